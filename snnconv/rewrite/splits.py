"""Parts of a tensor are slices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from snnconv.rewrite.tools import CONCATENATIONS, Values, argument, name_of, put_in_place

SPLITS = ("split", "chunk", "tensor_split", "unbind", "split_with_sizes")


# What takes a split as a whole.
_JOINTS = (*CONCATENATIONS, "stack")


def splits(module: fx.GraphModule, values: Values) -> bool:
    """Write what is taken out of a split as the slice it is."""
    changed = _narrowed(module, values)
    for node in [n for n in module.graph.nodes if n.name in values.parts]:
        for user in list(node.users):
            if name_of(module, user) in _JOINTS and argument(user, 0, "tensors") is node:
                _take_apart(module, node, user, values)
                changed = True
    for node in list(module.graph.nodes):
        source = node.args[0] if node.args else None
        if node.target is not operator.getitem or not isinstance(source, fx.Node):
            continue
        if source.name not in values.parts or name_of(module, source) not in SPLITS:
            continue
        parts, index = values.parts[source.name], node.args[1]
        whole = source.args[0]
        if not isinstance(index, int) or not isinstance(whole, fx.Node):
            continue
        dims = len(values.shapes[whole.name]) + 1
        unbound = name_of(module, source) == "unbind"
        axis = int(argument(source, 1 if unbound else 2, "dim", 0)) % dims
        if axis == 0:
            continue
        index %= len(parts)
        bounds: list[int | slice] = [slice(None)] * axis
        if unbound:
            bounds.append(index)
        else:
            first = sum(shape[axis] for shape in parts[:index])
            bounds.append(slice(first, first + parts[index][axis]))
        _slice(module, node, whole, bounds, values)
        changed = True
    return changed


def _narrowed(module: fx.GraphModule, values: Values) -> bool:
    """Write `narrow` as the slice it is."""
    changed = False
    for node in list(module.graph.nodes):
        source: Any = argument(node, 0, "input")
        if name_of(module, node) != "narrow" or getattr(source, "name", "") not in values.shapes:
            continue
        names = ("dim", "start", "length")
        axis, first, length = (argument(node, k, name) for k, name in enumerate(names, 1))
        shape = values.shapes[source.name]
        if not all(isinstance(n, int) for n in (axis, first, length)) or axis in (0, ~len(shape)):
            continue
        axis %= len(shape) + 1
        first %= shape[axis - 1]
        bounds = [*[slice(None)] * axis, slice(first, first + length)]
        _slice(module, node, source, bounds, values)
        changed = True
    return changed


def _slice(
    module: fx.GraphModule,
    node: fx.Node,
    whole: fx.Node,
    bounds: Sequence[int | slice],
    values: Values,
) -> None:
    """Put a slice of a tensor in place of a node."""
    with module.graph.inserting_before(node):
        new = module.graph.call_function(operator.getitem, (whole, tuple(bounds)))
    new.meta = dict(node.meta)
    values.shapes[new.name] = values.shapes[node.name]
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _take_apart(module: fx.GraphModule, split: fx.Node, user: fx.Node, values: Values) -> None:
    """Give a node that joins what a split yields the parts one by one."""
    parts = []
    with module.graph.inserting_before(user):
        for index, shape in enumerate(values.parts[split.name]):
            part = module.graph.call_function(operator.getitem, (split, index))
            values.shapes[part.name] = shape[1:]
            parts.append(part)
    put_in_place(user, split, parts)
