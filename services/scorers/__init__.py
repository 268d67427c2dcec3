"""Scorers: media and prompts in, finite scores or typed failures out."""
