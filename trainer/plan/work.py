"""Operations of an update, the seconds they take at a stated utilisation, what goes over links, and what it costs at a given price."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion.pixels import turn_size
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import VAEPass
from trainer.plan.gpus import GPU
from trainer.plan.memory import MASTER, PARCEL, asks_old, gathers_gradients, moments_bytes, offloads, passes, version_bytes, weights_bytes
from trainer.plan.sizes import Sizes
from trainer.plan.storage import Storage


@dataclass(frozen=True)
class Work:
    """Operations and seconds.

    Attributes:
        tokens: of one sample, text included where the network computes on it.
        forward: operations of one forward pass of one sample.
        forwards: passes of the network in an update, in forwards: `sampling`, and `training` with its backward passes.
        sampling, prompts, decoding, training: operations of an update where generators and learner run; `prompts` through the text encoders;
            `decoding` has the encoding of groups' own examples (`data.pairing: own`) in it.
        encoding: operations of an update beside generators and learner: anchor pictures through the VAE, on a CPU thread, and their captions
            through the text encoders (without Encoder actors ranks do that while they would train); a set that `ddrl prepare-data` made has its
            pictures encoded.
        evaluation: operations of one periodic evaluation, which generators do beside their rollouts; None without.
        seconds: of an update by stage: `sampling` with prompts and decoding, `training`, `encoding`; `update`, the whole on GPUs; `evaluation`;
            `offload`, the part of training that waits for PCIe and for the optimiser's step on the host, where `learner.offload` is set.
        colocated: sampling and training take turns on the same GPUs.
        links: bytes of an update by what they are.
        hours: of the whole run, by the seconds of an update.
        cost: of those hours at the price that was given, None without.
    """

    tokens: int
    forward: float
    forwards: dict[str, float]
    sampling: float
    prompts: float
    decoding: float
    training: float
    encoding: float
    evaluation: float | None
    seconds: dict[str, float]
    colocated: bool
    links: dict[str, float]
    hours: float
    cost: float | None


def forwards(config: RunConfig) -> dict[str, float]:
    """Forward passes of the network in an update, a backward pass counted as two (an adapter's takes less: frozen weights have no
    gradient); guidance adds an unconditional branch, which has no backward pass."""
    rollouts = config.rollout.groups_per_step * config.rollout.group_size if config.uses_policy else 0
    k, guided = config.sampler.trained_count, config.sampler.guidance > 1
    trained = 4.0 if config.learner.recompute else 3.0
    per_transition = trained + guided + (config.objective.kl_weight > 0) * (1 + guided) + asks_old(config) * (1 + guided)
    repeats = k if config.uses_policy and config.objective.data_per == "transition" else 1
    return {
        "sampling": rollouts * config.sampler.steps * (1.0 + guided),
        "policy loss": rollouts * k * per_transition,
        "data loss": config.data_rows * repeats * trained if config.uses_data else 0.0,
    }


def offloaded_bytes(config: RunConfig, sizes: Sizes) -> tuple[float, float]:
    """Of a rank in an update with `learner.offload`: bytes over PCIe, and of host memory that optimiser and average go through; 0 without.

    Shards of the weights go to the GPU whenever they are gathered: for each forward pass and once more for its backward pass, or with
    `shard_blocks: false` once a pass; gradients come back when they are reduced, once or in every pass. A step reads and writes weights,
    gradient, moments, average and old policy.
    """
    if not offloads(config):
        return 0.0, 0.0
    ranks, trained = config.learner.shards, MASTER * sizes.transformer.trained / config.learner.shards
    transitions, anchors = passes(config, sizes.tokens)
    guided, reference = config.sampler.guidance > 1, config.objective.kl_weight > 0
    again = 1 if config.learner.shard_blocks else 0  # gathered again; a network that is one unit stays until its backward pass
    gathers = transitions * (1 + again * (1 + guided) + asks_old(config)) + anchors * (1 + again)
    if reference:
        gathers += transitions * ((1 if sizes.adapted else 0) * again * (1 + guided) + (0 if sizes.adapted else 1 + again * guided))
    reductions = 1 if gathers_gradients(config, sizes.tokens) else transitions + anchors
    step = 3 * trained + 2 * moments_bytes(config, sizes) / ranks + 3 * trained * (bool(config.optimizer.ema) + config.objective.keeps_old)
    updates = config.learner.updates_per_claim
    return updates * (gathers * weights_bytes(config, sizes) / ranks + reductions * trained), updates * step


def pictures_of(config: RunConfig) -> tuple[int, int]:
    """Pictures of a periodic evaluation, one a prompt and those of the diversity figure, which are made one after the other."""
    e = config.evaluation
    return e.dev_prompts, max(1, e.diversity_prompts // 4) * e.diversity_samples


def evaluators(config: RunConfig) -> float:
    """Generators that a periodic evaluation keeps busy in the mean: it comes in parcels, of which a generator has one at a time."""
    sizes = pictures_of(config)
    size = turn_size(PARCEL, config.sampler.pixel_bytes)
    rounds = sum(-(-pictures // (size * config.rollout.generators)) for pictures in sizes)
    return max(1.0, sum(sizes) / (size * rounds))


def samplers(config: RunConfig) -> float:
    """Generators that an update keeps busy in the mean: a group is one generator's, and no more groups are in the making than may be waiting."""
    generators, groups = config.rollout.generators, config.rollout.groups_per_step
    if config.replay.max_staleness:
        return min(generators, groups * (1 + config.replay.max_staleness))
    return groups / -(-groups // generators)


def work_of(config: RunConfig, sizes: Sizes, vae: VAEPass, storage: Storage, gpu: GPU, count: int, assumptions: Assumptions, price: float | None) -> Work:
    """See `Work`. `count`: GPUs that there are; `price`: of one GPU an hour."""
    forward, passes = float(sizes.network.forward_flops(sizes.shape, sizes.prompt[0])), forwards(config)
    rollouts = config.rollout.groups_per_step * config.rollout.group_size if config.uses_policy else 0
    prompt = 2.0 * sizes.prompt[0] * sum(e.parameters for e in sizes.encoders)
    anchors = config.data_rows if config.feeds_data else 0
    pictures = anchors if config.data.kind != "prepared" else 0
    prompts = prompt * config.rollout.groups_per_step if config.uses_policy else 0.0
    sampling, decoding = passes["sampling"] * forward, rollouts * vae.decode.flops
    if config.uses_data and not config.feeds_data and config.data.kind != "prepared":
        decoding += config.rollout.groups_per_step * vae.encode.flops
    training = (passes["policy loss"] + passes["data loss"]) * forward
    drawn = pictures * vae.encode.flops
    encoding = drawn + anchors * prompt
    evaluation = None
    if config.evaluation.every:
        e = config.evaluation
        pictures = sum(pictures_of(config))
        evaluation = pictures * (config.sampler.eval_steps * forward + vae.decode.flops) + e.loss_points / 4 * forward

    cpu = assumptions.cpu_gflops * 1e9

    def seconds(operations: float, parts: float, gpus: float, rate: float) -> float:
        """Of processes that share the work, each on a GPU of its own as long as there are enough, or on a thread."""
        if not gpus:
            return operations / (parts * cpu)
        return operations / (min(parts, count) * rate) if count else float("nan")

    r, learner, rate = config.rollout, config.learner, gpu.rate(config.model.dtype)
    text_rate = gpu.rate(config.model.text_dtype) * assumptions.rollout_utilisation
    busy = samplers(config) if config.uses_policy else r.generators
    sample_s = seconds(sampling, busy * r.sequence_ranks, r.gpus, rate * assumptions.rollout_utilisation)
    texts = config.encoder
    actors = texts.actors * (1 if texts.gpus else texts.threads)
    sample_s += seconds(prompts, actors, texts.gpus, text_rate) if actors else seconds(prompts, busy, r.gpus, text_rate)
    encoding_s = drawn / cpu + (seconds(anchors * prompt, actors, texts.gpus, text_rate) if actors else 0.0)
    sample_s += seconds(decoding, busy, r.gpus, gpu.fp32 * assumptions.rollout_utilisation)  # the VAE runs in fp32
    train_s = seconds(training, learner.ranks, learner.gpus, rate * assumptions.train_utilisation)
    over_pcie, on_host = offloaded_bytes(config, sizes)
    offload_s = over_pcie / (assumptions.pcie_gb_s * 1e9) + on_host / (assumptions.host_gb_s * 1e9)
    train_s += offload_s
    if not actors:  # ranks encode what they train on, before they do
        train_s += seconds(anchors * prompt + prompts, learner.data_ranks, learner.gpus, text_rate)
    colocated = r.gpus > 0 and learner.gpus > 0 and r.generators * r.sequence_ranks + learner.ranks > count
    evaluated: dict[str, float] = {}
    if evaluation is not None:
        evaluated["evaluation"] = seconds(evaluation, evaluators(config) * r.sequence_ranks, r.gpus, rate * assumptions.rollout_utilisation)
    turns = config.uses_policy and (colocated or config.replay.max_staleness == 0)
    update = sample_s + train_s if turns else max(sample_s, train_s)
    hours = config.updates * update / 3600
    version = version_bytes(config, sizes)
    generators = r.generators * r.sequence_ranks if config.uses_policy else 0
    read = config.feeds_data * config.data_rows + config.uses_policy * config.rollout.groups_per_step  # a group's own datum has its text
    embeds = read * sizes.prompt_values * 4.0 if config.encoder.actors else 0.0
    return Work(
        tokens=sizes.tokens,
        forward=forward,
        forwards=passes,
        sampling=sampling,
        prompts=prompts,
        decoding=decoding,
        training=training,
        encoding=encoding,
        evaluation=evaluation,
        seconds={"sampling": sample_s, "training": train_s, "update": update, "encoding": encoding_s}
        | ({"offload": offload_s} if offload_s else {})
        | evaluated,
        colocated=colocated,
        links={
            "weights, handed in by ranks": version,
            "weights, read by generators": version * generators,
            "groups, written and read": 2.0 * config.rollout.groups_per_step * storage.group if config.uses_policy else 0.0,
            "anchor batch, written and read": 2.0 * storage.data,
            "encoded texts, read by ranks": embeds,
        },
        hours=hours,
        cost=None if price is None else hours * count * price,
    )
