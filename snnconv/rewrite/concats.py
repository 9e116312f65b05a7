"""Layers over a concatenation of counts that are worth differently."""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import fx, nn

from snnconv.rewrite.tools import CONCATENATIONS, SUMS, Values, argument, name_of

# What a count is worth: that of pixels, of neurons, and by which poolings it is a sum of.
Worth = tuple[Any, ...]
PIXELS, NEURONS = ("pixels",), ("neurons",)
# A sum of currents, which gets neurons before it is concatenated.
CURRENT = ("current",)

_NEURONS = ("Neurons", "Composite")
_SAME = ("Identity", "Dropout", "Dropout2d", "dropout", "contiguous", "clone")
_FLATTENED = ("Flatten", "flatten", "reshape", "view")


@dataclass(frozen=True)
class _Reading:
    """A layer's input in runs of channels that are worth the same.

    `bounds` are where the runs begin and end among the layer's inputs.
    """

    parts: tuple[tuple[fx.Node, ...], ...]
    flattened: bool
    bounds: tuple[int, ...]


def concats(module: fx.GraphModule, values: Values) -> bool:
    """Write a layer over a concatenation as a sum of layers over parts that are worth the same.

    The weights of a row share one scale. A count that is a sum over 49 pixels is worth the 49th
    part of another one, and so are its weights, of which 8 bits would keep 2 beside those. A layer
    that reads something else elsewhere is left as it is, for its weights must stay one parameter.
    """
    worths: dict[fx.Node, Worth | None] = {}
    readings: dict[fx.Node, _Reading] = {}
    # The weights of all layers, and how they are read, call by call.
    calls: dict[nn.Parameter, list[tuple[int, ...]]] = {}
    for node in module.graph.nodes:
        worths[node] = _worth(module, node, values, worths)
        if (layer := _layer(module, node)) is not None:
            found = _reading(module, node, values, worths)
            if found is not None:
                readings[node] = found
            calls.setdefault(layer.weight, []).append(found.bounds if found else ())
    changed: dict[fx.Node, fx.Node] = {}
    joined: dict[Any, fx.Node] = {}
    for node, reading in readings.items():
        if len(set(calls[_layer(module, node).weight])) == 1:
            changed[node] = _read_apart(module, node, reading, values, changed, joined)
    return bool(changed)


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
    if weighted or name in SUMS:
        return CURRENT
    if len(sources) > 1:
        found = [_counted(worths[n]) for n in sources]
        return found[0] if len(set(found)) == 1 else None
    below = worths[sources[0]]
    if below == CURRENT:
        return CURRENT if "pool" in name.lower() or name in _SAME else NEURONS
    if below is not None and "avgpool" in name.lower().replace("_", ""):
        told = owner.extra_repr() if owner is not None else f"{node.args[1:]} {node.kwargs}"
        return (*below, values.shapes[sources[0].name][1:], shape[1:], told)
    return below


def _counted(worth: Worth | None) -> Worth | None:
    """Return what counts are worth when they are read: currents have neurons then."""
    return NEURONS if worth == CURRENT else worth


def _layer(module: fx.GraphModule, node: fx.Node) -> Any:
    """Return the convolution or linear layer that a node calls."""
    if node.op != "call_module":
        return None
    layer = module.get_submodule(str(node.target))
    return layer if isinstance(layer, (nn.Conv2d, nn.Linear)) else None


def _reading(
    module: fx.GraphModule,
    node: fx.Node,
    values: Values,
    worths: dict[fx.Node, Worth | None],
) -> _Reading | None:
    """Return what a layer reads if that is worth differently, and every row reads all of it."""
    layer, source = _layer(module, node), node.args[0] if node.args else None
    pixels = isinstance(layer, nn.Conv2d)
    if not isinstance(source, fx.Node) or (pixels and layer.groups > 1):
        return None
    if len(values.shapes.get(source.name, ())) != (3 if pixels else 1):
        return None
    concatenation = _concatenation(module, source, values)
    if concatenation is None:
        return None
    runs = groupby(_parts(module, concatenation, worths), lambda part: _counted(worths[part]))
    parts = tuple(tuple(run) for _, run in runs)
    shapes = [[values.shapes[n.name] for n in part] for part in parts]
    flattened = not pixels and len(shapes[0][0]) > 1
    inputs = [sum(math.prod(s) if flattened else s[0] for s in part) for part in shapes]
    return _Reading(parts, flattened, (0, *accumulate(inputs))) if len(parts) > 1 else None


def _concatenation(module: fx.GraphModule, node: fx.Node, values: Values) -> fx.Node | None:
    """Return the concatenation of channels that a node is, flattened or not."""
    while name_of(module, node) not in CONCATENATIONS:
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        before, after = (values.shapes.get(n.name, ()) for n in (source, node))
        name = name_of(module, node)
        if name not in _SAME and (name not in _FLATTENED or after != (math.prod(before),)):
            return None
        node = source
    axes = len(values.shapes[node.name]) + 1
    axis = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    whole = isinstance(argument(node, 0, "tensors"), (list, tuple))
    return node if whole and axis % axes == 1 else None


def _parts(
    module: fx.GraphModule, joined: fx.Node, worths: dict[fx.Node, Worth | None]
) -> list[fx.Node]:
    """Return what a concatenation joins; of one that is itself a mixture, its parts."""
    parts: list[fx.Node] = []
    for part in argument(joined, 0, "tensors"):
        mixed = worths[part] is None and name_of(module, part) in CONCATENATIONS
        parts += _parts(module, part, worths) if mixed else [part]
    return parts


def _read_apart(
    module: fx.GraphModule,
    node: fx.Node,
    reading: _Reading,
    values: Values,
    changed: dict[fx.Node, fx.Node],
    joined: dict[Any, fx.Node],
) -> fx.Node:
    """Write `W cat(a, b)` as `W_a a + W_b b`; return the sum.

    `changed` are the sums that stand in the place of layers by now, `joined` the parts that are
    concatenated already.
    """
    layer, known = _layer(module, node), dict(module.named_modules())
    total: fx.Node | None = None
    for part, (first, last) in zip(reading.parts, pairwise(reading.bounds), strict=True):
        path = f"{node.target}_{first}_{last}"
        if path not in known:
            module.add_submodule(path, _columns(layer, str(node.target), first, last))
        with module.graph.inserting_before(node):
            key = (part, reading.flattened)
            if key not in joined:
                joined[key] = _join(module, [changed.get(n, n) for n in part], reading.flattened)
            new = module.graph.call_module(path, (joined[key],))
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


def _join(module: fx.GraphModule, part: list[fx.Node], flattened: bool) -> fx.Node:
    whole = part[0] if len(part) == 1 else module.graph.call_function(torch.cat, (part, 1))
    return module.graph.call_function(torch.flatten, (whole, 1)) if flattened else whole


def _columns(layer: Any, name: str, first: int, last: int) -> Any:
    """Return a layer that reads some of the inputs of one of a name; the first has the bias."""
    part = copy.deepcopy(layer)
    if isinstance(part, nn.Conv2d):
        part.in_channels = last - first
    else:
        part.in_features = last - first
    part.weight = nn.Parameter(layer.weight.detach()[:, first:last].clone())
    if first:
        part.bias = None
    part.part_of = name
    return part
