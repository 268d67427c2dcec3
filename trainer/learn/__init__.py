"""The learner group: from claimed groups to weights and checkpoints."""
