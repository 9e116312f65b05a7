"""What every pass needs: values, names, arguments, constants."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

# What sums and concatenations are called, as functions and methods.
SUMS = ("add", "add_", "iadd", "sub", "sub_", "isub")
CONCATENATIONS = ("cat", "concat", "concatenate")


class Values(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor, and every value that is none.

    `shapes` are without the batch axis, of tuples of tensors a tuple; `others` are numbers, sizes
    and the like.
    """

    def __init__(self, module: fx.GraphModule, example: Tensor) -> None:
        """Run the graph on an example `[N, C, H, W]`."""
        super().__init__(module)
        self.example = example
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[tuple[int, ...]]] = {}
        self.others: dict[str, Any] = {}
        with torch.no_grad():
            self.result = self.run(example.clone())

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what comes out."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            if result.ndim >= 1:
                self.shapes[n.name] = tuple(result.shape[1:])
        elif isinstance(result, (tuple, list)) and any(isinstance(r, Tensor) for r in result):
            self.parts[n.name] = [tuple(r.shape) for r in result if isinstance(r, Tensor)]
        else:
            self.others[n.name] = result
        return result


def name_of(module: fx.GraphModule, node: fx.Node) -> str:
    """Return what a node calls: a function's name, a method's, or a module's class."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return a node's argument, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def put_in_place(user: fx.Node, node: fx.Node, value: Any) -> None:
    """Give a node a value in place of another node."""
    arguments: Any = fx.node.map_arg(
        (user.args, user.kwargs), lambda argument: value if argument is node else argument
    )
    user.args, user.kwargs = arguments


def path_of(node: fx.Node, what: str = "") -> str:
    """Name a module after the node it stands for, or stands beside."""
    ending = f"_{what}" if what else ""
    if node.op == "call_module":
        return f"{node.target}{ending}"
    stack = node.meta.get("nn_module_stack") or {}
    owner = next(reversed(stack.values()))[0] if stack else ""
    return f"{owner}.{node.name}{ending}" if owner else f"{node.name}{ending}"


def put(module: fx.GraphModule, path: str, made: nn.Module) -> str:
    """Add a module at a path, or at the next one that is free; return where it is."""
    free, number = path, 1
    while _is_taken(module, free):
        number += 1
        free = f"{path}_{number}"
    module.add_submodule(free, made.eval())
    return free


def _is_taken(module: fx.GraphModule, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), name)
    except AttributeError:
        return False


def replace_by_module(
    module: fx.GraphModule, node: fx.Node, made: nn.Module, source: fx.Node
) -> fx.Node:
    """Put a module in place of a function's node; it is named by where the node stands."""
    path = put(module, path_of(node), made)
    with module.graph.inserting_before(node):
        new = module.graph.call_module(path, (source,))
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    return new


def known_values(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Return the value of every node that does not depend on the image."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(module)
        elif node.op not in ("call_function", "call_method") or _random(node):
            continue
        elif all(n in known for n in node.all_input_nodes):
            known[node] = _evaluated(node, known)
    return known


def _random(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return "rand" in name or "dropout" in name


def _evaluated(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def constant_per_channel(value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Return a constant per channel of a tensor of some shape, `[C]`; None if it is none."""
    if isinstance(value, (int, float)) and shape:
        return torch.full((shape[0],), float(value), device=device)
    if not isinstance(value, Tensor) or not shape:
        return None
    whole = (1,) * (len(shape) + 1 - value.ndim) + tuple(value.shape)
    if any(n != 1 for n in (whole[0], *whole[2:])) or whole[1] not in (1, shape[0]):
        return None
    return value.detach().float().reshape(-1).expand(shape[0]).clone()
