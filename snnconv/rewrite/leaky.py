"""LeakyReLU and PReLU, in parts that are exact on counts."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snnconv.rewrite.modules import Neurons, affine
from snnconv.rewrite.tools import (
    Values,
    argument,
    constant_per_channel,
    known_values,
    name_of,
    path_of,
    put,
)

_LEAKY = ("LeakyReLU", "PReLU", "leaky_relu", "leaky_relu_", "prelu")


def leaky(module: fx.GraphModule, values: Values) -> bool:
    """Write a LeakyReLU as what two-sided neurons count above 0 and, times its slope, below.

    Both parts are exact on counts. Layers that are linear read them apart, so that nothing has to
    be quantised twice.
    """
    known = known_values(module)
    changed = False
    for node in list(module.graph.nodes):
        shape = values.shapes.get(node.name, ())
        if name_of(module, node) not in _LEAKY or len(shape) not in (1, 3):
            continue
        slope = _slope(module, node, shape, known, values.example.device)
        if slope is None:
            continue
        source: Any = node.args[0]
        path = path_of(node, "neurons")
        module.add_submodule(path, Neurons())
        with module.graph.inserting_before(node):
            counts = module.graph.call_module(path, (source,))
            above = module.graph.call_function(F.relu, (counts,))
            below = module.graph.call_function(torch.clamp, (counts, None, 0.0))
        for new in (counts, above, below):
            values.shapes[new.name] = shape
        for user in list(node.users):
            if _is_linear(module, user) and user.args == (node,):
                _read_apart(module, user, above, below, slope)
        if node.users:
            made = affine(slope, 0 * slope, len(shape) == 3)
            path = put(module, path_of(node, "below"), made)
            with module.graph.inserting_before(node):
                weighed = module.graph.call_module(path, (below,))
                total = module.graph.call_function(operator.add, (above, weighed))
            node.replace_all_uses_with(total)
        module.graph.erase_node(node)
        changed = True
    return changed


def _slope(
    module: fx.GraphModule,
    node: fx.Node,
    shape: tuple[int, ...],
    known: dict[fx.Node, Any],
    device: torch.device,
) -> Tensor | None:
    """Return the slope below 0 per channel, `[C]`."""
    if node.op == "call_module":
        owner: Any = module.get_submodule(str(node.target))
        slope: Any = getattr(owner, "negative_slope", None)
        slope = owner.weight.detach() if slope is None else slope
    else:
        slope = argument(node, 1, "negative_slope", 0.01)
        slope = known.get(slope) if isinstance(slope, fx.Node) else slope
    if isinstance(slope, Tensor):
        slope = slope.view(-1, *[1] * (len(shape) - 1))
    return constant_per_channel(slope, shape, device)


def _is_linear(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(module.get_submodule(str(node.target)), (nn.Conv2d, nn.Linear))


def _read_apart(
    module: fx.GraphModule, user: fx.Node, above: fx.Node, below: fx.Node, slope: Tensor
) -> None:
    """Write `W (above + slope below)` as `W above + (W slope) below`."""
    layer: Any = module.get_submodule(str(user.target))
    other = copy.deepcopy(layer)
    other.bias = None
    groups = getattr(layer, "groups", 1)
    per_group = slope.view(groups, 1, -1, *[1] * (layer.weight.ndim - 2)).to(layer.weight)
    weight = layer.weight.detach()
    scaled = (weight.view(groups, -1, *weight.shape[1:]) * per_group).view_as(weight)
    other.weight = nn.Parameter(scaled)
    path = put(module, f"{user.target}_below", other)
    with module.graph.inserting_before(user):
        first = module.graph.call_module(str(user.target), (above,))
        second = module.graph.call_module(path, (below,))
        total = module.graph.call_function(operator.add, (first, second))
    user.replace_all_uses_with(total)
    module.graph.erase_node(user)
