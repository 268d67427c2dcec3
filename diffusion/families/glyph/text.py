"""A small frozen text encoder for the glyph world, with the interface of a CLIP/T5 pair.

Words outside the first pair of double quotes become one token each, characters inside it one token each, then padding:
a fixed number of tokens. A character's embedding says which character it is and where in the written line its centre
will fall (sinusoids of its offset from the line's middle), so image columns and characters line up. The pooled vector
is the sum of role-filler bindings: a frozen random vector per (character, position). An encoder without bindings gives none, for
networks that take none (Wan, Cosmos). Nothing here is trained; the tables are stored with the checkpoint so that an encoder never depends on a
random generator's version.

It is for signs, where what stands in quotes is all that varies. Words carry no meaning here: a new word is a new random vector.
Two versions, named in the folder's config.json, say how a word becomes one:

    1 (none named)  its bin of `words`, 64 of them, wherever it stands: "red on black" = "black on red", "sign" = "large"
    2               a bin of its own as far as `WORD_BINS` go, plus a frozen vector of its place among the words

`collisions` finds captions that an encoder cannot tell apart.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion.families.conditioning import Conditioning, digest_of, stacked

PRINTABLE = [chr(c) for c in range(32, 127)]
FREQUENCIES = 8
CLASS_NAME = "GlyphTextEncoder"
VERSIONS = (1, 2)
WIDTHS = ("joint_attention_dim", "text_dim", "text_embed_dim")
"""Keys of a network's configuration that say how wide a token of text is: SD3's, Wan's, Cosmos'."""
WORD_BINS = {1: 64, 2: 4096}
"""Bins of words by version. In 4096, two of a vocabulary of 20 words share one with a chance of 5 %, two given words of 1 in 4096."""


class GlyphTextEncoder:
    """See the module's docstring.

    Args:
        tables: `characters` [95, D - 4·FREQUENCIES], `words` [W, D], `padding` [D]; `bindings` [95, max_characters, P] where there is a
            pooled vector; version 2 also `places` [max_tokens, D].
        max_tokens: tokens of an encoded prompt, padding included.
        version: how words are encoded, see the module's docstring.

    Raises:
        ValueError: an unknown version.
    """

    def __init__(self, tables: dict[str, Tensor], max_tokens: int, version: int = 1) -> None:
        if version not in VERSIONS:
            raise ValueError(f"glyph text encoder of version {version}; this build knows {', '.join(map(str, VERSIONS))}")
        self.tables, self.max_tokens, self.version = tables, max_tokens, version
        self._index = {c: i for i, c in enumerate(PRINTABLE)}

    @classmethod
    def create(
        cls, dim: int = 64, pooled_dim: int = 64, max_tokens: int = 10, max_characters: int = 6, seed: int = 0, version: int = VERSIONS[-1]
    ) -> GlyphTextEncoder:
        """Draw the frozen tables once. `dim` must exceed 4·FREQUENCIES; with a `pooled_dim` of 0 there is no pooled vector, and no
        bound on quoted characters but `max_tokens`."""
        g = torch.Generator().manual_seed(seed)
        tables = {
            "characters": torch.randn(len(PRINTABLE), dim - 4 * FREQUENCIES, generator=g),
            "words": torch.randn(WORD_BINS[version], dim, generator=g) * 0.5,
            "padding": torch.randn(dim, generator=g) * 0.5,
        }
        if pooled_dim:
            tables["bindings"] = torch.randn(len(PRINTABLE), max_characters, pooled_dim, generator=g)
        if version > 1:
            tables["places"] = torch.randn(max_tokens, dim, generator=g) * 0.5
        return cls(tables, max_tokens, version)

    @classmethod
    def load(cls, folder: Path) -> GlyphTextEncoder:
        config = json.loads((folder / "config.json").read_text())
        return cls(load_file(folder / "model.safetensors"), int(config["max_tokens"]), int(config.get("version", 1)))

    @classmethod
    def of_policy(cls, folder: Path) -> GlyphTextEncoder:
        """The encoder of a policy's folder. Raises ValueError for one that gives something else than the network there takes."""
        found = cls.load(folder / "text_encoder")
        values = json.loads((folder / "transformer" / "config.json").read_text())
        takes = next(values[key] for key in WIDTHS if key in values), values.get("pooled_projection_dim", 0)
        bindings = found.tables.get("bindings")
        gives = len(found.tables["padding"]), 0 if bindings is None else bindings.shape[2]
        if gives != takes:
            raise ValueError(
                f"it gives tokens of {gives[0]} channels and a pooled vector of {gives[1]} (0: none), the network takes {takes[0]} and {takes[1]}; "
                f"write another: GlyphTextEncoder.create(dim={takes[0]}, pooled_dim={takes[1]})"
            )
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": CLASS_NAME, "version": self.version, "max_tokens": self.max_tokens}, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(save(self.tables))  # save_file makes files that only their owner may read

    def _positions(self, n: int) -> Tensor:
        """Sinusoids of each character's offset from the middle of a line of `n` characters, and of n: `[n, 4·FREQUENCIES]`."""
        offset = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        frequency = torch.pi / 2 ** torch.arange(FREQUENCIES, dtype=torch.float32) * 2
        angle = torch.cat([offset[:, None] * frequency, torch.full((n, 1), float(n)) * frequency / 2], 1)
        return torch.cat([angle.sin(), angle.cos()], 1)

    def _one(self, prompt: str) -> Conditioning:
        parts = prompt.split('"')
        quoted = parts[1] if len(parts) > 1 else ""
        words = (parts[0] + " " + " ".join(parts[2:])).split()
        bindings = self.tables.get("bindings")
        most = self.max_tokens if bindings is None else bindings.shape[1]
        if len(words) + len(quoted) > self.max_tokens or len(quoted) > most:
            raise ValueError(
                f"prompt {prompt!r} has {len(words)} words and {len(quoted)} quoted characters; this text encoder holds "
                f"{self.max_tokens} tokens of which {most} quoted characters"
            )
        unknown = [c for c in quoted if c not in self._index]
        if unknown:
            raise ValueError(f"prompt {prompt!r} has characters outside printable ASCII: {''.join(unknown)!r}")
        table = self.tables["words"]
        tokens = [table[zlib.crc32(w.lower().encode()) % len(table)] for w in words]
        if self.version > 1:
            tokens = [word + place for word, place in zip(tokens, self.tables["places"], strict=False)]
        index = torch.tensor([self._index[c] for c in quoted], dtype=torch.int64)
        if quoted:
            tokens.extend(torch.cat([self.tables["characters"][index], self._positions(len(quoted))], 1))
        tokens.extend([self.tables["padding"]] * (self.max_tokens - len(tokens)))
        found = {"prompt_embeds": torch.stack(tokens)}
        if bindings is not None:
            found["pooled"] = bindings[index, torch.arange(len(quoted))].sum(0) / max(1, len(quoted)) ** 0.5
        return Conditioning(found)

    def encode(self, prompts: list[str]) -> Conditioning:
        return stacked([self._one(p) for p in prompts])

    def signature(self, prompt: str) -> bytes:
        return digest_of(self.encode([prompt])[0])
