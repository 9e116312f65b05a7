"""Tensors that calls are given by name."""

from __future__ import annotations

import inspect

from torch import fx

# What torch's functions and modules call what they compute from, in this order.
_OPERANDS = ("input", "other")


def keywords(module: fx.GraphModule) -> None:
    """Give calls by position what they compute from, as most models do."""
    for node in module.graph.nodes:
        if not node.op.startswith("call") or not node.kwargs:
            continue
        names: tuple[str, ...] = _OPERANDS
        if node.op == "call_module":
            forward = module.get_submodule(str(node.target)).forward
            names = tuple(inspect.signature(forward).parameters)
        for name in names:
            if name not in node.kwargs or len(node.args) != names.index(name):
                break
            rest = dict(node.kwargs)
            node.args = (*node.args, rest.pop(name))
            node.kwargs = rest
