"""Integer charges computed with floating-point convolutions, exactly (method.md, section 4.4).

Sums of integers are exact in float32 while every partial sum stays below 2^24, in float64 below
2^53, in any order of summation. Each layer gets the narrowest type its bounds allow. Only
algorithms that multiply and add may run: no Winograd, no FFT, no TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from snnconv.errors import SnnconvError
from snnconv.network import Population, Readout, Synapse, charge_bounds, membrane_bound
from snnconv.ops import per_channel, sum_pool
from snnconv.quant import apply_weight

EXACT_FLOAT32 = 2**24
EXACT_FLOAT64 = 2**53


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Allow only convolutions that multiply and add in full precision."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.backends.nnpack.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def exact_dtype(bound: int) -> torch.dtype:
    """Return the float type in which integers up to `bound` add exactly.

    Raises SnnconvError beyond float64.
    """
    if bound < EXACT_FLOAT32:
        return torch.float32
    if bound < EXACT_FLOAT64:
        return torch.float64
    raise SnnconvError(
        f"charges up to {bound:.3g} do not add exactly in float64; take a smaller --timesteps"
    )


class Charge:
    """The linear part of one population or readout, ready to run.

    `limits` are the lowest and highest counts of every node (`SpikingNetwork.count_limits`).
    `dtype` is the type of the membrane.
    """

    def __init__(
        self,
        node: Population | Readout,
        limits: dict[str, tuple[int, int]],
        timesteps: int,
        device: torch.device,
    ) -> None:
        """Convert the weights once."""
        self.dtype = exact_dtype(membrane_bound(node, limits, timesteps))
        self.bias = node.bias.to(device, self.dtype)
        self.branches = []
        for synapse in node.branches:
            low, high = limits[synapse.source]
            bound = int(charge_bounds(synapse, low, high).max())
            dtype = exact_dtype(max(bound, -low, high))
            weight = synapse.weight.to(device, dtype)
            factor = torch.exp2(synapse.shift.to(device, self.dtype))
            plain = not bool(synapse.shift.any())
            self.branches.append((synapse, weight, None if plain else factor))

    def current(self, index: int, x: Tensor) -> Tensor:
        """Return `(W * x) << m` of one branch; `x` is `[..., C, H, W]` or `[..., F]` counts.

        Leading axes (time and batch) are kept.
        """
        synapse, weight, factor = self.branches[index]
        lead = x.shape[:2]
        result = _linear(synapse, weight, x.flatten(0, 1).to(weight.dtype)).to(self.dtype)
        if factor is not None:
            result *= per_channel(factor, result.ndim)
        return result.unflatten(0, lead)

    def bias_charge(self, injected: Tensor, ndim: int) -> Tensor:
        """Return B(t) b for B `[steps]`, as `[steps, 1, C, 1...]` of `ndim` axes."""
        bias = per_channel(self.bias, ndim - 1)
        return injected.to(self.bias).view(-1, *[1] * (ndim - 1)) * bias


def _linear(synapse: Synapse, weight: Tensor, x: Tensor) -> Tensor:
    result = apply_weight(synapse.kind, synapse.attributes, weight, x)
    for pool in synapse.pools:
        result = sum_pool(result, pool)
    return result
