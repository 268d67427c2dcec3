"""A client that finds the one Redis Cluster node which holds a run, and finds it again after a failover.

All keys of a run share a hash tag, so the run lives in one slot and one node serves every command, pipeline and
script of it. That makes a plain client enough: it talks to one node, follows `MOVED`, and asks the other nodes it
knows while the holder is gone. On a server that is no cluster nothing of this happens.

While the slot itself is being moved to another node, calls wait until the move is done.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.client import Pipeline
from redis.connection import ConnectionPool
from redis.exceptions import AskError, ClusterDownError, ConnectionError, MovedError, RedisError, TimeoutError, TryAgainError
from redis.retry import Retry

T = TypeVar("T")
Node = tuple[str, int]

# A cluster promotes a replica after its node timeout (15 s by default) and an election.
FAILOVER_TIMEOUT_S = 60.0
PAUSE_S = 0.2
# On one node of several: short, since another node may know better.
NODE_RETRIES = 2


class RunClient(redis.Redis):
    """`redis.Redis` for one run, on a cluster too; there, on a ConnectionError, it asks the other nodes for a minute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._switch = threading.Lock()
        self._nodes: dict[Node, ConnectionPool] = {}  # empty while no cluster has been seen

    def find_nodes(self) -> bool:
        """Ask whether this is a cluster and which nodes it has; False also when the server does not tell."""
        try:
            if not self.info("cluster").get("cluster_enabled"):  # type: ignore[union-attr]
                return False
            known: Any = self.cluster("nodes")  # type: ignore[no-untyped-call]
        except redis.ResponseError:
            return False
        here = self._here()
        for address in known:
            host, port = address.rsplit(":", 1)
            self._pool(host or here[0], int(port))
        self._pool(*here)
        return True

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return self._following(lambda: super(RunClient, self).execute_command(*args, **options))  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "RunPipeline":
        return RunPipeline(self, transaction, shard_hint)

    def _here(self) -> Node:
        options = self.connection_pool.connection_kwargs
        return options.get("host", "localhost"), int(options.get("port", 6379))

    def _pool(self, host: str, port: int) -> ConnectionPool:
        with self._switch:
            if (host, port) not in self._nodes:
                options = {**self.connection_pool.connection_kwargs, "host": host, "port": port}
                options["retry"] = Retry(ExponentialWithJitterBackoff(cap=0.2, base=0.05), NODE_RETRIES, (ConnectionError, TimeoutError))
                self._nodes[host, port] = ConnectionPool(connection_class=self.connection_pool.connection_class, **options)
            return self._nodes[host, port]

    def _following(self, call: Callable[[], T]) -> T:
        """Run `call` where the run lives."""
        deadline: float | None = None
        while True:
            try:
                return call()
            except MovedError as error:
                self.connection_pool = self._pool(error.host or self._here()[0], error.port)
                found: RedisError = error
            except (AskError, TryAgainError, ClusterDownError) as error:  # being moved, or without a master
                found = error
            except (ConnectionError, TimeoutError) as error:
                if not self._nodes:
                    raise
                others = [node for node in list(self._nodes) if node != self._here()]
                if others:
                    self.connection_pool = self._pool(*random.choice(others))
                found = error
            deadline = deadline or time.monotonic() + FAILOVER_TIMEOUT_S
            if time.monotonic() > deadline:
                raise found
            if not isinstance(found, MovedError):
                time.sleep(PAUSE_S * random.uniform(0.5, 1.0))

    def close(self) -> None:
        for pool in list(self._nodes.values()):
            pool.disconnect()
        super().close()


class RunPipeline(Pipeline):
    """A pipeline that is sent again, whole, to the node that holds the run: ledger calls are idempotent."""

    def __init__(self, client: RunClient, transaction: bool, shard_hint: str | None) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, shard_hint)  # type: ignore[arg-type]
        self._client = client

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands = list(self.command_stack)

        def send() -> list[Any]:
            self.connection_pool = self._client.connection_pool
            self.command_stack = list(commands)
            return super(RunPipeline, self).execute(raise_on_error)

        return self._client._following(send)
