"""What is wrong with a configuration, in one line for the person who wrote it."""


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""
