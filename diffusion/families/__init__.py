"""Families of networks: one folder each, with what belongs to it alone; beside them what all share."""
