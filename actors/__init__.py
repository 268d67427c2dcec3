"""Ray actors: rollout generator, anchor feeder, weight store, evaluator; and the sources of prompts and anchor data."""
