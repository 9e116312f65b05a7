"""What does not depend on the image is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnconv.rewrite.tools import (
    Values,
    argument,
    known_values,
    name_of,
    put_in_place,
    replace_by_module,
)

_CASTS = ("bfloat16", "detach", "double", "float", "half", "to", "type_as")


def sizes(module: fx.GraphModule, values: Values) -> bool:
    """Put numbers that depend on the size of the image, but not on the batch, in their places."""
    example = values.example
    more = Values(module, torch.cat([example, example[:1]]))
    fixed = {
        name: value
        for name, value in values.others.items()
        if name in more.others and _plain(value) and value == more.others[name]
    }
    changed = False
    for node in list(module.graph.nodes):
        if node.op in ("placeholder", "get_attr", "output") or node.name not in fixed:
            continue
        for user in list(node.users):
            put_in_place(user, node, fixed[node.name])
            changed = True
    return changed


def casts(module: fx.GraphModule, values: Values) -> bool:
    """Drop changes of a tensor's number type, one for the whole network, and of what is learnt."""
    changed = False
    for node in list(module.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_method" or not isinstance(source, fx.Node):
            continue
        if str(node.target) in _CASTS and source.name in values.shapes:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            changed = True
    return changed


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def constants(module: fx.GraphModule, values: Values) -> bool:
    """Compute once what does not depend on the image, and give it to modules of torch's."""
    known = known_values(module)
    changed = False
    for node in list(module.graph.nodes):
        if node in known or not any(n in known for n in node.all_input_nodes):
            continue
        made = _with_constants(module, node, known)
        if made is not None:
            replace_by_module(module, node, *made)
            changed = True
    return changed


def _with_constants(
    module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]
) -> tuple[nn.Module, fx.Node] | None:
    """Return the module that a function with constant weights is, and what it reads."""
    name = name_of(module, node)
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node) or source in known:
        return None
    if any(n not in known for n in node.all_input_nodes if n is not source):
        return None  # weights that depend on the image

    def value(position: int, key: str, default: Any = None) -> Any:
        found = argument(node, position, key, default)
        return known.get(found, default) if isinstance(found, fx.Node) else found

    if name == "conv2d":
        return _convolution(value), source
    if name in ("linear", "matmul", "mm"):
        weight, bias = value(1, "weight"), value(2, "bias")
        if name != "linear":
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                return None
            weight = weight.t()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        return _holding(linear, weight=weight, bias=bias), source
    if name == "batch_norm" and not value(5, "training", False):
        mean, variance = value(1, "running_mean"), value(2, "running_var")
        if mean is None or variance is None:
            return None
        norm = nn.BatchNorm2d(len(mean), eps=value(7, "eps", 1e-5), device="meta")
        weight, bias = value(3, "weight"), value(4, "bias")
        ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
        norm.register_buffer("running_mean", mean)
        norm.register_buffer("running_var", variance)
        norm.num_batches_tracked = torch.tensor(0)
        weight, bias = (ones if weight is None else weight), (zeros if bias is None else bias)
        return _holding(norm, weight=weight, bias=bias), source
    return None


def _convolution(value: Callable[..., Any]) -> nn.Module:
    weight, bias = value(1, "weight"), value(2, "bias")
    groups = int(value(6, "groups", 1))
    convolution = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        value(3, "stride", 1),
        value(4, "padding", 0),
        value(5, "dilation", 1),
        groups,
        bias is not None,
        device="meta",
    )
    return _holding(convolution, weight=weight, bias=bias)


def _holding(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """Give a module its parameters; one of the model's own stays the one it is."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach().clone())
        setattr(module, name, tensor)
    return module
