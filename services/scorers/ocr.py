"""The OCR reward: RapidOCR reads the image, ``scorers.text`` judges what it read.

Two readings. ``recognition`` takes each image as one line of text and calls the recogniser directly, in batches
of equal shape: the network then runs at the images' own width (48x144 for 16x48 px upscaled by 3) instead of
the 48x320 that RapidOCR pads to, and a reading cannot depend on which other images share the batch.
``detection`` finds lines first. Of a clip every ``frame_stride``-th frame is read, and all of a batch's frames together.

The engine also accepts paths and URLs, so only arrays ever reach it. One thread per engine: replicas are the
unit of parallelism. Numbers do not match PaddleOCR's character for character; the string rule is exact, the
engine is named in the revision.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from rapidocr import RapidOCR
from rapidocr.ch_ppocr_rec import TextRecInput

from services.contract import FrameSpec, ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.media.frames import take
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.settings import OcrReward
from services.scorers.text import NO_QUOTED_TEXT, SUB_SCORES, Target, quoted_target, score_clip_text, score_text

logger = logging.getLogger(__name__)

ENGINE_ERROR = "engine_error"
LINE_HEIGHT = 48  # the recogniser's input height
MIN_WIDTH = 48  # narrower lines are padded to this; wider ones keep their own width


class OcrScorer(Scorer):
    """Reads text with RapidOCR (PP-OCR models bundled in its wheel; no download, no network)."""

    name = "ocr"
    media = ("image", "video")
    sub_scores = SUB_SCORES

    def __init__(self, config: OcrReward) -> None:
        self._config = config
        self.reward = config.mode
        # Process-wide: OpenCV would otherwise start a thread per core in every replica.
        cv2.setNumThreads(1)
        params: dict[str, Any] = {
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Global.use_det": config.reading == "detection",
            "Global.text_score": config.min_confidence,
            "Det.limit_type": "max",
            "Det.limit_side_len": config.detection_side_limit,
            "Rec.rec_batch_num": config.lines_per_call,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        if config.reading == "recognition":
            params["Rec.rec_img_shape"] = [3, LINE_HEIGHT, MIN_WIDTH]
        self._engine: Any = RapidOCR(params=params)
        # The engine loads its networks at first use; `text_rec` exists from then on.
        self._engine(np.full((LINE_HEIGHT, 3 * LINE_HEIGHT, 3), 255, np.uint8), use_det=False)
        self._engine.use_det = config.reading == "detection"  # a call without detection leaves it off

    @property
    def revision(self) -> str:
        c, cfg = self._config, self._engine.cfg
        networks = [cfg.Rec] if c.reading == "recognition" else [cfg.Det, cfg.Rec]
        names = [f"{n.ocr_version.value}_{n.task_type.value}_{n.model_type.value}" for n in networks]
        side = f"-side{c.detection_side_limit}" if c.reading == "detection" else ""
        reading = f"{c.reading}{side};upscale-{c.upscale}-cubic;confidence-{c.min_confidence:g};stride-{c.frame_stride}"
        return f"{c.mode}-1;rapidocr-{version('rapidocr')};{'+'.join(names)};{reading}"

    @property
    def preprocessing(self) -> str:
        c = self._config
        side = f";longest-side-{c.detection_side_limit}" if c.reading == "detection" else f";line-height-{LINE_HEIGHT}"
        return f"bgr;upscale-{c.upscale}-cubic{side}"

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(kind="stride", stride=self._config.frame_stride)

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``. Prompts without a target are refused before any pixel is read."""
        targets = [quoted_target(prompt) for prompt in prompts]
        wanted = [i for i, target in enumerate(targets) if isinstance(target, Target)]
        frames = {i: take(self.frame_spec, media[i]).frames for i in wanted}
        read = iter(self.read([frame for i in wanted for frame in frames[i]]))
        lines = {i: [next(read) for _ in frames[i]] for i in wanted}
        return [self._judged(t, lines[i], media[i].is_video) if isinstance(t, Target) else t for i, t in enumerate(targets)]

    def _judged(self, target: Target, frames: list[list[str] | ScoreFailure], is_clip: bool) -> ItemScore | ScoreFailure:
        """The score of one item from what was read in each of its frames; a frame that cannot be read fails the item."""
        good: list[list[str]] = []
        for lines in frames:
            if isinstance(lines, ScoreFailure):
                return lines
            good.append(lines)
        mode = self._config.mode
        return score_clip_text(target, good, mode) if is_clip else score_text(target, good[0], mode)

    def read(self, images: Sequence[Image]) -> list[list[str] | ScoreFailure]:
        """Images [H, W, 3] of any sizes → recognised lines per image in reading order; an empty list when there is nothing to read."""
        if self._config.reading == "detection":
            return [self._guarded([image])[0] for image in images]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(i)
        out: list[list[str] | ScoreFailure] = [[] for _ in images]
        for indices in by_shape.values():
            for start in range(0, len(indices), self._config.lines_per_call):
                part = indices[start : start + self._config.lines_per_call]
                for i, lines in zip(part, self._guarded([images[i] for i in part]), strict=True):
                    out[i] = lines
        return out

    def self_test(self) -> None:
        """Read a drawn '407': 1 when asked for it, less when asked for '862', a failure without quotes."""
        image = _drawn("407", scale=1 if self._config.reading == "recognition" else 4)
        right, wrong, none = self.score(['a "407"', 'a "862"', "a 407"], [Media.image(image)] * 3)
        if not (isinstance(right, ItemScore) and right.reward == 1.0):
            raise ScorerUnfit(f"{self.revision}: a clean '407' scored {right}, not 1.0")
        if not (isinstance(wrong, ItemScore) and wrong.reward < 1.0):
            raise ScorerUnfit(f"{self.revision}: a clean '407' judged as '862' scored {wrong}")
        if not (isinstance(none, ScoreFailure) and none.code == NO_QUOTED_TEXT):
            raise ScorerUnfit(f"{self.revision}: a prompt without quotes gave {none}")

    def _guarded(self, images: Sequence[Image]) -> list[list[str] | ScoreFailure]:
        """Read a batch; if the engine raises, read one by one so that only the culprit fails."""
        try:
            return list(self._recognise(images) if self._config.reading == "recognition" else self._detect(images))
        except Exception as error:  # the engine raises anything from cv2.error to ONNXRuntimeError
            if len(images) > 1:
                return [self._guarded([image])[0] for image in images]
            logger.exception("the OCR engine failed on an image of shape %s", images[0].shape)
            message = f"the OCR engine failed on this image ({type(error).__name__})"
            return [ScoreFailure(ENGINE_ERROR, message)]

    def _recognise(self, images: Sequence[Image]) -> list[list[str]]:
        out = self._engine.text_rec(TextRecInput(img=[self._prepared(image) for image in images]))
        keep = self._config.min_confidence
        return [[text] if text and confidence >= keep else [] for text, confidence in zip(out.txts, out.scores, strict=True)]

    def _detect(self, images: Sequence[Image]) -> list[list[str]]:
        return [list(self._engine(self._prepared(image)).txts or ()) for image in images]

    def _prepared(self, image: Image) -> Image:
        """RGB → the BGR the engine expects, upscaled."""
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        k = self._config.upscale
        if k == 1:
            return bgr
        return np.asarray(cv2.resize(bgr, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC), np.uint8)


def _drawn(text: str, scale: int) -> Image:
    """Black ``text`` on a white [16·scale, 48·scale] image, in the font that ships inside Pillow."""
    picture = PILImage.new("RGB", (48 * scale, 16 * scale), "white")
    # Whole-pixel positions: a fractional one makes Pillow cut the first row of the glyphs.
    ImageDraw.Draw(picture).text((10 * scale, 0), text, fill="black", font=ImageFont.load_default(13 * scale))
    return np.asarray(picture, np.uint8)
