"""What tiny policy folders of several families are made of: vocabularies that nothing downloads, and weights with nothing left at one or zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WORDS = ["a", "an", "the", "of", "on", "in", "and", "red", "green", "blue", "black", "white", "small", "large", "circle", "square", "sign", "cat"]
"""Words that are one token to CLIP and one piece to T5; all others go letter by letter."""


def t5_tokenizer() -> Any:
    """A `T5Tokenizer`: padding, end and unknown first as in the published one, then printable ASCII and the words."""
    from transformers import T5Tokenizer

    pieces: list[tuple[str, float]] = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -4.0),
        *((chr(c), -6.0) for c in range(33, 127)),
        *(("▁" + w, -3.0) for w in WORDS),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def stirred(module: nn.Module) -> Any:
    """`module` with gains and biases moved away from one and zero, so that none of them can be left out unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()
