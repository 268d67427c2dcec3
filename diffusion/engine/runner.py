"""Where the model lies: its device, its memory, its weights, and one packed forward pass of it.

The engine says what runs; the runner runs it and says when it did not fit. Weights change only between forward passes:

    propose(incoming) ─► checked, held ─► swap() ─► in place       a swap to the digest in place only takes over the number

What is held is where the weights come from, not a copy: `swap` puts one piece after another in place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffusion.allocator import keep_freed_memory
from diffusion.engine.forward import Rows, predict, rows_of
from diffusion.engine.incoming import Incoming
from diffusion.engine.lead import Followers, Lead
from diffusion.engine.memory import out_of_memory, plan_memory
from diffusion.engine.sequence import Sequence
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import Conditioning
from diffusion.families.given import whole_shape
from diffusion.lora import merge_lora, trained_weights
from diffusion.precision import itemsize

RUNGS = 8
"""Buckets an octave of total tokens when the network is compiled: at most an eighth of the tokens is padding."""


def compile_for_batches(model: PackedModel) -> None:
    """Compile the network's per-token parts and pad token counts to buckets, so that batches of any mix repeat few shapes."""
    model.buckets = RUNGS
    model.compile_blocks()


class OutOfMemory(Exception):
    """A forward pass did not fit; the message is the allocator's."""


class Runner:
    """One model on one device. On the CPU, its process keeps the memory that a forward pass has used.

    Args:
        model: the policy network (fp32 weights), on its device.
        max_tokens: upper bound on the tokens of one packed forward pass; less if memory does not hold it (`plan`).
        dtype: `float32` or `bfloat16` inside the network (`diffusion.precision`).
        merge: merge adapters (LoRA) into the weights. Their log-densities then differ from the learner's by rounding.
        side: leave room for a second set of what is trained (`diffusion.engine.side`).
        followers: those that share the network's passes, do as this one does (`diffusion.engine.lead`).

    Attributes:
        plan: the token budget and where it comes from.
        version, digest: of the weights in place.
    """

    second = False
    """Whether its weights are the second set."""

    def __init__(
        self, model: PackedModel, max_tokens: int, dtype: str = "float32", merge: bool = False, side: bool = False, followers: Followers | None = None
    ) -> None:
        self.model, self.dtype, self.merge = model.eval(), dtype, merge
        self.lead = None if followers is None else Lead(model, followers)
        self.device = next(model.parameters()).device
        if merge:
            merge_lora(model)  # before memory is measured: the unmerged weights are kept
        if self.device.type == "cpu":
            keep_freed_memory()
        second = sum(tensor.nbytes for tensor in trained_weights(model).values()) if side else 0
        own = -(-model.activation_bytes(itemsize(dtype)) // model.sequence_ranks.count)  # of a token, on each of those that share it
        self.plan = plan_memory(own, self.device, max_tokens, second)
        self.version = 0
        self.digest: str | None = None
        self._next: tuple[Incoming, int, str | None] | None = None

    def describe(self) -> str:
        """How the network runs, for a log: precision, device, padding."""
        padded = "" if self.model.buckets is None else f", token counts in {self.model.buckets} buckets an octave"
        return f"{self.dtype} on {self.device}{padded}"

    def packed_tokens(self, shape: tuple[int, ...], documents: list[Conditioning]) -> int:
        """Tokens of one sample: a document of `shape`, and of the frames that are given, for each. Raises ValueError when it fits neither
        model nor budget."""
        tokens = sum(self.model.packed_tokens(whole_shape(shape, c), c.tokens) for c in documents)
        if tokens > self.plan.tokens:
            raise ValueError(f"one sample of {shape} needs {tokens} tokens, more than the budget: {self.plan}")
        return tokens

    def propose(self, incoming: Incoming, version: int, digest: str | None) -> None:
        """Hold weights for the next `swap`. Raises ValueError when names or shapes differ from the model's; nothing has changed then."""
        own, shapes = trained_weights(self.model), incoming.shapes
        wrong = sorted(own.keys() ^ shapes.keys()) or sorted(n for n in own if own[n].shape != shapes[n])
        if wrong:
            raise ValueError(
                f"weights of version {version} do not fit the model: {len(wrong)} tensors missing, unexpected or of another shape, e.g. {wrong[0]}"
            )
        self._next = (incoming, version, digest)

    def swap(self) -> None:
        """Put the proposed weights in place, if there are any."""
        if self._next is None:
            return
        incoming, self.version, digest = self._next
        if self.lead is not None:
            self.lead.followers.swap(self.second, self.version, digest)
        if digest is None or digest != self.digest:
            self._put(incoming)
            if self.merge:
                merge_lora(self.model)
        self.digest, self._next = digest, None

    @torch.no_grad()
    def _put(self, incoming: Incoming) -> None:
        own = self._places()  # names were checked; with an adapter the rest stays
        for name, place, piece in incoming.pieces():
            own[name][place].copy_(piece)

    def _places(self) -> dict[str, Tensor]:
        """The tensors that weights are put into."""
        return trained_weights(self.model)

    def weights(self) -> AbstractContextManager[None]:
        """The network has this runner's weights meanwhile."""
        return nullcontext()

    def forward(self, batch: list[Sequence]) -> list[tuple[Rows, Tensor]]:
        """Predictions of one packed forward pass, by rows of one kernel and shape.

        Raises:
            OutOfMemory: it did not fit; nothing of it is held any more.
        """
        rows = rows_of(batch, self.device)
        try:
            with self.weights():
                return list(zip(rows, predict(self.model, rows, self.dtype), strict=True))
        except Exception as error:
            if self.lead is not None:
                self.lead.followers.lost(error)
            if not out_of_memory(error):
                raise
            shortage = str(error) or type(error).__name__
        if self.device.type == "cuda":  # not inside `except`: the error's frames would keep the tensors alive
            torch.cuda.empty_cache()
        raise OutOfMemory(shortage)
