"""One packed forward pass of whatever runs: rows of one kernel and shape side by side, all rows in one network call.

A guided sequence is two documents of the pack, one with its own conditioning and one with the negative one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.engine.sequence import Path, Sequence
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import Conditioning, gathered
from diffusion.families.given import completed
from diffusion.precision import autocast


@dataclass
class Rows:
    """Sequences of one kernel, step count and shape: what one call of the kernel takes. B = their number."""

    path: Path
    sequences: list[Sequence]
    x: Tensor
    t: Tensor
    t_next: Tensor
    guided: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path, sequences: list[Sequence], device: torch.device) -> Rows:
        index = torch.tensor([s.index for s in sequences])
        t, t_next = path.times[index].to(device), path.times[index + 1].to(device)
        guided = [i for i, s in enumerate(sequences) if s.context.request.guided]
        return cls(path, sequences, torch.stack([s.x for s in sequences]), t, t_next, guided)

    def inputs(self) -> tuple[Tensor, Tensor, list[Conditioning]]:
        """Documents of the pack: network input, network time and conditioning of every row, then of the guided rows again."""
        process = self.path.kernel.process
        x, t = process.model_input(self.x, self.t), process.model_time(self.t)
        texts = [s.context.conditioning for s in self.sequences]
        if not self.guided:
            return x, t, texts
        negative = [c for i in self.guided if (c := self.sequences[i].context.negative) is not None]
        rows = torch.tensor(self.guided, device=x.device)
        return torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), texts + negative

    def combine(self, prediction: Tensor) -> Tensor:
        """Predictions of the documents to those of the rows: u + g (c - u) where guided (arXiv 2207.12598)."""
        if not self.guided:
            return prediction
        conditional, unconditional = prediction[: len(self.sequences)].float(), prediction[len(self.sequences) :].float()
        rows = torch.tensor(self.guided, device=prediction.device)
        scale = torch.tensor([self.sequences[i].context.request.guidance for i in self.guided], device=prediction.device)
        scale = scale.reshape(-1, *[1] * (prediction.dim() - 1))
        return conditional.index_copy(0, rows, unconditional + scale * (conditional[rows] - unconditional))


def rows_of(sequences: list[Sequence], device: torch.device) -> list[Rows]:
    """Sort a batch into rows; those of equal shape stand next to each other."""
    sorted_by: dict[tuple[tuple[int, ...], int], list[Sequence]] = {}
    for s in sequences:
        sorted_by.setdefault((s.context.request.shape, id(s.context.path)), []).append(s)
    groups = sorted(sorted_by.items(), key=lambda item: item[0])
    return [Rows.of(group[0].context.path, group, device) for _, group in groups]


def predict(model: PackedModel, rows: list[Rows], dtype: str) -> list[Tensor]:
    """Prediction of each of `rows`, `[B, *shape]`, from one call of the network."""
    inputs = [r.inputs() for r in rows]
    documents = [x for batch, _, _ in inputs for x in batch]
    texts = completed([c for _, _, conditioning in inputs for c in conditioning], documents)
    t = torch.cat([times for _, times, _ in inputs])
    even = len({x.shape[1:] for x, _, _ in inputs}) == 1
    with autocast(dtype, t.device):
        out = model(
            torch.cat([x for x, _, _ in inputs]) if even else documents,
            t,
            **gathered(texts),
        )
    sizes = [len(x) for x, _, _ in inputs]
    if isinstance(out, Tensor):
        parts = list(out.split(sizes))
    else:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = [torch.stack(out[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    return [r.combine(p) for r, p in zip(rows, parts, strict=True)]
