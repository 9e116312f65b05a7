"""Modules that take the place of calculations in a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = tuple[str, tuple[int, ...]]

# What neurons are called that the model has no activation for.
TWO_SIDED = "two-sided neuron"


class Affine1d(nn.BatchNorm1d):
    """A multiplication and an addition per channel, `[N, F]`; there is nothing it normalises."""


class Affine2d(nn.BatchNorm2d):
    """The same for `[N, C, H, W]`."""


AFFINE = (Affine1d, Affine2d)


def affine(gain: Tensor, shift: Tensor, pixels: bool) -> nn.Module:
    """Return `gain x + shift` per channel, both `[C]`, as a BatchNorm without statistics."""
    module = (Affine2d if pixels else Affine1d)(len(gain), eps=1.0, device=gain.device)
    # The root of 0 + 1 is exact, and torch asks for an eps above 0.
    module.running_var = torch.zeros_like(gain, dtype=torch.float32)
    with torch.no_grad():
        module.weight.copy_(gain)
        module.bias.copy_(shift)
    return module.eval()


class Neurons(nn.Identity):
    """A place where two-sided neurons stand; in float it changes nothing."""

    label = TWO_SIDED


class Rearrangement(nn.Module):
    """Several calls that only move numbers about, `[N, C, H, W]` to `[N, C', H', W']`.

    `steps` say the same in two words: to reshape, and to permute axes, that of the batch apart.
    """

    def __init__(self, calls: list[Callable[[Tensor], Tensor]], steps: tuple[Step, ...]) -> None:
        """Hold the calls as the model makes them."""
        super().__init__()
        self.calls, self.steps = calls, steps

    def forward(self, x: Tensor) -> Tensor:
        """Move the numbers."""
        for call in self.calls:
            x = call(x)
        return x
