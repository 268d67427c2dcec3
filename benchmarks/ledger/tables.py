"""The result as the Markdown tables of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.ledger.bandwidth import FIGURES, RATIOS
from benchmarks.markdown import figure, share, table

WORDS = {"set": "raw Redis SET", "get": "raw Redis GET", "ray put": "Ray queue put", "ray get": "Ray queue get"}


def markdown(result: dict[str, Any]) -> str:
    """All sections of `result` that were measured."""
    machine = result["machine"]
    head = (
        f"{machine['cores']} cores ({machine['processor']}), load average {machine['load_at_start']} before the start, "
        f"Python {machine['python']}, Redis {machine['redis']} "
        f"(appendonly {machine['appendonly']}, appendfsync {machine['appendfsync']}), redis-py {machine['redis_py']}."
    )
    if result["quick"]:
        head += " **A quick check, not a measurement.**"
    return "\n\n".join([head, *(f"### {title}\n\n{write(result[name])}" for name, (title, write) in SECTIONS.items() if name in result)])


def bandwidth(found: dict[str, Any]) -> str:
    head = ["MB/s, per group", *(f"{row['mb']:g} MB x {row['groups']}" for row in found["rows"])]
    rows = [[WORDS.get(name, name), *(figure(row[name]) for row in found["rows"])] for name in FIGURES]
    rows += [[f"**{one} / {two}**", *(figure(row[f"{one} / {two}"], 2) for row in found["rows"])] for one, two in RATIOS]
    return table(head, rows)


def ledger(found: dict[str, Any]) -> str:
    return table(["arrangement", "groups/s"], [[row["arrangement"], figure(row["groups/s"])] for row in found["rows"]])


def latency(found: dict[str, Any]) -> str:
    head = ["operation", "calls", "p50 ms", "p99 ms", "of it the server's script, mean ms"]
    rows = [[r["operation"], str(r["n"]), f"{r['p50_ms']:.3f}", f"{r['p99_ms']:.3f}", f"{r['server_ms']:.3f}"] for r in found["rows"]]
    by_name, G = {r["operation"]: r for r in found["rows"]}, found["groups_per_step"]

    def per_group(figure: str) -> float:
        per_step = sum(by_name[name][figure] for name in ("claim", "publish", "settle"))
        return by_name["lease"][figure] + by_name["commit"][figure] + per_step / G

    told = f"One client, G = {G}; settle includes deleting the payloads. A group costs lease + commit + (claim + publish + settle) / G = "
    told += f"{per_group('p50_ms'):.2f} ms, of which {per_group('server_ms'):.2f} ms in the server's scripts; the rest is the client and the loopback."
    return f"{table(head, rows)}\n\n{told}"


def producers(found: dict[str, Any]) -> str:
    head = ["mode", "producers (processes)", "groups/s", "lease p50 ms", "lease p99 ms", "commit p50 ms", "commit p99 ms"]
    names = ("lease_ms 0.5", "lease_ms 0.99", "commit_ms 0.5", "commit_ms 0.99")
    rows = [
        [r["mode"], f"{r['producers']} ({r['processes']})", figure(r["groups/s"]), *(figure(r[name], 2) for name in names)]
        for r in found["rows"]
    ]  # fmt: skip
    return table(head, rows) + f"\n\nPaced: each producer begins a group every {1e3 * found['pace_s']:.0f} ms. A learner process claims, publishes and settles."


def staleness(found: dict[str, Any]) -> str:
    head = [
        "S",
        "W",
        "bound of pacing alone",
        "worst before eviction",
        "worst trained on",
        "mean",
        "evicted",
        "learner waits",
        "producers wait",
        "updates per simulated s",
    ]
    rows = []
    for r in found["rows"]:
        if "refused" in r:
            rows.append([str(r["S"]), str(r["W"]), f"refused: {r['refused']}", *["–"] * 7])
            continue
        shares = [share(r[name]) for name in ("evicted_share", "learner_waits_share", "producers_wait_share")]
        numbers = [str(r["bound_of_pacing"]), str(r["worst_before_eviction"]), str(r["worst_at_claim"]), f"{r['mean_at_claim']:.2f}"]
        rows.append([str(r["S"]), str(r["W"]), *numbers, *shares, f"{r['updates_per_s']:.2f}"])
    shape = f"{found['updates']} updates, {found['producers']} producers, G = {found['groups_per_step']}, {share(found['straggler_share'])} stragglers"
    return table(head, rows) + f"\n\nSimulated time on the real ledger: {shape}."


def compression(found: dict[str, Any]) -> str:
    head = ["payload", "codec", "size after / before", "compress MB/s", "expand MB/s", "wins below MB/s", "Redis here MB/s", "pays here"]
    rows = []
    for r in found["rows"]:
        even = figure(r["break-even MB/s"]) if r["break-even MB/s"]["median"] > 0 else "never"
        rates = [figure(r["compress MB/s"]), figure(r["expand MB/s"]), even, figure(r["redis MB/s"])]
        rows.append([f"{r['payload']}, {r['bytes'] / 1e6:.1f} MB", r["codec"], f"{r['ratio']:.3f}", *rates, "yes" if r["pays"] else "no"])
    return table(head, rows)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "bandwidth": ("Payload bandwidth", bandwidth),
    "ledger": ("Groups a second", ledger),
    "latency": ("Latency of one call", latency),
    "producers": ("More producers", producers),
    "staleness": ("Staleness and window", staleness),
    "compression": ("Compression", compression),
}
