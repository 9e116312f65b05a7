"""Trace a network into one flat fx graph whose every call site is visible.

Tracing follows timm's own list of modules and functions that must not be entered. A leaf that
hides an activation (`BatchNormAct2d`) is written out first, so that each activation of the
network is a node of its own, at each place it is called. Then the graph is rewritten in the
operations the rest of the package knows (`snnconv.rewrite`).
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from snnconv.errors import NotConvertibleError, first_line
from snnconv.rewrite import rewrite
from snnconv.rewrite.tools import argument, name_of
from snnconv.tracer import Tracer

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

    @cached_property
    def _calls(self) -> dict[str, int]:
        """The how-manieth call of its module each node is, by the node's name."""
        calls: Counter[str] = Counter()
        found = {}
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                calls[node.target] += 1
                found[node.name] = calls[node.target]
        return found

    def path(self, node: fx.Node) -> str:
        """Return where a node stands in the user's code: its module path, else its name.

        The second call of a module has `#2` behind its path, and so on.
        """
        if node.op == "call_module":
            number = self._calls[node.name]
            return f"{node.target}#{number}" if number > 1 else str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack.values()))[0] if stack else ""
        return f"{owner}:{node.name}" if owner else node.name


def expand_leaves(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of the model in which no leaf hides an activation.

    timm's `BatchNormAct2d` becomes `Sequential(norm, drop, act)` over the same parameters, VGG's
    `ConvMlp` the layers it runs on a batch like `example`, a convolution that standardises its
    weights one that has them so, and timm's `Linear` torch's.
    """
    from timm.layers import BatchNormAct2d, Linear, ScaledStdConv2dSame, StdConv2dSame
    from timm.layers.norm_act import FrozenBatchNormAct2d
    from timm.models.vgg import ConvMlp

    model = _copied(model)
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
    for module in list(model.modules()):
        _settle(module)
    # A module with several names stays one.
    replacements: dict[nn.Module, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(path, replacements[module])
            continue
        if type(module) in (BatchNormAct2d, FrozenBatchNormAct2d):
            parts = _batch_norm_parts(module)
        elif type(module) in (StdConv2dSame, ScaledStdConv2dSame):
            parts = OrderedDict(conv=_standardised(module))
        elif type(module) is ConvMlp and module in sizes:
            parts = _conv_mlp_parts(module, sizes[module])
        elif type(module) is Linear:
            parts = OrderedDict(linear=_plain_linear(module))
        else:
            continue
        replacements[module] = nn.Sequential(parts).train(module.training)
        if not path:
            return replacements[module]
        model.set_submodule(path, replacements[module])
    return model


def _settle(module: nn.Module) -> None:
    """Make weights that are computed in every pass (pruned, normalised) the parameters they are."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _batch_norm_parts(module: Any) -> OrderedDict[str, nn.Module]:
    norm = nn.BatchNorm2d(len(module.running_mean), module.eps, affine=module.weight is not None)
    for name in ("weight", "bias"):  # which a frozen one holds as buffers
        value = getattr(module, name)
        frozen = value is not None and not isinstance(value, nn.Parameter)
        setattr(norm, name, nn.Parameter(value) if frozen else value)
    norm.running_mean, norm.running_var = module.running_mean, module.running_var
    return OrderedDict(norm=norm, drop=module.drop, act=module.act)


def _standardised(module: Any) -> nn.Conv2d:
    """Return the convolution with its weights standardised (Qiao et al., arXiv 1903.10520)."""
    from timm.layers import Conv2dSame

    rows = module.weight.flatten(1)
    variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
    rows = (rows - mean) * torch.rsqrt(variance + module.eps)
    if hasattr(module, "gain"):
        rows = rows * (module.gain * module.scale).view(-1, 1)
    conv = (Conv2dSame if module.same_pad else nn.Conv2d)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
    )
    conv.weight = nn.Parameter(rows.detach().view_as(module.weight))
    conv.bias = module.bias
    return conv


def _plain_linear(module: nn.Linear) -> nn.Linear:
    plain = nn.utils.skip_init(
        nn.Linear, module.in_features, module.out_features, module.bias is not None
    )
    plain.weight, plain.bias = module.weight, module.bias
    return plain


def _conv_mlp_parts(module: Any, size: tuple[int, int]) -> OrderedDict[str, nn.Module]:
    names = ("fc1", "act1", "drop", "fc2", "act2")
    parts = OrderedDict((name, getattr(module, name)) for name in names)
    grown = tuple(max(module.input_kernel_size, n) for n in size)
    if grown != tuple(size):
        parts = OrderedDict(pool=nn.AdaptiveAvgPool2d(grown), **parts)
    return parts


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Traced:
    """Trace a model in eval mode, in float32 on the CPU, for images of `input_size` `(C, H, W)`.

    The traced graph is run beside the model, on noise, and must give the same outputs. A model on
    torch's `meta` device, which has shapes and no numbers, is only held to the same shapes. The
    model itself stays as it is.
    Raises NotConvertibleError if the model cannot be traced, cannot take the input, or computes
    something else once traced.
    """
    with evaluating(model):
        return _trace(model, tuple(input_size))


def _elsewhere(tensor: Tensor) -> bool:
    """Return whether a tensor is on a device that computes, or of floats of another size."""
    other = tensor.is_floating_point() and tensor.dtype != torch.float32
    return not tensor.is_meta and (other or tensor.device.type != "cpu")


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy; weights that were computed in a pass with gradients are copied without."""
    held = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    memo = {id(t): t.detach().clone() for t in held if t.grad_fn is not None}
    return copy.deepcopy(model, memo)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _trace(model: nn.Module, input_size: tuple[int, ...]) -> Traced:
    if any(_elsewhere(tensor) for tensor in model.state_dict().values()):
        model = _copied(model).to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, *input_size, generator=generator, dtype=torch.float32)
    if on_meta(model):
        example = example.to("meta")
    try:
        with torch.no_grad():
            expected = flatten_outputs(model(example.clone()))
    except Exception as error:
        size = "x".join(map(str, input_size))
        raise NotConvertibleError(
            f"the network does not run on an input of {size}: {first_line(error)}"
        ) from error
    _check_outputs(expected)
    try:
        expanded = expand_leaves(model, example).float()
        graph = Tracer(example).trace(expanded, _defaults(expanded))
        for placeholder in [n for n in graph.nodes if n.op == "placeholder"][1:]:
            _erase(placeholder)
        traced = fx.GraphModule(expanded, graph)
    except Exception as error:
        raise NotConvertibleError(
            f"torch.fx cannot trace {type(model).__name__}: {first_line(error)}; "
            "control flow that depends on the images must be taken out of forward()"
        ) from error
    try:
        values = rewrite(traced, example)
    except RuntimeError as error:
        raise NotConvertibleError(
            f"{type(model).__name__} runs for one size of the batch only once traced "
            f"({first_line(error)}); sizes in forward() must follow the input's"
        ) from error
    outputs = flatten_outputs(values.result)
    _keep_names_for(outputs, traced, values.shapes)
    if set(outputs) != set(expected):
        raise NotConvertibleError("the traced network has other outputs than the model")
    for name, output in outputs.items():
        if output.shape != expected[name].shape:
            raise NotConvertibleError(f"the traced network has {name} of another shape")
    other = None
    if not example.is_meta and _far(expected, outputs) is not None:
        other = differing_output(model, traced, example)
    if other is not None:
        raise NotConvertibleError(
            f"the traced network computes another {other} than the model: part of forward() runs "
            "outside what torch.fx sees, or changes a tensor in place that has another name too"
        )
    _drop_log_softmax(traced, values.shapes)
    return Traced(traced, values.shapes, input_size, example)


def _drop_log_softmax(traced: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> None:
    """Leave out a log-softmax at an output: it shifts all logits of an image, or pixel, alike."""
    (output,) = (n for n in traced.graph.nodes if n.op == "output")
    for node in output.all_input_nodes:
        name = name_of(traced, node)
        if name not in ("log_softmax", "LogSoftmax"):
            continue
        axis = argument(node, 1, "dim")
        if node.op == "call_module":
            axis = traced.get_submodule(str(node.target)).dim
        source = argument(node, 0, "input")
        if isinstance(axis, int) and axis % (len(shapes[node.name]) + 1) == 1:
            output.replace_input_with(node, source)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _keep_names_for(
    outputs: dict[str, Any], traced: fx.GraphModule, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Give nodes that are called as an output is another name."""
    for node in traced.graph.nodes:
        name = node.name
        while node.name in outputs:
            node._rename(f"{node.name}_node")
        if node.name != name and name in shapes:
            shapes[node.name] = shapes.pop(name)
    traced.recompile()


def _check_outputs(outputs: dict[str, Any]) -> None:
    """Raise NotConvertibleError unless a network returned tensors of numbers."""
    for name, output in outputs.items():
        if not isinstance(output, Tensor):
            raise NotConvertibleError(
                f"the network returns {name}, a {type(output).__name__}; return tensors, one or "
                "several by name or in a row"
            )
        if not output.is_meta and not bool(output.isfinite().all()):
            raise NotConvertibleError(
                f"the network gives {name} that are no finite numbers, on random images; its "
                "weights may be damaged"
            )


def on_meta(model: nn.Module) -> bool:
    """Return whether a model has shapes only."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


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


def differing_output(
    model: nn.Module,
    other: nn.Module,
    example: Tensor,
    exact: Callable[[], nn.Module] | None = None,
) -> str | None:
    """Name an output in which two networks of float32 differ; None if there is none.

    Deep networks amplify what is rounded, so doubts are settled in float64. `exact` makes the
    other network for that; without, its float32 is taken for exact.
    """
    unlike = _far(*_outputs_of((model, other), example))
    if unlike is None:
        return None
    try:
        pair = copy.deepcopy(model).double(), exact() if exact else copy.deepcopy(other).double()
        return _far(*_outputs_of(pair, example.double()))
    except RuntimeError:  # a network that asks for float32
        return unlike


def _outputs_of(networks: Sequence[nn.Module], example: Tensor) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return [flatten_outputs(network(example.clone())) for network in networks]


def _far(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> str | None:
    """Name an output that differs."""
    for name, output in expected.items():
        if not difference(actual[name].reshape(output.shape), output) <= TRACE_TOLERANCE:
            return name
    return None


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance `|actual - expected| / |expected|` of two tensors (L2)."""
    scale = expected.double().norm().clamp_min(1e-12)
    return float((actual.double() - expected.double()).norm() / scale)
