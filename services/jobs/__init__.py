"""Scoring that outlives the connection: jobs in Redis, their worker and their routes."""
