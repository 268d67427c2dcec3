"""How fast the packed networks sample: against diffusers' own classes, by attention provider, eager and compiled, over batch sizes.

    python benchmarks/gpu.py [--json] [--size full|tiny] [--device cuda] [--only NAMES] [--repeats 5]

Networks have the public sizes of SD3.5-medium and Wan 2.1 1.3B and random weights, which all sides share; a forward pass is
one denoising step without guidance. All sides take turns in every repeat; figures are medians with their range.
Utilisation is the forward's floating-point operations (`PackedModel.forward_flops`) over its time, as a share of what a
large matrix product reaches in the same repeat. `--size tiny --device cpu` checks that everything runs; it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "benchmarks"):  # run as a script: packages are found from the repository's root
    sys.path[0] = str(ROOT)

TARGETS = {"utilisation": 0.5, "ratio_to_diffusers": 1.5}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    import diffusers

    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "diffusers": diffusers.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"{k}: {v}  " for k, v in found["machine"].items()]
    lines += [f"attention {name}: not here ({why})  " for name, why in found["providers"].items() if why]
    for workload in found["workloads"]:
        lines += ["", f"### {workload['workload']} ({workload['parameters'] / 1e9:.2f} B parameters)", ""]
        lines += ["| batch | tokens | side | samples/s | tokens/s | utilisation | × diffusers | activations MB | error |", "|" + "---|" * 9]
        for batch in workload["batches"]:
            for row in batch["sides"]:
                start = f"| {batch['batch']} | {batch['tokens']} | {row['side']} | "
                if "failed" in row:
                    lines.append(start + f"{row['failed']} | | | | | |")
                    continue
                speed, ratio, peak = row["samples_per_s"], row.get("ratio_to_diffusers"), row.get("peak_above_weights_bytes")
                lines.append(
                    start + f"{speed['median']:.3g} [{speed['low']:.3g}, {speed['high']:.3g}] | {row['tokens_per_s']['median']:.3g} | "
                    f"{100 * row['utilisation']['median']:.1f} % | {'–' if ratio is None else format(ratio['median'], '.2f')} | "
                    f"{'–' if peak is None else format(peak / 1e6, '.0f')} | {row['relative_error']:.1e} |"
                )
        lines += [
            "",
            f"Best of each side over the batch sizes (targets: utilisation {TARGETS['utilisation']}, {TARGETS['ratio_to_diffusers']} × diffusers):",
            "",
        ]
        for side, row in workload["best"].items():
            ratio = "–" if row["ratio_to_diffusers"] is None else f"{row['ratio_to_diffusers']:.2f}"
            lines.append(
                f"- {side}: {row['samples_per_s']:.3g} samples/s at batch {row['batch']}, utilisation {100 * row['utilisation']:.1f} %, {ratio} × diffusers"
            )
    return "\n".join(lines)


def main() -> None:
    from benchmarks.networks.measure import Plan, measure
    from benchmarks.networks.workloads import WORKLOADS
    from diffusion.attention import PROVIDERS, trial

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=WORKLOADS, default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="least time of one timing [default: 0.5, tiny 0]")
    parser.add_argument("--only", metavar="NAMES", help="some of the workloads, by name, with commas")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --size tiny --device cpu checks that everything runs")
    names = options.only.split(",") if options.only else [w.name for w in WORKLOADS[options.size]]
    workloads = [w for w in WORKLOADS[options.size] if w.name in names]
    if unknown := set(names) - {w.name for w in workloads}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(w.name for w in WORKLOADS[options.size])}")

    seconds = options.seconds if options.seconds is not None else (0.5 if options.size == "full" else 0.0)
    plan = Plan(device, getattr(torch, options.dtype), options.repeats, seconds)
    providers = {name: trial(name, plan.device, plan.dtype) for name in PROVIDERS}
    usable = [name for name, why in providers.items() if why is None]
    found = {"machine": machine(device), "size": options.size, "dtype": options.dtype, "repeats": options.repeats, "targets": TARGETS, "providers": providers}
    found["workloads"] = [measure(w, plan, usable, lambda line: print(line, file=sys.stderr, flush=True)) for w in workloads]
    print(json.dumps(found, indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
