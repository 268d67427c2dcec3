"""Memory of a learner rank, of a generator and of the hosts, as sums of named parts. Arithmetic on `Sizes` and the recipe.

A learner rank, with P parameters cut into R shards (`learner.ranks` / `learner.replicas`), of which T are trained (fp32 masters, as the
learner keeps them; frozen ones in b bytes, as `model.base_dtype` says):

    weights (4 T + b (P - T)) / R + buffers     optimiser 8 T / R (adamw8bit: some 2 T / R)
    average 4 T / R     reference 4 P / R (reverse KL, full training)
    gradients  4 T while several passes accumulate (FSDP keeps them whole then); with one pass, or with accumulate: sharded, 4 T / R and two blocks
    gathered   with R > 1, the root and three blocks as they are held (one in use, one fetched ahead, the buffer it arrives in); everything without
               shard_blocks
    learner.offload  weights, optimiser, average and sharded gradients are in host memory then, and what is gathered on the GPU with one rank too
    casts      2 P under bf16 autocast; with an adapter those that its gradient passes through, of one block where blocks are recomputed;
               none of weights that are bf16 already
    activations  of the rows of one pass, as the network counts them (`PackedModel.saved`), shared by `learner.sequence_ranks`

Without shard_blocks the gradients are reduced at once: three times 4 T at the end of the last pass, activations then gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffusion.pixels import turn_size
from services.scorers.settings import RewardSettings
from services.scorers.videoalign import cost
from services.scorers.videoalign.config import VideoAlignConfig
from trainer.config.learner import scales
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import VAEPass
from trainer.plan.sizes import Sizes

MASTER = 4
"""Bytes of a parameter, its gradient, its average, and of each of Adam's two moments."""
PROMPT_CACHE = 256 * 2**20
"""Bound of a generator's encoded prompts (`diffusion.engine.cache`)."""
PARCEL = 32
"""Pictures that an evaluation asks of a generator at a time (`actors.evaluator.SAMPLES_A_PARCEL`); of large clips fewer."""
WEIGHT_VERSIONS = 2
"""Newest versions of the weights that are kept (`actors.weights.store`); beside them the next one arrives, and one waits for its evaluation."""
PART = 64 * 2**20
"""Bytes of weights that a rank hands in at a time (`actors.weights.shards`)."""
SHARD = 2 * 10**9
"""Bytes of a file of an export (`diffusion.weights.SHARD_BYTES`)."""


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


def rank_rows(config: RunConfig, updates: int = 1) -> tuple[int, int]:
    """Most transitions, and most diffusion-loss evaluations, of one rank, or of those that share them, in a claim; in one of its `updates`."""
    ranks, rollout, k = config.learner.data_ranks, config.rollout, config.sampler.trained_count
    rollouts = -(-rollout.groups_per_step // updates) * rollout.group_size
    transitions = -(-rollouts // ranks) * k if config.uses_policy else 0
    repeats = k if config.uses_policy and config.objective.data_per == "transition" else 1
    anchors = -(-(config.data_rows if updates == 1 else rollouts) * repeats // ranks) if config.uses_data else 0
    return transitions, anchors


def passes(config: RunConfig, tokens: int) -> tuple[int, int]:
    """Forward and backward passes of a rank in an optimiser update, over transitions and over anchor data; `tokens` of one sample."""
    transitions, anchors = (-(-rows // config.learner.rows(tokens)) for rows in rank_rows(config, config.learner.updates_per_claim))
    return transitions, anchors


def pass_count(config: RunConfig, tokens: int) -> int:
    """Forward and backward passes of a rank in an optimiser update; `tokens` of one sample."""
    return sum(passes(config, tokens))


def micro_rows(config: RunConfig, tokens: int) -> int:
    """Rows of the largest pass: those of an update are cut into passes of almost equal size."""
    rows = rank_rows(config, config.learner.updates_per_claim)
    return max(-(-rows // count) for rows, count in zip(rows, passes(config, tokens), strict=True) if rows)


def gathers_gradients(config: RunConfig, tokens: int) -> bool:
    """Whether gradients are whole on every rank while passes accumulate; a network that is one unit has whole ones in every pass."""
    return (config.learner.accumulate == "whole" or not config.learner.shard_blocks) and pass_count(config, tokens) > 1


def asks_old(config: RunConfig) -> bool:
    """Whether the old policy is asked once more than the network at hand: a kept one, or that before the first of several updates of a claim."""
    objective = config.objective
    several = config.learner.updates_per_claim > 1 and config.uses_policy
    return objective.keeps_old or (several and (objective.on_samples or objective.old_log_prob == "learner"))


def keeps_predictions(config: RunConfig) -> bool:
    """Whether what the old policy says is as large as a latent for each row; a density is a number."""
    return asks_old(config) and (config.objective.on_samples or config.objective.center_ratio)


def offloads(config: RunConfig) -> bool:
    """Whether shards rest in host memory; on CPUs they are there anyway."""
    return config.learner.offload and config.learner.gpus > 0


BYTES = {"float32": 4, "bfloat16": 2}


def weights_bytes(config: RunConfig, sizes: Sizes) -> float:
    """The network's parameters as they are held: what is trained in fp32, the rest in `model.base_dtype`."""
    network = sizes.transformer
    return MASTER * network.trained + BYTES[config.model.base_dtype] * (network.parameters - network.trained)


def buffers_bytes(config: RunConfig, sizes: Sizes) -> float:
    """The network's buffers, which are of the type of its frozen weights."""
    return BYTES[config.model.base_dtype] * sizes.transformer.buffers


def moments_bytes(config: RunConfig, sizes: Sizes) -> float:
    """Both of Adam's moments of everything that is trained, all ranks together."""
    if config.optimizer.kind == "adamw":
        return 2.0 * MASTER * sizes.transformer.trained
    total = 0
    for parameter in sizes.network.parameters():
        if parameter.requires_grad:
            coded = scales(parameter.shape)
            total += 2 * (MASTER * parameter.numel() if coded is None else parameter.numel() + MASTER * coded[0] * coded[1])
    return float(total)


def encoders_bytes(config: RunConfig, sizes: Sizes) -> float:
    """The text encoders in `model.text_dtype`."""
    return BYTES[config.model.text_dtype] * sum(e.parameters for e in sizes.encoders)


def vae_bytes(sizes: Sizes) -> float:
    """The VAE, which is fp32."""
    return MASTER * sizes.vae.parameters if sizes.vae else 0.0


def learner_rank(config: RunConfig, sizes: Sizes) -> tuple[Part, ...]:
    """A rank at the peak of an update. What the process itself takes is not counted."""
    ranks, network = config.learner.shards, sizes.transformer
    parameters, buffers, trained = weights_bytes(config, sizes), buffers_bytes(config, sizes), MASTER * network.trained
    e, rows, count, based = BYTES[config.model.dtype], micro_rows(config, sizes.tokens), pass_count(config, sizes.tokens), config.model.base_dtype
    saved = sizes.network.saved(sizes.shape, sizes.prompt[0], e, sizes.adapted)
    per_parameter = parameters / network.parameters  # adapters lie in the blocks evenly
    largest = per_parameter * max(sizes.blocks)
    sharded, offloaded = config.learner.shard_blocks, offloads(config)
    whole = gathers_gradients(config, sizes.tokens) or (ranks == 1 and not offloaded)
    gradients = trained if whole else (0.0 if offloaded else trained / ranks) + (min(trained, 2 * largest) if sharded else 0)
    gathered = min(parameters, per_parameter * sizes.root + 3 * largest) if sharded else parameters
    if ranks == 1 and not offloaded:
        gathered = 0.0  # FSDP computes with the shards themselves
    # autocast remembers casts of weights that are trained until the forward pass is over, recomputed or not; those of frozen ones autograd keeps
    kept = (max(saved.weights) if config.learner.recompute else sum(saved.weights)) if sizes.adapted else network.parameters
    casts = 0.0 if e == 4 else 2.0 * (network.trained if based == "bfloat16" else kept)
    sharing = config.learner.sequence_ranks
    activations = rows * saved.peak(config.learner.recompute) / sharing
    masters = "fp32 masters" if based == "float32" else f"fp32 adapters, frozen weights {based}"
    how = "blocks recomputed" if config.learner.recompute else "nothing recomputed"
    shards = tuple(replace(p, bytes=p.bytes + buffers, why=p.why + ", buffers whole") if p.name == "weights" else p for p in _shards(config, sizes, masters))
    reduced = "of two blocks before they go to the host" if offloaded else "sharded, and of two blocks before they are reduced"
    parts = [
        *((Part("weights", buffers, "buffers; the rest in host memory"),) if offloaded else shards),
        Part("gradients", gradients, f"whole while {count} passes accumulate" if whole else reduced),
        Part(
            "gathered weights",
            gathered,
            "root and three blocks: in use, fetched ahead, arriving" if sharded else "the whole network: shard_blocks is false",
        ),
        Part("casts of weights", casts, "bf16, kept for the backward pass"),
        Part("activations", activations, f"{rows} rows a pass{f' of {sharing} ranks' if sharing > 1 else ''}, {how}"),
        Part("rows of a pass", rows * (sizes.prompt_values + 4 * sizes.latent_values) * 4.0 + 6 * rows * sizes.latent_values * 8.0, "inputs; moments in fp64"),
    ]
    if config.objective.kl_weight and not sizes.adapted:
        parts.append(Part("reference", (0.0 if offloaded else parameters / ranks) + buffers, "the starting policy for the reverse KL"))
    if not sharded:
        beside = trained * (1 + 1 / ranks)  # the collective's input and output, beside the gradients
        spare = activations + casts
        parts.append(Part("reduction", max(0.0, beside - spare), "gradients of the whole network at once"))
    if not config.encoder.actors:
        parts.append(Part("text encoders", encoders_bytes(config, sizes), config.model.text_dtype))
    if config.model.init and not config.learner.gpus:
        update = sum(part.bytes for part in parts)
        parts.append(Part("loading", max(0.0, MASTER * network.values - update), "at start: random weights are drawn whole"))
    return tuple(part for part in parts if part.bytes)


def _shards(config: RunConfig, sizes: Sizes, why: str) -> tuple[Part, ...]:
    """What a rank keeps between updates, wherever that is."""
    ranks, trained = config.learner.shards, MASTER * sizes.transformer.trained
    held = "fp32" if config.optimizer.kind == "adamw" else "8 bits a value and scales of blocks"
    return (
        Part("weights", weights_bytes(config, sizes) / ranks, why + (f" over {ranks} ranks" if ranks > 1 else "")),
        Part("optimiser", moments_bytes(config, sizes) / ranks, f"AdamW's two moments, {held}"),
        Part("average", trained / ranks if config.optimizer.ema else 0.0, "moving average of the weights, fp32"),
        Part("old policy", trained / ranks if config.objective.keeps_old else 0.0, "weights that trail the trained ones, fp32"),
    )


def offloaded(config: RunConfig, sizes: Sizes) -> tuple[Part, ...]:
    """What a rank on a GPU keeps in pinned host memory instead (`learner.offload`)."""
    if not offloads(config):
        return ()
    ranks = config.learner.shards
    kept = [*_shards(config, sizes, "offloaded"), Part("gradients", MASTER * sizes.transformer.trained / ranks, "offloaded")]
    if config.objective.kl_weight and not sizes.adapted:
        kept.append(Part("reference", weights_bytes(config, sizes) / ranks, "offloaded"))
    return tuple(kept)


def generator(config: RunConfig, sizes: Sizes, vae: VAEPass, assumptions: Assumptions) -> tuple[Part, ...]:
    """A generator at its peak: the engine's largest forward pass while pictures are decoded, in the middle of an evaluation."""
    network, e, rollout, sampler = sizes.transformer, BYTES[config.model.dtype], config.rollout, config.sampler
    based = config.model.base_dtype
    weights = weights_bytes(config, sizes) + buffers_bytes(config, sizes)
    cast = network.trained if based == "bfloat16" else max(sizes.blocks) if sizes.adapted else network.parameters
    casts = 0.0 if e == 4 else 2.0 * cast
    merged = BYTES[based] * sizes.adapted_weights if config.model.lora.merge else 0
    members, sharing = rollout.concurrent_groups * rollout.group_size if config.uses_policy else 0, rollout.sequence_ranks
    evaluated = parcel(config)
    one = sizes.tokens * (2 if sampler.guidance > 1 else 1)  # more than the budget, it runs alone
    tokens = max(one if members else sizes.tokens, min(sampler.max_tokens, max(members * one, evaluated * sizes.tokens)))
    prompts = config.updates * rollout.groups_per_step * config.uses_policy + config.evaluation.test_prompts
    parts = [
        Part("weights", weights, "fp32; the network runs in them or in casts" if based == "float32" else f"frozen ones in {based}"),
        Part("casts of weights", casts, "bf16, for the time of a forward pass"),
        Part("unmerged weights", merged, "kept beside those that the adapter is merged into"),
        Part(
            "activations",
            tokens * sizes.network.activation_bytes(e) / sharing,
            f"{tokens} tokens a forward pass{f' of {sharing} ranks' if sharing > 1 else ''}",
        ),
        Part("states", members * 3 * sizes.latent_values * 4.0, f"{members} samples as they stand, fp32; what is stored of them is in host memory"),
        Part("weights under evaluation", MASTER * sizes.published_values, "what is trained, of the version that is evaluated; for that time"),
        Part("encoded prompts", min(PROMPT_CACHE, prompts * sizes.prompt_values * 4.0), "cache of at most 256 MiB"),
    ]
    if not config.encoder.actors:
        parts.append(Part("text encoders", encoders_bytes(config, sizes), config.model.text_dtype))
    if sizes.vae is not None:
        parts.append(Part("VAE", vae_bytes(sizes), "fp32"))
        batch = min(vae.batch, max(members, evaluated))
        what = f"{batch} pictures of {sampler.height}x{sampler.width} in one call" if len(sizes.shape) == 3 else f"a clip{' in tiles' * vae.tiled}"
        if config.data.kind != "prepared":
            parts.append(Part("encoding", vae.batch * vae.encode.peak, "held-out pictures of an evaluation, in one call" if len(sizes.shape) == 3 else what))
        parts.append(Part("decoding", batch * vae.decode.peak, what))
    return tuple(part for part in parts if part.bytes)


RANK_PARTS = ("weights", "casts of weights", "unmerged weights", "activations", "weights under evaluation")
"""What of a generator a rank that follows it has too: the network and its share of a pass."""


def _of_ranks(config: RunConfig, parts: tuple[Part, ...]) -> list[Process]:
    """Ranks that follow the generators (`rollout.sequence_ranks`), where there are any; `parts`: of a generator."""
    others = config.rollout.generators * (config.rollout.sequence_ranks - 1)
    return [Process("generator rank", others, config.rollout.gpus, tuple(p for p in parts if p.name in RANK_PARTS))] if others else []


def encoder(config: RunConfig, sizes: Sizes) -> tuple[Part, ...]:
    """An Encoder actor: the text encoders. What a pass of theirs computes with is small beside them, and not counted."""
    parts = [Part("text encoders", encoders_bytes(config, sizes), config.model.text_dtype)]
    if not config.encoder.gpus:
        parts.append(Part("encoded prompts", config.encoder.cache_mb * 2.0**20, "cache"))
    return tuple(part for part in parts if part.bytes)


def rewards(config: RunConfig) -> list[Process]:
    """Rewards on GPUs. VideoAlign's parts are known; others are taken to fill the share that they ask for."""
    from services.config import fleet_of

    if config.fleet.url is not None or not config.reward_names:
        return []
    fleet = fleet_of(config.fleet, config.reward_names)
    return [_reward(name, reward) for name, reward in fleet.rewards.items() if reward.gpus]


def _reward(name: str, reward: RewardSettings) -> Process:
    if not isinstance(reward, VideoAlignConfig):
        return Process(f"reward {name}", reward.replicas.min, reward.gpus, (), reserved=True)
    batch = f"{reward.batch_cost:,} pixels of frames, {reward.batch_items} clips at most"
    held = (Part("weights", cost.weights_bytes(reward), "Qwen2-VL-2B with its head"), Part("activations", cost.batch_bytes(reward), batch))
    return Process(f"reward {name}", reward.replicas.min, reward.gpus, held)


def parcel(config: RunConfig) -> int:
    """Samples that an evaluation asks of a generator at a time, at most."""
    return max(config.evaluation.diversity_samples, turn_size(min(PARCEL, config.evaluation.test_prompts), config.sampler.pixel_bytes))


def _generator_host(config: RunConfig, sizes: Sizes) -> tuple[Part, ...]:
    """What a generator holds of its groups in host memory: trained transitions as they are stored, the member that is being stored, and two turns
    of pixels (`diffusion.engine.decode`) or an evaluation's parcel beside them."""
    rollout, k, bytes_each = config.rollout, config.sampler.trained_count, config.sampler.pixel_bytes
    history = 3 if config.sampler.kernel == "edm_2ab" else 2  # with the prediction before; a state that two steps share stands twice
    stored = sizes.latent_values * (4 if config.objective.on_samples else history * k * BYTES[config.replay.store_dtype])
    member = float(stored * config.uses_policy)
    groups = 2 * rollout.concurrent_groups  # sampled, and as many that wait for their scores
    held = parcel(config)
    pixels = 2 * turn_size(max(held, rollout.group_size), bytes_each) + held
    return (
        Part("stored states", groups * rollout.group_size * member, f"of {groups} groups of {rollout.group_size}, {config.replay.store_dtype}"),
        Part("payload in the making", member, "one member"),
        Part("pixels", float(pixels * bytes_each), f"{pixels} samples, 8 bits: two turns of decoding and a parcel of an evaluation"),
    )


def processes(config: RunConfig, sizes: Sizes, vae: VAEPass, assumptions: Assumptions) -> list[Process]:
    """Everything that may lie on a GPU: learner ranks, generators, rewards."""
    own = Part("process", assumptions.process_gb * 1e9, "context and libraries")
    found = [Process("learner rank", config.learner.ranks, config.learner.gpus, learner_rank(config, sizes))]
    sampling = generator(config, sizes, vae, assumptions)
    found += [Process("generator", config.rollout.generators, config.rollout.gpus, sampling), *_of_ranks(config, sampling)]
    if config.encoder.actors:
        found.append(Process("encoder", config.encoder.actors, config.encoder.gpus, encoder(config, sizes)))
    return [replace(p, parts=(*p.parts, own)) if p.gpus and not p.reserved else p for p in (*found, *rewards(config))]


def hosts(config: RunConfig, sizes: Sizes) -> list[Process]:
    """Host memory of a run's processes, without Python and its libraries, and without what `learner_rank` and `generator` count. In this
    build the anchor feeder runs on a CPU; the evaluator holds pictures and no network; a rank holds its own rows, and draws the noise of all ranks'
    anchor evaluations before it takes its own."""
    row = 2 * sizes.latent_values * 4.0
    transitions, anchors = rank_rows(config)
    repeats = config.sampler.trained_count if config.uses_policy and config.objective.data_per == "transition" else 1
    evaluations = config.data_rows * repeats if config.uses_data else 0
    network, version = weights_bytes(config, sizes) + buffers_bytes(config, sizes), version_bytes(config, sizes)
    data = -(-anchors // repeats)
    texts = sizes.prompt_values * 4.0 * (config.feeds_data * data + config.uses_policy * config.rollout.groups_per_step)
    rank = [
        *offloaded(config, sizes),
        Part("part of the weights", min(PART, version / config.learner.shards), "while it hands in"),
        Part("transitions", transitions * row),
        Part("old policy's predictions", transitions * sizes.latent_values * 4.0 * keeps_predictions(config), "for the rows of the policy loss"),
        Part("anchor evaluations", (anchors + data) * row, "and the data rows they are of"),
        Part("encoded texts", texts + min(PROMPT_CACHE, config.updates * texts), "of an update, and a cache of at most 256 MiB"),
        Part("anchor noise", evaluations * sizes.latent_values * 4.0, "of all ranks"),
        Part("checkpoint", config.learner.checkpoint_async * checkpoint_bytes(config, sizes, config.learner.shards), "a copy, while it is written"),
    ]
    copies = 2 if config.optimizer.ema else 1
    if sizes.adapted and not config.model.init:
        making, why = copies * MASTER * sizes.transformer.trained + min(SHARD, network), "rank 0 only: the adapter, and a file of the merged network"
    else:
        making, why = copies * network, "rank 0 only"
    pixels = Part("VAE", vae_bytes(sizes), "fp32")
    export = Process("export of rank 0", 1, 0, (Part("export in the making", making, why),))
    found = [Process("learner rank", config.learner.ranks, 0, tuple(p for p in rank if p.bytes)), export]
    found.append(
        Process(
            "generator",
            config.rollout.generators,
            0,
            (Part("weights that arrive", version, "mapped or shared memory of its node"), *_generator_host(config, sizes)),
        )
    )  # ranks that follow it read the same files or shared memory
    if config.feeds_data and pixels.bytes:
        found.append(Process("anchor feeder", 1, 0, (pixels,)))
    if config.weights.transport == "objects":
        found.append(Process("object store", 1, 0, (Part("versions", kept_versions(config) * version, "Ray's, over the nodes of the ranks"),)))
    return found


def version_bytes(config: RunConfig, sizes: Sizes) -> float:
    """A published version, in `weights.dtype`."""
    return BYTES[config.weights.dtype] * float(sizes.published_values)


def checkpoint_bytes(config: RunConfig, sizes: Sizes, ranks: int = 1) -> float:
    """What one of so many ranks has of a checkpoint: its shards of what is trained, of the moments, the average and the old policy; buffers whole."""
    trained = MASTER * sizes.transformer.trained
    return (
        ((1 + bool(config.optimizer.ema) + config.objective.keeps_old) * trained + moments_bytes(config, sizes)) / ranks
        + MASTER * sizes.published_values
        - trained
    )


def kept_versions(config: RunConfig) -> int:
    """Most versions that lie anywhere at a time."""
    return WEIGHT_VERSIONS + 1 + (config.evaluation.every > 0)
