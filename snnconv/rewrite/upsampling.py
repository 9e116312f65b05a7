"""Bilinear interpolation, as averages of pixels that have been repeated.

Between the centres of two pixels a line runs from one to the other. So does the average over a
window as wide as a pixel, moved across the image: it holds less and less of the one, more and more
of the other. On a grid so fine that all windows begin and end between its cells, the average is a
pooling of repeated pixels, and those are exact on counts.
"""

from __future__ import annotations

import math
import operator
from fractions import Fraction
from typing import Any

import torch.nn.functional as F
from torch import fx

from snnconv.rewrite.tools import Values, argument, name_of

_NAMES = ("interpolate", "upsample", "Upsample", "UpsamplingBilinear2d")
# The grid may have so many cells for every pixel of the result.
MOST_CELLS = 64

Axis = tuple[int, int, int, int]


def upsampling(module: fx.GraphModule, values: Values) -> bool:
    """Write bilinear interpolation as repetition, a border, and average pooling."""
    changed = False
    for node in list(module.graph.nodes):
        source = node.args[0] if node.args else None
        if name_of(module, node) not in _NAMES or not isinstance(source, fx.Node):
            continue
        before, after = (values.shapes.get(n.name, ())[1:] for n in (source, node))
        if len(before) != 2 or not _is_bilinear(module, node, before, after):
            continue
        aligned = bool(_told(module, node, 4, "align_corners"))
        axes = [_windows(n, m, aligned) for n, m in zip(before, after, strict=True)]
        sizes = [n * axis[0] for n, axis in zip(before, axes, strict=True)]
        if math.prod(sizes) > MOST_CELLS * math.prod(after):
            continue
        _interpolate_(module, node, source, axes, sizes)
        changed = True
    return changed


def _interpolate_(
    module: fx.GraphModule, node: fx.Node, source: fx.Node, axes: list[Axis], sizes: list[int]
) -> None:
    """Put the three operations in the place of one."""
    graph, whole = module.graph, slice(None)
    (_, top, bottom, _), (_, left, right, _) = axes
    border = tuple(max(n, 0) for n in (left, right, top, bottom))
    inner = [slice(max(-first, 0), min(last, 0) or None) for _, first, last, _ in axes]
    with graph.inserting_before(node):
        new = graph.call_function(F.interpolate, (source, tuple(sizes)))
        new = graph.call_function(F.pad, (new, border, "replicate"))
        new = graph.call_function(operator.getitem, (new, (whole, whole, *inner)))
        kernel, stride = (tuple(axis[k] for axis in axes) for k in (0, 3))
        new = graph.call_function(F.avg_pool2d, (new, kernel, stride))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _windows(before: int, after: int, aligned: bool) -> Axis:
    """Return cells per pixel, cells to add before and behind (to take off below 0), and the stride.

    Centres of pixels are half a pixel from the border, those of `aligned` corners on it.
    """
    if aligned:
        ratio, start = Fraction(before - 1, max(after - 1, 1)), Fraction(0)
    else:
        ratio = Fraction(before, after)
        start = (ratio - 1) / 2
    cells = math.lcm(ratio.denominator, start.denominator)
    first, stride = int(start * cells), int(ratio * cells)
    return cells, -first, first + (after - 1) * stride + cells - before * cells, stride


def _is_bilinear(
    module: fx.GraphModule, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...]
) -> bool:
    """Return whether a node interpolates by lines, as far apart as the sizes say."""
    if _told(module, node, 3, "mode") != "bilinear" or 1 in before:
        return False
    if _told(module, node, 6, "antialias") and any(
        m < n for n, m in zip(before, after, strict=True)
    ):
        return False
    scale = _told(module, node, 2, "scale_factor")
    if scale is None or _told(module, node, 5, "recompute_scale_factor"):
        return True
    scales = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    return all(m == n * s for n, m, s in zip(before, after, scales, strict=True))


def _told(module: fx.GraphModule, node: fx.Node, position: int, name: str) -> Any:
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), name, None)
    return argument(node, position, name)
