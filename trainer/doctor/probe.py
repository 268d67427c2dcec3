"""torch and xformers, asked in a process of their own: `python -m trainer.doctor.probe` prints one JSON object as its last line.

A driver that hangs, or a kernel that ends its process, then costs the doctor one check and not itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def attention(device: Any, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> list[dict[str, Any]]:
    """What `auto` takes on `device` by type of the network, and what a small call of each GPU provider said."""
    import torch

    from diffusion.attention import PROVIDERS, resolve_provider, trial

    found = []
    for name in dtypes:
        dtype = getattr(torch, name)
        trials = {p: trial(p, device, dtype) for p in PROVIDERS if p != "sdpa"} if device.type == "cuda" else {}
        chosen = resolve_provider("auto", device, dtype, _told(trials))
        told = {provider: problem or "" for provider, problem in trials.items()}
        found.append({"dtype": name, "device": str(device), "name": chosen.name, "because": chosen.because, "others": chosen.others, "trials": told})
    return found


def _told(trials: dict[str, str | None]) -> Callable[[str, Any, Any], str | None]:
    return lambda provider, *_: trials[provider]


def xformers() -> dict[str, Any]:
    """Why xformers' own library does not load; '' where it does, or where it has none."""
    try:
        from xformers import _cpp_lib
    except Exception as error:  # not installed, or refused by this torch: each release raises its own class
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    broken = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    return {"error": "" if broken is None else " ".join(str(root_of(broken)).split())[:200]}


def root_of(error: BaseException) -> BaseException:
    """The first error of a chain: of a library that does not load, what the loader says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def torch_facts() -> dict[str, Any]:
    """The torch that is installed and the devices it sees."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if gpus:
        bf16 = torch.cuda.get_device_capability(0) >= (8, 0)
    else:
        bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor]} for gpu in gpus],
        "bf16": bf16,
        "attention": attention(torch.device("cuda" if gpus else "cpu")),
    }


def main() -> None:
    """Print what was found."""
    try:
        torch = torch_facts()
    except Exception as error:  # a broken installation raises what it likes
        torch = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps({"torch": torch, "xformers": xformers()}))


if __name__ == "__main__":
    main()
