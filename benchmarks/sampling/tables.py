"""The result of benchmarks/rollout.py as the Markdown of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import figure, share, table
from benchmarks.sampling.growth import fixed_and_rate
from benchmarks.sampling.workload import about

WORDS = {
    "limit": "(a) bare forward passes, the limit",
    "engine": "(b) engine, ODE samples",
    "engine, rollout": "(b) engine, rollouts",
    "pipeline": "(c) diffusers pipeline, a call for each size and step count",
    "loop": "(d) a loop over time steps for each prompt",
}
RATIOS = (("engine, rollout", "limit"), ("engine", "limit"), ("engine", "pipeline"), ("engine, rollout", "loop"))


def markdown(result: dict[str, Any]) -> str:
    """All sections."""
    m = result["machine"]
    loads = result["load_before_each_section"]
    head = (
        f"{m['cores']} cores ({m['processor']}), {m['threads']} thread{'s' if m['threads'] > 1 else ''} on {m['device']}, load average before the sections "
        f"{min(loads):.1f} to {max(loads):.1f}, Python {m['python']}, torch {m['torch']}, diffusers {m['diffusers']}; "
        f"token budget {result['max_tokens']}, {result['repeats']} repeats."
    )
    if result["quick"]:
        head += " **A quick check, not a measurement.**"
    sections = [head]
    if result["workloads"]:
        sections += ["### Sampling: everything there from the start", *(offline(name, found) for name, found in result["workloads"].items())]
    for name, title, write in (
        ("streaming", "Sampling: requests that arrive", streaming),
        ("growth", "Sampling: what batching gains", growth),
        ("memory", "Sampling: peak memory", memory),
    ):
        if name in result:
            sections += [f"### {title}", write(result[name])]
    return "\n\n".join(sections)


def offline(name: str, found: dict[str, Any]) -> str:
    head = [f"**{name.replace('_', ' ')}**", "samples/s", "1,000 tokens/s", "tokens a forward pass", "of the budget"]
    rows = []
    for side, figures in found["sides"].items():
        filled = found["filled"][side]
        rows.append([WORDS[side], figure(figures["samples_per_s"], 1), figure(figures["ktokens_per_s"], 1), f"{filled['tokens']:.0f}", share(filled["share"])])
    ratios = table(
        ["within a repeat", "by the clock", "by CPU time"],
        [[name, figure(found["ratios"][name], 2), figure(found["cpu_ratios"][name], 2)] for name in (f"{one} / {two}" for one, two in RATIOS)],
    )
    intro = f"{name.replace('_', ' ').capitalize()}: {about(name)}. {found['samples']} samples of {found['kinds']} kinds (size, steps)."
    return f"{intro}\n\n{table(head, rows)}\n\n{ratios}\n\nLargest difference between samples: {max(found['check'].values()):.1g}."


def streaming(found: dict[str, Any]) -> str:
    head = ["side", "samples/s", "p50 s", "p99 s"]
    rows = [[WORDS[side], *(figure(figures[name], 2) for name in ("samples_per_s", "p50_s", "p99_s"))] for side, figures in found["sides"].items()]
    ratios = "; ".join(f"{name} **{figure(value, 2)}**" for name, value in found["ratios"].items())
    intro = (
        f"{found['requests']} requests, {about('streaming')}. Arrivals at {found['share']:g} of the engine's capacity "
        f"({figure(found['capacity'], 1)} samples/s with everything there at once)."
    )
    return f"{intro}\n\n{table(head, rows)}\n\nWithin a repeat: {ratios}."


def growth(rows: list[dict[str, Any]]) -> str:
    head = ["size", "in flight", "tokens a step", "(b) engine samples/s", "(c) pipeline samples/s", "(b) / (c)", "engine's step, ms"]
    cells = [
        [
            r["size"],
            str(r["in_flight"]),
            str(r["tokens"]),
            *(figure(r[side], 1) for side in ("engine", "pipeline")),
            figure(r["engine / pipeline"], 2),
            figure({k: 1000 * v for k, v in r["step_s"].items()}, 1),
        ]
        for r in rows
    ]
    lines = []
    for size in dict.fromkeys(r["size"] for r in rows):
        mine = [r for r in rows if r["size"] == size]
        if len(mine) > 1:
            fixed, slope = fixed_and_rate([(r["tokens"], r["step_s"]["median"]) for r in mine])
            lines.append(
                f"{size}: a step costs {1000 * fixed:.1f} ms and {1e6 * slope:.1f} µs a token: half of the full rate ({1 / slope / 1000:.1f} thousand "
                f"tokens/s) at {max(0.0, fixed / slope):.0f} tokens; from one sample in flight to many the gain cannot exceed "
                f"{(fixed + slope * mine[0]['tokens']) / (slope * mine[0]['tokens']):.1f}."
            )
    return table(head, cells) + "\n\n" + "\n".join(f"- {line}" for line in lines)


def memory(found: dict[str, dict[str, dict[str, float]]]) -> str:
    head = ["side", *(f"{name.replace('_', ' ')}: peak MB (above the loaded policy)" for name in found)]
    sides = next(iter(found.values()))
    rows = [[WORDS[side], *(f"{found[name][side]['peak_mb']:.0f} ({found[name][side]['above_loaded_mb']:.0f})" for name in found)] for side in sides]
    return table(head, rows)
