"""From `scheduler/scheduler_config.json` of a diffusers folder to a forward process.

Only what defines the policy is read: the process and the meaning of the network's output. Which solver diffusers would use,
its spacing of timesteps (but for a flow's, on demand) and its clipping of predictions are not: sampling is the step kernels' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion.processes.base import ForwardProcess
from diffusion.processes.edm import EDM
from diffusion.processes.rectified_flow import Grid, RectifiedFlow
from diffusion.processes.variance_preserving import VariancePreserving

FLOW = "FlowMatchEulerDiscreteScheduler"
EULER_EDM = "EDMEulerScheduler"
UNIPC = "UniPCMultistepScheduler"
OTHER_GRIDS = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
"""Settings of `FLOW` that would make its grid another one."""
DISCRETE = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")


def _refuse(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if key in values and values[key] not in allowed:
        raise ValueError(f"{key}={values[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")


def process_from_scheduler(values: Mapping[str, Any], grid: Grid = "even") -> ForwardProcess:
    """Forward process of a scheduler configuration; without `_class_name` it is a rectified flow.

    Args:
        grid: `diffusers`: the sampling grid that the scheduler itself would make, of a `FlowMatchEulerDiscreteScheduler` or a
            `UniPCMultistepScheduler`. Which solver goes along it is not read.

    Raises:
        ValueError, TypeError: an unknown scheduler, or a setting that would change the process, or the grid asked for, and is
            not implemented.
    """
    name = str(values.get("_class_name", FLOW))
    if name == FLOW:
        _refuse(values, "use_dynamic_shifting", (False,))
        for key in OTHER_GRIDS if grid == "diffusers" else ():
            _refuse(values, key, (None, False))
        return RectifiedFlow(float(values.get("shift", 1.0)), grid, int(values.get("num_train_timesteps", 1000)))
    if name == UNIPC:
        return _unipc(values, grid)
    if grid != "even":
        raise ValueError(f"model.grid={grid} is that of a {FLOW} or a {UNIPC}, this is a {name}; set model.grid=even")
    if name == EULER_EDM:
        keys = ("sigma_min", "sigma_max", "rho", "sigma_data")
        return EDM("edm", prediction=values.get("prediction_type", "epsilon"), **{k: float(values[k]) for k in keys if k in values})
    if name in DISCRETE:
        _refuse(values, "trained_betas", (None,))
        _refuse(values, "rescale_betas_zero_snr", (False,))
        return VariancePreserving(
            values.get("beta_schedule", "linear"),
            float(values.get("beta_start", 1e-4)),
            float(values.get("beta_end", 0.02)),
            int(values.get("num_train_timesteps", 1000)),
            values.get("prediction_type", "epsilon"),
        )
    raise ValueError(f"unknown scheduler {name!r}; known: {', '.join((FLOW, UNIPC, EULER_EDM, *DISCRETE))}")


def _unipc(values: Mapping[str, Any], grid: Grid) -> RectifiedFlow:
    """The flow of a `UniPCMultistepScheduler`: Wan's with a shift, Cosmos-Predict2.5's with Karras' grid."""
    if not values.get("use_flow_sigmas") or values.get("prediction_type") != "flow_prediction":
        raise ValueError(f"{UNIPC} is supported for flow policies only (use_flow_sigmas=true, prediction_type=flow_prediction)")
    shift, times = float(values.get("flow_shift", 1.0)), int(values.get("num_train_timesteps", 1000))
    if grid == "even":
        return RectifiedFlow(shift)
    _refuse(values, "use_dynamic_shifting", (False,))
    _refuse(values, "final_sigmas_type", ("zero",))
    for key in OTHER_GRIDS:
        if key != "use_karras_sigmas":
            _refuse(values, key, (None, False))
    if not values.get("use_karras_sigmas"):
        return RectifiedFlow(shift, "unipc", times)
    high, low = values.get("sigma_max"), values.get("sigma_min")
    if high is None or low is None:
        raise ValueError(f"{UNIPC} with use_karras_sigmas needs sigma_max and sigma_min; set model.grid=even")
    return RectifiedFlow(shift, "karras", times, (float(high), float(low)))
