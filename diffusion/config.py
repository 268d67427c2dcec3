"""Settings of the model side. Pydantic only: importing this module brings in neither torch nor ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffusion.kernel_names import CHURN, KernelName, stochastic_steps


class Strict(BaseModel):
    """Base of the settings of this room and of those above it: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoRAConfig(Strict):
    """A low-rank adapter that is trained instead of the whole network (LoRA, arXiv 2106.09685)."""

    rank: int = Field(0, ge=0, description="rank r; 0 = no adapter, all weights are trained (DiffusionNFT on SD3.5: 32)")
    alpha: float = Field(64.0, gt=0, description="the adapter's output is scaled by alpha / rank (DiffusionNFT on SD3.5: 64)")
    targets: Literal["attention", "flow_grpo"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "attention",
        description="linear layers that get one: attention = every projection of attention (verl-omni); flow_grpo = those of attn, not of "
        "SD3.5's second attention attn2 (Flow-GRPO, DiffusionNFT); or a list of ends of their names",
    )
    merge: bool = Field(False, description="rollouts: merge the adapter into the weights; needs objective.old_log_prob=learner, because merging rounds")


class ModelConfig(Strict):
    """Which policy is trained and how its forward pass runs."""

    path: str = Field("recipes/glyph-base", description="policy to start from: a folder in diffusers' layout (transformer/, text_encoder/), or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; a run keeps the commit that it found")
    init: bool = Field(False, description="true: read only the folder's config files and start from random weights")
    attention: Literal["auto", "sdpa", "xformers", "torch_varlen"] = Field(
        "auto", description="attention provider; auto = the first of xformers, torch_varlen that works on the GPU, else sdpa"
    )
    compile: bool = Field(
        False, description="rollouts: compile the network's per-token parts (torch.compile); token counts are then padded to buckets so that shapes repeat"
    )
    lora: LoRAConfig = Field(default_factory=lambda: LoRAConfig(), description="low-rank adapter")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="autocast type inside the network, same for sampling and training")
    base_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type that the network's own weights are held in; bfloat16 beside an adapter alone (lora.rank > 0), which stays float32"
    )
    grid: Literal["even", "diffusers"] = Field(
        "even",
        description="times of a flow's steps, before the shift: even = N even steps from 1 to 0; diffusers = as the policy's scheduler makes them: "
        "FlowMatchEulerDiscreteScheduler (Flow-GRPO), whose last but one time is near 0, or UniPCMultistepScheduler",
    )
    text_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the frozen text encoders (T5-XXL: 19 or 9.5 GB) and of Wan's encoder of pictures"
    )
    given_time: Annotated[float, Field(ge=0, le=1)] | Literal["family", "free"] = Field(
        "family",
        description="time that given frames are shown at: family = 0 of Wan, 0.0001 of Cosmos (the post-trained 2B, diffusers); free = that of the sampled "
        "frames (Cosmos' pre-trained networks); or a number",
    )
    map_weights: bool = Field(
        False,
        description="frozen weights that lie on a CPU in their files' type stay those files, mapped into memory: a host's processes share them. The files "
        "must not be overwritten while a run uses them",
    )
    t5_tokens: int = Field(256, ge=1, le=512, description="tokens of T5 in a prompt of SD3; padding counts and is attended (diffusers: 256, Flow-GRPO: 128)")

    @model_validator(mode="after")
    def _base_fits(self) -> ModelConfig:
        if self.base_dtype != "float32" and (self.lora.rank == 0 or self.dtype != self.base_dtype):
            raise ValueError(
                f"base_dtype={self.base_dtype} is for frozen weights beside an adapter: set lora.rank > 0 and dtype={self.base_dtype}, or base_dtype=float32"
            )
        return self


class SamplerConfig(Strict):
    """How rollouts are sampled and which of their transitions are trained."""

    kernel: KernelName = Field(
        "flow_sde",
        description="step kernel of stochastic steps: flow_sde (Flow-GRPO), constant_sde (DanceGRPO), cps, ddim_eta, "
        "edm_2ab (public DDRL code), edm_euler, ancestral",
    )
    noise_level: float = Field(0.7, gt=0, le=100, description="the kernel's noise parameter: a, eta or g of its formula; s_churn of edm_euler and edm_2ab")
    guidance: float = Field(1.0, ge=1, le=100, description="classifier-free guidance of rollouts, u + g (c - u), in sampling and training alike; 1 = none")
    negative_prompt: str = Field("", max_length=4096, description="prompt of the unconditional branch u when guidance > 1")
    steps: int = Field(10, ge=2, le=1000, description="denoising steps of a rollout")
    eval_steps: int = Field(20, ge=1, le=1000, description="ODE steps when evaluating (no noise, no guidance)")
    trained_steps: int | list[int] = Field(
        5, description="a number: that many step indices drawn per group; a list: exactly these indices (the last step is never trained)"
    )
    trained_choice: Literal["scattered", "window", "sliding"] = Field(
        "scattered",
        description="how a number of trained steps is chosen: scattered = any, drawn for each group; window = neighbours, whose first is drawn for each group "
        "(Flow-GRPO-Fast); sliding = neighbours, which move one step on every window_updates updates, and from the end back to the start (MixGRPO)",
    )
    window_last: int | None = Field(
        None, ge=0, description="trained_choice=window: the last step that a window may begin at; null = the middle of the steps (Flow-GRPO-Fast)"
    )
    window_updates: int = Field(25, ge=1, description="trained_choice=sliding: updates that a window stays for (MixGRPO: 25)")
    noise_on: Literal["all", "trained", "none"] = Field(
        "all",
        description="all: every step but the last is stochastic; trained: only the trained steps are, the rest follow the ODE; none: the whole rollout follows "
        "it (for objective.policy_loss=nft or awm)",
    )
    height: int = Field(16, ge=1, description="height of a sample in pixels")
    width: int = Field(48, ge=1, description="width of a sample in pixels")
    frames: int = Field(1, ge=1, description="frames of a clip, of video policies; of others 1: a picture")
    fps: float = Field(16.0, gt=0, le=240, description="frames a second of clips: what rewards and players are told (Wan, Cosmos-Predict2.5: 16)")
    given_frames: Annotated[int, Field(ge=0)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = Field(
        0,
        description="latent frames of its example's own clip that a rollout is given (0 = text-to-video, 1 = image-to-video, 2 = video-to-video of Cosmos); "
        "of a list each group is given one number, equally often each (public DDRL code: [0, 1])",
    )
    max_tokens: int = Field(16384, ge=1, description="token budget of one packed forward pass of the engine, at most; less where memory does not hold it")

    @property
    def given_choices(self) -> tuple[int, ...]:
        """Numbers of given frames that groups are given."""
        return (self.given_frames,) if isinstance(self.given_frames, int) else self.given_frames

    @property
    def trained_count(self) -> int:
        """Trained steps of a rollout."""
        return self.trained_steps if isinstance(self.trained_steps, int) else len(self.trained_steps)

    @property
    def pixel_bytes(self) -> int:
        """Of one sample, as uint8."""
        return 3 * self.frames * self.height * self.width

    @model_validator(mode="after")
    def _noise_level_fits(self) -> SamplerConfig:
        if self.kernel in ("cps", "ddim_eta", "ancestral") and self.noise_level > 1:
            raise ValueError(f"noise_level={self.noise_level:g} exceeds 1, where kernel {self.kernel} already draws all of its noise anew")
        if self.kernel not in CHURN and self.noise_level > 2:
            raise ValueError(f"noise_level={self.noise_level:g} exceeds 2, the most that kernel {self.kernel} takes")
        return self

    @model_validator(mode="after")
    def _trained_steps_exist(self) -> SamplerConfig:
        count = stochastic_steps(self.kernel, self.steps)
        why = "the last step is never trained" if self.kernel not in CHURN else f"the last two steps of {self.kernel} draw no noise and are never trained"
        if count < 1:
            raise ValueError(f"steps={self.steps} leaves nothing to train: {why}")
        if isinstance(self.trained_steps, int):
            if not 1 <= self.trained_steps <= count:
                raise ValueError(f"trained_steps={self.trained_steps} must lie in 1..{count}: steps={self.steps} and {why}")
        elif self.trained_choice != "scattered":
            raise ValueError(f"trained_choice={self.trained_choice} needs a number of trained_steps; {self.trained_steps} are these steps and no others")
        else:
            bad = [i for i in self.trained_steps if not 0 <= i < count]
            if bad or not self.trained_steps or len(set(self.trained_steps)) != len(self.trained_steps):
                raise ValueError(f"trained_steps={self.trained_steps} must be distinct indices in 0..{count - 1} (steps={self.steps}, {why})")
        return self
