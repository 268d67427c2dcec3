"""Claims of groups and data that are given frames, of tiny policies in the published layouts: what a learner is given of image- and video-to-video."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.clips import write_clip
from actors.conditioning import Conditioner, Subject, Subjects
from actors.groups import group_payload, group_request
from actors.payload import DataPayload, encode
from actors.sources.draws import data_source, training_rows
from actors.sources.latents import clean_latents
from diffusion.checkpoint import Policy, load_policy
from diffusion.engine.cache import PromptCache
from diffusion.engine.engine import Engine
from diffusion.families.cosmos import tiny as cosmos
from diffusion.families.wan import tiny as wan
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader
from trainer.config.load import parse_config
from trainer.config.run import RunConfig

SIDE, FRAMES, CLIPS, GROUPS, MEMBERS = 16, 9, 30, (3, 7, 9, 11), 2
POLICIES: dict[str, Any] = {
    "cosmos": cosmos.write_tiny,
    "wan": wan.write_tiny,
    "i2v": lambda folder: wan.write_tiny(folder, "i2v"),
    "ti2v": lambda folder: wan.write_tiny(folder, "ti2v"),
}


def write_clips(folder: Path) -> None:
    """Clips of noise, all of one text."""
    draw = np.random.default_rng(0)
    for i in range(CLIPS):
        write_clip(folder / f"{i}.mp4", draw.integers(0, 256, (FRAMES + 1, SIDE, SIDE, 3), dtype=np.uint8), 16.0)
    lines = [json.dumps({"file_name": f"{i}.mp4", "text": "a red circle", "id": str(i)}) for i in range(CLIPS)]  # all of one text
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def config_of(policy: Path, clips: Path, pairing: str = "free", **changes: Any) -> RunConfig:
    side = 2 * SIDE if policy.name == "ti2v" else SIDE  # whose VAE makes smaller latents
    values: dict[str, Any] = {
        "seed": 5,
        "model": {"path": str(policy)},
        "sampler": {
            "steps": 4,
            "trained_steps": [0, 2],
            "height": side,
            "width": side,
            "frames": FRAMES,
            "given_frames": {"i2v": [1], "ti2v": [0, 1]}.get(policy.name, [0, 1, 2]),
        },
        "rollout": {"groups_per_step": len(GROUPS), "group_size": MEMBERS},
        "data": {"kind": "folder", "path": str(clips), "pairing": pairing},
        "prompts": {"kind": "data"},
        "objective": {"clip": 0.2, "data_weight": 0.3},
        "learner": {"ranks": 1, "micro_batch": 3},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value
    return parse_config(values)


@dataclass(frozen=True)
class Given:
    """A scenario of `ranks.py`: what a group of ranks trains."""

    policy: str
    pairing: str

    def config(self, folder: Path, mesh: dict[str, int] | None = None) -> RunConfig:
        # a large eps, as in ranks.py
        optimizer = {"lr": 5e-3, "ema": 0.9, "eps": 1e-2}
        return config_of(folder / self.policy, folder / "examples", self.pairing, learner=mesh or {}, optimizer=optimizer)

    def write_claim(self, folder: Path, name: str) -> None:
        """Its policy, its clips and its claim, where they are not there."""
        if not (folder / self.policy).exists():
            POLICIES[self.policy](folder / self.policy)
        if not (folder / "examples").exists():
            (folder / "examples").mkdir()
            write_clips(folder / "examples")
        config = self.config(folder)
        ledger = Ledger(config, load_policy(config.model))
        payloads = {ref: list(segments) for ref, segments in ledger.payloads.items()}
        torch.save((ledger.claim, payloads), folder / f"claim-{name}.pt")


SCENARIOS = {
    "frames given to Cosmos": Given("cosmos", "free"),
    "frames given to Cosmos, own data": Given("cosmos", "own"),
    "a frame given to Wan": Given("i2v", "own"),
    "a frame given to TI2V": Given("ti2v", "free"),
}
"""Updates on rows of several shapes, with conditioning of their own."""


class Ledger:
    """A claim of groups that the engine sampled, as a generator does it, and of a batch as the feeder makes it."""

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        sampler, codec = config.sampler, policy.codec
        subjects = Subjects(config.seed, config.prompts, config.data, sampler)
        conditioner = Conditioner(PromptCache(policy.text_encoder), policy.frames, codec, sampler, policy.transformer.needs_picture)
        shape = codec.latent_shape(sampler.height, sampler.width, sampler.frames)
        engine = Engine(policy.transformer, policy.process, sampler.max_tokens)
        self.payloads: dict[str, list[bytearray]] = {}
        self.given = {g: subjects.given_to_group(g) for g in GROUPS}
        groups, data = [], []
        for g in GROUPS:
            subject = subjects.group(g)
            own = config.data.pairing == "own" and subject.example is not None
            x0 = clean_latents([subject.example], codec, sampler.height, sampler.width, FRAMES)[0] if own and subject.example is not None else None
            texts = [subject.text, sampler.negative_prompt]
            shown, negative = conditioner.get([Subject(text, subject.given, subject.example, x0) for text in texts])
            free = policy.transformer.free_shape(shape, subject.given)
            members = engine.run([group_request(sampler, config.rollout, config.seed, g, shown, negative, free)])
            self.payloads[f"g{g}"] = encode(group_payload(members, subject.text, x0))
            rewards = [float(m + g) for m in range(MEMBERS)]
            groups.append(ClaimedGroup(g, GroupHeader(rewards, MEMBERS, 0, 0, "", scores={"ocr": rewards}), f"g{g}"))
        if config.feeds_data:
            rows = training_rows(data_source(config.data), 0.5, config.seed, 1, config.data_rows)
            x0 = clean_latents([example for _, example in rows], codec, sampler.height, sampler.width, FRAMES)
            self.payloads["d1"] = encode(DataPayload(tuple(text for text, _ in rows), x0))
            data = [ClaimedData(1, "d1", "")]
        self.claim = Claim(1, 1, groups, data)

    def read(self, item: ClaimedGroup | ClaimedData, segments: list[int]) -> list[bytearray]:
        return [self.payloads[item.ref][i] for i in segments]
