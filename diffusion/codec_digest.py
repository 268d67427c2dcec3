"""What a policy's codec is, as one word: latents fit a policy exactly where it is the same. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PIXELS = "pixels"
"""Of a policy in pixel space."""
RULE = "mean-1"
"""How `VAECodec` makes a latent from what the autoencoder says; changed with it."""


def codec_digest(folder: Path) -> str:
    """Digest of the codec of a policy folder: `pixels`, or a hash of its VAE's configuration and weights.

    Notes that diffusers leaves in config.json (`_…`) do not count, bytes of the weight files do.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a configuration that is no JSON object, or no weights.
    """
    vae = folder / "vae"
    if not vae.exists():
        return PIXELS
    config = json.loads((vae / "config.json").read_text())
    weights = sorted(vae.glob("*.safetensors"))
    if not isinstance(config, dict) or not weights:
        raise ValueError(f"{vae} needs a config.json and weights in safetensors")
    digest = hashlib.blake2b(RULE.encode(), digest_size=16)
    digest.update(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode())
    for file in weights:
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "blake2b").digest())
    return digest.hexdigest()
