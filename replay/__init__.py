"""Replay buffer of rollout groups and data batches: a ledger in Redis and a payload store. See README."""
