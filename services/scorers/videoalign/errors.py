"""Why a checkpoint cannot be served: one error with advice, and one that lists every key that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_KEYS = 40


class CheckpointError(RuntimeError):
    """The checkpoint, its tokenizer or its template is missing, damaged, or of a kind this scorer does not compute."""


class KeyMismatch(CheckpointError):
    """The tensors are not exactly those of the model. ``missing``, ``unexpected`` and ``wrong_shape`` hold every name."""

    def __init__(self, where: str, missing: Sequence[str], unexpected: Sequence[str], wrong_shape: Sequence[str]) -> None:
        self.missing, self.unexpected, self.wrong_shape = sorted(missing), sorted(unexpected), sorted(wrong_shape)
        lists = (("missing", self.missing), ("unexpected", self.unexpected), ("of the wrong shape", self.wrong_shape))
        text = [_listing(title, names) for title, names in lists if names]
        super().__init__(f"{where} does not hold exactly the tensors of this model.\n" + "\n".join(text))


def _listing(title: str, names: Sequence[str]) -> str:
    more = [f"  … and {len(names) - SHOWN_KEYS} more"] if len(names) > SHOWN_KEYS else []
    return "\n".join([f"{len(names)} {title}:", *(f"  {name}" for name in names[:SHOWN_KEYS]), *more])
