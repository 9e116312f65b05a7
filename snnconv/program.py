"""Short programs of tensor operations: what an analog island computes if no one function does.

A program is a tuple of steps `(operation, operands, attributes)`, plain values that a checkpoint
can hold. Operands are names: `x0` an input, `c0` a constant, `s0` what a step gave. Every tensor
but the constants has the batch in front, which no operation touches: axes are counted with it,
shapes are written without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = tuple[str, tuple[str, ...], dict[str, Any]]


def _slice(x: Tensor, bounds: Sequence[Sequence[int]]) -> Tensor:
    return x[(slice(None), *(slice(*b) for b in bounds))]


def _standardize(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """Take off the mean over some axes, and divide by the standard deviation."""
    away = x - x.mean(tuple(axes), keepdim=True)
    return away / (away.square().mean(tuple(axes), keepdim=True) + eps).sqrt()


def _variance(x: Tensor, axes: Sequence[int], correction: int) -> Tensor:
    away = (x - x.mean(tuple(axes), keepdim=True)).square()
    count = away[0].numel() // away[0].sum([a - 1 for a in axes]).numel()
    return away.sum(tuple(axes), keepdim=True) / (count - correction)


def _length(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.square().sum(tuple(axes), keepdim=True).sqrt()


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "add": torch.add,
    "concat": lambda *x, axis: torch.cat(x, axis),
    "convolve": lambda x, weight, *bias, **how: F.conv1d(x, weight, *bias, **how),
    "div": torch.div,
    "exp": torch.exp,
    "expand": lambda x, shape: x.expand(len(x), *shape),
    "largest": lambda x, axes: x.amax(tuple(axes), keepdim=True),
    "least": lambda x, axes: x.amin(tuple(axes), keepdim=True),
    "length": _length,
    "limit": lambda x, low, high: x.clamp(low, high),
    "matmul": torch.matmul,
    "larger": torch.maximum,
    "mean": lambda x, axes: x.mean(tuple(axes), keepdim=True),
    "mul": torch.mul,
    "permute": lambda x, axes: x.permute(tuple(axes)),
    "pow": torch.pow,
    "relu": torch.relu,
    "reshape": lambda x, shape: x.reshape(len(x), *shape),
    "rsqrt": torch.rsqrt,
    "slice": _slice,
    "softmax": lambda x, axis: x.softmax(axis),
    "sqrt": torch.sqrt,
    "square": torch.square,
    "standardize": _standardize,
    "sub": torch.sub,
    "sum": lambda x, axes: x.sum(tuple(axes), keepdim=True),
    "variance": _variance,
}


def run(
    inputs: Sequence[Tensor],
    steps: Sequence[Step],
    constants: Sequence[Tensor],
    functions: Mapping[str, Callable[..., Tensor]],
    notice: Callable[[Tensor], object] = lambda result: None,
) -> Tensor:
    """Run a program on tensors `[N, ...]` of one number type; return what its last step gives.

    `functions` are further operations, by name; `notice` is told what each step gives. Raises
    ValueError if a step is of an unknown operation, reads what there is not, cannot be done, or
    goes over the batch.
    """
    first = inputs[0]
    # In one order in memory, so that sums run the same way in every engine.
    values = {f"x{i}": x.contiguous() for i, x in enumerate(inputs)}
    values |= {f"c{i}": c.to(first.device, first.dtype) for i, c in enumerate(constants)}
    result = first
    known = {**functions, **OPERATIONS}
    for i, (operation, operands, attributes) in enumerate(steps):
        try:
            given = [values[name] for name in operands]
            if _touches_batch(operation, attributes, given[0].ndim):
                raise ValueError("it goes over the axis of the batch")
            axes = {x.ndim for x, name in zip(given, operands, strict=True) if name[0] != "c"}
            if len(axes) > 1:
                raise ValueError("its operands have other numbers of axes")
            result = known[operation](*given, **attributes)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"step {i} of a program, {operation}: {error}") from error
        if result.ndim < 2 or len(result) != len(first):
            raise ValueError(f"step {i} of a program, {operation}, moves the axis of the batch")
        notice(result)
        values[f"s{i}"] = result
    return result


def _touches_batch(operation: str, attributes: Mapping[str, Any], axes: int) -> bool:
    """Return whether an operation on a tensor of so many axes would mix the images of a batch."""
    if "axes" not in attributes and "axis" not in attributes:
        return False
    touched = attributes.get("axes", [attributes.get("axis")])
    if operation == "permute":
        return bool(touched[0] % axes != 0)
    return not touched or any(axis < 0 or axis % axes == 0 for axis in touched)
