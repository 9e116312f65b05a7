"""What is computed with the channels last is computed with the channels first."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snnconv.analog import NAMES
from snnconv.rewrite.arithmetic import ARITHMETIC
from snnconv.rewrite.tools import Values, argument, known_values, name_of, path_of

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# Where the axes of `[N, H, W, C]` are in `[N, C, H, W]`.
_PLACE = {0: 0, 1: 2, 2: 3, 3: 1}
_ELEMENTWISE = {
    "ReLU", "relu", "relu_", "ReLU6", "relu6", "Identity", "Dropout", "dropout", "contiguous",
    "clone", "square", "sqrt", "rsqrt", "abs", "exp", "addcmul",
    *(set(NAMES) - {"mul", "mul_", "imul", "multiply"}), *ARITHMETIC,
}  # fmt: skip
_OVER_AXES = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "norm": 2, "softmax": 1, "cat": 1}


def channels_last(module: fx.GraphModule, values: Values) -> bool:
    """Follow images whose channels have been put last, and compute the same with them first.

    A linear layer over the last axis is a 1x1 convolution then. What has no such form reads its
    input permuted, as it did.
    """
    pass_ = _Pass(module, values)
    for node in list(module.graph.nodes):
        pass_.visit(node)
    return pass_.finish()


class _Pass:
    """One pass: `first` maps nodes `[N, H, W, C]` to nodes `[N, C, H, W]` of the same numbers."""

    def __init__(self, module: fx.GraphModule, values: Values) -> None:
        self.module, self.graph, self.shapes = module, module.graph, values.shapes
        self.known = known_values(module)
        self.first: dict[fx.Node, fx.Node] = {}
        self.layers: dict[str, str] = {}
        self.changed = False

    def visit(self, node: fx.Node) -> None:
        """Write a node anew if it reads what is in `first`, or begins it."""
        source: Any = node.args[0] if node.args else None
        begins = isinstance(source, fx.Node) and source not in self.first
        if begins and self._permutes(node, TO_LAST) and len(self.shapes[source.name]) == 3:
            self.first[node] = source
            return
        if node in self.known or not any(n in self.first for n in node.all_input_nodes):
            return
        with self.graph.inserting_before(node):
            made = self._made(node)
        if made is None:
            return
        self.changed = True
        if made in (self.first.get(n) for n in node.all_input_nodes):
            node.replace_all_uses_with(made)  # it only put the channels first again
            return
        made.meta = dict(node.meta)
        if len(self.shapes[node.name]) == 3:
            height, width, channels = self.shapes[node.name]
            self.shapes[made.name] = (channels, height, width)
            self.first[node] = made
        else:
            self.shapes[made.name] = self.shapes[node.name]
            node.replace_all_uses_with(made)

    def finish(self) -> bool:
        """Permute for the nodes that still read the channels last."""
        for node, first in self.first.items():
            if not self.changed or self._permutes(node, TO_LAST) or not node.users:
                continue
            with self.graph.inserting_after(node):
                last = self.graph.call_function(torch.permute, (first, TO_LAST))
            node.replace_all_uses_with(last)
        return self.changed

    def _permutes(self, node: fx.Node, axes: tuple[int, ...]) -> bool:
        if name_of(self.module, node) != "permute":
            return False
        given = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims", ())
        return isinstance(given, (tuple, list)) and [
            a % 4 if isinstance(a, int) else a for a in given
        ] == list(axes)

    def _made(self, node: fx.Node) -> fx.Node | None:
        name, source = name_of(self.module, node), argument(node, 0, "input")
        shape = self.shapes.get(node.name)
        if shape is None:
            return None
        if self._permutes(node, TO_FIRST):
            return self.first[source]
        if name == "Linear":
            return self.graph.call_module(self._pointwise(node), (self.first[source],))
        if name == "layer_norm" and len(argument(node, 1, "normalized_shape")) == 1:
            last = self.graph.call_function(torch.permute, (self.first[source], TO_LAST))
            normed = self.graph.call_function(
                F.layer_norm, (last, *node.args[1:]), dict(node.kwargs)
            )
            return self.graph.call_function(torch.permute, (normed, TO_FIRST))
        if name in _ELEMENTWISE and len(shape) == 3 and self._turnable(node):
            return self._again(node, *fx.node.map_arg((node.args, node.kwargs), self._turned))
        if name in _OVER_AXES:
            return self._over_axes(node, name)
        if node.target is operator.getitem and isinstance(node.args[1], tuple):
            index = (*node.args[1], *[slice(None)] * 4)[:4]
            if all(isinstance(i, slice) for i in index):
                turned = tuple(index[i] for i in TO_FIRST)
                return self._again(node, (self.first[source], turned), {})
        return None

    def _again(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        return self.graph.create_node(node.op, node.target, tuple(args), dict(kwargs))

    def _turnable(self, node: fx.Node) -> bool:
        """Return whether all operands are constants or images."""
        others = [n for n in node.all_input_nodes if n not in self.first and n not in self.known]
        return all(len(self.shapes.get(n.name, ())) == 3 for n in others)

    def _turned(self, node: fx.Node) -> fx.Node:
        """Return what stands for an operand: itself, a constant or an image turned, or `first`."""
        if node in self.first:
            return self.first[node]
        value = self.known.get(node)
        if node in self.known and (not isinstance(value, Tensor) or value.ndim == 0):
            return node
        if node not in self.known:
            return self.graph.call_function(torch.permute, (node, TO_FIRST))
        return self.graph.call_function(_first, (node,))

    def _over_axes(self, node: fx.Node, name: str) -> fx.Node | None:
        """Return a reduction, a softmax or a concatenation over axes that have moved."""
        position = _OVER_AXES[name]
        axes = argument(node, position, "dim")
        keeps = name in ("softmax", "cat") or bool(argument(node, position + 1, "keepdim", False))
        if axes is None or (name == "norm" and argument(node, 1, "p", 2) != 2):
            return None
        places = [_PLACE[a % 4] for a in ([axes] if isinstance(axes, int) else axes)]
        if not keeps and sorted(places) != [2, 3]:
            return None
        if name == "cat":
            parts: Any = argument(node, 0, "tensors")
            if any(p not in self.first for p in parts):
                return None
            return self.graph.call_function(torch.cat, ([self.first[p] for p in parts], places[0]))
        source = self.first[argument(node, 0, "input")]
        if name == "softmax":
            return self.graph.call_function(torch.softmax, (source, places[0]))
        function: Any = {"norm": torch.linalg.vector_norm}.get(name) or getattr(torch, name)
        return self.graph.call_function(
            function, (source,), {"dim": tuple(places), "keepdim": keeps}
        )

    def _pointwise(self, node: fx.Node) -> str:
        """Return the path of the convolution that a linear layer over channels is."""
        path = str(node.target)
        if path not in self.layers:
            linear: Any = self.module.get_submodule(path)
            conv = nn.Conv2d(
                linear.in_features, linear.out_features, 1, bias=linear.bias is not None,
                device="meta",
            )  # fmt: skip
            conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None])
            conv.bias = linear.bias
            callers = [n for n in self.graph.nodes if n.target == path]
            self.layers[path] = path_of(node, "pointwise" if len(callers) > 1 else "")
            self.module.add_submodule(self.layers[path], conv.eval())
        return self.layers[path]


def _first(x: Tensor) -> Tensor:
    """Put the last axis behind that of the batch; one that is missing has length 1."""
    return x.reshape(*[1] * (4 - x.ndim), *x.shape).permute(TO_FIRST)
