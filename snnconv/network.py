"""The integer spiking network: everything it does is additions of integers.

A `SpikingNetwork` is a list of nodes in topological order: sources (images), maps that are
exact on counts, populations of neurons, and readouts. It holds no state and knows no time; an
engine runs it under a schedule. See docs/concepts.md, "The integer network".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from snnconv.analog import LARGEST, compute, width
from snnconv.choices import INITIAL_MEMBRANES, MAX_WEIGHT_BITS, MIN_WEIGHT_BITS, NEURONS
from snnconv.errors import UsageError, require_one_of
from snnconv.neuron import rounding_offset
from snnconv.ops import Pool, constant, padded_channels, rearranged_channels, sum_pool
from snnconv.plan import Key, Relay, Source
from snnconv.preprocess import Preprocessing
from snnconv.quant import Island as FloatIsland
from snnconv.quant import apply_weight, only_logits, reads, relay
from snnconv.schedule import SCHEDULES, Schedule, check_timesteps


@dataclass(frozen=True)
class Synapse:
    """Integer weights from one counts tensor into the rows of a population.

    A row's charge is `(W * S) << shift`, in row units. `kind`, `attributes` and `pools` are
    those of the branch; `weight` is int8 for conv and linear, int32 for scale (an identity
    shortcut). `shift` is int32 `[C]`.
    """

    source: str
    key: Key
    kind: str
    weight: Tensor
    shift: Tensor
    attributes: dict[str, Any] = field(default_factory=dict)
    pools: tuple[Pool, ...] = ()


@dataclass(frozen=True)
class Image:
    """The source: pixels minus `zero_point` per channel, injected in each of T steps."""

    name: str
    shape: tuple[int, ...]
    zero_point: tuple[int, ...]


@dataclass(frozen=True)
class Population:
    """Neurons of one activation call site, `shape` `(C, H, W)` or `(F,)`.

    `threshold` and `bias` (per step) are int32 `[C]` in row units; `row_unit` is the float value
    of one unit and `clip` (alpha) of T counts, float64 `[C]`. `depth` counts the neurons on the
    longest path from the image; the first population has 0.
    """

    name: str
    path: str
    branches: tuple[Synapse, ...]
    threshold: Tensor
    bias: Tensor
    shape: tuple[int, ...]
    two_sided: bool
    depth: int
    row_unit: Tensor
    clip: Tensor


@dataclass(frozen=True)
class Readout:
    """A named output: integer charge per class times one `unit`, no neuron.

    `logits(t) = unit (W S(t) + B(t) bias) / max(B(t), 1)`. `threshold` is that of neurons that
    could stand in its place, where the usual outputs are known.
    """

    name: str
    branches: tuple[Synapse, ...]
    bias: Tensor
    shape: tuple[int, ...]
    depth: int
    unit: float
    threshold: int | None = None
    readout: bool = True


@dataclass(frozen=True)
class Island:
    """A function that is no sum of spikes (`snnconv.analog`), of the mean values of `inputs`.

    What it emits are integers, each worth `unit`, float64 `[C]`. `depth` is that of a layer of
    neurons in its place: what it reads must have begun before it does.
    """

    name: str
    path: str
    function: str
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    depth: int
    unit: Tensor


Node = Image | Relay | Population | Island | Readout

# Maps of a sum of counts that are not the sum of the maps; their events depend on the order.
NONLINEAR = ("max_pool", "clamp")
# Numbers per image beyond which no step of an island's program is believed.
WIDEST_ISLAND = 2**28


# Settings of a network that are names, and the names there are.
KINDS = {"schedule": SCHEDULES, "neuron": NEURONS, "initial_membrane": INITIAL_MEMBRANES}


def check_weight_bits(bits: int) -> None:
    """Raise UsageError unless weights can have so many bits."""
    if not (isinstance(bits, Integral) and MIN_WEIGHT_BITS <= bits <= MAX_WEIGHT_BITS):
        raise UsageError(
            f"--weight-bits must be between {MIN_WEIGHT_BITS} and {MAX_WEIGHT_BITS}, not {bits}"
        )


def check_settings(timesteps: int, weight_bits: int, **settings: Any) -> None:
    """Raise UsageError for a T, bits or names that a network cannot have."""
    check_timesteps(timesteps)
    check_weight_bits(weight_bits)
    for key, known in KINDS.items():
        require_one_of(key, settings.get(key, known[0]), known)


@dataclass(frozen=True)
class SpikingNetwork:
    """An integer spiking network and what it was made for.

    `timesteps` is the T it was calibrated or trained for; `schedule`, `drain` and `stagger` are
    what it is run under by default, `neuron` and `initial_membrane` the kind of its neurons.
    `model` describes the ANN it came from, `provenance` how it was made; both are plain JSON
    values.
    """

    nodes: tuple[Node, ...]
    preprocessing: Preprocessing
    timesteps: int
    schedule: str = "drain"
    drain: int | None = None
    stagger: int = 1
    neuron: str = "signed"
    initial_membrane: str = "half"
    weight_bits: int = 8
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings there are none of."""
        settings = {name: getattr(self, name) for name in KINDS}
        check_settings(self.timesteps, self.weight_bits, **settings)
        if self.readouts:
            self.timetable()
        for name in ("timesteps", "weight_bits", "drain", "stagger"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))

    @property
    def populations(self) -> list[Population]:
        """Return the populations of neurons in topological order."""
        return [n for n in self.nodes if isinstance(n, Population)]

    @property
    def weighted(self) -> list[Population | Readout]:
        """Return the populations and readouts in topological order."""
        return [n for n in self.nodes if isinstance(n, Population | Readout)]

    @property
    def islands(self) -> list[Island]:
        """Return the analog islands in topological order."""
        return [n for n in self.nodes if isinstance(n, Island)]

    @property
    def readouts(self) -> list[Readout]:
        """Return the named outputs."""
        return [n for n in self.nodes if isinstance(n, Readout)]

    def readout(self, name: str) -> Readout:
        """Return a named output. Raises UsageError if there is none of that name."""
        found = {r.name: r for r in self.readouts}
        if name not in found:
            raise UsageError(f"there is no output {name!r}; the network has {', '.join(found)}")
        return found[name]

    @property
    def rounding_offset(self) -> float:
        """Return V0/threshold, which the QANN adds before it rounds down."""
        return rounding_offset(self.initial_membrane)

    @cached_property
    def depth(self) -> int:
        """Return the depth of the deepest readout: neuron layers on the longest path."""
        return max(r.depth for r in self.readouts)

    @cached_property
    def worths(self) -> dict[str, Tensor]:
        """Return what one count of each node is worth, float64 `[C]`."""
        return {name: w for name, (w, _) in count_values(self.nodes, self.preprocessing).items()}

    @cached_property
    def steady(self) -> frozenset[str]:
        """Return the nodes whose counts move by at most one a step."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, Population) or (
                isinstance(node, Relay) and node.op != "sum_pool" and found.issuperset(node.inputs)
            ):
                found.add(node.name)
        return frozenset(found)

    @property
    def eventful(self) -> list[Population | Relay]:
        """Return the nodes whose unit events do not follow from those of the nodes they read.

        Those are the populations, and nonlinear maps that spikes reach.
        """
        found: list[Population | Relay] = []
        reached: set[str] = set()
        for node in self.nodes:
            if isinstance(node, Population):
                reached.add(node.name)
                found.append(node)
            elif isinstance(node, Relay) and not reached.isdisjoint(node.inputs):
                reached.add(node.name)
                if node.op in NONLINEAR:
                    found.append(node)
        return found

    @property
    def logits(self) -> Readout | None:
        """Return a classifier's one readout, a flat vector; None for other networks."""
        return only_logits(self.readouts)

    @property
    def title(self) -> str:
        """Return the name of the network's architecture, if it has one."""
        return str(self.model.get("name") or "network")

    @property
    def neurons(self) -> int:
        """Return the number of neurons."""
        return sum(torch.Size(p.shape).numel() for p in self.populations)

    def timetable(self, timesteps: int | None = None, **changes: Any) -> Schedule:
        """Return the schedule to run under, at T and with the `name`, `drain`, `stagger` given.

        A drain belongs to its schedule: another `name` starts from the automatic one. Raises
        UsageError for values that make no sense.
        """
        settings = {"name": self.schedule, "drain": self.drain, "stagger": self.stagger}
        if changes.get("name", self.schedule) != self.schedule:
            settings["drain"] = None
        return Schedule(
            timesteps=self.timesteps if timesteps is None else timesteps,
            depth=self.depth,
            **(settings | changes),
        )

    def signed(self, population: Population) -> bool:
        """Return whether a population emits negative spikes."""
        return self.neuron == "signed" or population.two_sided

    def count_limits(self, timesteps: int) -> dict[str, tuple[int, int]]:
        """Return the lowest and highest cumulative count of every node at T."""
        limits: dict[str, tuple[int, int]] = {}
        for node in self.nodes:
            if isinstance(node, Image):
                zero = node.zero_point
                limits[node.name] = (-max(zero) * timesteps, (255 - min(zero)) * timesteps)
            elif isinstance(node, Relay):
                low = min(limits[i][0] for i in node.inputs)
                high = max(limits[i][1] for i in node.inputs)
                if node.op == "pad":
                    low, high = min(low, 0), max(high, 0)
                if node.op == "clamp":
                    low = low if node.attributes["low"] is None else 0
                    high = high if node.attributes["high"] is None else 0
                factor = node.attributes["pool"].largest_sum if node.op == "sum_pool" else 1
                limits[node.name] = (low * factor, high * factor)
            elif isinstance(node, Island):
                limits[node.name] = (-LARGEST * timesteps, LARGEST * timesteps)
            elif isinstance(node, Population):
                limits[node.name] = (-timesteps if node.two_sided else 0, timesteps)
        return limits


def count_values(
    nodes: Iterable[Any], preprocessing: Preprocessing, dtype: torch.dtype = torch.float64
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what one count of each node of a QANN or a network is worth, and the constant, `[C]`.

    A tensor's T-fold value is `worth * S + T * constant`. For neurons the worth is the threshold
    and the constant 0; for images `1/(255 std)` and the part of the mean lost by rounding.
    """
    values: dict[str, tuple[Tensor, Tensor]] = {}
    nodes = list(nodes)
    found = (node.clip.device for node in nodes if hasattr(node, "clip"))
    device = next(found, torch.device("cpu"))
    for node in nodes:
        if isinstance(node, Source | Image):
            std, mean, zero = (
                constant(tuple(v), dtype, device)
                for v in (preprocessing.std, preprocessing.mean, preprocessing.zero_point)
            )
            values[node.name] = 1 / (255 * std), (zero / 255 - mean) / std
        elif isinstance(node, Relay):
            values[node.name] = _relay_values(node, [values[i] for i in node.inputs])
        elif isinstance(node, FloatIsland | Island):
            values[node.name] = node.unit.to(dtype), torch.zeros_like(node.unit, dtype=dtype)
        elif not getattr(node, "readout", False):
            clip = node.clip.to(dtype)
            values[node.name] = clip, torch.zeros_like(clip)
    return values


def _relay_values(node: Relay, inputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    worth, constant = (torch.cat([i[k] for i in inputs]) for k in (0, 1))
    if node.op == "slice":
        kept = slice(*node.attributes["slices"][0])
        return worth[kept], constant[kept]
    if node.op == "pad":
        # Channels of padding are always zero: so are their weights, which else would set a scale.
        padding = node.attributes["padding"]
        return padded_channels(worth, padding), padded_channels(constant, padding)
    if node.op == "rearrange":
        a = node.attributes
        worth, constant = (
            rearranged_channels(v, a["shape"], a["steps"]) for v in (worth, constant)
        )
        return worth, constant
    if node.op == "flatten":
        pixels = node.shape[0] // len(worth)
        return worth.repeat_interleave(pixels), constant.repeat_interleave(pixels)
    if node.op == "sum_pool":
        pool = node.attributes["pool"]
        return worth / pool.lcm, constant * (pool.largest_sum / pool.lcm)
    return worth, constant


def wiring(layers: Iterable[Any]) -> dict[str, list[Any]]:
    """Describe what every layer, of a QANN or a network, reads, and by what kind of weights."""
    return {
        layer.name: [
            (b.source, b.kind, tuple(b.weight.shape), b.attributes) for b in layer.branches
        ]
        for layer in layers
    }


def count_dtype(low: int, high: int) -> torch.dtype:
    """Return the smallest integer type that holds counts from `low` to `high`."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return dtype
    return torch.int32


def charge_bounds(synapse: Synapse, low: int, high: int) -> Tensor:
    """Return per row the largest magnitude of any partial sum of `W S`, int64 `[C]`.

    For counts from `low <= 0` to `high >= 0`, before the shift, summed in any order; pooling sums
    are included.
    """
    weight = synapse.weight.double()  # faster than int64, and as exact
    weight = weight[:, None] if synapse.kind == "scale" else weight.flatten(1)
    net, size = weight.sum(1).long(), weight.abs().sum(1).long()
    positive, negative = (size + net) // 2, (size - net) // 2
    largest = torch.maximum(positive * high - negative * low, negative * high - positive * low)
    return largest * math.prod(pool.largest_sum for pool in synapse.pools)


def membrane_bound(
    node: Population | Readout, limits: dict[str, tuple[int, int]], timesteps: int
) -> int:
    """Return a bound on the magnitude of every partial sum of a membrane.

    Engines choose by it the number type in which sums are exact (docs/concepts.md, "Engines").
    """
    total = timesteps * node.bias.double().abs()
    for synapse in node.branches:
        bounds = charge_bounds(synapse, *limits[synapse.source]).double()
        total = total + bounds * torch.exp2(synapse.shift.double())
    if isinstance(node, Population):
        total = total + (timesteps + 1) * node.threshold.double()
    return int(total.max())


def largest_image(network: SpikingNetwork) -> int:
    """Return how many numbers the largest tensor of a node has for one image, islands' own too."""
    shapes = {node.name: node.shape for node in network.nodes}
    sizes = [math.prod(shape) for shape in shapes.values()]
    for node in network.nodes:
        if isinstance(node, Island):
            inputs = [shapes[name] for name in node.inputs]
            # In float64, which is twice what others take.
            sizes.append(2 * width(node.function, node.attributes, inputs))
    return max(sizes)


def check_shapes(network: SpikingNetwork) -> None:
    """Raise ValueError or RuntimeError unless shapes, windows and depths fit together.

    The network is run on tensors without contents, so that absurd sizes cost nothing.
    """
    values: dict[str, Tensor] = {}
    depth = depths(list(network.nodes))
    for node in network.nodes:
        if isinstance(node, Image):
            channels = network.preprocessing.input_size[0]
            if tuple(node.shape) != tuple(network.preprocessing.input_size):
                raise ValueError(f"{node.name}: {node.shape} is not the size of an image")
            zeros = [z for z in node.zero_point if isinstance(z, int) and 0 <= z <= 255]
            if len(zeros) != channels or len(node.zero_point) != channels:
                raise ValueError(f"{node.name}: zero points {node.zero_point}")
            value = torch.empty(1, *node.shape, device="meta")
        elif isinstance(node, Relay):
            inputs = [values[name] for name in node.inputs]
            if node.op == "sum_pool":
                _check_windows(node.name, node.attributes["pool"], inputs[0])
            if node.op == "gather":
                _check_pixels(node, inputs[0])
            if node.op == "rearrange" and node.attributes["shape"] != inputs[0].shape[1:]:
                raise ValueError(f"{node.name}: it rearranges {node.attributes['shape']}")
            value = relay(node, inputs, 0)
        elif isinstance(node, Island):
            inputs = [values[name] for name in node.inputs]
            if width(node.function, node.attributes, [x.shape[1:] for x in inputs]) > WIDEST_ISLAND:
                raise ValueError(f"{node.name}: a step of its program is of absurd size")
            value = compute(node.function, node.attributes, inputs)
            if node.depth != depth[node.name]:
                raise ValueError(f"{node.name}: its depth is {depth[node.name]}")
        else:
            parts = [_current_of(node.name, s, values[s.source]) for s in node.branches]
            if len({p.shape for p in parts}) != 1 or parts[0].shape[1] != len(node.bias):
                raise ValueError(f"{node.name}: its synapses give {[p.shape for p in parts]}")
            if node.depth != depth[node.name]:
                raise ValueError(f"{node.name}: its depth is {depth[node.name]}")
            value = parts[0]
        if value.numel() != math.prod(node.shape) or (
            not isinstance(node, Readout) and tuple(value.shape[1:]) != tuple(node.shape)
        ):
            raise ValueError(f"{node.name}: shape {list(value.shape[1:])} is not {node.shape}")
        values[node.name] = value


def _current_of(name: str, synapse: Synapse, x: Tensor) -> Tensor:
    if synapse.kind == "scale" and x.shape[1] != len(synapse.weight):
        raise ValueError(f"{name}: {len(synapse.weight)} weights for {x.shape[1]} channels")
    weight = torch.empty(synapse.weight.shape, device="meta")
    current = apply_weight(synapse.kind, synapse.attributes, weight, x)
    for pool in synapse.pools:
        _check_windows(name, pool, current)
        current = sum_pool(current, pool)
    return current


def _check_windows(name: str, pool: Pool, x: Tensor) -> None:
    for windows, length in zip((pool.h, pool.w), x.shape[2:], strict=True):
        if not windows or not all(0 <= a < b <= length and size > 0 for a, b, size in windows):
            raise ValueError(f"{name}: pooling windows outside of {length} pixels")


def _check_pixels(node: Relay, x: Tensor) -> None:
    for axis, length in zip(("rows", "columns"), x.shape[2:], strict=True):
        if not all(isinstance(i, int) and 0 <= i < length for i in node.attributes[axis]):
            raise ValueError(f"{node.name}: {axis} outside of {length} pixels")


def depths(nodes: list[Any]) -> dict[str, int]:
    """Return, for each node, the number of neurons on the longest path that ends before it."""
    depth: dict[str, int] = {}
    after: dict[str, int] = {}
    for node in nodes:
        depth[node.name] = max((after[name] for name in reads(node)), default=0)
        neurons = bool(getattr(node, "branches", ())) and not getattr(node, "readout", False)
        after[node.name] = depth[node.name] + neurons
    return depth
