"""The reward service against the bare scorer and against a plain FastAPI app around it, in one run.

    python benchmarks/rewards.py [--quick] [--json FILE] [--markdown]

All three score the same pictures (`workloads/rewards.json`) with the same scorer: OCR, recognition, one thread, one replica.

- *bare*: the scorer called in a loop in one process, 32 pictures per call.
- *plain*: FastAPI and uvicorn in one process, the scorer behind a lock in a thread; decodes PNG, no limits, no batches.
- *service*: `ddrl`'s fleet on a local Ray, everything on: limits, batching, one replica.

Every repeat measures all of them one after the other, so that whatever else the machine does meets all alike; the table gives
the median and the range of the repeats. The load comes from this process, over keep-alive connections, each client sending its
next request when the last one is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as PILImage

ROOT = Path(__file__).resolve().parents[1]

Figures = dict[str, float]
OCR = {"kind": "ocr", "mode": "flow_grpo", "reading": "recognition", "upscale": 3}


def prepare() -> None:
    """One thread per library everywhere, a Ray without tokens, and our packages for all processes."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before Ray is imported


def workload() -> tuple[list[str], list[np.ndarray[Any, Any]]]:
    """Prompts and uint8 pictures [16, 48, 3]."""
    import matplotlib
    from PIL import ImageDraw, ImageFont

    spec = json.loads((Path(__file__).parent / "workloads" / "rewards.json").read_text())
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), spec["font_px"])
    pictures = []
    for text in spec["texts"]:
        picture = PILImage.new("RGB", (spec["width"], spec["height"]), "white")
        pen = ImageDraw.Draw(picture)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        pen.text((round((spec["width"] - left - right) / 2), round((spec["height"] - top - bottom) / 2)), text, font=font, fill="black")
        pictures.append(np.asarray(picture, np.uint8))
    return [f'a sign that says "{text}"' for text in spec["texts"]], pictures


# Requests, made before the clock starts.


def png(picture: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def npy(pictures: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pictures)
    return buffer.getvalue()


def form(fields: dict[str, Any], files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    request = httpx.Request("POST", "http://x/", data=fields, files=[("file", file) for file in files])
    return request.headers["content-type"], request.read()


def encode(kind: str, model: str, prompts: list[str], pictures: list[np.ndarray[Any, Any]]) -> tuple[str, bytes]:
    """(content type, body) of one request to /v1/score."""
    if kind == "png":
        return form({"model": model, "prompt": prompts}, [(f"{i}.png", png(p)) for i, p in enumerate(pictures)])
    if kind == "npy":
        return form({"model": model, "prompt": prompts}, [("a.npy", npy(np.stack(pictures)))])
    if kind == "json":
        items = [{"prompt": prompt, "image": base64.b64encode(png(picture)).decode()} for prompt, picture in zip(prompts, pictures, strict=True)]
        return "application/json", json.dumps({"model": model, "items": items}).encode()
    from safetensors.numpy import save

    request = json.dumps({"model": model, "items": [{"prompt": prompt} for prompt in prompts]})
    return "application/vnd.safetensors", save({"media": np.stack(pictures)}, {"request": request})


def wire(port: int, path: str, content_type: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# Load.


async def _client(port: int, requests: Iterator[bytes], latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        started = time.perf_counter()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        latencies.append(time.perf_counter() - started)
        if b" 200 " not in head[:20] or b'"error"' in body:
            raise RuntimeError(f"the service did not score: {head[:40]!r} {body[:300]!r}")
    writer.close()


def load(port: int, requests: list[bytes], clients: int, count: int, items: int) -> Figures:
    """``count`` requests by ``clients``; items per second and latencies in ms."""
    latencies: list[float] = []
    shared = iter([requests[i % len(requests)] for i in range(count)])

    async def run() -> None:
        await asyncio.gather(*(_client(port, shared, latencies) for _ in range(clients)))

    started = time.perf_counter()
    asyncio.run(run())
    return {"items_per_s": count * items / (time.perf_counter() - started), **quantiles(latencies)}


def quantiles(seconds: list[float]) -> Figures:
    ordered = sorted(seconds)
    return {"p50_ms": 1000 * ordered[len(ordered) // 2], "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


# The three sides.


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def plain_server() -> Iterator[int]:
    port = _free_port()
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("plain_reward_app.py")), str(port)])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/openapi.json", timeout=1)
                break
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def service() -> Iterator[int]:
    """Our fleet: `one` and `two` are the same scorer with one and two replicas; `jpeg` is cheap, for the payload formats."""
    import ray
    from ray import serve

    from services.fleet.file import parse_fleet
    from services.fleet.start import start_fleet

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    rewards = {"one": {**OCR, "max_queued": 1024}, "two": {**OCR, "replicas": 2, "max_queued": 1024}, "jpeg": {"kind": "jpeg"}}
    try:
        url = start_fleet(parse_fleet({"rewards": rewards, "port": 0}))
        yield int(url.rpartition(":")[2])
    finally:
        serve.shutdown()
        ray.shutdown()


def bare(count: int, batch: int) -> Callable[[], Figures]:
    from services.media.base import Media
    from services.scorers.registry import build_scorer, parse_reward

    scorer = build_scorer(parse_reward(OCR))
    prompts, pictures = workload()
    media = [Media.image(p) for p in pictures]

    def measure() -> Figures:
        seconds, started, done = [], time.perf_counter(), 0
        while done < count:
            at = done % len(media)
            before = time.perf_counter()
            done += len(scorer.score(prompts[at : at + batch], media[at : at + batch]))
            seconds.append(time.perf_counter() - before)
        return {"items_per_s": done / (time.perf_counter() - started), **quantiles(seconds)}

    return measure


# The run.


def measurements(stack: ExitStack, quick: bool) -> dict[str, Callable[[], Figures]]:
    """What every repeat measures, by name."""
    plain, ours = stack.enter_context(plain_server()), stack.enter_context(service())
    prompts, pictures = workload()
    few, many = (60, 480) if quick else (200, 1920)

    def requests(port: int, model: str, per: int, kind: str = "png") -> list[bytes]:
        starts = range(0, len(pictures), per)
        return [wire(port, "/v1/score", *encode(kind, model, prompts[s : s + per], pictures[s : s + per])) for s in starts]

    def at(port: int, model: str, per: int, clients: int, count: int, kind: str = "png") -> Callable[[], Figures]:
        ready = requests(port, model, per, kind)
        return lambda: load(port, ready, clients, max(clients, count // per), per)

    found: dict[str, Callable[[], Figures]] = {"bare, 1 picture per call": bare(few, 1), "bare, 32 pictures per call": bare(many, 32)}
    for clients in (1, 4, 16, 64):
        count = few if clients == 1 else many // 2
        found[f"plain, 1 picture, {clients} clients"] = at(plain, "", 1, clients, count)
        found[f"service, 1 picture, {clients} clients"] = at(ours, "one", 1, clients, count)
    for clients in (1, 4, 16):
        found[f"plain, 16 pictures, {clients} clients"] = at(plain, "", 16, clients, many)
        found[f"service, 16 pictures, {clients} clients"] = at(ours, "one", 16, clients, many)
        found[f"service, 16 pictures as safetensors, {clients} clients"] = at(ours, "one", 16, clients, many, "safetensors")
    found["service, 16 pictures as safetensors, 16 clients, 2 replicas"] = at(ours, "two", 16, 16, many, "safetensors")
    large = [np.asarray(PILImage.fromarray(p).resize((512, 512))) for p in pictures[:4]]
    for kind in ("png", "npy", "safetensors", "json"):
        ready = [wire(ours, "/v1/score", *encode(kind, "jpeg", prompts[:4], large))]
        found[f"formats: 4 pictures of 512x512 as {kind}"] = lambda ready=ready: load(ours, ready, 1, 10 if quick else 30, 4)  # type: ignore[misc]
    return found


def summarise(repeats: dict[str, list[Figures]]) -> dict[str, dict[str, list[float]]]:
    """Per measurement and figure: median, least, largest."""
    return {name: {key: [statistics.median(v), min(v), max(v)] for key in figures[0] for v in [[f[key] for f in figures]]} for name, figures in repeats.items()}


def targets(repeats: dict[str, list[Figures]]) -> dict[str, Any]:
    """The two numbers that were promised, from paired repeats."""
    full = "service, 16 pictures, 16 clients"
    share = [s["items_per_s"] / b["items_per_s"] for s, b in zip(repeats[full], repeats["bare, 32 pictures per call"], strict=True)]
    added = [s["p99_ms"] - b["p99_ms"] for s, b in zip(repeats["service, 1 picture, 1 clients"], repeats["bare, 1 picture per call"], strict=True)]
    two, one = repeats["service, 16 pictures as safetensors, 16 clients, 2 replicas"], repeats["service, 16 pictures as safetensors, 16 clients"]
    return {
        "share of the bare scorer's throughput at saturation (target 0.90)": statistics.median(share),
        "measured at": full,
        "p99 added at concurrency 1, ms (target 15)": statistics.median(added),
        "throughput of 2 replicas over 1": statistics.median(a["items_per_s"] / b["items_per_s"] for a, b in zip(two, one, strict=True)),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = ["| what | items per second | p50 ms | p99 ms |", "|---|---|---|---|"]
    for name, figures in result["figures"].items():
        cells = ["{:.1f} ({:.1f} … {:.1f})".format(*figures[key]) for key in ("items_per_s", "p50_ms", "p99_ms")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {value if isinstance(value, str) else f'{value:.2f}'}" for name, value in result["targets"].items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small counts, two repeats")
    parser.add_argument("--repeats", type=int, help="default 5, or 2 with --quick")
    parser.add_argument("--json", type=Path, help="write the figures of every repeat")
    parser.add_argument("--markdown", action="store_true", help="print the table for docs/benchmarks.md")
    arguments = parser.parse_args()
    prepare()
    with ExitStack() as stack:
        todo = measurements(stack, arguments.quick)
        for measure in todo.values():
            measure()  # warm
        repeats: dict[str, list[Figures]] = {name: [] for name in todo}
        loads = []
        for _ in range(arguments.repeats or (2 if arguments.quick else 5)):
            loads.append(os.getloadavg()[0])
            for name, measure in todo.items():
                repeats[name].append(measure())
    summary = summarise(repeats)
    result = {"cpus": os.cpu_count(), "load_before_each_repeat": loads, "figures": summary, "targets": targets(repeats)}
    if arguments.json:
        arguments.json.write_text(json.dumps({**result, "repeats": repeats}, indent=1) + "\n")
    print(markdown(result) if arguments.markdown else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
