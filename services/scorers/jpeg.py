"""The JPEG reward: how many bytes a picture takes as a JPEG file. Weightless, and a detector of blank or noisy pictures.

``incompressibility``  kilobytes (1000 bytes) of the file, as in DDPO and flow_grpo
``compressibility``    minus kilobytes over 500, as in flow_grpo (DDPO: without the 500)
``bits_per_pixel``     the same size, comparable across picture sizes

The encoder is Pillow's with its default chroma subsampling. A clip gets the means over its frames, each a file.

Worked example: a black 256x256 picture at quality 95 takes 1651 bytes → 1.651, -0.003302, 0.2015.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import __version__ as pillow_version
from PIL import features

from services.contract import ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.settings import JpegReward

ENCODE_FAILED = "encode_failed"
KB = 1000.0
COMPRESSIBILITY_KB = 500.0  # flow_grpo's divisor


class JpegScorer(Scorer):
    """Size of a picture or of a clip's frames as JPEG files."""

    name = "jpeg"
    media = ("image", "video")
    sub_scores = ("incompressibility", "compressibility", "bits_per_pixel")
    needs_prompt = False

    def __init__(self, config: JpegReward) -> None:
        self._quality = config.quality
        self.reward = config.reward

    @property
    def revision(self) -> str:
        codec = features.version("libjpeg_turbo") or features.version("jpg")
        return f"jpeg-1;{self.reward};quality-{self._quality};pillow-{pillow_version};libjpeg-{codec}"

    @property
    def preprocessing(self) -> str:
        return "none"

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``; prompts are not looked at."""
        return [self._one(item) for item in media]

    def self_test(self) -> None:
        """Noise takes more bytes than a flat picture of the same size, and twice the same picture twice the same."""
        flat, noise = np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        small, large, again = (self._bytes(image) for image in (flat, noise, noise))
        if not 0 < small < large == again:
            raise ScorerUnfit(f"{self.revision}: a flat picture took {small} bytes, noise {large} and then {again}")

    def _one(self, item: Media) -> ItemScore | ScoreFailure:
        frames = item.frames
        try:
            sizes = [self._bytes(frame) for frame in frames]
        except (OSError, ValueError, SystemError) as error:  # an empty picture, or more than 65535 pixels a side
            return ScoreFailure(ENCODE_FAILED, f"a picture of {frames.shape[1]}x{frames.shape[2]} pixels cannot be a JPEG file ({type(error).__name__})")
        size = sum(sizes) / len(sizes)
        scores = {
            "incompressibility": size / KB,
            "compressibility": -size / KB / COMPRESSIBILITY_KB,
            "bits_per_pixel": 8 * size / (frames.shape[1] * frames.shape[2]),
        }
        return ItemScore(scores[self.reward], scores)

    def _bytes(self, image: Image) -> int:
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, "JPEG", quality=self._quality)
        return buffer.tell()
