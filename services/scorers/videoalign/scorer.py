"""The VideoAlign reward: clips and prompts in; visual quality, motion quality, text alignment and their sum out.

Each item is prepared alone (frames, resize, patches, tokens); what cannot be prepared fails alone, as a typed failure.
The rest is scored in batches, padded on the right. The decoder is causal, so a result does not depend on the batch
beyond the rounding of the precision in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.contract import FrameSpec, ItemScore, ScoreFailure
from services.media.base import Media
from services.media.frames import TooFewFrames, frame_count, take
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.videoalign.config import VideoAlignConfig
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.frames import TEMPORAL_PATCH, UnusableSize, frame_spec, grid, resized, video_tokens
from services.scorers.videoalign.loader import load
from services.scorers.videoalign.pixels import patchify, resize

MEDIA_NOT_SUPPORTED = "media_not_supported"
TOO_FEW_FRAMES = "too_few_frames"
UNUSABLE_SIZE = "unusable_size"
VIDEO_TOO_LONG = "video_too_long"
NOT_FINITE = "not_finite"

# How far VQ and MQ of one clip may lie apart under two prompts: rounding, which bfloat16 has much of.
SELF_TEST_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class Prepared:
    """One item ready for the model: resized frames uint8 [T, 3, h, w], a quarter of their patches' size, and token ids."""

    planes: Tensor
    ids: list[int]
    cost: int


class VideoAlignScorer(Scorer):
    """KwaiVGI's VideoReward, or a model trained with VideoAlign's trainer."""

    name = "videoalign"
    media = ("video",)
    sub_scores = ("vq", "mq", "ta", "overall", "overall_mean")

    def __init__(self, config: VideoAlignConfig) -> None:
        self._config = config
        self.reward = config.reward
        self._loaded = load(config)
        settings = self._loaded.settings
        if config.normalise == "always" and settings.spread is None:
            raise CheckpointError(f"{config.path} states no mean and deviation (inference_config); set normalise: auto or never")
        self._spread = None if config.normalise == "never" else settings.spread
        self._spec = frame_spec(settings.fps, settings.num_frames, settings.max_frame_pixels)

    @property
    def revision(self) -> str:
        scale = "raw" if self._spread is None else "normalised-" + ",".join(f"{s.mean:g}/{s.std:g}" for s in self._spread)
        libraries = f"torch-{torch.__version__};transformers-{version('transformers')}"
        return f"videoalign-1;{self._loaded.identity};{scale};reward-{self.reward};{self.preprocessing};{libraries}"

    @property
    def preprocessing(self) -> str:
        s = self._spec
        rate = f"{s.fps:g}fps" if s.fps is not None else "fixed"
        frames = f"{rate}-{s.min_frames}to{s.max_frames}-even;max{s.max_frame_pixels}px-by{s.multiple_of}"
        return f"{frames};bicubic-antialias-uint8;template-{self._config.template_sha256[:12]}"

    @property
    def frame_spec(self) -> FrameSpec:
        return self._spec

    def cost(self, media: Media) -> int:
        """Pixels after sampling and resize: what the model's work grows with. 0 for what it will refuse."""
        try:
            frames = len(media.frames) if media.fps is None or media.selected else frame_count(self._spec, len(media.frames), media.fps)
            height, width = self._size(media)
        except (TooFewFrames, UnusableSize):
            return 0
        return frames * height * width

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``. Failures: ``prompt_refused`` for control tokens in the prompt, and others named in this module."""
        prepared = [self._prepare(prompt, item) for prompt, item in zip(prompts, media, strict=True)]
        ready = [(i, item) for i, item in enumerate(prepared) if isinstance(item, Prepared)]
        results: dict[int, ItemScore | ScoreFailure] = {i: item for i, item in enumerate(prepared) if isinstance(item, ScoreFailure)}
        for batch in self._batches(ready):
            raw = self._raw([item for _, item in batch])
            results.update((i, self._judge(row)) for (i, _), row in zip(batch, raw, strict=True))
        return [results[i] for i in range(len(prepared))]

    def self_test(self) -> None:
        """Score one small clip under two prompts of different length: all finite, VQ and MQ alike.

        This exercises every weight, the padding and the causal order; there is no public clip with a known score.
        """
        frames = np.random.default_rng(0).integers(0, 256, (TEMPORAL_PATCH, 56, 56, 3), np.uint8)
        planes = resize(frames, (56, 56))
        ids = [
            self._loaded.tokenizer.encode(prompt, video_tokens(grid(TEMPORAL_PATCH, 56, 56)))
            for prompt in ("a cat", "a long walk through a quiet town in the rain")
        ]
        items = [Prepared(planes, i, 0) for i in ids if not isinstance(i, ScoreFailure)]
        if len(items) != len(ids):
            raise ScorerUnfit("videoalign: the tokenizer refuses a plain prompt")
        first, second = self._raw(items)
        allowed = SELF_TEST_TOLERANCE[self._loaded.model.rm_head.weight.dtype]
        if not all(map(np.isfinite, (*first, *second))) or max(abs(first[0] - second[0]), abs(first[1] - second[1])) > allowed:
            raise ScorerUnfit(f"videoalign: the self-test clip scores {first} and {second}; VQ and MQ must be finite and must not depend on the prompt")

    def _size(self, media: Media) -> tuple[int, int]:
        _, height, width, _ = media.frames.shape
        return resized(height, width, self._loaded.settings.max_frame_pixels)

    def _prepare(self, prompt: str, media: Media) -> Prepared | ScoreFailure:
        if not media.is_video:
            return ScoreFailure(MEDIA_NOT_SUPPORTED, "videoalign scores clips; this is an image")
        try:
            frames = take(self._spec, media).frames
            size = self._size(media)
        except TooFewFrames as error:
            return ScoreFailure(TOO_FEW_FRAMES, str(error))
        except UnusableSize as error:
            return ScoreFailure(UNUSABLE_SIZE, str(error))
        if len(frames) < TEMPORAL_PATCH or len(frames) % TEMPORAL_PATCH:
            return ScoreFailure(TOO_FEW_FRAMES, f"{len(frames)} selected frames; the reward needs an even number, at least {TEMPORAL_PATCH}")
        tokens = video_tokens(grid(len(frames), *size))
        ids = self._loaded.tokenizer.encode(prompt, tokens)
        if isinstance(ids, ScoreFailure):
            return ids
        if len(ids) > self._config.max_tokens:
            return ScoreFailure(VIDEO_TOO_LONG, f"clip and prompt make {len(ids)} tokens; this service takes {self._config.max_tokens}")
        return Prepared(resize(frames, size), ids, len(frames) * size[0] * size[1])

    def _batches(self, items: Sequence[tuple[int, Prepared]]) -> Iterator[list[tuple[int, Prepared]]]:
        """Cut by items and cost; items of like length together, so that little padding is computed."""
        batch: list[tuple[int, Prepared]] = []
        for entry in sorted(items, key=lambda entry: len(entry[1].ids)):
            cost = sum(item.cost for _, item in batch) + entry[1].cost
            if batch and (cost > self._config.batch_cost or len(batch) == self._config.batch_items):
                yield batch
                batch = []
            batch.append(entry)
        if batch:
            yield batch

    def _raw(self, items: Sequence[Prepared]) -> list[list[float]]:
        """Raw VQ, MQ, TA of each item, in one padded batch."""
        tokenizer, device = self._loaded.tokenizer, self._loaded.device
        longest = max(len(item.ids) for item in items)
        ids = torch.tensor([item.ids + [tokenizer.pad_id] * (longest - len(item.ids)) for item in items])
        patches, grids = zip(*(patchify(item.planes.to(device)) for item in items), strict=True)
        raw: Any = self._loaded.model(ids.to(device), torch.cat(patches), torch.tensor(grids, device=device))
        rows: list[list[float]] = raw.float().cpu().tolist()
        return rows

    def _judge(self, raw: Sequence[float]) -> ItemScore | ScoreFailure:
        if not all(map(np.isfinite, raw)):
            return ScoreFailure(NOT_FINITE, "the model's output is not finite")
        vq, mq, ta = raw if self._spread is None else [(value - s.mean) / s.std for value, s in zip(raw, self._spread, strict=True)]
        total = vq + mq + ta
        scores = {"vq": vq, "mq": mq, "ta": ta, "overall": total, "overall_mean": total / 3}
        return ItemScore(scores[self.reward], scores)
