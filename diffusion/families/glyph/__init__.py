"""The glyph world: a tiny SD3 policy that writes signs, its text encoder, and the signs."""
