"""What names a set of weights in a revision: a hash of their files' bytes."""

from __future__ import annotations

from pathlib import Path

import xxhash


def fingerprint(*files: Path) -> str:
    """xxh3 (64 bit, hex) of the files' bytes, in order."""
    digest = xxhash.xxh3_64()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
