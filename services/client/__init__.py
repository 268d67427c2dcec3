"""Clients of the reward fleet: through the Serve handle inside a cluster, through REST from anywhere."""
