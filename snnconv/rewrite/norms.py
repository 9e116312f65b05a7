"""Normalisation over channels or groups, apart from its weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snnconv.rewrite.tools import Values, argument, name_of

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": F.layer_norm, "LayerNorm": F.layer_norm,
    "group_norm": F.group_norm, "GroupNorm": F.group_norm,
}  # fmt: skip


def norms(module: fx.GraphModule, values: Values) -> bool:
    """Write layer and group normalisation as one without weights, and calculations with them.

    The weights go where those of a BatchNorm do, and what is left is alike in all channels.
    """
    changed = False
    for node in list(module.graph.nodes):
        function = _FUNCTIONS.get(name_of(module, node))
        source = argument(node, 0, "input")
        if function is None or not isinstance(source, fx.Node):
            continue
        shape = values.shapes.get(source.name)
        if shape is None:
            continue
        with module.graph.inserting_before(node):
            how, weight, bias, eps = _parameters(module, node)
            if node.op == "call_function" and weight is None and bias is None:
                continue
            total = module.graph.call_function(function, (source, how), {"eps": eps})
            made = [total]
            for constant, calculate in ((weight, operator.mul), (bias, operator.add)):
                if constant is None:
                    continue
                if function is F.group_norm:
                    axes = (-1, *[1] * (len(shape) - 1))
                    constant = module.graph.call_function(torch.reshape, (constant, axes))
                total = module.graph.call_function(calculate, (total, constant))
                made.append(total)
        for new in made:
            new.meta = dict(node.meta)
            values.shapes[new.name] = shape
        node.replace_all_uses_with(total)
        module.graph.erase_node(node)
        changed = True
    return changed


def _parameters(module: fx.GraphModule, node: fx.Node) -> tuple[Any, Any, Any, float]:
    """Return groups or shape, the nodes of weight and bias or None, and what keeps from 0."""
    if node.op != "call_module":
        group = name_of(module, node) == "group_norm"
        how = argument(node, 1, "num_groups" if group else "normalized_shape")
        weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
        return how, weight, bias, argument(node, 4, "eps", 1e-5)
    owner: Any = module.get_submodule(str(node.target))
    weight, bias = (
        None if getattr(owner, name) is None else module.graph.get_attr(f"{node.target}.{name}")
        for name in ("weight", "bias")
    )
    how = getattr(owner, "num_groups", None) or owner.normalized_shape
    return how, weight, bias, owner.eps
