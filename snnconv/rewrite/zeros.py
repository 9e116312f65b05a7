"""Channels of zeros, as a shortcut to more channels may be given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from snnconv.rewrite.arithmetic import ARITHMETIC
from snnconv.rewrite.tools import CONCATENATIONS, Values, argument, name_of

_ZEROS = ("new_zeros", "zeros_like")


def zeros(module: fx.GraphModule, values: Values) -> bool:
    """Write zeros that are concatenated before or behind an image's channels as a border."""
    changed = False
    for node in list(module.graph.nodes):
        shape = values.shapes.get(node.name, ())
        if name_of(module, node) not in CONCATENATIONS or len(shape) != 3:
            continue
        parts = argument(node, 0, "tensors")
        axis = argument(node, 1, "dim", node.kwargs.get("axis", 0))
        if not isinstance(parts, (tuple, list)) or axis % 4 != 1:
            continue
        others = [i for i, part in enumerate(parts) if not _is_zero(module, part)]
        if not others or len(others) == len(parts) or others != [*range(others[0], others[-1] + 1)]:
            continue
        channels = [values.shapes[part.name][0] for part in parts]
        border = (sum(channels[: others[0]]), sum(channels[others[-1] + 1 :]))
        with module.graph.inserting_before(node):
            inner = parts[others[0]]
            if len(others) > 1:
                inner = module.graph.call_function(torch.cat, ([parts[i] for i in others], 1))
                values.shapes[inner.name] = (sum(channels[i] for i in others), *shape[1:])
            new = module.graph.call_function(F.pad, (inner, (0, 0, 0, 0, *border)))
        new.meta = dict(node.meta)
        values.shapes[new.name] = shape
        node.replace_all_uses_with(new)
        changed = True
    return changed


def _is_zero(module: fx.GraphModule, node: Any) -> bool:
    """Return whether a node gives zeros, whatever the image."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    name = name_of(module, node)
    if ARITHMETIC.get(name) == "mul":
        return any(isinstance(a, (int, float)) and a == 0 for a in node.args)
    return name in _ZEROS
