"""The signed integrate-and-fire neuron, as equations on integers (docs/concepts.md, "The neuron").

    V += current(t)
    if V >= theta and S < T:    emit +1, V -= theta, S += 1
    elif V < 0 and S > low:     emit -1, V += theta, S -= 1

`low` is 0, or -T for a two-sided neuron; an unsigned neuron never emits -1. Two-sided neurons
stay signed whatever the kind, for their values are negative by nature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def initial_membrane(threshold: Tensor, kind: str) -> Tensor:
    """Return V0: `floor(theta/2)`, with which firing rounds half up, or zero."""
    return threshold // 2 if kind == "half" else torch.zeros_like(threshold)


def rounding_offset(kind: str) -> float:
    """Return V0/theta: what a QANN adds before it rounds down, as `initial_membrane` does."""
    return 0.5 if kind == "half" else 0.0


def step(
    membrane: Tensor, counts: Tensor, threshold: Tensor, timesteps: int, low: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fire once: return spikes in {-1, 0, 1}, the new membrane and the new counts.

    All tensors are integers of one shape; `membrane` has this step's current in it.
    """
    up = (membrane >= threshold) & (counts < timesteps)
    spikes = up.to(membrane.dtype)
    if signed:
        down = (membrane < 0) & (counts > low)
        spikes = spikes - down.to(membrane.dtype)
    return spikes, membrane - threshold * spikes, counts + spikes
