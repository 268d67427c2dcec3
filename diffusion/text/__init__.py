"""Text encoders: prompt strings to token embeddings and a pooled vector."""
