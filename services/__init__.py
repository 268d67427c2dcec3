"""The reward fleet: scorers, their Ray Serve deployments, the REST ingress and its clients."""
