"""What a prepared set holds, in lines and as a grid of pictures, of clips strips of frames."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.prepared import BROKEN, INDEX, PreparedError, checksum, read_header, read_manifest, shard_file

if TYPE_CHECKING:
    from PIL import Image

SIDE = 256
"""Longest side of a picture in the grid, in pixels."""
SHOWN = 10
"""Broken inputs and sizes that are listed."""


def inspection(folder: Path) -> Iterator[str]:
    """Lines that describe a finished set; every shard is read and its checksum compared. Raises PreparedError."""
    import pyarrow.compute as pc
    from pyarrow import parquet

    manifest = read_manifest(folder)
    yield f"{manifest.rows} examples: " + ", ".join(f"{count} {split}" for split, count in manifest.splits.items())
    shape = "x".join(map(str, manifest.latent))
    yield f"{manifest.kind} of {manifest.height}x{manifest.width} pixels, latents of {shape}, {manifest.shards} shards, {_bytes(folder) / 2**20:.1f} MiB"
    yield f"codec {manifest.codec}, of {manifest.model}"
    index = parquet.read_table(folder / INDEX)
    if manifest.rows:
        sizes = Counter(zip(index["height"].to_pylist(), index["width"].to_pylist(), strict=True))
        small = sum(count for (height, width), count in sizes.items() if height < manifest.height or width < manifest.width)
        common = ", ".join(f"{height}x{width} ({count})" for (height, width), count in sizes.most_common(3))
        yield f"inputs: {len(sizes)} sizes, most often {common}; {small} smaller than the set's, enlarged"
        lengths = pc.utf8_length(index["text"]).to_numpy()
        distinct = pc.count_distinct(index["text"]).as_py()
        quantiles = " / ".join(f"{value:.0f}" for value in np.quantile(lengths, [0, 0.5, 0.95, 1]))
        yield f"captions: {distinct} distinct, characters {quantiles} (least / median / 95 % / most)"
        yield f"ids: {pc.count_distinct(index['id']).as_py()} distinct"
    broken = [json.loads(line) for line in (folder / BROKEN).read_text().splitlines()]
    yield f"broken inputs: {len(broken)}"
    for one in broken[:SHOWN]:
        yield f"  {one['name']}: {one['reason']}"
    if len(broken) > SHOWN:
        yield f"  … and {len(broken) - SHOWN} more in {folder / BROKEN}"
    for number in range(manifest.shards):
        _verify(shard_file(folder, number))
    yield f"checksums of {manifest.shards} shards are right; digest {manifest.digest}"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "shards").glob("*.safetensors"))


def _verify(file: Path) -> None:
    from safetensors.numpy import load_file

    shard, tensors = read_header(file)[1], load_file(file)
    if checksum(tensors["x0"], tensors.get("first")) != shard.checksum:
        raise PreparedError(f"shard {file} is damaged: its latents are not those that were written; remove it and prepare the set again")


def grid(folder: Path, n: int, model: Path | None = None) -> Image.Image:
    """`n` examples, evenly spread over the set, decoded and captioned.

    Args:
        model: policy folder whose codec decodes; None = the one that made the set.
    Raises:
        PreparedError: the codec is not the set's. CheckpointError: it cannot be read.
    """
    import torch
    from PIL import Image

    from actors.clips import STRIP, strip
    from actors.pictures import caption, contact_sheet
    from actors.sources.prepared import PreparedSource
    from diffusion.checkpoint import load_codec
    from diffusion.digests import codec_digest

    source = PreparedSource(str(folder))
    where = model or Path(source.manifest.model)
    if not where.is_dir():
        raise PreparedError(f"the policy that made {folder} is no longer at {where}; name it with --model")
    if codec_digest(where) != source.manifest.codec:
        raise PreparedError(f"the codec of {where} is not the one that made {folder} ({source.manifest.codec}); name that policy with --model")
    codec = load_codec(where)
    examples = [source[int(i)] for i in np.linspace(0, len(source) - 1, min(n, len(source)))]
    pictures = []
    for example in examples:
        assert example.latent is not None
        decoded = codec.decode(torch.from_numpy(example.latent.load())[None])[0]
        picture = Image.fromarray(strip(decoded) if codec.video else decoded)
        picture.thumbnail((SIDE * (STRIP if codec.video else 1), SIDE))
        pictures.append(np.asarray(picture))
    return contact_sheet(pictures, [caption(example.text) for example in examples], columns=2 if codec.video else 8)
