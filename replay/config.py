"""Settings of the replay buffer as they appear in a run's YAML. Importing this needs no Redis."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RedisConfig(_Strict):
    """Where the ledger lives."""

    url: str = Field(
        default="embedded",
        pattern=r"^(embedded|rediss?://.+|unix://.+)$",
        description="'embedded' starts a private redis-server on this machine; else redis://[:password@]host:port/db",
    )
    fsync: Literal["everysec", "always"] = Field(
        default="everysec",
        description="embedded server: 'always' loses nothing even when the machine crashes; 'everysec' may lose 2 s, which are made again",
    )
    connect_timeout_s: float = Field(default=10.0, gt=0, description="seconds to wait for the server to answer at start")


class ReplayConfig(_Strict):
    """Bounds and patience of the replay buffer."""

    max_staleness: int = Field(
        default=1,
        ge=0,
        description="S: largest (step - 1) - sampling version of a group when a step claims it",
    )
    window: int = Field(
        default=1,
        ge=1,
        description="W: a claim takes groups less than W indices past the oldest live one; 1 = strict FIFO",
    )
    lease_s: float = Field(default=120.0, gt=0, description="seconds a producer may hold a group without a heartbeat")
    max_attempts: int = Field(default=4, ge=1, description="tries to make one group before it is dead")
    max_bytes: int = Field(
        default=1 << 30,
        ge=1 << 16,
        description="budget in bytes for the payloads of all unsettled groups and data batches",
    )
    payloads: str = Field(
        default="redis",
        pattern=r"^(redis|/.+)$",
        description="where payloads live: 'redis', or the absolute path of a folder that all nodes share (video)",
    )
    store_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="type that rollouts' states are stored in; bfloat16 halves their bytes, and states are rounded to it while they are sampled",
    )
    part_bytes: int = Field(
        default=256 << 20,
        ge=1 << 16,
        lt=512 << 20,
        description="most bytes of one Redis value or file of a payload; larger payloads are several",
    )
    drop_zero_variance: bool = Field(
        default=False,
        description="replace groups whose rewards all agree, at most 4 times the groups of a step between two steps",
    )
    data_depth: int = Field(default=4, ge=1, description="anchor-data batches kept ready or in production")
    claim_timeout_s: float = Field(default=600.0, gt=0, description="seconds a learner waits for one step's groups before it gives up")
