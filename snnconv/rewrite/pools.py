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
    """Write means and maxima over all pixels, at once or one axis after the other, as poolings."""
    changed = False
    for node in list(module.graph.nodes):
        found = _over_all_pixels(module, node, values)
        if found is None:
            continue
        image, kept = found
        with module.graph.inserting_before(node):
            new = module.graph.call_function(_POOLS[name_of(module, node)], (image, 1))
            if not kept:
                new = module.graph.call_function(torch.flatten, (new, 1))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        changed = True
    return changed


def _over_all_pixels(
    module: fx.GraphModule, node: fx.Node, values: Values
) -> tuple[fx.Node, bool] | None:
    """Return the image whose pixels a node is the mean or maximum of; whether their axes stay."""
    name = name_of(module, node)
    if name not in _POOLS:
        return None
    chain, image = [node], argument(node, 0, "input")
    if isinstance(image, fx.Node) and name_of(module, image) == name:
        chain, image = [image, node], argument(image, 0, "input")
    if not isinstance(image, fx.Node) or len(values.shapes.get(image.name, ())) != 3:
        return None
    kept = {bool(argument(n, 2, "keepdim", False)) for n in chain}
    left, gone = [0, 1, 2, 3], []
    for reduction in chain:
        axes = argument(reduction, 1, "dim")
        axes = (axes,) if isinstance(axes, int) else axes
        if len(kept) != 1 or not isinstance(axes, (tuple, list)):
            return None
        gone += [left[axis % len(left)] for axis in axes]
        if kept == {False}:
            left = [axis for axis in left if axis not in gone]
    return (image, True in kept) if sorted(gone) == [2, 3] else None
