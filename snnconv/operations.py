"""Say what each node of a traced graph computes, in one small vocabulary.

Modules, functions and tensor methods that do the same (`nn.ReLU`, `F.relu`, `x.relu()`) become
the same `Operation`. What is not known here is `unsupported`, with the reason and a remedy.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snnconv.graph import Traced
from snnconv.ops import Pool, adaptive_windows, pool_windows
from snnconv.rewrite import AFFINE, Composite, Neurons, Rearrangement
from snnconv.rewrite.islands import is_analog
from snnconv.rewrite.tools import argument
from snnconv.rewrite.translate import analog_call

REPLACE = "use a variant of the network with ReLU"
REWRITE = "say it in operations that convert (docs/adding-a-model.md lists them)"
NO_TOKENS = "attention over tokens is not converted: choose a network of convolutions"
# As modules or functions.
ACTIVATIONS = {name.lower() for name in nn.modules.activation.__all__} | {"gelutanh", "quickgelu"}
# What networks with attention over tokens call, and what timm does not let a tracer enter.
ATTENTION = (
    "scaled_dot_product_attention", "matmul", "softmax", "einsum", "bmm", "ConvAttention",
    "PositionalEncodingFourier", "resample_abs_pos_embed",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """What one fx node computes: its kind, its attributes, and the nodes whose values it reads.

    Kinds: input, output, conv, linear, batch_norm, activation, add, concat, max_pool,
    average_pool, flatten, slice, pad, gather, rearrange, analog, negative_part, identity,
    shape (no tensor), unsupported. `module` owns the parameters of conv, linear and batch_norm.
    """

    kind: str
    inputs: tuple[fx.Node, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    module: Any = None
    reason: str = ""
    remedy: str = ""


def unsupported(reason: str, remedy: str = REWRITE) -> Operation:
    """Return the operation that cannot be converted."""
    return Operation("unsupported", reason=reason, remedy=remedy)


def describe(traced: Traced, node: fx.Node) -> Operation:
    """Return what an fx node computes."""
    if node.op == "placeholder":
        return Operation("input")
    if node.op == "output":
        return Operation("output")
    if node.op == "get_attr":
        return unsupported(
            "a tensor of the model's own enters the computation",
            "let it be a weight of a convolution, linear or normalisation layer, or a factor or "
            "summand per channel",
        )
    if node.name not in traced.shapes:
        return Operation("shape", tuple(node.all_input_nodes))
    if is_analog(traced.module, node, traced):
        return _analog(traced, node)
    inputs = tuple(n for n in node.all_input_nodes if n.name in traced.shapes)
    shape = traced.shapes[inputs[0].name] if inputs else ()
    if node.op == "call_module":
        module = traced.module.get_submodule(str(node.target))
        return _module(module, inputs, shape, traced.shapes[node.name])
    return _function(traced, node, inputs, shape)


def _analog(traced: Traced, node: fx.Node) -> Operation:
    """Describe a function that is no sum of spikes."""
    inputs = tuple(n for n in node.args if isinstance(n, fx.Node) and n.name in traced.shapes)
    owner: Any = traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(owner, Composite):
        program = {"steps": owner.steps, "constants": owner.constants}
        return Operation("analog", inputs, {"function": "program", "attributes": program})
    function, attributes = analog_call(traced.module, node)
    if function == "product":
        shapes = [traced.shapes[n.name] for n in inputs]
        if len(shapes) != 2 or len(shapes[0]) != len(shapes[1]):
            return unsupported("a product of an image and a vector", "multiply images")
    return Operation("analog", inputs, {"function": function, "attributes": attributes})


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _border(padding: Any) -> tuple[int, int, int, int]:
    """Turn torch's symmetric padding (rows, columns) into left, right, top, bottom."""
    rows, columns = _pair(padding)
    return columns, columns, rows, rows


def same_padding(length: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return TensorFlow's `SAME` padding before and after one axis: the odd pixel goes after."""
    total = max((-(-length // stride) - 1) * stride + dilation * (kernel - 1) + 1 - length, 0)
    return total // 2, total - total // 2


def _same_border(
    shape: tuple[int, ...], kernel: Any, stride: Any, dilation: Any = 1
) -> tuple[int, int, int, int]:
    rows, columns = (
        same_padding(length, k, s, d)
        for length, k, s, d in zip(
            shape[-2:], _pair(kernel), _pair(stride), _pair(dilation), strict=True
        )
    )
    return (*columns, *rows)


def _activation(x: fx.Node, low: Any, high: Any) -> Operation:
    """Return the neuron that `clamp(x, low, high)` is."""
    if not all(v is None or isinstance(v, (int, float)) for v in (low, high)):
        return unsupported("clamp to bounds that are computed", "clamp to constants")
    if low == 0 and (high is None or high > 0):
        return Operation("activation", (x,), {"two_sided": False, "cap": high and float(high)})
    if low is None and high == 0:
        return Operation("negative_part", (x,))
    if low is not None and high is not None and low == -high and high > 0:
        return Operation("activation", (x,), {"two_sided": True, "cap": float(high)})
    return unsupported(
        f"clamp to [{low}, {high}] is neither a ReLU (from 0) nor symmetric around 0",
        "clamp from 0, or from -a to a",
    )


def _module(
    m: Any, inputs: tuple[fx.Node, ...], shape: tuple[int, ...], out: tuple[int, ...]
) -> Operation:
    from timm.layers import AvgPool2dSame, CondConv2d, Conv2dSame
    from timm.layers.pool2d_same import MaxPool2dSame

    kind = type(m)
    x = inputs[0] if inputs else None
    if isinstance(m, nn.Conv2d) and kind in (nn.Conv2d, Conv2dSame):
        return _conv(m, inputs, shape, same=kind is Conv2dSame)
    if kind is nn.Linear:
        if len(shape) != 1:
            return unsupported(f"a linear layer over {len(shape)} axes (tokens)", NO_TOKENS)
        return Operation("linear", inputs, module=m)
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, *AFFINE):
        if m.running_mean is None:
            return unsupported(
                "BatchNorm without running statistics depends on the batch",
                "train it with track_running_stats=True",
            )
        return Operation("batch_norm", inputs, module=m)
    if kind is Neurons and x is not None:
        return Operation("activation", (x,), {"two_sided": True, "cap": None})
    if kind is Rearrangement:
        return Operation("rearrange", inputs, {"shape": shape, "steps": m.steps})
    if kind is nn.ReLU and x is not None:
        return _activation(x, 0, None)
    if isinstance(m, nn.Hardtanh) and kind in (nn.ReLU6, nn.Hardtanh) and x is not None:
        return _activation(x, m.min_val, m.max_val)
    if isinstance(m, nn.MaxPool2d) and kind in (nn.MaxPool2d, MaxPool2dSame):
        border = (
            _same_border(shape, m.kernel_size, m.stride, m.dilation)
            if kind is MaxPool2dSame
            else _border(m.padding)
        )
        return _max_pool(inputs, m.kernel_size, m.stride, border, m.dilation, m.ceil_mode)
    if isinstance(m, nn.AvgPool2d) and kind in (nn.AvgPool2d, AvgPool2dSame):
        border = (
            _same_border(shape, m.kernel_size, m.stride)
            if kind is AvgPool2dSame
            else _border(m.padding)
        )
        return _average_pool(
            inputs,
            shape,
            m.kernel_size,
            m.stride,
            border,
            m.ceil_mode,
            m.count_include_pad or kind is AvgPool2dSame,  # timm's pads beforehand
            m.divisor_override,
        )
    if kind is nn.AdaptiveAvgPool2d:
        return _adaptive_average(inputs, shape, m.output_size)
    if kind is nn.AdaptiveMaxPool2d:
        return _adaptive_max(inputs, shape, m.output_size)
    if kind is nn.Flatten:
        return _flatten(inputs, shape, m.start_dim, m.end_dim)
    if isinstance(m, (nn.Identity, nn.modules.dropout._DropoutNd)):
        return Operation("identity", inputs)
    if kind in (nn.ZeroPad2d, nn.ConstantPad2d):
        return _pad(inputs, shape, list(m.padding), "constant", m.value)
    if kind in _PADDINGS:
        return _pad(inputs, shape, list(m.padding), _PADDINGS[kind], None)
    if isinstance(m, nn.Upsample):
        scale = None if m.recompute_scale_factor else m.scale_factor
        return _upsample(out, inputs, shape, m.mode, scale)
    if isinstance(m, CondConv2d):
        return unsupported(
            "its weights are mixed anew for every image, a synapse has one weight for all",
            "choose the network with plain convolutions (for efficientnet_cc_b0_4e: "
            "efficientnet_b0)",
        )
    return _not_supported(kind.__name__, kind.__name__)


def _conv(m: nn.Conv2d, inputs: Any, shape: tuple[int, ...], *, same: bool) -> Operation:
    if m.padding_mode != "zeros":
        return unsupported(f"padding_mode={m.padding_mode!r}", "pad with zeros")
    if len(shape) != 3:
        return unsupported(f"a convolution over {len(shape)} axes", "use [N, C, H, W]")
    stride, dilation = _pair(m.stride), _pair(m.dilation)
    if same:
        border = _same_border(shape, m.kernel_size, stride, dilation)
    elif m.padding == "same":
        (top, bottom), (left, right) = (
            (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2)
            for k, d in zip(m.kernel_size, dilation, strict=True)
        )
        border = (left, right, top, bottom)
    else:
        border = _border(0 if m.padding == "valid" else m.padding)
    attributes = {
        "stride": stride,
        "padding": border,
        "dilation": dilation,
        "groups": m.groups,
    }
    return Operation("conv", inputs, attributes, m)


def _max_pool(
    inputs: Any, kernel: Any, stride: Any, border: Any, dilation: Any, ceil: bool
) -> Operation:
    kernel = _pair(kernel)
    attributes = {
        "kernel": kernel,
        "stride": _pair(stride) if stride is not None else kernel,
        "padding": tuple(border),
        "dilation": _pair(dilation),
        "ceil_mode": bool(ceil),
    }
    return Operation("max_pool", inputs, attributes)


def _average_pool(
    inputs: Any,
    shape: tuple[int, ...],
    kernel: Any,
    stride: Any,
    border: tuple[int, int, int, int],
    ceil: bool,
    include: bool,
    divisor: int | None,
) -> Operation:
    if len(shape) != 3:
        return unsupported(f"average pooling over {len(shape)} axes", "use [N, C, H, W]")
    kernel = _pair(kernel)
    stride = _pair(stride) if stride is not None else kernel
    h, w = (
        pool_windows(
            shape[1 + axis],
            kernel[axis],
            stride[axis],
            border[2:] if axis == 0 else border[:2],
            ceil_mode=ceil,
            include_padding=include,
        )
        for axis in (0, 1)
    )
    if divisor is not None:
        if divisor <= 0:
            return unsupported(f"divisor_override={divisor}", "divide by a positive number")
        h = tuple((start, end, int(divisor)) for start, end, _ in h)
        w = tuple((start, end, 1) for start, end, _ in w)
    return Operation("average_pool", inputs, {"pool": Pool(h, w)})


def _output_size(shape: tuple[int, ...], size: Any) -> tuple[int, int]:
    sizes = (size, size) if size is None or isinstance(size, int) else tuple(size)
    return tuple(n if s is None else int(s) for s, n in zip(sizes, shape[1:], strict=True))  # type: ignore[return-value]


def _adaptive_average(inputs: Any, shape: tuple[int, ...], size: Any) -> Operation:
    if len(shape) != 3:
        return unsupported(f"adaptive pooling over {len(shape)} axes", "use [N, C, H, W]")
    h, w = (
        adaptive_windows(n, s) for n, s in zip(shape[1:], _output_size(shape, size), strict=True)
    )
    return Operation("average_pool", inputs, {"pool": Pool(h, w)})


def _adaptive_max(inputs: Any, shape: tuple[int, ...], size: Any) -> Operation:
    if len(shape) != 3:
        return unsupported(f"adaptive pooling over {len(shape)} axes", "use [N, C, H, W]")
    out = _output_size(shape, size)
    if any(n % s for n, s in zip(shape[1:], out, strict=True)):
        return unsupported(
            f"adaptive max-pooling from {shape[1:]} to {out} has windows of unequal size",
            "use a size that divides the input",
        )
    kernel = tuple(n // s for n, s in zip(shape[1:], out, strict=True))
    return _max_pool(inputs, kernel, kernel, (0, 0, 0, 0), 1, False)


def _flatten(inputs: Any, shape: tuple[int, ...], start: int, end: int) -> Operation:
    axes = len(shape) + 1
    if start % axes == 1 and end % axes == axes - 1:
        return Operation("flatten", inputs)
    if start % axes == 2 and end % axes == axes - 1:
        return unsupported("pixels become a sequence of tokens", NO_TOKENS)
    return unsupported(f"flatten from axis {start} to {end}", "flatten all axes but the batch")


def _pad(
    inputs: Any, shape: tuple[int, ...], padding: list[int], mode: str, value: Any
) -> Operation:
    if mode in _PADDED_INDEX and len(shape) == 3 and len(padding) in (2, 4):
        left, right, top, bottom = (*map(int, padding), 0, 0)[:4]
        find = _PADDED_INDEX[mode]
        rows = tuple(find(i, shape[1]) for i in range(-top, shape[1] + bottom))
        columns = tuple(find(i, shape[2]) for i in range(-left, shape[2] + right))
        return Operation("gather", inputs, {"rows": rows, "columns": columns})
    if mode != "constant" or value not in (0, None):
        return unsupported(f"padding with mode {mode!r}, value {value}", "pad with zeros")
    if len(padding) > 2 * len(shape):
        return unsupported("padding of the batch axis", "pad channels and pixels only")
    return Operation("pad", inputs, {"padding": [int(p) for p in padding]})


_PADDINGS = {
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.CircularPad2d: "circular",
}
# Which of n pixels stands at place i, inside of them or beyond.
_PADDED_INDEX: dict[str, Callable[[int, int], int]] = {
    "reflect": lambda i, n: (n - 1) - abs((n - 1) - abs(i)),
    "replicate": lambda i, n: min(max(i, 0), n - 1),
    "circular": lambda i, n: i % n,
}


def _upsample(
    out: tuple[int, ...], inputs: Any, shape: tuple[int, ...], mode: str, scale: Any
) -> Operation:
    """Describe an interpolation to `[C, H, W]`, by a scale, or None if it follows from the sizes.

    A scale that is no whole number takes other pixels than the sizes would.
    """
    if mode not in ("nearest", "nearest-exact") or len(shape) != 3:
        return unsupported(
            f"interpolation with mode {mode!r} to {'x'.join(map(str, out[1:]))}",
            "upsample by the nearest pixel, or bilinearly by a factor that is nearly whole",
        )
    height, width = shape[1:]
    places = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    to = {"size": out[1:]} if scale is None else {"scale_factor": scale}
    taken = F.interpolate(places, **to, mode=mode)[0, 0].long()
    rows, columns = (taken[:, 0] // width).tolist(), (taken[0] % width).tolist()
    return Operation("gather", inputs, {"rows": tuple(rows), "columns": tuple(columns)})


def _expand(out: tuple[int, ...], inputs: Any, shape: tuple[int, ...]) -> Operation:
    if len(shape) != 3 or len(out) != 3 or shape[0] != out[0]:
        return unsupported(f"expanding {shape} to {out}", "expand over pixels only")
    rows, columns = (
        tuple(i if before == after else 0 for i in range(after))
        for before, after in zip(shape[1:], out[1:], strict=True)
    )
    return Operation("gather", inputs, {"rows": rows, "columns": columns})


_SAME_NAME = {
    "relu_": "relu",
    "relu6_": "relu6",
    "clamp_": "clamp",
    "clip": "clamp",
    "clip_": "clamp",
    "clamp_min_": "clamp_min",
    "hardtanh_": "hardtanh",
    "add_": "add",
    "iadd": "add",
    "cat": "concat",
    "concatenate": "concat",
    "dropout2d": "dropout",
    "alpha_dropout": "dropout",
    "contiguous": "identity",
    "clone": "identity",
    "drop_path": "identity",
    "boolean_dispatch": "max_pool2d",
    "view": "reshape",
}


def _function(
    traced: Traced, node: fx.Node, inputs: tuple[fx.Node, ...], shape: tuple[int, ...]
) -> Operation:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if target in (F.adaptive_max_pool2d, torch.nn.functional.adaptive_max_pool2d):
        name = "adaptive_max_pool2d"
    name = _SAME_NAME.get(name, name)
    x = inputs[0] if inputs else None

    def arg(position: int, key: str, default: Any = None) -> Any:
        return argument(node, position, key, default)

    if name == "relu" and x is not None:
        return _activation(x, 0, None)
    if name == "relu6" and x is not None:
        return _activation(x, 0, 6.0)
    if name == "hardtanh" and x is not None:
        return _activation(x, arg(1, "min_val", -1.0), arg(2, "max_val", 1.0))
    if name == "clamp" and x is not None:
        return _activation(x, arg(1, "min"), arg(2, "max"))
    if name == "clamp_min" and x is not None:
        return _activation(x, arg(1, "min"), None)
    if name == "add":
        return _add(traced, node, inputs)
    if name == "concat":
        parts = node.args[0] if node.args else node.kwargs["tensors"]
        axis = arg(1, "dim", node.kwargs.get("axis", 0))
        if axis % (len(shape) + 1) != 1:
            return unsupported(f"concatenation along axis {axis}", "concatenate channels (axis 1)")
        return Operation("concat", tuple(parts))  # type: ignore[arg-type]
    if name == "max_pool2d":
        border = _border(arg(3, "padding", 0))
        return _max_pool(
            inputs, arg(1, "kernel_size"), arg(2, "stride"), border, arg(4, "dilation", 1),
            arg(5, "ceil_mode", False),
        )  # fmt: skip
    if name == "avg_pool2d":
        border = _border(arg(3, "padding", 0))
        return _average_pool(
            inputs, shape, arg(1, "kernel_size"), arg(2, "stride"), border,
            arg(4, "ceil_mode", False), arg(5, "count_include_pad", True),
            arg(6, "divisor_override"),
        )  # fmt: skip
    if name == "adaptive_avg_pool2d":
        return _adaptive_average(inputs, shape, arg(1, "output_size"))
    if name == "adaptive_max_pool2d":
        return _adaptive_max(inputs, shape, arg(1, "output_size"))
    if name == "flatten":
        return _flatten(inputs, shape, arg(1, "start_dim", 0), arg(2, "end_dim", -1))
    if name == "reshape":
        if traced.shapes[node.name] == (math.prod(shape),):
            return Operation("flatten", inputs)
        if len(traced.shapes[node.name]) < len(shape) == 3:
            return unsupported("pixels become a sequence of tokens", NO_TOKENS)
        return unsupported("a reshape other than flattening all axes but the batch")
    if name == "pad":
        return _pad(inputs, shape, list(arg(1, "pad")), arg(2, "mode", "constant"), arg(3, "value"))
    if name == "expand":
        return _expand(traced.shapes[node.name], inputs, shape)
    if name in ("interpolate", "upsample"):
        mode, scale = arg(3, "mode", "nearest"), arg(2, "scale_factor")
        if isinstance(scale, fx.Node) or arg(5, "recompute_scale_factor"):
            scale = None
        return _upsample(traced.shapes[node.name], inputs, shape, mode, scale)
    if target is operator.getitem:
        return _slice(node, inputs, shape)
    if name in ("dropout", "identity"):
        return Operation("identity", inputs)
    return _not_supported(name, f"{name}()")


def _not_supported(name: str, what: str) -> Operation:
    remedy = REWRITE
    if name in ATTENTION:
        remedy = NO_TOKENS
    elif name.lower().rstrip("_") in ACTIVATIONS:
        remedy = REPLACE
    return unsupported(f"{what} is not supported", remedy)


def _add(traced: Traced, node: fx.Node, inputs: tuple[fx.Node, ...]) -> Operation:
    operands: Any = [argument(node, 0, "input"), argument(node, 1, "other")]
    if node.kwargs.get("alpha", 1) != 1:
        return unsupported("add with alpha", "scale the weights instead")
    if not all(isinstance(o, fx.Node) for o in operands):
        return unsupported("addition of a constant", "put the constant into a bias")
    shapes = {traced.shapes.get(o.name) for o in operands}
    if len(shapes) != 1:
        return unsupported(f"addition that broadcasts shapes {sorted(map(str, shapes))}")
    return Operation("add", tuple(operands))


def _slice(node: fx.Node, inputs: tuple[fx.Node, ...], shape: tuple[int, ...]) -> Operation:
    index: Any = node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    if not all(isinstance(i, slice) or i is Ellipsis for i in items):
        return unsupported(f"indexing with {index}", "use slices with constant bounds")
    if Ellipsis in items:
        at = items.index(Ellipsis)
        fill = [whole] * (len(shape) + 2 - len(items))
        items = (*items[:at], *fill, *items[at + 1 :])
    bounds = [v for i in items for v in (i.start, i.stop, i.step)]
    if items[0] != whole or any(isinstance(b, (fx.Node, Tensor)) for b in bounds):
        return unsupported(f"slicing with {index}", "slice channels and pixels by constant bounds")
    items = (*items, *[whole] * (len(shape) + 1 - len(items)))
    slices = [list(s.indices(n)) for s, n in zip(items[1:], shape, strict=True)]
    return Operation("slice", inputs, {"slices": slices})
