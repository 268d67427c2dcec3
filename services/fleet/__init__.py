"""The fleet as processes: Serve deployments of scorers, the ingress in front of them, and how they start and stop."""
