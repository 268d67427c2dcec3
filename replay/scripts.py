"""Runs the Lua scripts of `replay/lua`, each prefixed by `common.lua`, by hash and in one round trip."""

import hashlib
from importlib import resources
from typing import Any

import redis
from redis.client import Pipeline
from redis.exceptions import NoScriptError

NAMES = (
    "lease", "extend", "commit", "fail", "release", "lease_data", "commit_data",
    "claim", "publish", "settle", "rollback", "counts",
)  # fmt: skip


def script_text(name: str) -> str:
    """The full text of one script."""
    folder = resources.files("replay") / "lua"
    return (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()


class Scripts:
    """The scripts bound to one run's key prefix."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._texts = {name: script_text(name) for name in NAMES}
        self._hashes = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    def run(self, name: str, *args: str | int) -> list[Any]:
        """Run one script; loads it when the server does not know it (a fresh or restarted server)."""
        reply: Any
        try:
            reply = self._client.evalsha(self._hashes[name], 1, self._prefix, *args)
        except NoScriptError:
            reply = self._client.eval(self._texts[name], 1, self._prefix, *args)
        return _decoded(reply)

    def queue(self, name: str, batch: Pipeline, *args: str | int) -> None:
        """Queue the script as the last command of `batch`; execute it with `finish`."""
        batch.evalsha(self._hashes[name], 1, self._prefix, *args)

    def finish(self, name: str, batch: Pipeline) -> list[Any]:
        """Send the batch (once more if the server did not know the script); returns the script's reply."""
        commands = list(batch.command_stack)
        try:
            replies = batch.execute()
        except NoScriptError:
            self._client.script_load(self._texts[name])
            batch.command_stack = commands
            replies = batch.execute()
        return _decoded(replies[-1])


def _decoded(reply: list[Any]) -> list[Any]:
    return [item.decode() if isinstance(item, bytes) else item for item in reply]
