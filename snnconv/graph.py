"""Trace a network into one flat fx graph whose every call site is visible.

Tracing follows timm's own list of modules and functions that must not be entered. A leaf that
hides an activation (`BatchNormAct2d`) is written out first, so that each activation of the
network is a node of its own, at each place it is called.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snnconv.errors import NotConvertibleError, first_line

# Tracing and folding reorder float additions; anything beyond this is another function.
TRACE_TOLERANCE = 1e-3


@dataclass
class Traced:
    """A traced network: the fx graph, and the shape of every tensor in it.

    `shapes` maps the name of an fx node to its output shape without the batch axis, for an
    input of `input_shape` `(C, H, W)`; nodes that yield no tensor are absent. `example` is the
    batch of two normalised images it was traced with.
    """

    module: fx.GraphModule
    shapes: dict[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    example: Tensor

    def path(self, node: fx.Node) -> str:
        """Return where a node stands in the user's code: its module path, else its name."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack.values()))[0] if stack else ""
        return f"{owner}:{node.name}" if owner else node.name


class _Tracer(fx.Tracer):
    """Enter every module but torch's own and those timm asks not to be entered."""

    def __init__(self) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        functions = tuple(get_notrace_functions())
        super().__init__(autowrap_functions=functions, param_shapes_constant=True)
        self.leaves = tuple(get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)


def expand_leaves(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of the model in which no leaf hides an activation.

    timm's `BatchNormAct2d` becomes `Sequential(norm, drop, act)` over the same parameters, VGG's
    `ConvMlp` the layers it runs on a batch like `example`, and timm's `Linear` torch's.
    """
    from timm.layers import BatchNormAct2d, Linear
    from timm.models.vgg import ConvMlp

    model = copy.deepcopy(model)
    sizes: dict[nn.Module, tuple[int, int]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, x: sizes.update({m: x[0].shape[-2:]}))
        for module in model.modules()
        if isinstance(module, ConvMlp)
    ]
    if hooks:
        with torch.no_grad():
            model(example.clone())
    for hook in hooks:
        hook.remove()
    for path, module in list(model.named_modules()):
        if type(module) is BatchNormAct2d:
            parts = _batch_norm_parts(module)
        elif type(module) is ConvMlp and module in sizes:
            parts = _conv_mlp_parts(module, sizes[module])
        elif type(module) is Linear:
            parts = OrderedDict(linear=_plain_linear(module))
        else:
            continue
        replacement = nn.Sequential(parts).train(module.training)
        if not path:
            return replacement
        model.set_submodule(path, replacement)
    return model


def _batch_norm_parts(module: Any) -> OrderedDict[str, nn.Module]:
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
    norm.weight, norm.bias = module.weight, module.bias
    norm.running_mean, norm.running_var = module.running_mean, module.running_var
    return OrderedDict(norm=norm, drop=module.drop, act=module.act)


def _plain_linear(module: nn.Linear) -> nn.Linear:
    plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    plain.weight, plain.bias = module.weight, module.bias
    return plain


def _conv_mlp_parts(module: Any, size: tuple[int, int]) -> OrderedDict[str, nn.Module]:
    names = ("fc1", "act1", "drop", "fc2", "act2")
    parts = OrderedDict((name, getattr(module, name)) for name in names)
    grown = tuple(max(module.input_kernel_size, n) for n in size)
    if grown != tuple(size):
        parts = OrderedDict(pool=nn.AdaptiveAvgPool2d(grown), **parts)
    return parts


class _Shapes(fx.Interpreter):
    """Run the graph once and note the shape of every tensor, without its batch axis."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.ndim >= 1:
            self.shapes[n.name] = tuple(result.shape[1:])
        return result


def _write_out_means(traced: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Write `x.mean((2, 3))` as the global average pooling and flatten it is."""
    found = False
    for node in list(traced.graph.nodes):
        if node.target not in ("mean", torch.mean):
            continue
        values = dict(enumerate(node.args))
        source, axes = node.args[0], values.get(1, node.kwargs.get("dim"))
        keep = values.get(2, node.kwargs.get("keepdim", False))
        if not isinstance(axes, (tuple, list)) or len(shapes.get(source.name, ())) != 3:
            continue
        if sorted(a % 4 for a in axes) != [2, 3]:
            continue
        with traced.graph.inserting_before(node):
            pooled = traced.graph.call_function(F.adaptive_avg_pool2d, (source, 1))
            if not keep:
                pooled = traced.graph.call_function(torch.flatten, (pooled, 1))
        node.replace_all_uses_with(pooled)
        traced.graph.erase_node(node)
        found = True
    traced.recompile()
    return found


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Traced:
    """Trace a model in eval mode for images of `input_size` `(C, H, W)`.

    The traced graph is run beside the model, on noise, and must give the same outputs.
    Raises NotConvertibleError if the model cannot be traced, cannot take the input, or computes
    something else once traced.
    """
    model = model.eval()
    example = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            expected = flatten_outputs(model(example.clone()))
    except Exception as error:
        size = "x".join(map(str, input_size))
        raise NotConvertibleError(
            f"the network does not run on an input of {size}: {first_line(error)}"
        ) from error
    try:
        expanded = expand_leaves(model, example).float()
        graph = _Tracer().trace(expanded, _defaults(expanded))
        for placeholder in [n for n in graph.nodes if n.op == "placeholder"][1:]:
            _erase(placeholder)
        traced = fx.GraphModule(expanded, graph)
    except Exception as error:
        raise NotConvertibleError(
            f"torch.fx cannot trace {type(model).__name__}: {first_line(error)}; "
            "control flow that depends on the data must be taken out of forward()"
        ) from error
    traced.graph.eliminate_dead_code()
    traced.recompile()
    shapes = _Shapes(traced)
    with torch.no_grad():
        shapes.run(example.clone())
        if _write_out_means(traced, shapes.shapes):
            shapes = _Shapes(traced)
        outputs = flatten_outputs(shapes.run(example.clone()))
    if set(outputs) != set(expected):
        raise NotConvertibleError("the traced network has other outputs than the model")
    for name, output in outputs.items():
        if difference(output, expected[name]) > TRACE_TOLERANCE:
            raise NotConvertibleError(
                f"the traced network computes another {name} than the model: part of forward() "
                "runs outside what torch.fx sees"
            )
    return Traced(traced, shapes.shapes, tuple(input_size), example)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the default of every argument of forward() but the first, which is the image."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _erase(node: fx.Node) -> None:
    """Erase an argument that has been replaced by its default, and the assertions about it."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def flatten_outputs(output: Any) -> dict[str, Any]:
    """Name the outputs of a network: `logits` for a single one, else by key or position.

    Works on the values of a run and, alike, on the arguments of an fx output node.
    """
    if isinstance(output, dict):
        return {str(k): v for k, v in output.items()}
    if isinstance(output, (list, tuple)):
        return {f"output{i}": v for i, v in enumerate(output)}
    return {"logits": output}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance `|actual - expected| / |expected|` of two tensors (L2)."""
    scale = expected.double().norm().clamp_min(1e-12)
    return float((actual.double() - expected.double()).norm() / scale)
