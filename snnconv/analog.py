"""Functions that are no sum of spikes: gates, smooth activations, products.

Where a network has one, the spiking network has an *analog island* (method.md, "Beyond
conv-BN-ReLU chains"). From the mean values of what it reads it computes the function in float64,
and emits the multiple of it that so many steps are worth, rounded to an integer. Neurons that
follow turn that into spikes again. One function serves every engine, so all have the same
integers; across machines they are the same but where an exponential that differs in its last bit
meets a point of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snnconv import program

# How many integers the largest output that calibration saw is worth per step, and where outputs
# that are larger end.
RESOLUTION = 128
LARGEST = 2 * RESOLUTION
# What two ways to compute a function in float64 differ by must not decide how a half is rounded.
ABOVE_HALF = 0.5 + 2.0**-20

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "product": torch.mul,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
# What calls in a graph are which function, and which of its arguments go with it.
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "CELU": ("celu", ("alpha",)),
    "celu": ("celu", ("alpha",)),
    "ELU": ("elu", ("alpha",)),
    "elu": ("elu", ("alpha",)),
    "GELU": ("gelu", ("approximate",)),
    "gelu": ("gelu", ("approximate",)),
    "Hardsigmoid": ("hardsigmoid", ()),
    "hardsigmoid": ("hardsigmoid", ()),
    "Hardswish": ("hardswish", ()),
    "hardswish": ("hardswish", ()),
    "hardswish_": ("hardswish", ()),
    "Mish": ("mish", ()),
    "mish": ("mish", ()),
    "SELU": ("selu", ()),
    "selu": ("selu", ()),
    "Sigmoid": ("sigmoid", ()),
    "sigmoid": ("sigmoid", ()),
    "sigmoid_": ("sigmoid", ()),
    "SiLU": ("silu", ()),
    "silu": ("silu", ()),
    "Softplus": ("softplus", ("beta", "threshold")),
    "softplus": ("softplus", ("beta", "threshold")),
    "Tanh": ("tanh", ()),
    "tanh": ("tanh", ()),
    "tanh_": ("tanh", ()),
    "mul": ("product", ()),
    "mul_": ("product", ()),
    "imul": ("product", ()),
    "multiply": ("product", ()),
}


def compute(function: str, attributes: dict[str, Any], inputs: Sequence[Tensor]) -> Tensor:
    """Apply a function to tensors of one number type, `[N, C, ...]`.

    The function `program` (`snnconv.program`) has `steps` and `constants` as its attributes.
    """
    if function == "program":
        return program.run(inputs, **attributes, functions=FUNCTIONS)
    return FUNCTIONS[function](*inputs, **attributes)


def emitted(
    function: str,
    attributes: dict[str, Any],
    inputs: Sequence[Tensor],
    worths: Sequence[Tensor],
    steps: Tensor,
    unit: Tensor,
) -> Tensor:
    """Return what an island has emitted in all, integers in float64 `[steps, N, C, ...]`.

    `inputs` are counts `[steps or 1, N, C, ...]`, each worth `worths` `[C]`; `steps` `[steps]` is
    how often the island has been at work by then. An integer is worth `unit` `[C]`.
    """
    times = steps.double().clamp_min(1)
    means = []
    for counts, worth in zip(inputs, worths, strict=True):
        axes = [1] * (counts.ndim - 3)
        total = counts.double() * worth.double().view(-1, *axes)
        means.append(total / times.view(-1, 1, 1, *axes))
    lead = torch.broadcast_shapes(*(mean.shape[:2] for mean in means))
    flat = [mean.expand(*lead, *mean.shape[2:]).flatten(0, 1) for mean in means]
    result = compute(function, attributes, flat).unflatten(0, lead)
    axes = [1] * (result.ndim - 3)
    # Where the function is not defined, nothing is emitted.
    per_step = (result / unit.double().view(-1, *axes)).nan_to_num(0.0).clamp(-LARGEST, LARGEST)
    return (per_step * steps.double().view(-1, 1, 1, *axes) + ABOVE_HALF).floor()
