"""Reshapes and permutations of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from snnconv.ops import rearrange
from snnconv.rewrite.modules import Rearrangement, Step
from snnconv.rewrite.tools import Values, argument, known_values, name_of, path_of, put

RESHAPES = ("view", "reshape", "flatten", "unflatten", "Flatten", "Unflatten")


PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")


SHUFFLES = (
    "PixelShuffle", "pixel_shuffle", "PixelUnshuffle", "pixel_unshuffle", "ChannelShuffle",
    "channel_shuffle", "native_channel_shuffle",
)  # fmt: skip


def views(module: fx.GraphModule, values: Values) -> bool:
    """Write `view` as `reshape`: a tensor need not lie in memory as it does in the model."""
    seen = [
        node
        for node in module.graph.nodes
        if (node.op, node.target) == ("call_method", "view")
        and len(node.args) > 1
        and not isinstance(node.args[1], torch.dtype)
    ]
    for node in seen:
        node.target = "reshape"
    return bool(seen)


def foldings(module: fx.GraphModule, values: Values) -> bool:
    """Write what leads from an image to a vector of all its numbers, in their order, as `flatten`.

    What leaves a tensor's shape as it is, too, is nothing.
    """
    known = known_values(module)
    changed = False
    for node in list(module.graph.nodes):
        source = origin(module, node, values)
        if node in known or source is node:
            continue
        before, after = values.shapes[source.name], values.shapes[node.name]
        if before == after:
            node.replace_all_uses_with(source)
        elif len(before) == 3 and len(after) == 1 and not _flattens(module, node, source):
            with module.graph.inserting_before(node):
                new = module.graph.call_function(torch.flatten, (source, 1))
            new.meta = dict(node.meta)
            values.shapes[new.name] = after
            node.replace_all_uses_with(new)
        else:
            continue
        changed = True
    return changed


def origin(module: fx.GraphModule, node: fx.Node, values: Values) -> fx.Node:
    """Return the first node that has the numbers of a node, all in their order."""
    while _keeps_order(module, node, values):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _flattens(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """Return whether a node makes a vector of an image at once already."""
    return node.args[0] is source and name_of(module, node) in RESHAPES


def _keeps_order(module: fx.GraphModule, node: fx.Node, values: Values) -> bool:
    """Return whether a node gives another shape to all numbers of its input, for every image."""
    source = node.args[0] if node.args and node.op.startswith("call") else None
    if not isinstance(source, fx.Node) or node.name not in values.shapes:
        return False
    before = values.shapes.get(source.name)
    if before is None or math.prod(before) != math.prod(values.shapes[node.name]):
        return False
    name = name_of(module, node)
    if name != "getitem":
        return name in (*RESHAPES, "squeeze", "unsqueeze")
    items: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not items:
        return False
    if items[0] is Ellipsis:
        return len(items) <= len(before) + 1 and all(map(_is_plain, items[1:]))
    return items[0] == slice(None) and all(map(_is_plain, items[1:]))


def _is_plain(item: Any) -> bool:
    """Return whether an index takes the one there is, or all in a row."""
    return item is None or item is Ellipsis or isinstance(item, (int, slice))


def rearrangements(module: fx.GraphModule, values: Values) -> bool:
    """Put chains of reshapes and permutations that lead from an image to an image into one call."""
    changed = False
    for node in list(module.graph.nodes):
        chain = _chain(module, node, values)
        steps = [steps_of(module, n, values) for n in chain]
        if not chain or any(s is None for s in steps):
            continue
        source: Any = node.args[0]
        flat = tuple(step for part in steps if part for step in part)
        if not _keeps_channels(values.shapes[source.name], flat):
            continue
        last = chain[-1]
        calls = [_call(module, n, values.shapes[n.name]) for n in chain]
        path = put(module, path_of(last, "rearranged"), Rearrangement(calls, flat))
        with module.graph.inserting_before(last):
            new = module.graph.call_module(path, (source,))
        values.shapes[new.name] = values.shapes[last.name]
        last.replace_all_uses_with(new)
        for old in reversed(chain):
            module.graph.erase_node(old)
        changed = True
    return changed


def _chain(module: fx.GraphModule, node: fx.Node, values: Values) -> list[fx.Node]:
    """Return the nodes from here on that move numbers about, as far as the last image."""
    chain: list[fx.Node] = []
    last = 0
    while _moves(module, node, values) and isinstance(node.args[0], fx.Node):
        if not chain and len(values.shapes.get(node.args[0].name, ())) != 3:
            break
        chain.append(node)
        if len(values.shapes[node.name]) == 3:
            last = len(chain)
        if len(node.users) != 1:
            break
        node = next(iter(node.users))
    return chain[:last]


def _moves(module: fx.GraphModule, node: fx.Node, values: Values) -> bool:
    if not node.args or not node.op.startswith("call"):
        return False
    known = (*RESHAPES, *PERMUTATIONS, *SHUFFLES, "contiguous")
    sizes = [n for n in node.all_input_nodes if n is not node.args[0]]
    return name_of(module, node) in known and all(n.name in values.others for n in sizes)


def _call(
    module: fx.GraphModule, node: fx.Node, shape: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """Return what a node does to its input; one that names the batch's size takes what it gets."""
    rest, kwargs = node.args[1:], dict(node.kwargs)
    if len(node.all_input_nodes) > 1:
        return lambda x: x.reshape(len(x), *shape)
    if node.op == "call_module":
        owner: Any = module.get_submodule(str(node.target))
        return lambda x: owner(x)
    if node.op == "call_method":
        return lambda x: getattr(x, str(node.target))(*rest, **kwargs)
    function: Any = node.target
    return lambda x: function(x, *rest, **kwargs)


def steps_of(module: fx.GraphModule, node: fx.Node, values: Values) -> tuple[Step, ...] | None:
    """Return what a node does as reshapes and permutations; None if it moves the batch's axis."""
    source: Any = node.args[0]
    before, after = values.shapes[source.name], values.shapes[node.name]
    name = name_of(module, node)
    if name == "contiguous":
        return ()
    if name in RESHAPES:
        return (("reshape", after),)
    if name in PERMUTATIONS:
        marked = torch.empty(*range(2, len(before) + 3), device="meta")
        axes = tuple(n - 2 for n in _call(module, node, after)(marked).shape)
        return (("permute", axes[1:]),) if axes[0] == 0 else None
    return _shuffle(module, node, before, after)


def _shuffle(
    module: fx.GraphModule, node: fx.Node, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[Step, ...]:
    channels, height, width = before
    split: tuple[int, ...]
    axes: tuple[int, ...]
    if before == after:
        groups = argument(node, 1, "groups")
        if node.op == "call_module":
            groups = getattr(module.get_submodule(str(node.target)), "groups", 1)
        split, axes = (int(groups), channels // int(groups), height, width), (2, 1, 3, 4)
    elif after[1] > height:
        factor = after[1] // height
        split, axes = (after[0], factor, factor, height, width), (1, 4, 2, 5, 3)
    else:
        factor = height // after[1]
        split, axes = (channels, after[1], factor, after[2], factor), (1, 3, 5, 2, 4)
    return ("reshape", split), ("permute", axes), ("reshape", after)


def _keeps_channels(shape: tuple[int, ...], steps: tuple[Step, ...]) -> bool:
    """Return whether no channel of the result has numbers of several channels."""
    marks = torch.arange(shape[0]).view(1, -1, 1, 1).expand(1, *shape)
    moved = rearrange(marks, steps)[0].flatten(1)
    return bool((moved == moved[:, :1]).all())
