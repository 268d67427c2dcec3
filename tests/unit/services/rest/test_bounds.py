"""Bounds on work, not only on bytes: JSON values, parts of pictures, pixels in memory, slow bodies."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from services.contract import ScoreFailure
from services.limits import LimitsConfig
from services.media.decode import plan
from services.media.json_bounds import JsonTooLarge, check_json
from services.media.plan import Upload
from services.rest.budget import PixelBudget
from services.rest.ingress import make_app

trees = st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def depth(tree: Any) -> int:
    if isinstance(tree, dict | list):
        return 1 + max(map(depth, tree.values() if isinstance(tree, dict) else tree), default=0)
    return 0


@given(trees, st.booleans())
def test_depth_is_that_of_the_parsed_tree(tree: Any, escaped: bool) -> None:
    text = json.dumps(tree, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    deep = depth(tree)
    check_json(text, deep)
    if deep:
        with pytest.raises(JsonTooLarge, match="deep"):
            check_json(text, deep - 1)


@pytest.mark.parametrize("text", [b'"' * 3_000_000, b'"\\' * 1_500_000, b'\\"' * 1_500_000, b'{"a":"' + b"A" * 3_000_000, b'"\\\\' * 1_000_000])
def test_strings_of_any_kind_are_read_once(text: bytes) -> None:
    """Linear in the bytes: a pattern that starts over at every quote would take hours."""
    check_json(text, 4)


@pytest.mark.parametrize("text", [b"[" + b"1," * 200_000, b"[],[]," * 100_000, b"{" * 1_000_000])
def test_values_are_counted(text: bytes) -> None:
    with pytest.raises(JsonTooLarge):
        check_json(text, 50)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _jpeg(**options: Any) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


PNG = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))


@pytest.mark.parametrize(
    "data",
    [
        PNG + _chunk(b"prVt", b"") * 30_000,
        PNG + b"".join(_chunk(b"IDAT", b"x") for _ in range(30_000)),
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * 200_000,
        b"\xff\xd8" + b"\xff" * 400_000,
        b"\xff\xd8\xff" + b"\xff\x00" * 200_000,
        b"\xff\xd8\xff" + b"\xff\xf0" * 200_000,
        _jpeg(progressive=True) + b"\xff\xda\x00\x08" * 100,
    ],
    ids=["png chunks", "png data chunks", "jpeg comments", "jpeg padding", "jpeg escapes", "jpeg extensions", "jpeg scans"],
)
def test_pictures_of_countless_parts_are_refused_unread(data: bytes) -> None:
    found = plan(Upload(data))
    assert isinstance(found.failure, ScoreFailure)
    assert "may have" in found.failure.message or "too many" in found.failure.message


@pytest.mark.parametrize("options", [{"quality": 100, "subsampling": 0}, {"progressive": True}, {"quality": 30}, {"icc_profile": bytes(range(256)) * 500}])
def test_what_encoders_write_is_accepted(options: dict[str, Any]) -> None:
    assert plan(Upload(_jpeg(**options))).failure is None


class TestPixelBudget:
    def test_holders_wait_their_turn(self) -> None:
        async def story() -> list[str]:
            budget, order = PixelBudget(10), list[str]()

            async def work(name: str, pixels: int, shrink: int | None = None) -> None:
                async with budget.hold(pixels) as held:
                    order.append(f"+{name}")
                    if shrink is not None:
                        held.shrink(shrink)
                    for _ in range(5):
                        await asyncio.sleep(0)
                    order.append(f"-{name}")

            await asyncio.gather(work("a", 6), work("b", 6), work("c", 1), work("d", 99))
            assert budget.free == 10
            await asyncio.gather(work("e", 10, shrink=2), work("f", 8))
            assert budget.free == 10
            return order

        order = asyncio.run(story())
        assert order[:3] == ["+a", "-a", "+b"]  # c fits beside a, but came after b
        assert order.index("-c") < order.index("+d")
        assert order[-4:-2] == ["+e", "+f"]

    @given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 6), st.booleans()), max_size=12))
    def test_it_is_never_exceeded_and_comes_back(self, plans: list[tuple[int, int, int, bool]]) -> None:
        async def story() -> None:
            budget, held_now = PixelBudget(10), [0]

            async def work(pixels: int, shrink: int, turns: int) -> None:
                async with budget.hold(pixels) as held:
                    held.shrink(shrink)
                    held_now[0] += held.pixels
                    try:
                        assert 0 <= held_now[0] <= 10
                        for _ in range(turns):
                            await asyncio.sleep(0)
                    finally:
                        held_now[0] -= held.pixels

            tasks = [asyncio.create_task(work(pixels, shrink, turns)) for pixels, shrink, turns, _ in plans]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for task, (_, _, _, cancel) in zip(tasks, plans, strict=True):
                if cancel:
                    task.cancel()
            async with asyncio.timeout(5):
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [end for end in ended if isinstance(end, Exception)]
            assert (budget.free, held_now[0]) == (10, 0)

        asyncio.run(story())


def test_a_body_that_trickles_in_ends_with_408(serve_app: Callable[[Any], str], backend: Any) -> None:
    url = serve_app(make_app(backend, LimitsConfig(body_timeout_s=0.5)))
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as s:
        s.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        answer = b""
        while part := s.recv(4096):
            answer += part
            if b"body_timeout" in answer:
                break
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer


def test_a_client_that_leaves_while_sending_is_no_error(serve_app: Callable[[Any], str], backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    url = serve_app(make_app(backend, LimitsConfig()))
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as s:
            s.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    time.sleep(0.5)
    assert "unhandled" not in caplog.text
