"""Anchor data drawn from a policy beforehand: exactly N samples of each prompt, as a prepared set.

Latents are stored as they were drawn, not decoded and encoded again. A shard is a function of its prompts, the policy and the settings:
noise is named by the prompt's number and the sample's, and a shard's samples are drawn together and with nobody else's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.conditioning import Conditioner, Subject
from actors.prepared import FORMAT, Manifest, Row, begin, finish, shard_file, shard_rows, write_shard
from actors.sources.draws import listed
from actors.sources.example import DRAWS, Example, Source, SourceError
from diffusion.checkpoint import Policy
from diffusion.codecs import Codec
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.digests import codec_digest, network_digest
from diffusion.engine.cache import PromptCache
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.seeds import key

KERNEL = "ddim_eta"
"""Deterministic: every family of policies has it, and for a flow it is Euler's ODE step."""


class PresamplingFailed(Exception):
    """A sample that came out unusable; the message names it."""


@dataclass(frozen=True)
class Presampling:
    """What is drawn.

    Attributes:
        examples: whose texts are the prompts; their ids name the splits.
        per_prompt: samples of each.
        rows: samples of a shard, rounded to whole prompts; of clips fewer, see `shard_rows`.
    """

    out: Path
    model: ModelConfig
    sampler: SamplerConfig
    examples: Sequence[Example]
    per_prompt: int
    rows: int
    steps: int
    guidance: float
    seed: int = 0


def chosen(source: Source, n: int | None) -> list[Example]:
    """`n` examples of distinct texts, of all splits in their shares: the first of a list, else as they are drawn; None = the whole list.

    Raises:
        SourceError: there are not so many, or the source has no end and `n` is not given.
    """
    every = listed(source)
    found: dict[str, Example] = {}
    if every is not None:
        for example in every:
            found.setdefault(example.text, example)
            if len(found) == n:
                break
    elif n is None:
        raise SourceError("the recipe's prompts have no end; say with --prompts how many are sampled")
    else:
        rng = np.random.default_rng(key("presample"))
        for _ in range(20 * n + DRAWS):
            example = source.draw(rng)
            found.setdefault(example.text, example)
            if len(found) == n:
                break
    if n is not None and len(found) < n:
        raise SourceError(f"the recipe's prompt source has only {len(found)} distinct prompts, {n} were asked for; lower --prompts")
    return list(found.values())


def presample(p: Presampling, policy: Policy, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Draw what is missing of the set, and finish it.

    Args:
        policy: that of `p.model`, as it was loaded, on its device.
        progress: told how many shards there are, and of how many.

    Raises:
        PreparedError: `out` holds something else.
        ValueError: a size or a prompt that the policy cannot sample.
        SamplingFailed, StepFailed, PresamplingFailed: a sample could not be drawn.
    """
    folder, s = policy.source.folder, p.sampler
    latent = policy.codec.latent_shape(s.height, s.width, s.frames)
    codec = codec_digest(folder)
    clips = {"frames": s.frames, "fps": s.fps} if policy.codec.video else {}
    per_shard = max(1, shard_rows(p.rows, latent, s.height, s.width) // p.per_prompt)
    shards = -(-len(p.examples) // per_shard)
    prompts = hashlib.blake2b(json.dumps([(example.id, example.text) for example in p.examples]).encode(), digest_size=16).hexdigest()
    plan = {"format": FORMAT, "prompts": prompts, "codec": codec, "network": "random" if p.model.init else network_digest(folder), "dtype": p.model.dtype}
    drawn = {"height": s.height, "width": s.width, "steps": p.steps, "guidance": p.guidance, "negative_prompt": s.negative_prompt, "seed": p.seed}
    given = min(s.given_choices)  # text-to-video where the run has some of it: such samples have first frames to give, too
    begin(p.out, plan | drawn | clips | ({"given_frames": given} if given else {}) | {"per_prompt": p.per_prompt, "shard_prompts": per_shard})
    engine = Engine(policy.transformer, policy.process, s.max_tokens, p.model.dtype)
    conditioner = Conditioner(PromptCache(policy.text_encoder, engine.runner.device), policy.frames, policy.codec, s, policy.transformer.needs_picture)
    shape = policy.transformer.free_shape(latent, given)
    for number in range(shards):
        if not shard_file(p.out, number).exists():
            _draw(p, engine, conditioner, policy.codec, range(number * per_shard, min((number + 1) * per_shard, len(p.examples))), number, given, shape)
        if progress is not None:
            progress(number + 1, shards)
    return finish(p.out, shards, [], codec=codec, model=str(folder.resolve()), height=s.height, width=s.width, latent=latent, **clips)


def _draw(p: Presampling, engine: Engine, conditioner: Conditioner, codec: Codec, prompts: range, number: int, given: int, shape: tuple[int, ...]) -> None:
    """Draw the samples of these prompts, all given as many frames, and write them as shard `number`."""
    examples = p.examples[prompts.start : prompts.stop]
    shown = conditioner.get([Subject(example.text, given, example) for example in examples])
    negative = conditioner.get([Subject(p.sampler.negative_prompt, given, example) for example in examples]) if p.guidance != 1 else [None] * len(examples)
    requests = [
        SampleRequest(
            shape,
            p.steps,
            conditioning=shown[i],
            n=p.per_prompt,
            seed=key(p.seed, "presample"),
            group=group,
            kernel=KERNEL,
            guidance=p.guidance,
            negative=negative[i],
            id=example.text,
        )
        for i, (group, example) in enumerate(zip(prompts, examples, strict=True))
    ]
    samples = engine.run(requests)
    rows = []
    for one in samples:
        if not torch.isfinite(one.latent).all():
            raise PresamplingFailed(f"sample {one.member} of the prompt {one.request.id!r} is not finite; try model.dtype=float32, or less guidance")
        example = p.examples[one.request.group]
        rows.append(Row(example.id, example.text, f"prompt {one.request.group} sample {one.member}", p.sampler.width, p.sampler.height))
    first = np.stack([_first(codec, one.whole) for one in samples]) if codec.video else None
    write_shard(p.out, number, torch.stack([one.whole for one in samples]).numpy(), rows, [], first)


def _first(codec: Codec, latent: Tensor) -> NDArray[np.uint8]:
    """First frame `[H, W, 3]` of a clip's latent: clips are decoded causally, so it needs the first latent frame alone."""
    frame: NDArray[np.uint8] = codec.decode(latent[None, :, :1])[0, 0]
    return frame
