"""What a pass of the SD3 network takes: operations, and what training keeps for the backward pass. Pure arithmetic on the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from diffusion.families.base import Saved

if TYPE_CHECKING:
    from diffusion.families.sd3.network import SD3Config


def forward_flops(c: SD3Config, shape: Sequence[int], text: int) -> int:
    """See `PackedModel.forward_flops`."""
    dim, patch = c.inner_dim, c.patch_size**2
    image = prod(shape[1:]) // patch
    out = c.in_channels if c.out_channels is None else c.out_channels
    square = 2 * dim * dim
    ends = 2 * dim * (image * patch * (c.in_channels + out) + text * c.joint_attention_dim)
    per_request = 2 * dim * (256 + c.pooled_projection_dim) + 2 * square + 2 * square  # time, pooled, last modulation
    total = ends + per_request
    for i in range(c.num_layers):
        last, dual = i == c.num_layers - 1, i in c.dual_attention_layers
        total += square * ((9 if dual else 6) + (2 if last else 6))  # modulation
        total += square * image * (4 + 8) + square * text * (3 if last else 4 + 8)  # q, k, v, out and feed-forward
        total += 4 * (image + text) ** 2 * dim
        if dual:
            total += square * image * 4 + 4 * image**2 * dim
    return total


def saved(c: SD3Config, shape: Sequence[int], text: int, size: int, adapted: bool) -> Saved:
    """See `PackedModel.saved`.

    Bytes a token and channel of one block, with values of `size` (e) inside the network. The image stream stays fp32 under autocast,
    because its position table is; the text stream does not. A stream of another type is cast once for each of q, k and v.

        both      the stream before attention and before the feed-forward; q, k, v and the attention's output, as joined; the output as
                  cut apart; the feed-forward before its activation; q and k before their norms (fp32)
        full      the two layer norms' outputs (for the modulation's gradient); the feed-forward's input and what is behind its
                  activation; the two gated outputs; q and k behind their norms' division (fp32)
        adapted   frozen layers keep nothing of their input, adapters on q, k, v and out do
    """
    dim, e, norms = c.inner_dim, size, 0 if c.qk_norm is None else 2
    image_tokens = prod(shape[1:]) // c.patch_size**2
    full = not adapted
    qk = norms * (4 + 4 * full)

    def attention(stream: int) -> int:
        """Input of q, k and v, the three, the output; norms; the gated output."""
        return (3 if stream != e else 1) * e + 4 * e + qk + e * full

    def feed_forward(stream: int) -> int:
        return stream + stream * full + e * full + 4 * e * (1 + full) + e * full

    def entry(stream: int) -> int:
        return stream + stream * full

    blocks, inputs, weights = [], [], []
    for i in range(c.num_layers):
        last, dual = i == c.num_layers - 1, i in c.dual_attention_layers
        image = entry(4) + attention(4) + e + feed_forward(4) + (attention(4) if dual else 0)
        words = entry(e) + attention(e) - (e * full if last else 0) + (0 if last else e + feed_forward(e))
        per_request = ((9 if dual else 6) + (2 if last else 6) + 8) * dim * e
        maximum = 4 * c.num_attention_heads * (image_tokens + text + (image_tokens if dual else 0))  # the softmax's sums
        blocks.append(dim * (image * image_tokens + words * text) + per_request + maximum)
        inputs.append(dim * (4 * image_tokens + e * text))
        weights.append(dim * dim * ((7 + 8 if last else 8 + 16) + 4 * dual + full * ((9 if dual else 6) + (2 if last else 6))))
    patches = image_tokens * c.patch_size**2 * c.in_channels * 4 * full + text * c.joint_attention_dim * e * full
    head = dim * image_tokens * (4 + (4 + e) * full)
    gradients = dim * ((8 * e + 2 * 4) * image_tokens + e * text)  # of the feed-forward behind and before its activation, of the streams
    return Saved(tuple(blocks), tuple(inputs), patches + head, gradients, tuple(weights))
