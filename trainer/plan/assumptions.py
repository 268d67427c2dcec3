"""What a plan has to assume, because neither the recipe nor the architecture says it. Every key is shown with the plan."""

from __future__ import annotations

import difflib

import yaml
from pydantic import Field, ValidationError

from diffusion.config import Strict
from trainer.config.errors import ConfigError


class Assumptions(Strict):
    """Given on the command line as `--assume KEY=VALUE`."""

    rollout_utilisation: float = Field(0.4, gt=0, le=1, description="share of the GPU's peak rate that sampling reaches")
    train_utilisation: float = Field(0.4, gt=0, le=1, description="share of the GPU's peak rate that the learner reaches")
    cpu_gflops: float = Field(15.0, gt=0, description="GFLOP/s of one CPU thread, fp32 (measured: an SD3.5 block on an EPYC core)")
    usable: float = Field(0.92, gt=0, le=1, description="share of a GPU's memory that is planned with; the allocator fragments")
    process_gb: float = Field(1.0, ge=0, description="GB of a GPU that a process takes for its context and libraries")
    pcie_gb_s: float = Field(20.0, gt=0, description="GB/s between a GPU and its host, each way (PCIe 4.0 x16: 31.5 at most); used by learner.offload")
    host_gb_s: float = Field(10.0, gt=0, description="GB/s of host memory that one rank's threads reach in the optimiser's step; used by learner.offload")
    link_gbit_s: float = Field(10.0, gt=0, description="Gbit/s of the network between two machines")
    prompt_tokens: int | None = Field(None, ge=1, description="tokens of an encoded prompt, padding included; null = as the pipeline pads it")


def parse_assumptions(items: list[str]) -> Assumptions:
    """`key=value` pairs. Raises ConfigError, naming the nearest key of one that is unknown."""
    values = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator:
            raise ConfigError(f"--assume '{item}' is not of the form key=value")
        if key not in Assumptions.model_fields:
            near = next(iter(difflib.get_close_matches(key, list(Assumptions.model_fields), n=1)), None)
            raise ConfigError(
                f"--assume: unknown key '{key}'" + (f"; did you mean '{near}'?" if near else f"; there are {', '.join(Assumptions.model_fields)}")
            )
        values[key] = yaml.safe_load(text)
    try:
        return Assumptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--assume {first['loc'][0]}: {first['msg']} (got {first['input']!r})") from None
