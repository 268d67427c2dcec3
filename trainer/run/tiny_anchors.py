"""Anchor data of a tiny run, of the recipe's kind: samples of the tiny policy as a prepared set, or a folder of rendered clips or pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.run.tiny_cache import cached, libraries

if TYPE_CHECKING:
    from actors.sources.example import Example

ANCHORS = {"train": 16, "dev": 4, "test": 8}
"""Prompts of each split that anchor data is drawn for, one sample each."""
COLOURS = {"red": (220, 40, 30), "green": (40, 190, 60), "blue": (50, 80, 230), "white": (240, 240, 240)}
STEPS = {"left": (0, -2), "right": (0, 2), "up": (-2, 0), "down": (2, 0)}
"""Ways of a rendered square, in pixels a frame."""


def drawn(config: RunConfig) -> Path:
    """A prepared set of a few samples of the tiny policy, as `ddrl presample` draws them. Raises ConfigError."""
    from actors.preparing.presampling import Presampling, PresamplingFailed, presample
    from diffusion.checkpoint import load_policy
    from diffusion.digests import codec_digest, network_digest
    from diffusion.engine.engine import StepFailed
    from diffusion.engine.request import SamplingFailed
    from diffusion.source import CheckpointError, locate

    examples, s = _examples(config), config.sampler
    clips = [s.frames, s.fps] if s.frames > 1 else []
    model = config.model.model_dump(mode="json", exclude={"path", "revision"})
    drawn = [s.height, s.width, s.eval_steps, s.guidance, s.negative_prompt, model, libraries(), *clips]

    def draw(folder: Path) -> None:
        job = Presampling(folder, config.model, s, examples, 1, len(examples), s.eval_steps, s.guidance)
        presample(job, load_policy(config.model, seed=config.seed))

    try:
        policy = locate(config.model.path, config.model.revision).folder
        made_of = [network_digest(policy), codec_digest(policy), [(example.id, example.text) for example in examples], drawn]
        return cached("anchors", made_of, draw)
    except (CheckpointError, ValueError, SamplingFailed, StepFailed, PresamplingFailed) as error:
        raise ConfigError(f"--tiny: the anchor data cannot be drawn: {error}") from None


def rendered(config: RunConfig) -> Path:
    """A folder of captioned clips of the run's size and length, or of pictures where it samples those: a square that moves on black. Raises ConfigError."""
    s = config.sampler
    size = s.frames, s.height, s.width

    def write(folder: Path) -> None:
        lines = []
        for number, (text, clip) in enumerate(_squares(*size)):
            name = f"{number:03d}.{'mp4' if s.frames > 1 else 'png'}"
            _write(folder / name, clip, s.fps)
            lines.append(json.dumps({"file_name": name, "text": text}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    return cached("clips" if s.frames > 1 else "pictures", [*size, s.fps, Path(__file__).read_text()], write)


def _squares(frames: int, height: int, width: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """Captions and clips uint8 `[F, H, W, 3]`, as many of each split as `ANCHORS` says."""
    from actors.sources.example import split_of

    side, left, found, number = min(height, width) // 4, dict(ANCHORS), list[tuple[str, NDArray[np.uint8]]](), 0
    while any(left.values()):
        draw, number = np.random.default_rng(number), number + 1
        colour, way = list(COLOURS)[draw.integers(len(COLOURS))], list(STEPS)[draw.integers(len(STEPS))]
        text = f"a small {colour} square number {number} moving {way}"
        if not left[split_of(text)]:
            continue
        left[split_of(text)] -= 1
        place, clip = np.array([draw.integers(height), draw.integers(width)]), np.zeros((frames, height, width, 3), np.uint8)
        for t, frame in enumerate(clip):
            rows, columns = ((place + t * np.array(STEPS[way]))[axis] + np.arange(side) for axis in (0, 1))
            frame[np.ix_(rows % height, columns % width)] = COLOURS[colour]
        found.append((text, clip))
    return found


def _write(file: Path, clip: NDArray[np.uint8], fps: float) -> None:
    from PIL import Image

    from actors.clips import write_clip

    if len(clip) > 1:
        write_clip(file, clip, fps)
    else:
        Image.fromarray(clip[0]).save(file)


def _examples(config: RunConfig) -> list[Example]:
    """Some of the recipe's prompts of every split; of scenes where its prompts are the captions of a set that is not here. Raises ConfigError."""
    from actors.sources.draws import held_out_examples, prompt_source
    from actors.sources.example import SourceError
    from actors.sources.ocr_scenes import OCRScenesSource

    try:
        source = OCRScenesSource() if config.prompts.kind == "data" and not Path(str(config.data.path)).is_dir() else prompt_source(config.prompts, config.data)
        return [example for split, n in ANCHORS.items() for example in held_out_examples(source, split, n)]
    except SourceError as error:
        raise ConfigError(f"--tiny: prompts: {error}") from None
