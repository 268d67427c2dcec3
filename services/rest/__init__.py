"""The HTTP face: a FastAPI app that parses bodies, holds limits and keys, and asks a ``ScoreBackend``. It knows no scorer and no Ray."""
