"""The glyph world: a tiny SD3 policy that writes signs, a tiny Wan policy that writes moving numbers, their text encoder, the signs and the clips."""
