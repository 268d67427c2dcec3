"""Cosmos-Predict2.5."""
