"""Packed model implementations; parameter names follow diffusers."""
