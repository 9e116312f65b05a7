"""Tensors that are broadcast over pixels."""

from __future__ import annotations

from typing import Any

from torch import fx

from snnconv.rewrite.tools import SUMS, Values, known_values, name_of, put_in_place

_PRODUCTS = ("mul", "mul_", "imul", "multiply")


def broadcasts(module: fx.GraphModule, values: Values) -> bool:
    """Expand what is added to an image over its pixels; what multiplies one needs no expanding."""
    known = known_values(module)
    shapes = values.shapes
    changed = False
    for node in list(module.graph.nodes):
        name = name_of(module, node)
        shape = shapes.get(node.name, ())
        source: Any = node.args[0] if node.args else None
        if name in ("expand", "expand_as") and isinstance(source, fx.Node) and source not in known:
            if len(shapes.get(source.name, ())) != len(shape):
                continue
            for user in [u for u in node.users if name_of(module, u) in _PRODUCTS]:
                others = [a for a in user.args if a is not node]
                if len(others) == 1 and shapes.get(getattr(others[0], "name", "")) == shape:
                    put_in_place(user, node, source)
            if node.users:
                with module.graph.inserting_before(node):
                    new = module.graph.call_method("expand", (source, (-1, *shape)))
                node.replace_all_uses_with(new)
            changed = True
        elif name in SUMS and len(node.args) == 2 and len(shape) == 3:
            for operand in node.args:
                if not isinstance(operand, fx.Node) or operand in known:
                    continue
                small = shapes.get(operand.name, ())
                if len(small) == 3 and small[0] == shape[0] and small != shape:
                    with module.graph.inserting_before(node):
                        new = module.graph.call_method("expand", (operand, (-1, *shape)))
                    node.replace_input_with(operand, new)
                    changed = True
    return changed
