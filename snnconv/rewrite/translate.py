"""Say what calls in a graph compute as the steps of a program (`snnconv.program`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from snnconv.analog import NAMES
from snnconv.program import Step
from snnconv.rewrite.arithmetic import ARITHMETIC
from snnconv.rewrite.rearrangements import PERMUTATIONS, RESHAPES, SHUFFLES, steps_of
from snnconv.rewrite.tools import Values, argument, name_of

_NOTHING = ("Dropout", "Identity", "alpha_dropout", "clone", "contiguous", "dropout", "identity")
_ALIKE = {
    "abs": "abs", "exp": "exp", "relu": "relu", "relu_": "relu", "ReLU": "relu", "rsqrt": "rsqrt",
    "sqrt": "sqrt", "square": "square",
}  # fmt: skip
_REDUCTIONS = {"mean": "mean", "sum": "sum", "amax": "largest", "amin": "least"}
_LENGTHS = ("norm", "linalg_vector_norm")


class Unknown(Exception):
    """A call that no steps are known for."""


class Program:
    """Steps that are written one after the other, and the constants they read."""

    def __init__(self, module: fx.GraphModule, values: Values, known: dict[fx.Node, Any]) -> None:
        self.module, self.values, self.known = module, values, known
        self.names: dict[fx.Node, str] = {}
        self.steps: list[Step] = []
        self.constants: list[Tensor] = []

    def emit(self, operation: str, *operands: Any, **attributes: Any) -> str:
        """Add a step; return its name."""
        names = tuple(self.operand(o) for o in operands)
        self.steps.append((operation, names, attributes))
        return f"s{len(self.steps) - 1}"

    def operand(self, value: Any) -> str:
        """Name an operand: a step by its name, a node, or a constant."""
        if isinstance(value, str):
            return value
        if isinstance(value, fx.Node):
            if value in self.names:
                return self.names[value]
            value = self.known.get(value)
        if not isinstance(value, (int, float, Tensor)):
            raise Unknown
        # The type is given, else a number of Python's would be rounded to float32 first.
        constant = torch.as_tensor(value, dtype=torch.float64).detach()
        self.constants.append(constant)
        return f"c{len(self.constants) - 1}"

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape of a node's tensor, without the batch."""
        if not isinstance(node, fx.Node) or node.name not in self.values.shapes:
            raise Unknown
        return self.values.shapes[node.name]

    def add(self, node: fx.Node) -> None:
        """Add what a node computes. Raises Unknown if there is no way to say it."""
        self.names[node] = self._translated(node)

    def _translated(self, node: fx.Node) -> str:
        name = name_of(self.module, node)
        source = argument(node, 0, "input")
        out = self.shape(node)
        if name in _NOTHING:
            return self.operand(source)
        if name in (*PERMUTATIONS, *SHUFFLES):
            return self._moved(source, steps_of(self.module, node, self.values))
        if name in (*RESHAPES, "unsqueeze", "squeeze"):
            if math.prod(out) != math.prod(self.shape(source)):
                raise Unknown  # the batch has been put into another axis
            return self.emit("reshape", source, shape=out)
        if name == "expand":
            return self.emit("expand", source, shape=out)
        if name == "getitem":
            return self._sliced(source, node.args[1], out)
        if name in ARITHMETIC:
            return self._calculated(node, ARITHMETIC[name])
        if name in _ALIKE:
            return self.emit(_ALIKE[name], source)
        if name in NAMES:
            function, attributes = analog_call(self.module, node)
            return self.emit(function, source, **attributes)
        special = getattr(self, f"_{name.lower()}", None)
        if special is None and name not in _REDUCTIONS and name not in _LENGTHS:
            raise Unknown
        if name in _REDUCTIONS:
            axes = self._axes(source, argument(node, 1, "dim"))
            return self._reduced(_REDUCTIONS[name], source, axes, out)
        if name in _LENGTHS:
            keys = (1, "p", 2, "dim") if name == "norm" else (1, "ord", 2, "dim")
            if argument(node, keys[0], str(keys[1]), 2) not in (2, 2.0):
                raise Unknown
            axes = self._axes(source, argument(node, keys[2], str(keys[3])))
            return self._reduced("length", source, axes, out)
        result: str = special(node, source, out)  # type: ignore[misc]
        return result

    def _axes(self, source: Any, given: Any) -> tuple[int, ...]:
        """Return axes as positive numbers; none may be that of the batch."""
        count = len(self.shape(source)) + 1
        axes = [given] if isinstance(given, int) else given
        if not isinstance(axes, (tuple, list)) or not all(isinstance(a, int) for a in axes):
            raise Unknown
        positive = tuple(a % count for a in axes)
        if not positive or 0 in positive:
            raise Unknown
        return positive

    def _reduced(self, kind: str, source: Any, axes: tuple[int, ...], out: tuple[int, ...]) -> str:
        reduced = self.emit(kind, source, axes=axes)
        kept = tuple(1 if i + 1 in axes else n for i, n in enumerate(self.shape(source)))
        return reduced if kept == out else self.emit("reshape", reduced, shape=out)

    def _moved(self, source: Any, steps: Any) -> str:
        if steps is None:
            raise Unknown
        name = self.operand(source)
        for kind, numbers in steps:
            if kind == "reshape":
                name = self.emit("reshape", name, shape=tuple(numbers))
            else:
                name = self.emit("permute", name, axes=(0, *numbers))
        return name

    def _sliced(self, source: Any, index: Any, out: tuple[int, ...]) -> str:
        shape = self.shape(source)
        items = index if isinstance(index, tuple) else (index,)
        items = tuple(i for i in items if i is not None)
        if Ellipsis in items:
            at = items.index(Ellipsis)
            fill = [slice(None)] * (len(shape) + 2 - len(items))
            items = (*items[:at], *fill, *items[at + 1 :])
        items = (*items, *[slice(None)] * (len(shape) + 1 - len(items)))
        whole, *rest = items
        plain = all(isinstance(i, (int, slice)) for i in rest)
        if whole != slice(None) or not plain or len(rest) != len(shape):
            raise Unknown
        bounds = []
        for item, length in zip(rest, shape, strict=True):
            if isinstance(item, int):
                item = slice(item % length, item % length + 1)
            if any(isinstance(b, fx.Node) for b in (item.start, item.stop, item.step)):
                raise Unknown
            bounds.append(tuple(item.indices(length)))
        return self.emit("reshape", self.emit("slice", source, bounds=tuple(bounds)), shape=out)

    def _calculated(self, node: fx.Node, kind: str) -> str:
        if kind == "neg":
            return self.emit("mul", node.args[0], -1.0)
        if node.kwargs or len(node.args) != 2:
            raise Unknown
        first, second = node.args
        if kind == "rsub":
            kind, first, second = "sub", second, first
        return self.emit(kind, first, second)

    def _pow(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        return self.emit("pow", source, argument(node, 1, "exponent"))

    def _matmul(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        if min(len(self.shape(a)) for a in node.args) < 2:
            raise Unknown
        return self.emit("matmul", *node.args)

    def _addcmul(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        if argument(node, 3, "value", 1) != 1:
            raise Unknown
        return self.emit("add", source, self.emit("mul", node.args[1], node.args[2]))

    def _softmax(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        axis = argument(node, 1, "dim")
        if node.op == "call_module":
            axis = getattr(self.module.get_submodule(str(node.target)), "dim", None)
        return self.emit("softmax", source, axis=self._axes(source, axis)[0])

    def _cat(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        parts: Any = argument(node, 0, "tensors")
        if not isinstance(parts, (tuple, list)):
            raise Unknown
        (axis,) = self._axes(parts[0], argument(node, 1, "dim", 0))
        return self.emit("concat", *parts, axis=axis)

    def _stack(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        parts: Any = argument(node, 0, "tensors")
        if not isinstance(parts, (tuple, list)):
            raise Unknown
        axis = argument(node, 1, "dim", 0) % (len(out) + 1)
        if axis == 0:
            raise Unknown
        shape = (*out[: axis - 1], 1, *out[axis:])
        return self.emit(
            "concat", *(self.emit("reshape", p, shape=shape) for p in parts), axis=axis
        )

    def _clamp(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        if any(isinstance(bound, fx.Node) for bound in (low, high)):
            raise Unknown
        return self.emit("limit", source, low=low, high=high)

    def _layer_norm(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        count = len(argument(node, 1, "normalized_shape"))
        if argument(node, 2, "weight") is not None or argument(node, 3, "bias") is not None:
            raise Unknown
        axes = tuple(range(len(out) + 1 - count, len(out) + 1))
        return self.emit("standardize", source, axes=axes, eps=argument(node, 4, "eps", 1e-5))

    def _group_norm(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        groups = argument(node, 1, "num_groups")
        if argument(node, 2, "weight") is not None or argument(node, 3, "bias") is not None:
            raise Unknown
        apart = self.emit("reshape", source, shape=(groups, out[0] // groups, *out[1:]))
        axes = tuple(range(2, len(out) + 2))
        found = self.emit("standardize", apart, axes=axes, eps=argument(node, 4, "eps", 1e-5))
        return self.emit("reshape", found, shape=out)

    def _normalize(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        if argument(node, 1, "p", 2.0) != 2:
            raise Unknown
        axes = self._axes(source, argument(node, 2, "dim", 1))
        length = self.emit("length", source, axes=axes)
        bounded = self.emit("limit", length, low=argument(node, 3, "eps", 1e-12), high=None)
        return self.emit("div", source, bounded)

    def _var(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        axes = self._axes(source, argument(node, 1, "dim"))
        given = argument(node, 2, "unbiased", node.kwargs.get("correction", 1))
        correction = 1 if given is None else int(given)
        reduced = self.emit("variance", source, axes=axes, correction=correction)
        return self.emit("reshape", reduced, shape=out)

    def _maximum(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        if len(node.args) != 2 or not isinstance(node.args[1], fx.Node):
            raise Unknown
        return self.emit("larger", *node.args)

    _max = _maximum

    def _conv1d(self, node: fx.Node, source: Any, out: tuple[int, ...]) -> str:
        if node.op != "call_module":
            raise Unknown
        owner: Any = self.module.get_submodule(str(node.target))
        if owner.padding_mode != "zeros" or isinstance(owner.padding, str):
            raise Unknown
        how = {
            "stride": tuple(owner.stride),
            "padding": tuple(owner.padding),
            "dilation": tuple(owner.dilation),
            "groups": owner.groups,
        }
        parameters = [p for p in (owner.weight, owner.bias) if p is not None]
        return self.emit("convolve", source, *parameters, **how)


def analog_call(module: fx.GraphModule, node: fx.Node) -> tuple[str, dict[str, Any]]:
    """Return which function of `snnconv.analog` a node calls, and what goes with it."""
    function, names = NAMES[name_of(module, node)]
    if node.op == "call_module":
        owner = module.get_submodule(str(node.target))
        return function, {name: getattr(owner, name) for name in names}
    rest = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    return function, {name: rest[name] for name in names if name in rest}
