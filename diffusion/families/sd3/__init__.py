"""Stable Diffusion 3 and 3.5: the joint text-image transformer."""
