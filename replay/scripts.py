"""Runs the Lua scripts of `replay/lua` by hash and in one round trip.

A script is sent as `common.lua`, then the parts its `-- Uses:` line names, then its own text: each call defines only the
functions it may need.
"""

import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

import redis
from redis.client import Pipeline
from redis.exceptions import NoScriptError, ResponseError

NAMES = (
    "lease", "extend", "commit", "fail", "give_back", "release", "requeue", "lease_data", "commit_data",
    "expect", "claim", "publish", "settle", "rollback", "counts", "snapshot", "close",
)  # fmt: skip
PARTS = ("common", "groups", "data", "steps", "settling", "payload")


@cache
def script_text(name: str) -> str:
    """The full text of one script, parts in front."""
    folder = resources.files("replay") / "lua"
    own = (folder / f"{name}.lua").read_text()
    uses = re.search(r"^-- Uses: (.+)\.$", own, re.MULTILINE)
    named = uses.group(1).split(", ") if uses else []
    return "".join((folder / f"{part}.lua").read_text() for part in PARTS if part == "common" or part in named) + own


@cache
def script_hash(name: str) -> str:
    """The SHA-1 under which a server knows the script."""
    return hashlib.sha1(script_text(name).encode()).hexdigest()


class Scripts:
    """The scripts bound to one run's key prefix."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def run(self, name: str, *args: str | int) -> list[Any]:
        """Run one script; loads it when the server does not know it (a fresh or restarted server)."""
        reply: Any
        try:
            reply = self._client.evalsha(script_hash(name), 1, self._prefix, *args)
        except NoScriptError:
            reply = self._client.eval(script_text(name), 1, self._prefix, *args)
        return _decoded(reply)

    def finish(self, name: str, batch: Pipeline, *args: str | int) -> list[Any]:
        """Send `batch` with the script behind it; returns the script's reply.

        A server at its memory limit refuses parts of the batch: the reply is then `['no_memory']`.
        """
        untyped: Any = batch
        untyped.execute_command("EVALSHA", script_hash(name), 1, self._prefix, *args)  # a cluster's pipeline has no evalsha()
        try:
            return _decoded(batch.execute()[-1])
        except NoScriptError:  # what stands before the script has been done
            return self.run(name, *args)
        except ResponseError as error:
            if "maxmemory" in str(error):
                return ["no_memory"]
            raise


def _decoded(reply: list[Any]) -> list[Any]:
    return [item.decode() if isinstance(item, bytes) else item for item in reply]
