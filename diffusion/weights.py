"""A component's tensors, from one safetensors file or from shards with an index, into a model: all of them or none.

Names and shapes are compared first, from the files' headers. Then tensors go one by one from file to their place, in the type and on
the device they are wanted in: the peak is the model and one tensor beside it, not the model and the files. Of a parameter that is
sharded over ranks (a DTensor) a rank reads its own part only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from diffusion.allocator import give_back_freed_memory
from diffusion.source import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD_BYTES = 2 * 10**9
"""Most bytes of one file that is written; a larger tensor has a file of its own."""
GIVE_BACK_BYTES = 2**27
"""Of tensors taken, after which memory that making them has freed is given back."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; model.path must name a folder in diffusers' layout") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def shapes_of(folder: Path, remedy: str = "download the folder again") -> dict[Path, dict[str, tuple[int, ...]]]:
    """Shapes of the tensors in `folder`, by file and name, from the headers. Variants beside them (`….fp16.safetensors`) are not looked at.

    Raises:
        CheckpointError: no weights (`remedy` says what to do then), a damaged or missing shard, an index that disagrees with its shards.
    """
    single, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if single.exists():
        files, listed = [single], None
    elif index.exists():
        listed = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        raise CheckpointError(f"{folder} holds no {WEIGHTS}; {remedy}")
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    for path in files:
        with _opened(path) as file:
            found[path] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    if listed is not None:
        stored = {name: path.name for path, tensors in found.items() for name in tensors}
        wrong = sorted(name for name in listed.keys() | stored.keys() if listed.get(name) != stored.get(name))
        if wrong:
            raise CheckpointError(f"{index} and its shards disagree on {len(wrong)} tensors {wrong[:3]}; download the folder again")
    return found


def tensors_of(folder: Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in `folder`, or those `wanted` of them, by name, one at a time: the files themselves, mapped into memory. Raises as
    `shapes_of`, and CheckpointError for one that is wanted and not there."""
    files = shapes_of(folder)
    absent = sorted(set(wanted or ()) - {name for names in files.values() for name in names})
    if absent:
        raise CheckpointError(f"{folder} holds no {', '.join(absent)}; download the folder again")
    for path, names in files.items():
        with _opened(path) as file:
            for name in names:
                if wanted is None or name in wanted:
                    yield name, file.get_tensor(name)


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `load_weights` and diffusers read them: one file, or where they exceed `shard_bytes` several with an index.

    Tensors are taken one by one: what is held at a time is a shard of them.
    """
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    taken = 0

    def write() -> None:
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        path = folder / f"{len(shards)}.partial"
        path.touch()
        mode = path.stat().st_mode
        save_file(held, path, metadata={"format": "pt"})  # from where the tensors lie: no second copy of them
        path.chmod(mode)  # it makes files that only their owner may read
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            write()
        held[name] = tensor.detach().cpu().contiguous()
        taken += tensor.nbytes
        if taken > GIVE_BACK_BYTES:
            give_back_freed_memory()
            taken = 0
    write()
    give_back_freed_memory()
    stem, count = WEIGHTS.removesuffix(".safetensors"), len(shards)
    names = [WEIGHTS] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        (folder / f"{i + 1}.partial").rename(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)}}
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index | {"weight_map": weight_map}, indent=2) + "\n")


def load_weights(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    origin: str | None = None,
    remedy: str = "download the folder again",
    made: Collection[str] = (),
    mapped: bool = False,
) -> None:
    """Put the tensors of `folder` in the place of `model`'s, which may be on the meta device.

    Args:
        dtype, device: of the model afterwards; integers keep their type, and sharded parameters (see `place`) theirs.
        origin: what messages call the folder.
        remedy: see `shapes_of`.
        made: names of the model's tensors that no file holds; they stay as they are.
        mapped: see `place`.

    Raises:
        CheckpointError: what `shapes_of` raises, or tensors that are missing, unexpected or misshapen; the model is as it was then.
    """
    files = check_weights(model, folder, origin, remedy, made)
    for path, tensors in files.items():
        with _opened(path) as file:
            for name, shape in tensors.items():
                value = file.get_slice(name) if shape else file.get_tensor(name)  # a scalar has no slices
                place(model, name, value, dtype, device, mapped)


def check_weights(
    model: nn.Module, folder: Path, origin: str | None = None, remedy: str = "download the folder again", made: Collection[str] = ()
) -> dict[Path, dict[str, tuple[int, ...]]]:
    """Compare the names and shapes in `folder` with those of `model`, from the files' headers; arguments as of `load_weights`.

    Returns:
        `shapes_of` the folder, without what the model says it has no use for (`PackedModel.unused`).

    Raises:
        CheckpointError: as `load_weights`.
    """
    unused: Collection[str] = getattr(model, "unused", ())
    files = {
        path: {name: shape for name, shape in tensors.items() if not any(part in name for part in unused)}
        for path, tensors in shapes_of(folder, remedy).items()
    }
    stored = {name: shape for tensors in files.values() for name, shape in tensors.items()}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in made}
    missing, extra = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    shapes = [f"{k} {stored[k]} instead of {own[k]}" for k in own.keys() & stored.keys() if own[k] != stored[k]]
    if missing or extra or shapes:
        raise CheckpointError(
            f"weights of {origin or folder} do not fit the model: {len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}, "
            f"{len(shapes)} of another shape {sorted(shapes)[:3]}"
        )
    return files


@torch.no_grad()
def place(model: nn.Module, name: str, values: Any, dtype: torch.dtype, device: torch.device | str, mapped: bool = False) -> None:
    """Put `values` in the place of `model`'s tensor `name`: a new one of `dtype` on `device`, or, where it is sharded, this rank's part
    of them into its shard, which has memory already.

    Args:
        values: a tensor, or what safetensors gives of one before it is read.
        mapped: what is a file's, of the type and on the device that are wanted, stays the file, mapped into memory: processes of a host share
            its pages, and what writes to the tensor gets pages of its own. The file must not be overwritten meanwhile.
    """
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    sharded = owner._parameters.get(last)
    if isinstance(sharded, DTensor):
        shape, start = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
        if 0 not in shape:
            sharded.to_local().copy_(values[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))])
        return
    tensor: Tensor = values if isinstance(values, Tensor) else values[...]
    # unless it may be mapped, a copy even where nothing changes: what safetensors gives is the file itself
    own = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=not mapped)
    if last in owner._parameters:
        old = owner._parameters[last]
        assert old is not None
        owner._parameters[last] = nn.Parameter(own, requires_grad=old.requires_grad)
    else:
        owner._buffers[last] = own
