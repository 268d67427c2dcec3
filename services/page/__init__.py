"""The page that people open: models, their health, and a place to drop a picture or a clip."""
