"""Record what a model calls, and let it decide by the sizes of tensors on the way.

torch.fx knows no values while it traces, and so no `if x.shape[-1] > 7`. Here the graph so far is
run on an example where a size is asked for. An answer counts if it is the same for batches of
several sizes and comes from shapes alone, not from what an image shows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

# What tells of a tensor's shape and type, and nothing of its numbers.
_SHAPES = frozenset({
    "device", "dim", "dtype", "is_floating_point", "len", "ndim", "ndimension", "nelement", "numel",
    "shape", "size",
})  # fmt: skip


class Tracer(fx.Tracer):
    """Enter every module but torch's own and those timm asks not to be entered."""

    def __init__(self, example: Tensor) -> None:
        """Take an example of two images `[2, C, H, W]`, on which to find out sizes."""
        from timm.layers import get_notrace_functions, get_notrace_modules
        from timm.models.nfnet import NormFreeBlock

        functions = tuple(get_notrace_functions())
        super().__init__(autowrap_functions=functions, param_shapes_constant=True)
        # What it changes in place is no trouble here.
        self.leaves = tuple(set(get_notrace_modules()) - {NormFreeBlock})
        # Runs on one, two and three images: what has been computed, by node.
        self.examples = [example[:1], example, torch.cat([example, example[:1]])]
        self.runs: list[dict[fx.Node, Any]] = [{} for _ in self.examples]
        self.running = False

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Return whether a module is recorded as one call."""
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a module, or its calls."""
        if self.running:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute of a module, or what stands for a parameter."""
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a value while the model runs."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a condition on sizes. Raises TraceError for any other."""
        found = self.settled(obj.node, bool)
        return super().to_bool(obj) if found is None else bool(found)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Yield the parts of a tuple or list. Raises TraceError if its length is not settled."""
        found, parts = self.settled(obj.node, len), cast("Any", obj)
        return super().iter(obj) if found is None else (parts[i] for i in range(found))

    def settled(self, node: fx.Node, measure: Callable[[Any], Any]) -> Any:
        """Return a measure of a node's value if it follows from shapes; else None."""
        found = []
        for run, example in zip(self.runs, self.examples, strict=True):
            self.running = True
            try:
                value = self._value(node, run, example)
            finally:
                self.running = False
            if isinstance(value, Tensor) or not self._is_of_shapes(node, run):
                return None
            found.append(measure(value))
        return found[0] if all(f == found[0] for f in found) else None

    def _value(self, last: fx.Node, run: dict[fx.Node, Any], example: Tensor) -> Any:
        """Compute a node, and what it needs."""
        waiting = [last]
        while waiting:
            missing = [n for n in waiting[-1].all_input_nodes if n not in run]
            if missing:
                waiting += missing
                continue
            node = waiting.pop()
            if node not in run:
                run[node] = self._call(node, run, example)
        return run[last]

    def _call(self, node: fx.Node, run: dict[fx.Node, Any], example: Tensor) -> Any:
        if node.op == "placeholder":
            return example.clone()
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: run[n])
        target: Any = node.target
        if node.op == "call_module":
            target = self.root.get_submodule(str(node.target))
        elif node.op == "call_method":
            target, args = getattr(args[0], str(node.target)), args[1:]
        with torch.no_grad():
            return target(*args, **kwargs)

    @staticmethod
    def _is_of_shapes(last: fx.Node, run: dict[fx.Node, Any]) -> bool:
        """Return whether a value depends on tensors by their shapes alone."""
        waiting = [last]
        while waiting:
            node = waiting.pop()
            if _holds_tensors(run[node]):
                continue
            inputs = node.all_input_nodes
            if any(_holds_tensors(run[n]) for n in inputs) and _query(node) not in _SHAPES:
                return False
            waiting += inputs
        return True


class _Sized:
    """What a proxy answers by running the graph."""

    node: fx.Node
    tracer: Any

    def __getattr__(self: Any, name: str) -> Attribute:
        return _Attribute(self, name)

    def __len__(self) -> int:
        return int(self._settled(len))

    def __int__(self) -> int:
        return int(self._settled(int))

    def __index__(self) -> int:
        return int(self._settled(operator.index))

    def __float__(self) -> float:
        return float(self._settled(float))

    def _settled(self, measure: Callable[[Any], Any]) -> Any:
        found = self.tracer.settled(self.node, measure)
        if found is None:
            raise TraceError("a number depends on the images or on how many there are")
        return found


class _Proxy(_Sized, fx.Proxy):
    """The value of a node."""


class _Attribute(_Sized, Attribute):
    """An attribute or a method of such a value."""


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _query(node: fx.Node) -> str:
    """Return what a node asks a tensor for, by attribute, method or function."""
    if node.target is getattr:
        return str(node.args[1])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
