"""Names of Redis keys: all of one run begin with `ddrl:{run}:`, whose braces keep them in one cluster slot."""

import re
from collections.abc import Iterator

import redis

from replay.errors import ReplayError


def key_prefix(run: str) -> str:
    """`'demo' → 'ddrl:{demo}:'`. Raises ReplayError on a name that could not stand in a key."""
    if not run or any(char in "{}* \t\n" for char in run):
        raise ReplayError(f"run name {run!r} must be non-empty, without braces, stars or blanks")
    return f"ddrl:{{{run}}}:"


def own_keys(client: redis.Redis, prefix: str) -> Iterator[str]:
    """Every key that begins with `prefix`, by SCAN: each at least once if it stays, none of another run."""
    client.exists(prefix)  # SCAN names no key: on a cluster this leads the client to the node that holds the run
    pattern = re.sub(r"([?\[\]^\\])", r"\\\1", prefix) + "*"
    for key in client.scan_iter(match=pattern, count=1000):
        yield key.decode()
