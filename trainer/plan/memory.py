"""Memory of a learner rank, of a generator and of the hosts, as sums of named parts. Arithmetic on `Sizes` and the recipe.

A learner rank of R, with P parameters of which T are trained (fp32 masters, as the learner keeps them; frozen ones in b bytes, as
`model.base_dtype` says):

    weights (4 T + b (P - T)) / R + buffers     optimiser 8 T / R     average 4 T / R     reference 4 P / R (reverse KL, full training)
    gradients  4 T while several passes accumulate (FSDP keeps them whole then); with one pass, or with accumulate: sharded, 4 T / R and two blocks
    gathered   with R > 1, the root and three blocks as they are held (one in use, one fetched ahead, the buffer it arrives in); everything without
               shard_blocks
    casts      2 P under bf16 autocast; with an adapter those that its gradient passes through, of one block where blocks are recomputed;
               none of weights that are bf16 already
    activations  of the rows of one pass, as the network counts them (`PackedModel.saved`)

Without shard_blocks the gradients are reduced at once: three times 4 T at the end of the last pass, activations then gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import VAEPass
from trainer.plan.sizes import Sizes

MASTER = 4
"""Bytes of a parameter, its gradient, its average, and of each of Adam's two moments."""
PROMPT_CACHE = 256 * 2**20
"""Bound of a generator's encoded prompts (`diffusion.engine.cache`)."""
WEIGHT_VERSIONS = 2
"""Newest versions of the weights that are kept (`actors.weights.store`); beside them the next one arrives, and one waits for its evaluation."""
PART = 64 * 2**20
"""Bytes of weights that a rank hands in at a time (`actors.weights.shards`)."""


@dataclass(frozen=True)
class Part:
    """Bytes of one kind, and why it is that many."""

    name: str
    bytes: float
    why: str = ""


@dataclass(frozen=True)
class Process:
    """One process and what it holds on its device at its peak.

    Attributes:
        name: what it is.
        count: how many alike there are.
        gpus: share of a GPU that each asks for; 0 = host memory.
        reserved: it may fill its share of the GPU, whatever its parts are (a reward model that is not known here).
    """

    name: str
    count: int
    gpus: float
    parts: tuple[Part, ...]
    reserved: bool = False

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts)


def trained_steps(config: RunConfig) -> int:
    """Transitions of a rollout that are trained, K."""
    steps = config.sampler.trained_steps
    return steps if isinstance(steps, int) else len(steps)


def rank_rows(config: RunConfig) -> tuple[int, int]:
    """Most transitions, and most diffusion-loss evaluations, of one rank in an update."""
    ranks, rollout, k = config.learner.ranks, config.rollout, trained_steps(config)
    transitions = -(-rollout.groups_per_step * rollout.group_size // ranks) * k if config.uses_policy else 0
    repeats = k if config.uses_policy and config.objective.data_per == "transition" else 1
    anchors = -(-config.data_rows * repeats // ranks) if config.uses_data else 0
    return transitions, anchors


def pass_count(config: RunConfig) -> int:
    """Forward and backward passes of a rank in an update."""
    return sum(-(-rows // config.learner.micro_batch) for rows in rank_rows(config))


def micro_rows(config: RunConfig) -> int:
    """Rows of the largest pass: those of an update are cut into passes of almost equal size."""
    return max(-(-rows // -(-rows // config.learner.micro_batch)) for rows in rank_rows(config) if rows)


def gathers_gradients(config: RunConfig) -> bool:
    """Whether gradients are whole on every rank while passes accumulate; a network that is one unit has whole ones in every pass."""
    return (config.learner.accumulate == "whole" or not config.learner.shard_blocks) and pass_count(config) > 1


BYTES = {"float32": 4, "bfloat16": 2}


def weights_bytes(config: RunConfig, sizes: Sizes) -> float:
    """The network's parameters as they are held: what is trained in fp32, the rest in `model.base_dtype`."""
    network = sizes.transformer
    return MASTER * network.trained + BYTES[config.model.base_dtype] * (network.parameters - network.trained)


def buffers_bytes(config: RunConfig, sizes: Sizes) -> float:
    """The network's buffers, which are of the type of its frozen weights."""
    return BYTES[config.model.base_dtype] * sizes.transformer.buffers


def encoders_bytes(config: RunConfig, sizes: Sizes) -> float:
    """The text encoders in `model.text_dtype`."""
    return BYTES[config.model.text_dtype] * sum(e.parameters for e in sizes.encoders)


def vae_bytes(sizes: Sizes) -> float:
    """The VAE, which is fp32."""
    return MASTER * sizes.vae.parameters if sizes.vae else 0.0


def learner_rank(config: RunConfig, sizes: Sizes) -> tuple[Part, ...]:
    """A rank at the peak of an update. What the process itself takes is not counted."""
    ranks, network = config.learner.ranks, sizes.transformer
    parameters, buffers, trained = weights_bytes(config, sizes), buffers_bytes(config, sizes), MASTER * network.trained
    e, rows, passes, based = BYTES[config.model.dtype], micro_rows(config), pass_count(config), config.model.base_dtype
    saved = sizes.network.saved(sizes.shape, sizes.prompt[0], e, sizes.adapted)
    per_parameter = parameters / network.parameters  # adapters lie in the blocks evenly
    largest = per_parameter * max(sizes.blocks)
    sharded = config.learner.shard_blocks
    whole = gathers_gradients(config) or ranks == 1
    gradients = trained if whole else trained / ranks + (min(trained, 2 * largest) if sharded else 0)
    gathered = 0.0 if ranks == 1 else (min(parameters, per_parameter * sizes.root + 3 * largest) if sharded else parameters)
    # autocast remembers casts of weights that are trained until the forward pass is over, recomputed or not; those of frozen ones autograd keeps
    kept = (max(saved.weights) if config.learner.recompute else sum(saved.weights)) if sizes.adapted else network.parameters
    casts = 0.0 if e == 4 else 2.0 * (network.trained if based == "bfloat16" else kept)
    activations = rows * saved.peak(config.learner.recompute)
    masters = "fp32 masters" if based == "float32" else f"fp32 adapters, frozen weights {based}"
    how = "blocks recomputed" if config.learner.recompute else "nothing recomputed"
    parts = [
        Part("weights", parameters / ranks + buffers, masters + (f" over {ranks} ranks" if ranks > 1 else "") + ", buffers whole"),
        Part("optimiser", 2 * trained / ranks, "AdamW's two moments, fp32"),
        Part("average", trained / ranks if config.optimizer.ema else 0.0, "moving average of the weights, fp32"),
        Part("gradients", gradients, f"whole while {passes} passes accumulate" if whole else "sharded, and of two blocks before they are reduced"),
        Part(
            "gathered weights",
            gathered,
            "root and three blocks: in use, fetched ahead, arriving" if sharded else "the whole network: shard_blocks is false",
        ),
        Part("casts of weights", casts, "bf16, kept for the backward pass"),
        Part("activations", activations, f"{rows} rows a pass, {how}"),
        Part("rows of a pass", rows * (sizes.prompt_values + 4 * sizes.latent_values) * 4.0 + 6 * rows * sizes.latent_values * 8.0, "inputs; moments in fp64"),
    ]
    if config.objective.kl_weight and not sizes.adapted:
        parts.append(Part("reference", parameters / ranks + buffers, "the starting policy for the reverse KL"))
    if not sharded:
        reduced = trained * (1 + 1 / ranks)  # the collective's input and output, beside the gradients
        spare = activations + casts
        parts.append(Part("reduction", max(0.0, reduced - spare), "gradients of the whole network at once"))
    update = sum(part.bytes for part in parts)
    loaded = encoders_bytes(config, sizes) if config.uses_policy else 0.0
    if config.model.init and not config.learner.gpus:
        loaded = max(loaded, MASTER * network.values)
    parts.append(Part("loading", max(0.0, loaded - update), "at start: text encoders, then the rank's shards; random weights are drawn whole"))
    return tuple(part for part in parts if part.bytes)


def generator(config: RunConfig, sizes: Sizes, vae: VAEPass, assumptions: Assumptions) -> tuple[Part, ...]:
    """A generator at its peak: the engine's largest forward pass while pictures are decoded."""
    network, e, rollout, sampler = sizes.transformer, BYTES[config.model.dtype], config.rollout, config.sampler
    based = config.model.base_dtype
    weights = weights_bytes(config, sizes) + buffers_bytes(config, sizes)
    cast = network.trained if based == "bfloat16" else max(sizes.blocks) if sizes.adapted else network.parameters
    casts = 0.0 if e == 4 else 2.0 * cast
    merged = BYTES[based] * sizes.adapted_weights if config.model.lora.merge else 0
    members = rollout.concurrent_groups * rollout.group_size
    tokens = min(sampler.max_tokens, members * sizes.tokens * (2 if sampler.guidance > 1 else 1))
    history = 3 if sampler.kernel == "edm_2ab" else 2
    states = members * (history * trained_steps(config) + 3) * sizes.latent_values * 4.0
    parts = [
        Part("weights", weights, "fp32; the network runs in them or in casts" if based == "float32" else f"frozen ones in {based}"),
        Part("casts of weights", casts, "bf16, for the time of a forward pass"),
        Part("unmerged weights", merged, "kept beside those that the adapter is merged into"),
        Part("activations", tokens * sizes.network.activation_bytes(e), f"{tokens} tokens a forward pass"),
        Part("states", states, f"{members} samples with their trained transitions, fp32"),
        Part("encoded prompts", min(PROMPT_CACHE, config.updates * rollout.groups_per_step * sizes.prompt_values * 4.0), "cache of at most 256 MiB"),
    ]
    parts.append(Part("text encoders", encoders_bytes(config, sizes), config.model.text_dtype))
    if sizes.vae is not None:
        parts.append(Part("VAE", vae_bytes(sizes), "fp32"))
        batch = min(vae.batch, rollout.group_size)
        parts.append(Part("decoding", batch * vae.decode.peak, f"{batch} pictures of {sampler.height}x{sampler.width} in one call"))
    return tuple(part for part in parts if part.bytes)


def rewards(config: RunConfig) -> list[Process]:
    """Rewards on GPUs, which are taken to fill the share that they ask for."""
    from services.config import fleet_of

    if config.fleet.url is not None or not config.reward_names:
        return []
    fleet = fleet_of(config.fleet, config.reward_names)
    found = fleet.rewards.items()
    return [Process(f"reward {name}", r.replicas.min, r.gpus, (), reserved=True) for name, r in found if r.gpus]


def processes(config: RunConfig, sizes: Sizes, vae: VAEPass, assumptions: Assumptions) -> list[Process]:
    """Everything that may lie on a GPU: learner ranks, generators, rewards."""
    own = Part("process", assumptions.process_gb * 1e9, "context and libraries")
    found = [Process("learner rank", config.learner.ranks, config.learner.gpus, learner_rank(config, sizes))]
    if config.uses_policy:
        found.append(Process("generator", config.rollout.generators, config.rollout.gpus, generator(config, sizes, vae, assumptions)))
    return [replace(p, parts=(*p.parts, own)) if p.gpus else p for p in found] + rewards(config)


def hosts(config: RunConfig, sizes: Sizes) -> list[Process]:
    """Host memory of a run's processes, without Python and its libraries, and without what `learner_rank` and `generator` count. In this
    build evaluator and anchor feeder run on CPUs, each with a policy of its own; a rank holds its own rows, and draws
    the noise of all ranks' anchor evaluations before it takes its own."""
    row = (2 * sizes.latent_values + sizes.prompt_values) * 4.0
    transitions, anchors = rank_rows(config)
    repeats = trained_steps(config) if config.uses_policy and config.objective.data_per == "transition" else 1
    evaluations = config.data_rows * repeats if config.uses_data else 0
    network = weights_bytes(config, sizes) + buffers_bytes(config, sizes)
    version = version_bytes(config, sizes)
    rank = [
        Part("part of the weights", min(PART, version / config.learner.ranks), "while it hands in"),
        Part("transitions", transitions * row),
        Part("anchor evaluations", (anchors + -(-anchors // repeats)) * row, "and the data rows they are of"),
        Part("anchor noise", evaluations * sizes.latent_values * 4.0, "of all ranks"),
    ]
    first = [Part("export in the making", network * (2 if config.optimizer.ema else 1), "rank 0 only")]
    whole = Part("policy", network + encoders_bytes(config, sizes) + vae_bytes(sizes), "on the CPU")
    found = [Process("learner rank", config.learner.ranks, 0, tuple(p for p in rank if p.bytes)), Process("export of rank 0", 1, 0, tuple(first))]
    if config.uses_policy:
        found.append(Process("generator", config.rollout.generators, 0, (Part("weights that arrive", version, "mapped or shared memory of its node"),)))
    found.append(Process("evaluator", 1, 0, (whole,)))
    if config.feeds_data:
        found.append(Process("anchor feeder", 1, 0, (whole,)))
    if config.weights.transport == "objects":
        found.append(Process("object store", 1, 0, (Part("versions", kept_versions(config) * version, "Ray's, over the nodes of the ranks"),)))
    return found


def version_bytes(config: RunConfig, sizes: Sizes) -> float:
    """A published version, in `weights.dtype`."""
    return BYTES[config.weights.dtype] * float(sizes.published_values)


def kept_versions(config: RunConfig) -> int:
    """Most versions that lie anywhere at a time."""
    return WEIGHT_VERSIONS + 1 + (config.evaluation.every > 0)


def floor_tokens(config: RunConfig, sizes: Sizes) -> int:
    """Fewest tokens of a forward pass of the engine: one sample, both branches of guidance."""
    return sizes.tokens * (2 if config.sampler.guidance > 1 else 1)
