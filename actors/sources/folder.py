"""A folder of captioned pictures and clips: `metadata.jsonl` with `file_name`, `text` and, where the text is not its name, `id`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.sources.example import Example, SourceError

CLIPS = (".mp4", ".webm", ".mov", ".mkv")


def _resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Picture:
    """An image file."""

    file: Path

    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        try:
            with Image.open(self.file) as image:
                return _resized(image, height, width)
        except OSError as error:
            raise SourceError(f"anchor picture {self.file} cannot be read: {error}") from None


@dataclass(frozen=True)
class Clip:
    """A video file."""

    file: Path

    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        import av

        try:
            with av.open(str(self.file)) as container:
                read = islice(container.decode(video=0), frames)
                found = [_resized(Image.fromarray(frame.to_ndarray(format="rgb24")), height, width) for frame in read]
        except (OSError, ValueError, IndexError, av.FFmpegError) as error:
            raise SourceError(f"anchor clip {self.file} cannot be read: {error}") from None
        if not found:
            raise SourceError(f"anchor clip {self.file} holds no frames")
        return np.stack(found)


def media_of(file: Path) -> Picture | Clip:
    """The picture or clip in a file, by its name's end."""
    return Clip(file) if file.suffix.lower() in CLIPS else Picture(file)


@lru_cache(maxsize=4)
def folder_examples(path: str) -> tuple[Example, ...]:
    """Everything that the folder lists. Raises SourceError naming the folder."""
    root = Path(path)
    try:
        rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines() if line.strip()]
        files = [(root / row["file_name"], str(row["text"]), str(row.get("id", row["text"]))) for row in rows]
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(f"anchor folder {path} needs a metadata.jsonl with file_name and text on each line: {error}") from None
    if not files:
        raise SourceError(f"anchor folder {path} lists no pictures")
    return tuple(Example(name, text, media_of(file)) for file, text, name in files)


class FolderSource:
    """Pictures and clips of a folder. Raises SourceError for a folder that cannot be used."""

    def __init__(self, path: str) -> None:
        self.examples = folder_examples(path)

    def draw(self, rng: np.random.Generator) -> Example:
        return self.examples[int(rng.integers(len(self.examples)))]
