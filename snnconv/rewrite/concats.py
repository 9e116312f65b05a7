"""Layers over a concatenation of counts that are worth differently."""

from __future__ import annotations

import copy
import math
import operator
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import fx, nn

from snnconv.rewrite.tools import Values, argument, name_of, path_of

# What a count is worth: that of pixels, of neurons, and by which poolings it is a sum of.
Worth = tuple[Any, ...]
PIXELS, NEURONS = ("pixels",), ("neurons",)
# A sum of currents, which gets neurons before it is concatenated.
CURRENT = ("current",)

_CONCATENATIONS = ("cat", "concat", "concatenate")
_SUMS = ("add", "add_", "iadd", "sub", "sub_", "isub")
_NEURONS = ("Neurons", "Composite")
_SAME = ("Identity", "Dropout", "Dropout2d", "dropout", "contiguous", "clone")
_FLATTENED = ("Flatten", "flatten", "reshape", "view")


def concats(module: fx.GraphModule, values: Values) -> bool:
    """Write a layer over a concatenation as a sum of layers over parts that are worth the same.

    The weights of a row share one scale. A count that is a sum over 49 pixels is worth the 49th
    part of another one, and so are its weights, of which 8 bits would keep 2 beside those.
    """
    worths: dict[fx.Node, Worth | None] = {}
    changed = False
    for node in list(module.graph.nodes):
        worths[node] = _worth(module, node, values, worths)
        layer = _layer(module, node)
        if layer is None or not isinstance(node.args[0], fx.Node):
            continue
        joined, flattened = _joined(module, node.args[0], values)
        if joined is None:
            continue
        parts = [
            list(same)
            for _, same in groupby(
                _parts(module, joined, worths), lambda part: _counted(worths[part])
            )
        ]
        if len(parts) > 1:
            total = _read_apart(module, node, parts, flattened, values)
            worths[total] = CURRENT
            changed = True
    return changed


def _worth(
    module: fx.GraphModule, node: fx.Node, values: Values, worths: dict[fx.Node, Worth | None]
) -> Worth | None:
    """Return what the counts of a node are worth, None if that differs between channels."""
    name, shape = name_of(module, node), values.shapes.get(node.name)
    if node.op == "placeholder":
        return PIXELS
    sources = [n for n in node.all_input_nodes if n.name in values.shapes]
    if shape is None or not sources or name in _NEURONS:
        return NEURONS
    owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    weighted = isinstance(owner, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d))
    if weighted or name in _SUMS:
        return CURRENT
    if len(sources) > 1:
        found = [_counted(worths[n]) for n in sources]
        return found[0] if len(set(found)) == 1 else None
    below = worths[sources[0]]
    if below == CURRENT:
        return CURRENT if "pool" in name.lower() or name in _SAME else NEURONS
    if below is not None and "avgpool" in name.lower().replace("_", ""):
        return (*below, values.shapes[sources[0].name][1:], shape[1:])
    return below


def _counted(worth: Worth | None) -> Worth | None:
    """Return what counts are worth when they are read: currents have neurons then."""
    return NEURONS if worth == CURRENT else worth


def _layer(module: fx.GraphModule, node: fx.Node) -> Any:
    """Return the layer that a node calls, if every row of it reads all channels."""
    if node.op != "call_module":
        return None
    layer: Any = module.get_submodule(str(node.target))
    dense = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    return layer if dense and len(node.args) == 1 else None


def _joined(module: fx.GraphModule, node: fx.Node, values: Values) -> tuple[fx.Node | None, bool]:
    """Return the concatenation of channels that a node is, and whether it was flattened since."""
    flattened = False
    while name_of(module, node) not in _CONCATENATIONS:
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None, False
        before, after = (values.shapes.get(n.name, ()) for n in (source, node))
        if name_of(module, node) in _FLATTENED and after == (math.prod(before),):
            flattened |= len(before) > 1
        elif name_of(module, node) not in _SAME:
            return None, False
        node = source
    axes = len(values.shapes[node.name]) + 1
    axis = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    return (node, flattened) if axis % axes == 1 else (None, False)


def _parts(
    module: fx.GraphModule, joined: fx.Node, worths: dict[fx.Node, Worth | None]
) -> list[fx.Node]:
    """Return what a concatenation joins; of one that is itself a mixture, its parts."""
    parts: list[fx.Node] = []
    for part in argument(joined, 0, "tensors"):
        mixed = worths[part] is None and name_of(module, part) in _CONCATENATIONS
        parts += _parts(module, part, worths) if mixed else [part]
    return parts


def _read_apart(
    module: fx.GraphModule,
    node: fx.Node,
    parts: list[list[fx.Node]],
    flattened: bool,
    values: Values,
) -> fx.Node:
    """Write `W cat(a, b)` as `W_a a + W_b b`; return the sum."""
    layer: Any = module.get_submodule(str(node.target))
    channels = [sum(values.shapes[n.name][0] for n in part) for part in parts]
    pixels = layer.weight.shape[1] // sum(channels)
    bounds = [0, *(sum(channels[: i + 1]) * pixels for i in range(len(channels)))]
    known = dict(module.named_modules())
    total: fx.Node | None = None
    for part, (first, last) in zip(parts, pairwise(bounds), strict=True):
        path = path_of(node, f"{first}_{last}")
        if path not in known:
            module.add_submodule(path, _columns(layer, first, last))
        with module.graph.inserting_before(node):
            source = part[0] if len(part) == 1 else module.graph.call_function(torch.cat, (part, 1))
            if flattened:
                source = module.graph.call_function(torch.flatten, (source, 1))
            new = module.graph.call_module(path, (source,))
            if total is not None:
                new = module.graph.call_function(operator.add, (total, new))
        new.meta = dict(node.meta)
        values.shapes[new.name] = values.shapes[node.name]
        total = new
    assert total is not None
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)
    if all(other.target != node.target for other in module.graph.nodes):
        module.delete_submodule(str(node.target))
    return total


def _columns(layer: Any, first: int, last: int) -> Any:
    """Return a layer that reads some of the inputs; the first of them has the bias."""
    part = copy.deepcopy(layer)
    if isinstance(part, nn.Conv2d):
        part.in_channels = last - first
    else:
        part.in_features = last - first
    part.weight = nn.Parameter(layer.weight.detach()[:, first:last].clone())
    if first:
        part.bias = None
    return part
