"""`ddrl serve`: Ray, Redis and the reward fleet of one machine, until it is told to stop.

Lifecycle: checks → Ray → Redis, if asked for → fleet → wait for Ctrl-C or SIGTERM → drain → everything down, in reverse order.
A signal before the service is ready, or a second one, ends it at once, everything down. What libraries print goes to a log file, which
stays only where something failed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from replay.embedded import EmbeddedRedis
from replay.errors import ReplayError
from services.config import FleetConfig
from services.fleet.file import parse_fleet
from services.rest.auth import load_keys, require_keys
from trainer.run.errors import RunFailed, describe
from trainer.run.quiet import output_to
from trainer.run.signals import SIGNALS, ray_starts

PORT = 8000


class Stopped(BaseException):
    """A signal ended the service before it was ready, or a second one its draining."""

    def __init__(self, number: int, doing: str) -> None:
        super().__init__(f"{signal.Signals(number).name} while {doing}")
        self.status = 128 + number


class Stop:
    """What SIGINT and SIGTERM do: while the service starts they end it; once it serves, the first begins the draining and the second ends that."""

    def __init__(self) -> None:
        self._came, self._serving, self._number = threading.Event(), False, int(signal.SIGTERM)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals inside the block."""
        before = {number: signal.signal(number, self._on) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self._serving and not self._came.is_set():
            self._came.set()
            return
        doing = "stopping" if self._came.is_set() else "starting"
        self._number = number
        self._came.set()
        raise Stopped(number, doing)

    def check(self) -> None:
        """Raise Stopped if a signal came whose exception was lost on the way, as in a callback that swallows what is raised."""
        if self._came.is_set():
            raise Stopped(self._number, "starting")

    def wait(self) -> None:
        """Until a signal came."""
        self._serving = True
        while not self._came.wait(3600):
            pass


def overridden(config: FleetConfig, **settings: object) -> FleetConfig:
    """``config`` with the settings that are not None, and a port. Raises FleetConfigError."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items() if value is not None}
    port = PORT if config.port is None else config.port
    return parse_fleet({**config.model_dump(mode="json"), "port": port, **given})


def serve_fleet(config: FleetConfig, starting: Callable[[], None], ready: Callable[[str], None], stopping: Callable[[], None]) -> None:
    """Serve until a signal; ``starting`` is called once signals are heard, ``ready`` with the URL, ``stopping`` when the signal came.

    Raises RunFailed (also when requests were still open at the end of the draining), Stopped, FleetConfigError or KeysError.
    """
    require_keys(config.host, load_keys(config.keys_file))
    if config.port:
        _check_port(config.host, config.port)
    log = Path(tempfile.mkstemp(prefix="ddrl-serve-", suffix=".log")[1])
    try:
        _serve(config, starting, ready, stopping, log)
    except RunFailed as error:
        raise RunFailed(error.part, f"{str(error).partition(': ')[2]} (log: {log})") from error
    except Stopped:
        log.unlink()
        raise
    log.unlink()


def _serve(config: FleetConfig, starting: Callable[[], None], ready: Callable[[str], None], stopping: Callable[[], None], log: Path) -> None:
    stop = Stop()
    with stop.listening(), ExitStack() as stack:
        starting()
        with output_to(log):
            try:
                url = _start(config, stack)
                stop.check()
            except BaseException:
                stack.pop_all().close()  # what Ray says while it ends belongs into the log too
                raise
        ready(url)
        stop.wait()
        stopping()
        with output_to(log):
            from services.fleet.start import drain_fleet

            drained = drain_fleet(config.drain_s)
            stack.pop_all().close()
    if not drained:
        raise RunFailed("reward fleet", f"some requests were still open after {config.drain_s:g} s")


def _start(config: FleetConfig, stack: ExitStack) -> str:
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    import ray
    from ray import serve

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        # "local" starts a new cluster even where RAY_ADDRESS names another
        stack.callback(ray.shutdown)
        with ray_starts():
            ray.init("local", num_cpus=math.ceil(config.room()) + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise RunFailed("Ray", f"a local Ray cluster did not start: {describe(error)}") from error
    gpus: float = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    if config.needs()["GPU"] > gpus:
        raise RunFailed("reward fleet", f"the rewards need {config.needs()['GPU']:g} GPUs and this machine has {gpus:g}")
    if config.redis_url == "embedded":
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ddrl-redis-"))
        try:
            server = EmbeddedRedis.start(Path(folder))
        except ReplayError as error:
            raise RunFailed("Redis", str(error)) from error
        stack.callback(server.stop)
        config = config.model_copy(update={"redis_url": server.url})
    from services.fleet.start import start_fleet

    stack.callback(serve.shutdown)
    try:
        return start_fleet(config)
    except Exception as error:
        raise RunFailed("reward fleet", describe(error)) from error


def _check_port(host: str, port: int) -> None:
    """Serve's proxy would only say so in its log."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise RunFailed("reward fleet", f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --port") from None
