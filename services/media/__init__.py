"""Uploaded bytes → uint8 RGB frames: formats, limits, and the process that decodes clips."""
