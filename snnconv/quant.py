"""The quantised ANN: T levels per activation, rounded half up.

A `Qann` is the folded network: sources, maps that are exact on counts, and layers. A layer is a
population of neurons, or a readout, with all the branches it sums. Without clips it computes
the float ANN; with clips and T it computes what the spiking network converges to, up to the
rounding of weights. See docs/concepts.md, "The quantised ANN".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from snnconv.analog import LARGEST, compute
from snnconv.ops import (
    Pool,
    average_pool,
    convolve,
    gather_pixels,
    max_pool,
    pad_border,
    per_channel,
    rearrange,
    sum_pool,
)
from snnconv.plan import Island as PlannedIsland
from snnconv.plan import Key, Relay, Source

Observer = Callable[["Layer", Tensor], None]
Activation = Callable[["Layer", Tensor], Tensor]
Normalization = Callable[["Layer", int, Tensor], Tensor]


class HasShape(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""


Output = TypeVar("Output", bound=HasShape)


def quantize(
    x: Tensor, clip: Tensor, timesteps: int, *, two_sided: bool = False, offset: float = 0.5
) -> Tensor:
    """Return `s * clip(floor(x/s + offset), 0, T)` with `s = clip/T`.

    `clip` broadcasts against `x`. Two-sided values go down to `-T`. `offset` is V0/threshold:
    one half rounds half up, as a membrane that starts half full does.
    """
    step = clip / timesteps
    return step * _levels(x / step, timesteps, two_sided, offset)


def _levels(in_steps: Tensor, timesteps: int, two_sided: bool, offset: float) -> Tensor:
    """Return the levels that values in steps of one level are rounded to."""
    return (in_steps + offset).floor_().clamp_(-timesteps if two_sided else 0, timesteps)


class FakeQuantize(torch.autograd.Function):
    """`quantize` with straight-through gradients.

    The gradient with respect to x is 1 strictly between 0 (two-sided: -clip) and the clip; with
    respect to the clip it is 1 from the clip on (-1 below -clip), and `(a - x)/clip` between.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip: Tensor, timesteps: int, two_sided: bool, offset: float
    ) -> Tensor:
        """Quantise x `[N, C, ...]` with a clip per channel `[C]`, or one for all `[1]`."""
        step = per_channel(clip, x.ndim) / timesteps
        in_steps = x / step
        levels = _levels(in_steps, timesteps, two_sided, offset)
        ctx.save_for_backward(in_steps, levels)
        ctx.timesteps, ctx.two_sided, ctx.channels = timesteps, two_sided, len(clip)
        return step * levels

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of x and clip."""
        in_steps, levels = ctx.saved_tensors
        if grad.stride() != in_steps.stride():  # or all that is behind pays for the difference
            grad = torch.empty_like(in_steps, dtype=grad.dtype).copy_(grad)
        low = -ctx.timesteps if ctx.two_sided else 0
        by_x = torch.ops.aten.hardtanh_backward(grad, in_steps, low, ctx.timesteps)
        # Outside, `levels/T` is what remains of `(levels - x/s)/T`: the sign of the end reached.
        by_clip = (grad * levels).addcmul_(by_x, in_steps, value=-1)
        axes = [i for i in range(grad.ndim) if i != 1 or ctx.channels == 1]
        return by_x, by_clip.sum(axes).view(-1) / ctx.timesteps, None, None, None


@dataclass
class Branch:
    """One linear map from a counts tensor into a layer's rows.

    `kind` is conv (`weight [O, C/groups, kh, kw]`), linear (`[O, F]`) or scale (`[C]`, an
    identity shortcut or a lone BatchNorm). `shift` `[C]` is the part of the layer's bias that the
    ANN adds to this branch alone. `pools` are averaged over afterwards. `statistics` are mean and
    standard deviation per row where a BatchNorm, the node `norm`, tells them: of the sum of all
    branches that pass it. `part_of` names the ANN's layer where it is but a part of one.
    """

    source: str
    key: Key
    kind: str
    weight: Tensor
    shift: Tensor
    attributes: dict[str, Any] = field(default_factory=dict)
    pools: tuple[Pool, ...] = ()
    statistics: tuple[Tensor, Tensor] | None = None
    norm: str = ""
    part_of: str = ""


def apply_weight(kind: str, attributes: dict[str, Any], weight: Tensor, x: Tensor) -> Tensor:
    """Apply a branch's weights to `[N, C, H, W]` or `[N, F]`, in the tensors' number type."""
    if kind == "conv":
        return convolve(x, weight, **attributes)
    if kind == "linear":
        return x @ weight.t()
    return x * per_channel(weight, x.ndim)


class Layer(nn.Module):
    """A population of neurons, or a readout: branches, one bias `[C]`, and the clip `[C]`.

    `shape` is the layer's output without batch axis. `clip` is the float value of `T` counts;
    it is unset (NaN) until calibrated and unused in a readout. `clip_shares` are, per branch, the
    upper ends of weights of few bits as shares of each row's largest, `[C]`, once learnt.
    """

    clip: Tensor

    def __init__(
        self,
        name: str,
        path: str,
        branches: list[Branch],
        bias: Tensor,
        shape: tuple[int, ...],
        *,
        readout: bool = False,
        two_sided: bool = False,
        cap: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Hold copies of the branches' weights as parameters of a float type."""
        super().__init__()
        self.name, self.path, self.shape = name, path, shape
        self.readout, self.two_sided, self.cap = readout, two_sided, cap
        self.branches = branches
        self.clip_shares: list[Tensor | None] = [None] * len(branches)
        self.weights = nn.ParameterList(nn.Parameter(b.weight.to(dtype)) for b in branches)
        self.bias = nn.Parameter(bias.to(dtype))
        self.register_buffer("clip", torch.full_like(self.bias.detach(), float("nan")))

    def assign_(self, weights: list[Tensor], bias: Tensor) -> None:
        """Take the values of other weights, one tensor per branch, and another bias."""
        with torch.no_grad():
            for target, weight in zip(self.weights, weights, strict=True):
                target.copy_(weight)
            self.bias.copy_(bias)

    def forward(self, inputs: list[Tensor], normalize: Normalization | None = None) -> Tensor:
        """Return the layer's current, `[N, C, H, W]` or `[N, F]`, from its branches' inputs."""
        total: Tensor | None = None
        for j, (branch, weight, x) in enumerate(
            zip(self.branches, self.weights, inputs, strict=True)
        ):
            current = apply_weight(branch.kind, branch.attributes, weight, x)
            for pool in branch.pools:
                current = average_pool(current, pool)
            if normalize is not None:
                current = normalize(self, j, current)
            total = current if total is None else total + current
        assert total is not None
        return total + per_channel(self.bias, total.ndim)


class Island(nn.Module):
    """A function that is no sum of spikes, and what an integer of it is worth, `unit` `[C]`.

    `unit` is infinite until calibrated, and so bounds nothing.
    """

    unit: Tensor

    def __init__(self, planned: PlannedIsland) -> None:
        """Take it from the plan."""
        super().__init__()
        self.name, self.path, self.shape = planned.name, planned.path, planned.shape
        self.function, self.attributes = planned.function, planned.attributes
        self.inputs, self.input_shapes = planned.inputs, planned.input_shapes
        self.register_buffer("unit", torch.full((self.shape[0],), float("inf")))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Return the function of activations `[N, C, ...]`, within its bounds."""
        result = compute(self.function, self.attributes, [_finite_gradient(x) for x in inputs])
        bound = per_channel(LARGEST * self.unit, result.ndim).to(result.dtype)
        return result.clamp(-bound, bound)


def _finite_gradient(x: Tensor) -> Tensor:
    """Return x; where what is computed from it has no derivative (1/√x at 0), its gradient is 0."""
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda grad: grad.nan_to_num(0.0, 0.0, 0.0))
    return x


class Qann(nn.Module):
    """The folded network as a list of nodes in topological order."""

    def __init__(self, nodes: list[Source | Relay | Layer | Island]) -> None:
        """Register the layers so that their parameters are the module's."""
        super().__init__()
        self.nodes = nodes
        self.layers = nn.ModuleList(n for n in nodes if isinstance(n, Layer))
        self.analog = nn.ModuleList(n for n in nodes if isinstance(n, Island))

    def weighted(self) -> list[Layer]:
        """Return all layers, populations and readouts, in topological order."""
        return [node for node in self.nodes if isinstance(node, Layer)]

    def islands(self) -> list[Island]:
        """Return the analog islands, in topological order."""
        return [node for node in self.nodes if isinstance(node, Island)]

    def readouts(self) -> list[Layer]:
        """Return the outputs, in topological order."""
        return [layer for layer in self.weighted() if layer.readout]

    def populations(self) -> Iterator[Layer]:
        """Yield the layers that have neurons, in topological order."""
        yield from (layer for layer in self.weighted() if not layer.readout)

    def forward(
        self,
        images: Tensor,
        timesteps: int | None = None,
        *,
        offset: float = 0.5,
        observe: Observer | None = None,
        activation: Activation | None = None,
        normalize: Normalization | None = None,
    ) -> dict[str, Tensor]:
        """Return every readout for normalised images `[N, C, H, W]`.

        With `timesteps` each activation is quantised to T levels of its clip, without it is the
        plain ReLU (clamped at its natural cap); another `activation` takes its place. `observe`
        sees each population's output, `normalize` changes the current of a layer's branch.
        """
        if activation is None:

            def activation(layer: Layer, x: Tensor) -> Tensor:
                return activate(layer, x, timesteps, offset)

        values: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        last_use = last_uses(self.nodes)
        for position, node in enumerate(self.nodes):
            if isinstance(node, Source):
                values[node.name] = images
            elif isinstance(node, Relay):
                values[node.name] = relay(node, [values[i] for i in node.inputs], averaged=True)
            elif isinstance(node, Island):
                values[node.name] = node([values[i] for i in node.inputs])
            else:
                current = node([values[b.source] for b in node.branches], normalize)
                if node.readout:
                    outputs[node.name] = current.reshape(len(current), *node.shape)
                else:
                    values[node.name] = activation(node, current)
                    if observe is not None:
                        observe(node, values[node.name])
            for name in last_use.get(position, ()):
                del values[name]
        return outputs


def only_logits(readouts: Sequence[Output]) -> Output | None:
    """Return a classifier's one output, a flat vector; None if the outputs are others."""
    if len(readouts) != 1 or math.prod(readouts[0].shape) != max(readouts[0].shape):
        return None
    return readouts[0]


def activate(layer: Layer, x: Tensor, timesteps: int | None, offset: float = 0.5) -> Tensor:
    """Apply a population's activation: quantised to T levels, or as in the float ANN."""
    if timesteps is not None:
        quantised: Tensor = FakeQuantize.apply(x, layer.clip, timesteps, layer.two_sided, offset)
        return quantised
    if not layer.two_sided:
        return x.clamp(min=0, max=layer.cap)
    return x if layer.cap is None else x.clamp(-layer.cap, layer.cap)


def relay(
    node: Relay, inputs: list[Tensor], lowest: int | None = None, *, averaged: bool = False
) -> Tensor:
    """Apply a map that is exact on counts, to counts or to float activations.

    `lowest` is the smallest count there can be, the border of a max-pool; None takes the lowest
    the maps can hold. `averaged` divides a sum_pool, as float activations need.
    """
    x, attributes = inputs[0], node.attributes
    if node.op == "max_pool":
        if lowest is None:
            lowest = -(2**30)
        return max_pool(x, lowest=lowest, **attributes)
    if node.op == "sum_pool":
        return average_pool(x, attributes["pool"]) if averaged else sum_pool(x, attributes["pool"])
    if node.op == "concat":
        return torch.cat(inputs, 1)
    if node.op == "slice":
        return x[(slice(None), *(slice(*s) for s in attributes["slices"]))]
    if node.op == "pad":
        return pad_border(x, attributes["padding"])
    if node.op == "gather":
        return gather_pixels(x, **attributes)
    if node.op == "rearrange":
        return rearrange(x, attributes["steps"])
    if node.op == "clamp":
        return x.clamp(attributes["low"], attributes["high"])
    if node.op == "flatten":
        return x.flatten(1)
    raise ValueError(f"{node.name}: unknown map {node.op!r}")


def last_uses(nodes: list[Any]) -> dict[int, list[str]]:
    """Map each position to the names of the nodes that nothing behind it reads."""
    last: dict[str, int] = {}
    for position, node in enumerate(nodes):
        last[node.name] = position
        for name in reads(node):
            last[name] = position
    uses: dict[int, list[str]] = {}
    for name, position in last.items():
        if not getattr(nodes[position], "readout", False) or nodes[position].name != name:
            uses.setdefault(position, []).append(name)
    return uses


def reads(node: Any) -> Iterator[str]:
    """Yield the names of the nodes that a node of a Qann or a SpikingNetwork reads."""
    yield from getattr(node, "inputs", ())
    for branch in getattr(node, "branches", ()):
        yield branch.source
