"""The commands of `ddrl`."""
