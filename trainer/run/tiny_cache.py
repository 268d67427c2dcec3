"""Where `--tiny` keeps what it writes: folders of a cache, each named by what it is made of, so that a run that goes on finds the same files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError


def cache_folder() -> Path:
    """Where tiny weights and data are kept: `$XDG_CACHE_HOME/ddrl/tiny`, `~/.cache/ddrl/tiny` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddrl" / "tiny"


def cached(name: str, made_of: object, write: Callable[[Path], object]) -> Path:
    """The folder `name-DIGEST` of the cache, written if it is not there; it appears whole. Raises ConfigError where it cannot be written."""
    folder = cache_folder() / f"{name}-{hashlib.blake2b(json.dumps(made_of).encode(), digest_size=6).hexdigest()}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        _quiet()
        try:
            write(partial)
            if not folder.is_dir():  # another process may have been quicker
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--tiny writes to {folder.parent}, and cannot: {error.strerror or error}; set XDG_CACHE_HOME to a folder of yours") from None
    return folder


def _quiet() -> None:
    """What transformers and xformers tell of parts that no tiny weights need is not said."""
    import logging

    logging.getLogger("xformers").setLevel(logging.ERROR)
    from transformers.utils import logging as told

    quiet: Any = told
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


def libraries() -> list[str]:
    """What writes the weights, with versions. Raises ConfigError."""
    try:
        return [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    except PackageNotFoundError as error:
        raise ConfigError(f"--tiny needs {error.name} to write such weights: pip install 'ddrl[models]'") from None
