"""Where a policy's files are: a folder in diffusers' layout, or a snapshot of a repository on the Hugging Face hub.

`owner/name` is a hub id unless it is a folder here, or `owner` is one. A snapshot lies in the hub's cache under its commit, which is
looked up once and kept, so that every process of a run, and a resumed run, reads the same files. Without network (or with
HF_HUB_OFFLINE=1) a complete snapshot in the cache will do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

EXAMPLE = "stabilityai/stable-diffusion-3.5-medium"
INDEX = "model_index.json"
FILES = (
    INDEX,
    "*/*.json",
    "*/*.txt",
    "*/*.model",
    "*/*.jinja",
    "*/diffusion_pytorch_model.safetensors",
    "*/diffusion_pytorch_model-?????-of-?????.safetensors",
    "*/model.safetensors",
    "*/model-?????-of-?????.safetensors",
)
"""What a policy consists of: every component's settings, tokens and weights; no variants (`….fp16.safetensors`), no single-file
checkpoints, no pickles."""


class CheckpointError(Exception):
    """A policy that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Source:
    """A policy's files.

    Attributes:
        folder: where they are.
        revision: the commit that they are of; None for a folder.
    """

    folder: Path
    revision: str | None = None


def belongs(name: str) -> bool:
    """Whether a file, by its path in the folder, is part of the policy (`FILES`)."""
    return any(fnmatch(name, pattern) for pattern in FILES) and name.count("/") < 2


def has_codec(folder: Path) -> bool:
    """Whether the policy in `folder` has a codec (`vae/`); one without samples pixels. Raises CheckpointError for what is no policy folder."""
    if (folder / "vae").exists():
        return True
    if not (folder / "transformer" / "config.json").exists():
        raise CheckpointError(f"{folder} is no policy folder: it has neither vae/ nor transformer/config.json; give a folder in diffusers' layout")
    return False


def is_hub_id(path: str) -> bool:
    """Whether `path` names a hub repository, see the module's docstring."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not Path(path).is_dir() and not Path(path).parent.is_dir()


def locate(path: str, revision: str | None = None, download: bool = True) -> Source:
    """Find a policy's files; those of a hub id are downloaded, with a progress bar, unless the cache has them.

    Args:
        path: folder or hub id.
        revision: branch, tag or commit of the hub repository; None = its main branch.
        download: False looks into the cache alone.

    Raises:
        CheckpointError: no such folder or repository, no access to it, or no network and no complete snapshot in the cache.
    """
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"model.revision={revision} is of a hub repository, but model.path {folder} is a folder here; leave the revision out")
        return Source(folder)
    if not is_hub_id(path):
        raise CheckpointError(f"checkpoint folder {folder} does not exist; set model.path to a folder in diffusers' layout, or to a hub id such as {EXAMPLE}")
    snapshot = _snapshot(path, revision, download)
    return Source(snapshot, snapshot.name)


def _snapshot(name: str, revision: str | None, download: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    at = f"{name}@{revision}" if revision else name
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES), local_files_only=not download))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{at} is gated: accept its terms at {constants.ENDPOINT}/{name}, then log in with `hf auth login` or set HF_TOKEN to a token that may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision}; set model.revision to a branch, tag or commit of {constants.ENDPOINT}/{name}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{at} is neither a folder here nor a repository of {constants.ENDPOINT} that may be read; check the name, and for a private one log in "
            "with `hf auth login` or HF_TOKEN"
        ) from None
    except Exception as error:  # of the hub's client, its HTTP library or the disk
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        option = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{at} is no folder here, cannot be downloaded from {constants.ENDPOINT}, and the cache {constants.HF_HUB_CACHE} holds no complete "
            f"snapshot of it ({cause}); where there is network, run `hf download {name}{option}`, or set model.path to a folder"
        ) from None
