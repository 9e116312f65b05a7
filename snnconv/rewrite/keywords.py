"""Tensors that calls are given by name."""

from __future__ import annotations

import inspect

from torch import fx

from snnconv.rewrite.tools import name_of

# What torch's functions call what they compute from, in this order; but for `where`, whose
# condition comes first.
_OPERANDS = ("input", "other")


def keywords(module: fx.GraphModule) -> None:
    """Give calls by position what they compute from, as most models do."""
    for node in module.graph.nodes:
        if not node.op.startswith("call") or not node.kwargs or name_of(module, node) == "where":
            continue
        names: tuple[str, ...] = _OPERANDS
        if node.op == "call_module":
            forward = module.get_submodule(str(node.target)).forward
            names = tuple(inspect.signature(forward).parameters)
        for name in names[len(node.args) :]:
            if name not in node.kwargs:
                break
            rest = dict(node.kwargs)
            node.args = (*node.args, rest.pop(name))
            node.kwargs = rest
