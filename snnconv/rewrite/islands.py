"""Neurons behind functions that are no sum of spikes, so that layers read spikes again."""

from __future__ import annotations

from typing import Protocol

from torch import fx, nn

from snnconv.analog import NAMES
from snnconv.rewrite.composites import Composite
from snnconv.rewrite.modules import AFFINE, Neurons
from snnconv.rewrite.tools import Values, known_values, name_of, path_of


class Shaped(Protocol):
    """Whatever has the shapes of a graph's tensors by node, without the batch axis."""

    shapes: dict[str, tuple[int, ...]]


# What reads an island's integers as they are: sums, and neurons.
ADDITIONS = ("add", "iadd", "add_")
RECTIFIERS = ("ReLU", "ReLU6", "relu", "relu_", "relu6", "Neurons", "Hardtanh")


def islands(module: fx.GraphModule, values: Values) -> bool:
    """Put two-sided neurons behind analog functions that others than sums and neurons read."""
    known = known_values(module)
    changed = False
    for node in list(module.graph.nodes):
        if node in known or not is_analog(module, node, values):
            continue
        users = [u for u in node.users if not _reads_integers(module, u, values)]
        if not users:
            continue
        path = path_of(node, "neurons")
        module.add_submodule(path, Neurons())
        with module.graph.inserting_after(node):
            spikes = module.graph.call_module(path, (node,))
        values.shapes[spikes.name] = values.shapes[node.name]
        for user in users:
            user.replace_input_with(node, spikes)
        changed = True
    return changed


def is_analog(module: fx.GraphModule, node: fx.Node, values: Shaped) -> bool:
    """Return whether a node is a function that `snnconv.analog` knows, of images or vectors."""
    if not node.op.startswith("call"):
        return False
    if name_of(module, node) not in (*NAMES, Composite.__name__):
        return False
    tensors = [n for n in node.all_input_nodes if n.name in values.shapes]
    return len(values.shapes.get(node.name, ())) in (1, 3) and len(tensors) >= 1


def _reads_integers(module: fx.GraphModule, user: fx.Node, values: Shaped) -> bool:
    name = name_of(module, user)
    if user.op == "output" or is_analog(module, user, values):
        return True
    if name in ADDITIONS or name in RECTIFIERS:
        return True
    if user.op != "call_module":
        return False
    owner = module.get_submodule(str(user.target))
    return isinstance(owner, (nn.BatchNorm1d, nn.BatchNorm2d, *AFFINE))
