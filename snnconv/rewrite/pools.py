"""Sums, means and maxima over all pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from snnconv.rewrite.rearrangements import origin
from snnconv.rewrite.tools import Values, argument, name_of

_POOLS = ("mean", "sum", "amax")


def pools(module: fx.GraphModule, values: Values) -> bool:
    """Write what is taken over all pixels, at once or one axis after the other, as pooling."""
    changed = _maxima(module, values)
    for node in list(module.graph.nodes):
        name = name_of(module, node)
        if name not in _POOLS or node.name not in values.shapes:
            continue
        image = _pooled(module, node, values)
        if image is None:
            continue
        kept = len(values.shapes[node.name]) == 3
        if name == "sum" and kept:
            continue  # what is divided by it is computed with it
        with module.graph.inserting_before(node):
            if name == "sum":
                window = values.shapes[image.name][1:]
                new = module.graph.call_function(
                    F.avg_pool2d, (image, window), {"divisor_override": 1}
                )
            else:
                pool: Any = F.adaptive_avg_pool2d if name == "mean" else F.adaptive_max_pool2d
                new = module.graph.call_function(pool, (image, 1))
            new.meta = dict(node.meta)
            if not kept:
                new = module.graph.call_function(torch.flatten, (new, 1))
        values.shapes[new.name] = values.shapes[node.name]
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        changed = True
    return changed


def _maxima(module: fx.GraphModule, values: Values) -> bool:
    """Write the values of `max` along an axis as `amax`."""
    changed = False
    for node in list(module.graph.nodes):
        axis = argument(node, 1, "dim")
        if name_of(module, node) != "max" or not isinstance(axis, int):
            continue
        taken = [u for u in node.users if u.args in ((node, 0), (node, "values"))]
        if not taken or len(taken) < len(node.users) or taken[0].name not in values.shapes:
            continue
        with module.graph.inserting_before(node):
            kept = argument(node, 2, "keepdim", False)
            new = module.graph.call_function(torch.amax, (node.args[0], axis, kept))
        new.meta = dict(node.meta)
        values.shapes[new.name] = values.shapes[taken[0].name]
        for user in taken:
            user.replace_all_uses_with(new)
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        changed = True
    return changed


def _pooled(module: fx.GraphModule, node: fx.Node, values: Values) -> fx.Node | None:
    """Return the image over all whose pixels a node goes, alone or after another of its kind."""
    chain = [node]
    while len(chain) <= 2:
        source = argument(chain[0], 0, "input")
        if not isinstance(source, fx.Node) or source.name not in values.shapes:
            return None
        image = origin(module, source, values)
        shapes = [values.shapes[n.name] for n in (image, source, *chain)]
        axes = [argument(n, 1, "dim", n.kwargs.get("axis")) for n in chain]
        if len(shapes[0]) == 3 and _goes_over(axes, *shapes):
            return image
        if name_of(module, source) != name_of(module, node):
            return None
        chain.insert(0, source)
    return None


def _goes_over(
    axes: list[Any], image: tuple[int, ...], given: tuple[int, ...], *results: tuple[int, ...]
) -> bool:
    """Return whether axes, one call's after the other's, are those of all pixels of an image.

    The image may have been `given` with its pixels in a row. Calls either keep axes, with one
    element, or drop them.
    """
    in_a_row = given == (image[0], image[1] * image[2])
    kept = len(results[-1]) == len(given)
    if (given != image and not in_a_row) or (in_a_row and kept):
        return False
    left, gone = [*range(len(given) + 1)], []
    for some, result in zip(axes, results, strict=True):
        some = (some,) if isinstance(some, int) else some
        if not isinstance(some, (tuple, list)) or kept != (len(result) == len(given)):
            return False
        gone += [left[axis % len(left)] for axis in some]
        left = left if kept else [axis for axis in left if axis not in gone]
    return sorted(gone) == [*range(2, len(given) + 1)]
