"""A small frozen text encoder for the glyph world, with the interface of a CLIP/T5 pair.

Words outside the first pair of double quotes become one token each, characters inside it one token each, then padding:
a fixed number of tokens. A character's embedding says which character it is and where in the written line its centre
will fall (sinusoids of its offset from the line's middle), so image columns and characters line up. The pooled vector
is the sum of role-filler bindings: a frozen random vector per (character, position). Nothing here is trained; the
tables are stored with the checkpoint so that an encoder never depends on a random generator's version.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffusion.families.conditioning import TextConditioning

PRINTABLE = [chr(c) for c in range(32, 127)]
FREQUENCIES = 8
CLASS_NAME = "GlyphTextEncoder"


class GlyphTextEncoder:
    """See the module's docstring.

    Args:
        tables: `characters` [95, D - 4·FREQUENCIES], `words` [W, D], `padding` [D], `bindings` [95, max_characters, P].
        max_tokens: tokens of an encoded prompt, padding included.
    """

    def __init__(self, tables: dict[str, Tensor], max_tokens: int) -> None:
        self.tables, self.max_tokens = tables, max_tokens
        self._index = {c: i for i, c in enumerate(PRINTABLE)}

    @classmethod
    def create(cls, dim: int = 64, pooled_dim: int = 64, max_tokens: int = 10, max_characters: int = 6, seed: int = 0) -> GlyphTextEncoder:
        """Draw the frozen tables once. `dim` must exceed 4·FREQUENCIES."""
        g = torch.Generator().manual_seed(seed)
        tables = {
            "characters": torch.randn(len(PRINTABLE), dim - 4 * FREQUENCIES, generator=g),
            "words": torch.randn(64, dim, generator=g) * 0.5,
            "padding": torch.randn(dim, generator=g) * 0.5,
            "bindings": torch.randn(len(PRINTABLE), max_characters, pooled_dim, generator=g),
        }
        return cls(tables, max_tokens)

    @classmethod
    def load(cls, folder: Path) -> GlyphTextEncoder:
        config = json.loads((folder / "config.json").read_text())
        return cls(load_file(folder / "model.safetensors"), int(config["max_tokens"]))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": CLASS_NAME, "max_tokens": self.max_tokens}, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(save(self.tables))  # save_file makes files that only their owner may read

    def _positions(self, n: int) -> Tensor:
        """Sinusoids of each character's offset from the middle of a line of `n` characters, and of n: `[n, 4·FREQUENCIES]`."""
        offset = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        frequency = torch.pi / 2 ** torch.arange(FREQUENCIES, dtype=torch.float32) * 2
        angle = torch.cat([offset[:, None] * frequency, torch.full((n, 1), float(n)) * frequency / 2], 1)
        return torch.cat([angle.sin(), angle.cos()], 1)

    def _one(self, prompt: str) -> tuple[Tensor, Tensor]:
        parts = prompt.split('"')
        quoted = parts[1] if len(parts) > 1 else ""
        words = (parts[0] + " " + " ".join(parts[2:])).split()
        bindings = self.tables["bindings"]
        if len(words) + len(quoted) > self.max_tokens or len(quoted) > bindings.shape[1]:
            raise ValueError(
                f"prompt {prompt!r} has {len(words)} words and {len(quoted)} quoted characters; this text encoder holds "
                f"{self.max_tokens} tokens of which {bindings.shape[1]} quoted characters"
            )
        unknown = [c for c in quoted if c not in self._index]
        if unknown:
            raise ValueError(f"prompt {prompt!r} has characters outside printable ASCII: {''.join(unknown)!r}")
        table = self.tables["words"]
        tokens = [table[zlib.crc32(w.lower().encode()) % len(table)] for w in words]
        pooled = torch.zeros(bindings.shape[2])
        if quoted:
            index = torch.tensor([self._index[c] for c in quoted])
            tokens.extend(torch.cat([self.tables["characters"][index], self._positions(len(quoted))], 1))
            pooled = bindings[index, torch.arange(len(quoted))].sum(0) / len(quoted) ** 0.5
        tokens.extend([self.tables["padding"]] * (self.max_tokens - len(tokens)))
        return torch.stack(tokens), pooled

    def encode(self, prompts: list[str]) -> TextConditioning:
        embeds, pooled = zip(*(self._one(p) for p in prompts), strict=True)
        return TextConditioning(torch.stack(embeds), torch.stack(pooled))
