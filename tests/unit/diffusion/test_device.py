"""A device that was asked for is used or refused, never replaced."""

from __future__ import annotations

import pytest
import torch

from diffusion.device import DeviceMissing, resolve_device


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu", "rollout.gpus=0") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_key_that_asked() -> None:
    with pytest.raises(DeviceMissing, match=r"rollout\.gpus=1 asks for a GPU.*set rollout\.gpus=0 to run on the CPU"):
        resolve_device("cuda", "rollout.gpus=1")
