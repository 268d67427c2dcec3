"""A published or trained checkpoint in, a folder of safetensors out, once: no pickle afterwards, and a smaller file.

The folder is complete: weights, settings, architecture, tokenizer, and the user's template where one is given. It appears
under its name only when everything is written. ``ddrl rewards convert-videoalign`` calls this.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from services.scorers.fingerprint import fingerprint
from services.scorers.videoalign.checkpoint import MANIFEST, Layout, Manifest, Written, find, read
from services.scorers.videoalign.config import PUBLIC_TEMPLATE_SHA256
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.layout import empty_model
from services.scorers.videoalign.loader import DTYPES, TOKENIZER, template_file, tokenizer_file
from services.scorers.videoalign.template import read_template
from services.scorers.videoalign.tokens import RewardTokenizer
from services.scorers.videoalign.weights import folded, unfolded

SHARD_BYTES = 1 << 30
TEMPLATE = "prompt_template.txt"


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion read and wrote. ``tensors_in`` counts every source tensor; ``unused`` of them were not needed."""

    source: Path
    layout: Layout
    tensors_in: int
    unused: tuple[str, ...]
    bytes_in: int
    destination: Path
    tensors_out: int
    bytes_out: int
    folded_updates: int
    dtype: str
    normalised: bool
    xxh3: str

    def __str__(self) -> str:
        updates = f"{self.folded_updates} low-rank updates folded" if self.folded_updates else "low-rank updates kept beside the weights"
        unused = f", not needed: {', '.join(self.unused)}" if self.unused else ""
        return (
            f"{self.source} ({self.layout} layout): {self.tensors_in} tensors, {self.bytes_in:,} bytes{unused}\n"
            f"{self.destination}: {self.tensors_out} tensors in {self.dtype}, {self.bytes_out:,} bytes, {updates}\n"
            f"scores will be {'normalised' if self.normalised else 'raw: the checkpoint states no mean and deviation'}; weights {self.xxh3}"
        )


def convert(
    source: Path,
    destination: Path,
    *,
    checkpoint: int | None = None,
    base: Path | None = None,
    tokenizer: Path | None = None,
    template: Path | None = None,
    template_sha256: str = PUBLIC_TEMPLATE_SHA256,
    fold: bool = True,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> ConvertReport:
    """Write ``destination``, a new folder, from the checkpoint under ``source``.

    ``fold`` adds the low-rank updates into the weights in float32 and rounds once to ``dtype``; ``fold=False`` keeps them
    apart, exactly as stored. A template given or lying beside the checkpoint is checked and copied along.
    Raises ``CheckpointError``, and then leaves nothing behind.
    """
    if destination.exists():
        raise CheckpointError(f"{destination} exists; give a new folder")
    found = find(source, checkpoint, base)
    if found.manifest is not None:
        raise CheckpointError(f"{source} is converted already")
    token_file = tokenizer_file(found, tokenizer)
    try:
        chosen: Path | None = template_file(found, template)
    except CheckpointError:
        if template is not None:
            raise
        chosen = None  # the server asks for it again, by the setting `template`
    text = None if chosen is None else read_template(chosen, template_sha256)
    qwen = empty_model(found.architecture, RewardTokenizer(token_file, text or "").size)
    weights = read(found, qwen)
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        tensors = folded(weights, DTYPES[dtype]) if fold else unfolded(weights, DTYPES[dtype])
        files, count = _write(work, tensors, shard_bytes)
        mark = fingerprint(*found.files)
        size = sum(file.stat().st_size for file in found.files)
        manifest = Manifest(
            settings=found.settings,
            architecture=dict(found.architecture),
            lora="folded" if fold else "beside",
            dtype=dtype,
            files=files,
            source={"layout": found.layout, "tensors": weights.tensors_read, "xxh3": mark},
        )
        shutil.copyfile(token_file, work / TOKENIZER)
        if text is not None:
            (work / TEMPLATE).write_bytes(text.encode())
        (work / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        work.chmod(0o755)
        work.rename(destination)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return ConvertReport(
        source=found.folder,
        layout=found.layout,
        tensors_in=weights.tensors_read,
        unused=weights.unused,
        bytes_in=size,
        destination=destination,
        tensors_out=count,
        bytes_out=sum(written.bytes for written in files.values()),
        folded_updates=len(weights.lora_a) if fold else 0,
        dtype=dtype,
        normalised=found.settings.spread is not None,
        xxh3=fingerprint(*(destination / name for name in files)),
    )


def _write(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> tuple[dict[str, Written], int]:
    """Write shards of at most about ``shard_bytes``, so that memory holds one; the files and the number of tensors."""
    files: dict[str, Written] = {}
    count = 0
    for number, shard in enumerate(_shards(tensors, shard_bytes), start=1):
        file = folder / f"model-{number:05d}.safetensors"
        save_file(shard, file)
        file.chmod(0o644)  # the library writes for its owner only; the service may be another user
        files[file.name] = Written(bytes=file.stat().st_size, xxh3=fingerprint(file))
        count += len(shard)
    return files, count


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name], held = tensor.contiguous(), held + tensor.nbytes
    yield shard
