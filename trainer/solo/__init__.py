"""A run's updates in one process: the same groups, engine, scorers, losses and optimiser, without Ray, Redis, HTTP or FSDP."""
