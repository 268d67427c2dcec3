"""Would lossless compression of payloads pay? On a real group of the glyph recipe, and on noise in half precision.

It pays where the bytes it saves would have taken longer to write and read than it takes to compress and expand them:
the break-even bandwidth is bytes saved / (compression + expansion time); on a slower link than that it wins.
Codecs beside zlib are optional (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import importlib
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger.bandwidth import raw
from benchmarks.stats import spread

MB = 1_000_000
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "glyph-ocr.yaml"
NOISE_VALUES = 2_000_000
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def glyph_group() -> bytes:
    """Payload of group 0 of the glyph recipe, sampled by the base checkpoint."""
    import torch

    from actors.groups import group_payload, group_request
    from actors.payload import encode
    from actors.sources.draws import prompt_source, training_example
    from diffusion.checkpoint import load_policy
    from diffusion.engine.engine import Engine
    from trainer.config.load import load_config

    torch.set_num_threads(1)
    config = load_config(RECIPE)
    model = config.model.model_copy(update={"path": str(RECIPE.parent.parent / config.model.path)})
    policy = load_policy(model, "cpu", config.seed)
    engine = Engine(policy.transformer, policy.process, config.sampler.max_tokens, model.dtype)
    shape = policy.codec.latent_shape(config.sampler.height, config.sampler.width)
    prompt = training_example(prompt_source(config.prompts, config.data), config.seed, 0).text
    request = group_request(config.sampler, config.rollout, config.seed, 0, policy.text_encoder.encode([prompt])[0], None, shape)
    return b"".join(encode(group_payload(engine.run([request]), prompt)))


def noise(half: str) -> bytes:
    """Gaussian noise in half precision, as latents are: `half` is 'float16' or 'bfloat16'."""
    values = np.random.default_rng(0).standard_normal(NOISE_VALUES, dtype=np.float32)
    if half == "float16":
        return values.astype(np.float16).tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def planes(width: int, inner: Codec) -> Codec:
    """`inner` on the bytes sorted by their place in a value: exponents apart from mantissas."""

    def split(data: bytes) -> bytes:
        whole = len(data) // width * width
        return inner[0](np.frombuffer(data[:whole], np.uint8).reshape(-1, width).T.tobytes() + data[whole:])

    def join(packed: bytes) -> bytes:
        data = inner[1](packed)
        whole = len(data) // width * width
        return np.frombuffer(data[:whole], np.uint8).reshape(width, -1).T.tobytes() + data[whole:]

    return split, join


def codecs(width: int) -> dict[str, Codec]:
    """Every codec that is installed; `width` = bytes of one value."""
    found: dict[str, Codec] = {"zlib-1": (lambda data: zlib.compress(data, 1), zlib.decompress)}
    try:
        lz4 = importlib.import_module("lz4.frame")
        found["lz4"] = (lz4.compress, lz4.decompress)
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
        found["zstd-1"] = (zstandard.ZstdCompressor(level=1).compress, zstandard.ZstdDecompressor().decompress)
        found["byte planes + zstd-1"] = planes(width, found["zstd-1"])
    except ImportError:
        found["byte planes + zlib-1"] = planes(width, found["zlib-1"])
    return found


def measure(url: str, quick: bool) -> dict[str, Any]:
    """Ratio, MB/s (of uncompressed bytes) and the break-even bandwidth, beside that of raw Redis here."""
    repeats = 1 if quick else 5
    payloads = {"glyph group (fp32)": (glyph_group(), 4), "noise fp16": (noise("float16"), 2), "noise bf16": (noise("bfloat16"), 2)}
    rows = []
    for name, (payload, width) in payloads.items():
        link = spread([len(payload) / MB / seconds for seconds in raw(url, payload, 4 * repeats)])
        for codec, (compress, expand) in codecs(width).items():
            packed = compress(payload)
            if expand(packed) != payload:
                raise SystemExit(f"{codec} does not give {name} back")
            times: dict[str, list[float]] = {"compress": [], "expand": []}
            for _ in range(repeats):
                begin = time.perf_counter()
                compress(payload)
                middle = time.perf_counter()
                expand(packed)
                times["compress"].append(middle - begin)
                times["expand"].append(time.perf_counter() - middle)
            saved = len(payload) - len(packed)
            both = [c + e for c, e in zip(times["compress"], times["expand"], strict=True)]
            even = spread([saved / MB / seconds for seconds in both])
            rows.append(
                {
                    "payload": name,
                    "bytes": len(payload),
                    "codec": codec,
                    "ratio": len(packed) / len(payload),
                    **{f"{what} MB/s": spread([len(payload) / MB / seconds for seconds in values]) for what, values in times.items()},
                    "break-even MB/s": even,
                    "redis MB/s": link,
                    "pays": even["median"] > link["median"],
                }
            )
    return {"rows": rows}
