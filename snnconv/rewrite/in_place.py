"""Changes in place, which a graph of results does not know."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from snnconv.rewrite.tools import put_in_place

IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
)


def in_place(module: fx.GraphModule) -> None:
    """Let those who read a tensor after it has been changed in place read the result.

    A graph knows results only; a change whose result nobody takes would be lost.
    """
    for node in module.graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _changes_its_input(module, node):
            continue
        later = set(_after(node))
        for user in [u for u in source.users if u in later]:
            put_in_place(user, source, node)


def _changes_its_input(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    underscored = name.endswith("_") and not name.endswith("__")
    return bool(node.kwargs.get("inplace")) or underscored or node.target in IN_PLACE


def _after(node: fx.Node) -> Iterator[fx.Node]:
    node = node.next
    while node.op != "root":
        yield node
        node = node.next
