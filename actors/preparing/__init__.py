"""Preparing anchor data: pictures in the forms that teams keep them in, read once, encoded once."""
