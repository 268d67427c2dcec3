"""What a policy's codec and network are, each as one word: what was made with them fits a policy exactly where it is the same. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from diffusion.source import belongs, has_codec

PIXELS = "pixels"
"""Codec of a policy in pixel space."""
CODEC_RULE = "mean-1"
"""How `VAECodec` makes a latent from what the autoencoder says; changed with it."""


def codec_digest(folder: Path) -> str:
    """Digest of the codec of a policy folder: `pixels`, or one of its VAE's configuration and weights.

    Raises:
        CheckpointError: no policy folder.
        OSError: a file that cannot be read.
        ValueError: a configuration that is no JSON object, or no weights.
    """
    return _digest(folder / "vae", CODEC_RULE) if has_codec(folder) else PIXELS


def network_digest(folder: Path) -> str:
    """Digest of the network of a policy folder. Raises as `codec_digest` does."""
    return _digest(folder / "transformer", "network")


def _digest(part: Path, rule: str) -> str:
    """Notes that diffusers leaves in config.json (`_…`, but for the class) do not count, bytes of the weight files do, variants apart."""
    config = json.loads((part / "config.json").read_text())
    weights = sorted(file for file in part.glob("*.safetensors") if belongs(f"{part.name}/{file.name}"))
    if not isinstance(config, dict) or not weights:
        raise ValueError(f"{part} needs a config.json and weights in safetensors")
    digest = hashlib.blake2b(rule.encode(), digest_size=16)
    counted = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    digest.update(json.dumps(counted, sort_keys=True).encode())
    for file in weights:
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "blake2b").digest())
    return digest.hexdigest()
