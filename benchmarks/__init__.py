"""Figures that docs quote: each script measures both sides of a ratio in one run."""
