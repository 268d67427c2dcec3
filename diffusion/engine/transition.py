"""One denoising step of rows that stand at the same kernel and shape: prediction in, next states and log-densities out.

States are fp32, log-densities fp64: they are those of the states as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.engine.forward import Rows
from diffusion.engine.sequence import as_stored, previous_of
from diffusion.kernels import log_prob


def advance(rows: Rows, prediction: Tensor, version: int) -> None:
    """Take the kernel's step of every row with weights of `version`: stochastic rows draw, the others follow the solver."""
    kernel, sequences = rows.path.kernel, rows.sequences
    noisy = [i for i, s in enumerate(sequences) if s.stochastic]
    for stochastic, chosen in ((True, noisy), (False, [i for i in range(len(sequences)) if i not in set(noisy)])):
        if not chosen:
            continue
        whole = len(chosen) == len(sequences)
        x, t, t_next, v = (a if whole else a[chosen] for a in (rows.x, rows.t, rows.t_next, prediction))
        part = [sequences[i] for i in chosen]
        previous, density = previous_of(part), None
        if stochastic:
            mean, std = kernel.moments(v.double(), x.double(), t, t_next, previous)
            noise = torch.stack([s.noise() for s in part]).to(x.device)
            x_next = as_stored((mean + std.reshape(-1, *[1] * (x.dim() - 1)) * noise).float(), part)
            density = log_prob(x_next, mean, std)
        else:
            x_next = as_stored(kernel.ode(v, x, t, t_next, previous), part)
        x0 = as_stored(kernel.process.split(v, x, t)[0], part) if kernel.uses_previous else None
        for i, s in enumerate(part):
            s.advance(x_next[i], None if x0 is None else x0[i], None if density is None else density[i], version)
