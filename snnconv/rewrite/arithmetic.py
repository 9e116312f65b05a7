"""Calculations with constants, and differences."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from snnconv.rewrite.modules import affine
from snnconv.rewrite.tools import (
    Values,
    constant_per_channel,
    known_values,
    name_of,
    put,
    replace_by_module,
)

ARITHMETIC = {
    "mul": "mul", "mul_": "mul", "imul": "mul", "multiply": "mul",
    "add": "add", "add_": "add", "iadd": "add",
    "sub": "sub", "sub_": "sub", "isub": "sub", "rsub": "rsub",
    "truediv": "div", "div": "div", "div_": "div", "itruediv": "div",
    "neg": "neg",
}  # fmt: skip


def arithmetic(module: fx.GraphModule, values: Values) -> bool:
    """Write calculations with constants, one per channel or one for all, as `affine`."""
    changed = _weigh(module, values)
    known = known_values(module)
    for node in list(module.graph.nodes):
        if node in known or node.name not in values.shapes or node.op == "call_module":
            continue
        kind = ARITHMETIC.get(name_of(module, node))
        if kind is None:
            continue
        shape = values.shapes[node.name]
        if kind == "add" and _adds_nothing_(node, values):
            changed = True
            continue
        made = _affine_of(node, kind, shape, known, values.example.device)
        if made is not None:
            gain, shift, source = made
            if values.shapes.get(source.name) == shape and len(shape) in (1, 3):
                made_of = affine(gain, shift, len(shape) == 3)
                new = replace_by_module(module, node, made_of, source)
                values.shapes[new.name] = shape
                changed = True
        elif kind == "sub" and not node.kwargs:
            _subtract_(module, node, values)
            changed = True
    return changed


def _weigh(module: fx.GraphModule, values: Values) -> bool:
    """Write `add(x, y, alpha=a)` as `x + a y`."""
    changed = False
    for node in list(module.graph.nodes):
        alpha, shape = node.kwargs.get("alpha"), values.shapes.get(node.name)
        if not isinstance(alpha, (int, float)) or len(node.args) != 2 or shape is None:
            continue
        if ARITHMETIC.get(name_of(module, node)) not in ("add", "sub"):
            continue
        with module.graph.inserting_before(node):
            weighed = module.graph.call_function(operator.mul, (node.args[1], alpha))
        values.shapes[weighed.name] = shape
        node.args = (node.args[0], weighed)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "alpha"}
        changed = True
    return changed


def _adds_nothing_(node: fx.Node, values: Values) -> bool:
    """Take out the 0 that Python's `sum()` begins with; return whether it was that."""
    rest = [o for o in node.args if not (isinstance(o, (int, float)) and o == 0)]
    if len(node.args) != 2 or len(rest) != 1 or not isinstance(rest[0], fx.Node):
        return False
    if values.shapes.get(rest[0].name) != values.shapes[node.name]:
        return False
    node.replace_all_uses_with(rest[0])
    return True


def _affine_of(
    node: fx.Node,
    kind: str,
    shape: tuple[int, ...],
    known: dict[fx.Node, Any],
    device: torch.device,
) -> tuple[Tensor, Tensor, fx.Node] | None:
    """Return gain, shift `[C]` and source if a calculation is one of a tensor and a constant."""
    operands: list[Any] = list(node.args[:2]) if kind != "neg" else [node.args[0], -1.0]
    if node.kwargs or len(operands) != 2:
        return None
    constants = [constant_per_channel(known.get(o, o), shape, device) for o in operands]
    if (constants[0] is None) == (constants[1] is None):
        return None
    right = constants[0] is None
    source, constant = (operands[0], constants[1]) if right else (operands[1], constants[0])
    assert constant is not None and isinstance(source, fx.Node)
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    if kind in ("mul", "neg"):
        return constant, zero, source
    if kind == "add":
        return one, constant, source
    if kind in ("sub", "rsub"):
        first = right == (kind == "sub")  # whether the constant is what is taken off
        return (one, -constant, source) if first else (-one, constant, source)
    return (1 / constant, zero, source) if right else None


def _subtract_(module: fx.GraphModule, node: fx.Node, values: Values) -> None:
    """Write `x - y` as `x + (-y)`."""
    x, y = node.args
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return
    shape = values.shapes.get(y.name)
    if shape is None or len(shape) not in (1, 3):
        return
    channels = torch.ones(shape[0], device=values.example.device)
    made = affine(-channels, 0 * channels, len(shape) == 3)
    name = put(module, f"{node.name}_negated", made)
    with module.graph.inserting_before(node):
        negated = module.graph.call_module(name, (y,))
        total = module.graph.call_function(operator.add, (x, negated))
    for new in (negated, total):
        values.shapes[new.name] = shape
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)
