"""Sources: pure functions from (seed, index) to prompts and anchor data."""
