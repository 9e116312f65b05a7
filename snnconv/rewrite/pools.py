"""Means and maxima over all pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snnconv.rewrite.tools import Values, argument, name_of

_POOLS: dict[str, Callable[..., Tensor]] = {
    "mean": F.adaptive_avg_pool2d,
    "amax": F.adaptive_max_pool2d,
}


def pools(module: fx.GraphModule, values: Values) -> bool:
    """Write means and maxima over all pixels as the global poolings they are."""
    changed = False
    for node in list(module.graph.nodes):
        pool = _POOLS.get(name_of(module, node))
        source, axes = argument(node, 0, "input"), argument(node, 1, "dim")
        if pool is None or not isinstance(source, fx.Node) or not isinstance(axes, (tuple, list)):
            continue
        pixels = len(values.shapes.get(source.name, ())) == 3
        if not pixels or sorted(a % 4 for a in axes) != [2, 3]:
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(pool, (source, 1))
            if not argument(node, 2, "keepdim", False):
                new = module.graph.call_function(torch.flatten, (new, 1))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        changed = True
    return changed
