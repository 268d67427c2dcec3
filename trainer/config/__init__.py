"""The settings of a run: one strict tree, a file a branch. No torch, ray or redis."""
