"""What a hub on loopback says, and one that says nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.diffusion.hub import Handler
from trainer.doctor.hub import access, answered, owner


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    for name in ("open", "gated"):
        (tmp_path / "team" / name).mkdir(parents=True)
    handler = type("Here", (Handler,), {"root": tmp_path})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_policy_that_may_be_read_a_gated_one_and_none(endpoint: str) -> None:
    assert access("team/open", endpoint, 60.0).error == ""
    assert access("team/gated", endpoint, 60.0).error.startswith("team/gated is gated: accept its terms at ")
    assert access("team/none", endpoint, 60.0).error.startswith("team/none is no repository that may be read")


def test_a_hub_that_is_not_there_does_not_show_the_token() -> None:
    found = owner("hf_sesame", "http://127.0.0.1:9", 60.0)
    assert found.error
    assert "sesame" not in repr(found)


def test_a_hub_that_does_not_answer() -> None:
    assert answered(lambda: str(time.sleep(5)), 0.1).error == "no answer within 0 s"
    assert answered(lambda: "somebody", 60.0).who == "somebody"
