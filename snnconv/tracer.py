"""Record what a model calls, and let it decide by the sizes of tensors on the way.

torch.fx knows no values while it traces, and so no `if x.shape[-1] > 7`. Where a model asks for a
size, the graph so far is run on torch's `meta` device, which knows shapes and no numbers: what an
image shows can decide nothing there. An answer counts if it is the same for batches of any size.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

# Images in the batches that must agree.
BATCHES = (1, 2, 3, 100_003)


class Tracer(fx.Tracer):
    """Enter every module but torch's own and those timm asks not to be entered."""

    def __init__(self, example: Tensor | None = None) -> None:
        """Take a batch `[N, C, H, W]` as the model gets; without one, there are no sizes."""
        from timm.layers import get_notrace_functions, get_notrace_modules
        from timm.models.nfnet import NormFreeBlock

        functions = tuple(get_notrace_functions())
        super().__init__(autowrap_functions=functions, param_shapes_constant=True)
        # What it changes in place is no trouble here.
        self.leaves = tuple(set(get_notrace_modules()) - {NormFreeBlock})
        self.example = example
        # What has been computed for each batch, by node; whether something is being computed.
        self.runs: list[dict[fx.Node, Any]] = [{} for _ in BATCHES]
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
        """Return a measure of a node's value if sizes settle it, for batches of any; else None."""
        if self.example is None:
            return None
        found = []
        for images, run in zip(BATCHES, self.runs, strict=True):
            self.running = True
            try:
                value = self._value(node, run, images)
                if isinstance(value, Tensor):
                    return None
                found.append(measure(value))
            except Exception:
                return None  # it asks for numbers, or does not run on so many images
            finally:
                self.running = False
        return found[0] if all(f == found[0] for f in found) else None

    @cached_property
    def shapes_only(self) -> nn.Module:
        """A copy of the model without numbers."""
        return copy.deepcopy(self.root).to("meta")

    def _value(self, last: fx.Node, run: dict[fx.Node, Any], images: int) -> Any:
        """Compute a node, and what it needs."""
        waiting = [last]
        while waiting:
            missing = [n for n in waiting[-1].all_input_nodes if n not in run]
            if missing:
                waiting += missing
                continue
            node = waiting.pop()
            if node not in run:
                run[node] = self._call(node, run, images)
        return run[last]

    def _call(self, node: fx.Node, run: dict[fx.Node, Any], images: int) -> Any:
        assert self.example is not None
        if node.op == "placeholder":
            return torch.empty(images, *self.example.shape[1:], device="meta")
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.root)
            return value.to("meta") if isinstance(value, Tensor) else value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: run[n])
        target: Any = node.target
        if target is getattr and args[1] == "device":
            return self.example.device
        if node.op == "call_module":
            target = self.shapes_only.get_submodule(str(node.target))
        elif node.op == "call_method":
            target, args = getattr(args[0], str(node.target)), args[1:]
        with torch.no_grad():
            return target(*args, **kwargs)


class _Sized:
    """What a proxy answers by the sizes there are."""

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
