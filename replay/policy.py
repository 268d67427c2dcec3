"""The rules of the buffer as plain arithmetic: slots, retained groups, staleness, what must fit where.

Two budgets bound a run with G groups per step, staleness bound S and a checkpoint every K steps.

*Pipeline slots* `(S + 1) G`: charged when a group is leased, freed when the step that claimed it has
published its version (or when the group is evicted or dead). With versions published in order this alone
keeps staleness within S: a group leased under version v finds at most `(S + 1) G - 1` groups before it, so in
FIFO order a step <= v + 1 + S claims it, and `(v + 1 + S - 1) - v = S`.

*Retained groups* `(S + 1 + K) G`: everything not yet settled. A claimed group stays until the checkpoint of
its step is registered, because a restart must be able to serve it again.

Worked example: G = 4, S = 1, K = 5 gives 8 slots and 28 retained groups; at 30 MB a group, 840 MB.

The scripts in `lua/` enforce these limits; nothing here talks to Redis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replay.errors import BudgetExceeded, ImpossibleSettings, UnsuitableServer

MIN_SERVER_VERSION = (6, 2, 0)
# Records, sets and client buffers beside the payloads; a ledger record is about 1 kB.
SERVER_OVERHEAD_BYTES = 64 << 20
# While the append-only file is rewritten, pages touched by the parent are copied: payloads written in that
# time.
FORK_HEADROOM = 1.5
# The append-only file grows to twice its base size before a rewrite, which then writes a fresh copy beside
# it.
DISK_FACTOR = 3.0
# Rewards closer than this agree: no advantage can be made of them.
FLAT_REWARDS = 1e-9
# Seconds before a producer that gave a group back is given it again.
GIVE_BACK_PAUSE_S = 1.0
# By default at most this many steps' worth of zero-variance groups are dropped between two claims.
DROPS_PER_GROUP = 4
# Most bytes of one part of a payload, by default.
PART_BYTES = 256 << 20
# Redis stores values below this (`proto-max-bulk-len`, its default).
LARGEST_VALUE = 512 << 20
# A script handles all groups of a step in one call; Lua passes at most some 8000 values at once.
LARGEST_STEP = 4096


@dataclass(frozen=True)
class BufferSettings:
    """What one run asks of the buffer.

    `groups_per_step` 0 means no rollouts (supervised fine-tuning); `data_per_step` is 0 or 1 (or more) data
    batches. `checkpoint_interval` is the number of steps between two `settle` calls. `remake_cut_off` makes a
    group whose lineage a rollback cut off under its old index instead of evicting it: needed for bitwise
    resume when `checkpoint_interval` > 1, since it leaves no holes in the sequence of prompts.
    `drop_zero_variance` replaces groups whose rewards all agree by the next index, at most `drop_limit` of them
    between two claims: a policy whose groups all agree goes on training, and the metric shows it. `part_bytes`: most
    bytes of one stored part of a payload.
    """

    groups_per_step: int
    data_per_step: int = 0
    max_staleness: int = 1
    window: int = 1
    lease_s: float = 120.0
    max_attempts: int = 4
    max_bytes: int = 1 << 30
    data_depth: int = 4
    checkpoint_interval: int = 1
    remake_cut_off: bool = False
    drop_zero_variance: bool = False
    max_drops_per_step: int | None = None
    part_bytes: int = PART_BYTES

    @property
    def slots(self) -> int:
        """Most groups in the pipeline: leased, ready, or claimed by a step that has not published."""
        return (self.max_staleness + 1) * self.groups_per_step

    @property
    def retained_groups(self) -> int:
        """Most groups not yet settled."""
        return self.slots + self.checkpoint_interval * self.groups_per_step

    @property
    def retained_data(self) -> int:
        """Most data batches not yet settled: the depth, one checkpoint interval, and the step in progress."""
        if self.data_per_step == 0:
            return 0
        return self.data_depth + (self.checkpoint_interval + 1) * self.data_per_step

    @property
    def drop_limit(self) -> int:
        """Most zero-variance groups dropped between two claims; 0 when they are kept."""
        if not self.drop_zero_variance:
            return 0
        return DROPS_PER_GROUP * self.groups_per_step if self.max_drops_per_step is None else self.max_drops_per_step

    def check(self) -> None:
        """Raise `ImpossibleSettings` when no run could make progress with these numbers."""
        least = {
            "groups_per_step": 0,
            "data_per_step": 0,
            "max_staleness": 0,
            "window": 1,
            "max_attempts": 1,
            "max_bytes": 1,
            "checkpoint_interval": 1,
            "part_bytes": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ImpossibleSettings(f"{name} is {getattr(self, name)}, must be at least {bound}")
        for name in ("groups_per_step", "data_per_step"):
            if getattr(self, name) > LARGEST_STEP:
                raise ImpossibleSettings(f"{name} is {getattr(self, name)}, must be at most {LARGEST_STEP}")
        if self.max_drops_per_step is not None and self.max_drops_per_step < 1:
            raise ImpossibleSettings(f"max_drops_per_step is {self.max_drops_per_step}, must be at least 1; to keep all groups set drop_zero_variance to false")
        if self.part_bytes >= LARGEST_VALUE:
            raise ImpossibleSettings(f"part_bytes is {self.part_bytes}; one Redis value holds less than {LARGEST_VALUE}")
        if self.lease_s <= 0:
            raise ImpossibleSettings(f"lease_s is {self.lease_s}, must be positive")
        if self.groups_per_step == 0 and self.data_per_step == 0:
            raise ImpossibleSettings("a step takes 0 groups and 0 data batches: nothing to learn from")
        if self.data_depth < self.data_per_step:
            raise ImpossibleSettings(f"data_depth {self.data_depth} is below the {self.data_per_step} data batches one step takes")
        if self.groups_per_step and self.window > self.slots:
            raise ImpossibleSettings(
                f"window {self.window} is larger than the pipeline: (max_staleness {self.max_staleness} + 1) x {self.groups_per_step} groups = {self.slots}"
            )


def staleness(step: int, version: int) -> int:
    """Versions between the weights that sampled a group and those that train on it at `step` (from 1)."""
    return step - 1 - version


def zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all rewards of a group agree, so that every advantage is 0."""
    return max(rewards) - min(rewards) < FLAT_REWARDS


def worst_staleness(settings: BufferSettings) -> int:
    """The bound that admission alone keeps; what the window adds beyond S is evicted at claim."""
    if settings.groups_per_step == 0:
        return 0
    return settings.max_staleness + -(-(settings.window - 1) // settings.groups_per_step)


def budget_error(group_bytes: int, data_bytes: int, groups: int, batches: int, limit: int) -> BudgetExceeded:
    """The error for payloads that cannot all be retained, with its arithmetic."""
    need = group_bytes * groups + data_bytes * batches
    return BudgetExceeded(
        f"{groups} retained groups x {megabytes(group_bytes)} + {batches} data batches x "
        f"{megabytes(data_bytes)} = {megabytes(need)}, more than max_bytes {megabytes(limit)}; "
        f"raise max_bytes, or lower checkpoint_interval, max_staleness or the groups per step"
    )


def room_error(what: str, size: int, held: int, groups: int, limit: int, waited_s: float) -> BudgetExceeded:
    """The error for a payload that found no room in time, with its arithmetic."""
    return BudgetExceeded(
        f"{what}: {megabytes(held)} held by {groups} ready or claimed groups (and data) + {megabytes(size)} = {megabytes(held + size)}, more than max_bytes "
        f"{megabytes(limit)}, for {waited_s:.0f} s; raise max_bytes, or settle more often (lower checkpoint_interval)"
    )


def megabytes(size: float) -> str:
    """`31457280 → '31.5 MB'`."""
    return f"{size / 1e6:.1f} MB"


def parse_version(text: str) -> tuple[int, int, int]:
    """`'7.0.15' → (7, 0, 15)`; missing parts are 0."""
    parts = [int(part) for part in text.split(".")[:3] if part.isdigit()]
    parts += [0] * (3 - len(parts))
    return parts[0], parts[1], parts[2]


def check_server(
    version: str,
    options: Mapping[str, str],
    total_memory: int,
    settings: BufferSettings,
    payloads_in_redis: bool,
    recorded_version: str | None = None,
) -> None:
    """Raise `UnsuitableServer` when the server would lose groups or cannot hold the budget.

    `version` is '' when the server hides it; `options` are the server's `maxmemory`, `maxmemory-policy` and `appendonly` (absent when the server hides
    them); `total_memory` is the machine's memory in bytes, 0 when unknown; `recorded_version` is the server
    that wrote the ledger before.
    """
    if version and parse_version(version) < MIN_SERVER_VERSION:
        raise UnsuitableServer(f"Redis {version} is too old: the ledger needs 6.2 or newer")
    if version and recorded_version and parse_version(version)[:2] < parse_version(recorded_version)[:2]:
        raise UnsuitableServer(
            f"this run's ledger was written by Redis {recorded_version}; Redis {version} is older and may not read it: start the newer server"
        )
    policy = options.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        raise UnsuitableServer(f"maxmemory-policy is {policy}: Redis would silently drop groups; set it to noeviction")
    if options.get("appendonly", "yes") != "yes":
        raise UnsuitableServer("appendonly is no: a server restart would lose the ledger; set appendonly yes")
    need = SERVER_OVERHEAD_BYTES + (settings.max_bytes if payloads_in_redis else 0)
    limit = int(options.get("maxmemory", "0"))
    if limit and limit < need:
        raise UnsuitableServer(
            f"maxmemory {megabytes(limit)} is below {megabytes(need)} "
            f"(max_bytes + {megabytes(SERVER_OVERHEAD_BYTES)} overhead); "
            f"raise maxmemory or lower replay.max_bytes"
        )
    if total_memory and need * FORK_HEADROOM > total_memory:
        raise UnsuitableServer(
            f"the server's machine has {megabytes(total_memory)}; {megabytes(need)} x {FORK_HEADROOM} "
            f"(copies made while the append-only file is rewritten) do not fit; lower replay.max_bytes"
        )


def memory_needed(max_bytes: int) -> int:
    """Bytes of memory a server with this payload budget may take while its append-only file is rewritten."""
    return int(FORK_HEADROOM * (max_bytes + SERVER_OVERHEAD_BYTES))


def disk_needed(max_bytes: int) -> int:
    """Bytes of disk the append-only file of a server with this payload budget may take."""
    return int(DISK_FACTOR * (max_bytes + SERVER_OVERHEAD_BYTES))
