"""Functions that are no sum of spikes: gates, smooth activations, products.

Where a network has one, the spiking network has an *analog island* (docs/concepts.md, "Analog
islands"). From the mean values of what it reads it computes the function in float64,
and emits the multiple of it that so many steps are worth, rounded to an integer. Neurons that
follow turn that into spikes again. One function serves every engine, so all have the same
integers; across machines they are the same but where an exponential that differs in its last bit
meets a point of rounding.
"""

from __future__ import annotations

import math
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

    The function `program` (`snnconv.program`) has `steps` and `constants` as its attributes. Where
    a function is not defined, it is 0 here.
    """
    if function == "program":
        found = program.run(inputs, **attributes, functions=FUNCTIONS)
    else:
        found = FUNCTIONS[function](*inputs, **attributes)
    return found.nan_to_num(0.0, math.inf, -math.inf)


def width(function: str, attributes: dict[str, Any], shapes: Sequence[Sequence[int]]) -> int:
    """Return how many numbers the largest tensor has that a function makes of an image on its way.

    `shapes` are those of its inputs, without the batch. Raises ValueError for a program that cannot
    run, or does not keep the images of a batch apart.
    """
    if function != "program":
        return max(math.prod(shape) for shape in shapes)
    # Two sizes of the batch: what is as long as it in one is not in the other.
    found = {_width(attributes, [(count, *shape) for shape in shapes]) for count in (2, 3)}
    if len(found) > 1:
        raise ValueError("a program mixes the images of a batch")
    return found.pop()[0]


def _width(
    attributes: dict[str, Any], shapes: Sequence[tuple[int, ...]]
) -> tuple[int, tuple[int, ...]]:
    """Return the largest size per image on a program's way, and the shape of its result."""
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    sizes = [x[0].numel() for x in inputs]

    def notice(result: Tensor) -> None:
        sizes.append(result[0].numel())

    last = program.run(inputs, **attributes, functions=FUNCTIONS, notice=notice)
    return max(sizes), tuple(last.shape[1:])


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
    per_step = (result / unit.double().view(-1, *axes)).clamp(-LARGEST, LARGEST)
    return (per_step * steps.double().view(-1, 1, 1, *axes) + ABOVE_HALF).floor()
