"""The native engine: the counts engine on bytes, its convolutions and neurons fused in C++.

A population is one call of a kernel: int8 weights times uint8 counts for every step of the block,
and the neurons' course in the same pass over the image. What the kernels do not know (the first
layer, whose current is constant; odd poolings; readouts) is computed as in the counts engine and
handed to them as charge.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from snnconv.engine import counts, kernels, selfcheck
from snnconv.engine.kernels import Planes, padded, spatial
from snnconv.engine.trace import Endpoint, Trace
from snnconv.errors import UsageError
from snnconv.network import Population, SpikingNetwork, Synapse, charge_bounds
from snnconv.neuron import initial_membrane
from snnconv.plan import Relay
from snnconv.quant import relay
from snnconv.schedule import Schedule

INT32 = 2**31
# A threshold that the channels of padding, whose membranes stay 0, never reach.
UNREACHED = 2**20
# Bytes of the largest node's planes that one pass over the network works on.
PASS_BYTES = 2**22
NO_BORDER = (0, 0, 0, 0)


@cache
def unavailable() -> str | None:
    """Say why the engine cannot be used here; None if it can.

    The first call in a process holds it against the reference on a small network.
    """
    try:
        kernels.library()
    except UsageError as error:
        return str(error)
    try:
        network = selfcheck.sample()
        wrong = selfcheck.wrong(Engine(network, selfcheck.TIMESTEPS))
    except Exception as error:
        return f"the native engine fails on a test network: {error}"
    if wrong is None:
        return None
    return (
        f"the native engine computes {wrong} of a test network unlike the reference on this "
        "machine; please report it with the output of snnconv env"
    )


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def refusal(network: SpikingNetwork, timesteps: int, device: torch.device | str) -> str | None:
    """Say why the engine cannot simulate a network at T; None if it can."""
    if torch.device(device).type != "cpu":
        return "the native engine runs on CPUs only"
    if (reason := unavailable()) is not None:
        return reason
    if not network.populations:
        return "the network has no neurons"
    limits = network.count_limits(timesteps)
    for node in network.populations:
        low, high = limits[node.name]
        if high - low > kernels.LARGEST_COUNT:
            most = kernels.LARGEST_COUNT // (2 if low else 1)
            return f"{node.path}: the native engine holds counts up to {most}, not {timesteps}"
        if _bound(node, limits, timesteps) >= INT32:
            return f"{node.path}: its charges do not fit into the native engine's 32 bits"
    return None


def _bound(node: Population, limits: dict[str, tuple[int, int]], timesteps: int) -> float:
    """Bound every partial sum of a membrane, with all counts moved up to begin at 0."""
    low, high = limits[node.name]
    total = timesteps * node.bias.double().abs()
    total += node.threshold.double() * (2 * (high - low) + 1)
    for synapse in node.branches:
        low, high = limits[synapse.source]
        moved = charge_bounds(synapse, 0, high - low) + charge_bounds(synapse, 0, -low)
        total += moved.double() * torch.exp2(synapse.shift.double())
    return float(total.max())


class Engine(counts.Engine):
    """The native engine for one network at one T, which `refusal` must have nothing against.

    Its buffers serve one simulation at a time; others wait.
    """

    name = "native"

    def __init__(self, network: SpikingNetwork, timesteps: int, level: int | None = None) -> None:
        """Pack the weights for the processor's instruction set, or that of a `level` below it."""
        super().__init__(network, timesteps)
        self.scans = False  # its own kernels do
        self.level = len(kernels.levels()) - 1 if level is None else level
        self.threads = torch.get_num_threads()
        self.in_bytes = _in_bytes(network, self.limits)
        self.populations = {p.name: _Packed(p, self) for p in network.populations}
        self.borders = {n.name: NO_BORDER for n in network.nodes}
        shapes = {n.name: spatial(n.shape) for n in network.nodes}
        for packed in self.populations.values():
            for synapse in packed.synapses:
                if synapse.kind == "conv":
                    reach = _reach(synapse, shapes[synapse.source], shapes[packed.node.name])
                    border = zip(self.borders[synapse.source], reach, strict=True)
                    left, right, above, below = (max(pair) for pair in border)
                    self.borders[synapse.source] = left, right, above, below
        self.plans: dict[int, _Plan] = {}
        self.plan: _Plan
        self.lock = threading.Lock()

    def simulate(self, pixels: Tensor, schedule: Schedule) -> Trace:
        """Simulate uint8 images `[N, C, H, W]` under a schedule of this T."""
        with self._own_threads(torch.get_num_threads()):
            return super().simulate(pixels, schedule)

    def endpoint(self, pixels: Tensor, *, maps: bool = False) -> Endpoint:
        """Compute where every exact schedule ends, in one pass."""
        with self._own_threads(torch.get_num_threads()):
            return super().endpoint(pixels, maps=maps)

    @contextmanager
    def _own_threads(self, threads: int) -> Iterator[None]:
        """Let the kernels have all threads: torch's, once busy, wait for more by spinning.

        Not by `torch.set_num_threads`, which forgets every convolution that was made ready.
        """
        with self.lock, _thread_pools().limit(limits=1, user_api="openmp"):
            self.threads = threads
            yield

    def images_at_once(self, steps: int) -> int:
        """Return how many images to run at once: enough for all threads, few for the caches."""
        largest = max(torch.Size(n.shape).numel() for n in self.network.nodes)
        return max(self.threads, PASS_BYTES // (steps * largest))

    def simulation(self, pixels: Tensor, schedule: Schedule) -> counts.Simulation:
        """Begin a simulation of some images."""
        return _Simulation(self, pixels, schedule)

    def counts(self, value: Any) -> Tensor:
        """Return a node's counts `[steps, N, ...]` in a float type."""
        return value.counts() if isinstance(value, Planes) else super().counts(value)

    def begin(self, steps: int, images: int) -> None:
        """Have buffers for so many steps and images, the last ones if they are large enough."""
        plan = self.plans.get(steps)
        if plan is None or plan.images < images:
            with torch.inference_mode(False):  # for later simulations outside of it
                plan = self.plans[steps] = _Plan(self, steps, images)
        self.plan = plan

    def map(self, node: Relay, inputs: list[Any]) -> Any:
        """Apply a map that is exact on counts, on bytes where they hold its results."""
        if node.name not in self.in_bytes:
            return super().map(node, inputs)
        steps, images = max(len(p.data) for p in inputs), inputs[0].data.shape[1]
        out = self.plan.planes[node.name].part(steps, images)
        if node.op == "max_pool":
            kernels.max_pool(inputs[0], out, node.attributes, self.level, self.threads)
            return out
        flat = [p.bytes.expand(steps, *p.bytes.shape[1:]).flatten(0, 1) for p in inputs]
        out.bytes.copy_(relay(node, flat).unflatten(0, (steps, images)))
        out.fill_border_()
        return out

    def settle(self, node: Population, values: dict[str, Any]) -> Planes:
        """Return the counts a population ends at."""
        packed, plan = self.populations[node.name], self.plan
        if packed.fused:
            charge, injected = self.image_charge(packed, values), self.timesteps
        else:
            charge, injected = packed.numbers(self.end_charge(node, values)), 0
        value = values[node.branches[0].source]
        images = int((value.data if isinstance(value, Planes) else value).shape[1])
        drive = kernels.Drive.of([1], [injected], [True])
        plan.calls[node.name].settle(packed.sources(values), charge, drive, images, self.threads)
        return plan.planes[node.name].part(1, images)

    def image_charge(self, packed: _Packed, values: dict[str, Any]) -> Tensor | None:
        """Return what a population's branches make of the image, as the kernels want it."""
        charge = self.charge(packed.node)
        parts = [
            charge.current(i, values[synapse.source])
            for i, synapse in enumerate(packed.node.branches)
            if synapse.source in self.images
        ]
        return packed.numbers(sum(parts[1:], parts[0])) if parts else None


def _in_bytes(network: SpikingNetwork, limits: dict[str, tuple[int, int]]) -> set[str]:
    """Return the nodes whose counts are bytes: populations, and maps that keep to their inputs."""
    found = {p.name for p in network.populations}
    for node in network.nodes:
        if isinstance(node, Relay) and node.op != "sum_pool" and found.issuperset(node.inputs):
            lows = {limits[name][0] for name in node.inputs}
            if len(lows) == 1 and (node.op != "pad" or lows == {0}):
                found.add(node.name)
    return found


class _Plan:
    """Buffers for every node in bytes, and the kernels' calls on them.

    A node's bytes take the place of those that nobody reads any more. `states` are uint8 `[N, H, W,
    channels]` per population.
    """

    def __init__(self, engine: Engine, steps: int, images: int) -> None:
        self.steps, self.images = steps, images
        self.planes: dict[str, Planes] = {}
        self.states: dict[str, Tensor] = {}
        self.calls: dict[str, kernels.Call] = {}
        buffers: dict[str, Tensor] = {}
        free: list[Tensor] = []
        for position, node in enumerate(engine.network.nodes):
            if node.name in engine.in_bytes:
                zero = -engine.limits[node.name][0]
                border = engine.borders[node.name]
                size = Planes.size(steps, images, node.shape, border)
                buffer = buffers[node.name] = _taken(free, math.prod(size))
                data = buffer[: math.prod(size)].view(size)
                self.planes[node.name] = Planes(data, node.shape, border, zero)
            if isinstance(node, Population):
                packed = engine.populations[node.name]
                channels, height, width = spatial(node.shape)
                state = torch.empty(images, height, width, padded(channels), dtype=torch.uint8)
                self.states[node.name] = state
                out, sources = self.planes[node.name], packed.sources(self.planes)
                call = kernels.Call(packed.cell, sources, out, state, engine.level)
                self.calls[node.name] = call
            read_last = engine.last_use.get(position, ())
            free += [buffers[name] for name in read_last if name in buffers]


def _taken(free: list[Tensor], size: int) -> Tensor:
    """Take the smallest buffer that is large enough, or a new one."""
    fitting = [k for k, buffer in enumerate(free) if len(buffer) >= size]
    if not fitting:
        return torch.empty(size, dtype=torch.uint8)
    return free.pop(min(fitting, key=lambda k: len(free[k])))


class _Packed:
    """A population with its weights as the kernels want them.

    `fused` says whether they run its branches, those from the image apart.
    """

    def __init__(self, node: Population, engine: Engine) -> None:
        low, high = engine.limits[node.name]
        self.node, self.zero = node, -low
        channels = padded(node.shape[0])
        self.synapses = [s for s in node.branches if s.source not in engine.images]
        # The kernels keep the last branch in registers, where shortcuts would gain nothing.
        self.synapses.sort(key=lambda s: s.kind != "scale")
        self.fused = len(node.shape) == 3 and all(_known(s, engine) for s in self.synapses)
        if not self.fused:
            self.synapses = []
        block = _block(self.synapses, channels, engine.level)
        threshold = node.threshold.long()
        start = initial_membrane(threshold, engine.network.initial_membrane)
        start = start + threshold * self.zero
        for synapse in self.synapses:
            weight = synapse.weight.long()
            total = weight if synapse.kind == "scale" else weight.flatten(1).sum(1)
            start = start + (engine.limits[synapse.source][0] * total << synapse.shift.long())
        self.cell = kernels.Cell(
            tuple(_branch(s, channels, block) for s in self.synapses),
            _per_channel(threshold, channels, UNREACHED),
            _per_channel(node.bias, channels),
            _per_channel(start, channels, UNREACHED * self.zero),
            block,
            high - low,
        )

    def sources(self, values: dict[str, Any]) -> list[Planes]:
        """Return what the kernels read."""
        return [values[s.source] for s in self.synapses]

    def numbers(self, charge: Tensor) -> Tensor:
        """Return charges `[steps, N, *shape]` as int32 `[steps, N, H, W, channels]`."""
        rows, height, width = spatial(self.node.shape)
        steps, images = charge.shape[:2]
        numbers = torch.zeros(steps, images, height, width, len(self.cell.bias), dtype=torch.int32)
        charge = charge.reshape(steps, images, rows, height, width)
        numbers[..., :rows] = charge.permute(0, 1, 3, 4, 2)
        return numbers


def _known(synapse: Synapse, engine: Engine) -> bool:
    """Return whether the kernels can run a branch."""
    low, high = engine.limits[synapse.source]
    exact = high - low <= kernels.largest_count(engine.level)
    known = synapse.kind in ("conv", "scale") and not synapse.pools
    return exact and known and synapse.source in engine.in_bytes


def _block(synapses: list[Synapse], channels: int, level: int) -> int:
    """Choose how many output channels have their weights side by side.

    A block reads the inputs of all its outputs, so blocks that are no wider than a group save work.
    """
    block = kernels.block(level, channels)
    for synapse in synapses:
        if synapse.kind == "conv" and not _depthwise(synapse):
            per_group = len(synapse.weight) // synapse.attributes["groups"]
            while block > kernels.CHANNELS and block > per_group:
                block //= 2
    return block


def _depthwise(synapse: Synapse) -> bool:
    return synapse.attributes["groups"] == len(synapse.weight) and synapse.weight.shape[1] == 1


def _per_channel(values: Tensor, channels: int, padding: int = 0) -> Tensor:
    vector = torch.full((channels,), padding, dtype=torch.int32)
    vector[: len(values)] = values.to(torch.int32)
    return vector


def _branch(synapse: Synapse, channels: int, block: int) -> kernels.Branch:
    """Pack the weights of a branch (kernels.h)."""
    if synapse.kind == "scale":
        factors = _per_channel(synapse.weight << synapse.shift, channels)
        return kernels.Branch(factors)
    weight, attributes = synapse.weight, synapse.attributes
    shift = _per_channel(synapse.shift, channels)
    left, _, above, _ = attributes["padding"]
    geometry = {
        "kernel": tuple(weight.shape[2:]),
        "stride": attributes["stride"],
        "dilation": attributes["dilation"],
        "padding": (above, left),
    }
    if _depthwise(synapse):
        taps = torch.zeros(math.prod(weight.shape[2:]), channels, dtype=torch.int32)
        taps[:, : len(weight)] = weight.flatten(1).t()
        return kernels.Branch(shift, depthwise=taps, geometry=geometry)
    rows, depth_of_group = weight.shape[:2]
    groups, blocks = attributes["groups"], channels // block
    group = torch.arange(channels).clamp(max=rows - 1) // (rows // groups)
    ends = group.view(blocks, block)[:, [0, -1]]
    depth = int((ends[:, 1] - ends[:, 0] + 1).max()) * depth_of_group
    depth = -(-depth // 4) * 4
    first = (ends[:, 0] * depth_of_group).clamp(max=padded(groups * depth_of_group) - depth)
    # Every row's weights at the place of its group among the channels its block reads.
    at = group * depth_of_group - first.repeat_interleave(block)
    columns = at[:rows, None] + torch.arange(depth_of_group)
    taps = weight.flatten(2)
    wide = torch.zeros(channels, depth, taps.shape[2], dtype=torch.int8)
    wide[:rows].scatter_(1, columns[..., None].expand_as(taps), taps)
    packed = wide.view(blocks, block, depth // 4, 4, -1).permute(0, 4, 2, 1, 3).contiguous()
    return kernels.Branch(shift, packed, None, first.to(torch.int32), depth, geometry)


def _reach(synapse: Synapse, source: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, ...]:
    """Return the pixels a convolution reads left, right, above and below its source."""
    left, _, above, _ = synapse.attributes["padding"]
    beyond = []
    for axis, before in enumerate((above, left)):
        steps = (out[1 + axis] - 1) * synapse.attributes["stride"][axis]
        taps = (synapse.weight.shape[2 + axis] - 1) * synapse.attributes["dilation"][axis]
        beyond.append(max(0, steps + taps - before - source[1 + axis] + 1))
    return left, beyond[1], above, beyond[0]


class _Simulation(counts.Simulation):
    """One chunk of images, whose states are bytes `[N, H, W, channels]`."""

    engine: Engine

    def __init__(self, engine: Engine, pixels: Tensor, schedule: Schedule) -> None:
        engine.begin(min(counts.BLOCK_STEPS, schedule.timesteps), len(pixels))
        self.plan = engine.plan
        self.drives: dict[int, kernels.Drive] = {}
        self.currents: dict[str, Tensor | None] = {}
        super().__init__(engine, pixels, schedule)

    def initial(self, node: Population) -> Tensor:
        """Return the part of the plan's state that these images have."""
        state = self.plan.states[node.name][: self.images]
        return state.fill_(self.engine.populations[node.name].zero)

    def final(self, node: Population, state: Tensor) -> Tensor:
        """Return the counts `[n, ...]` of a state."""
        zero = self.engine.populations[node.name].zero
        found = Planes(state[None], node.shape, NO_BORDER, zero).bytes[0]
        return found.to(torch.int16) - zero if zero else found.clone()

    def keep(self, still: Tensor) -> None:
        """Go on with some of the running images, at the front of the plan's buffers."""
        for name, current in self.currents.items():
            self.currents[name] = None if current is None else current[:, still]
        super().keep(still)
        for name, kept in self.state.items():
            self.state[name] = self.plan.states[name][: len(kept)].copy_(kept)

    def begin(self, steps: range) -> None:
        """Begin a block."""
        self.drives = {}
        names = list(self.state)
        spikes = torch.zeros(len(names), len(steps), len(self.running), 2, dtype=torch.int64)
        self.fired = dict(zip(names, spikes, strict=True))

    def end(self, fired: Tensor) -> None:
        """End a block: count its spikes."""
        for name, spikes in self.fired.items():
            self.spikes[name][self.running] += spikes.sum(0)
        fired += torch.stack(list(self.fired.values())).sum((0, 3))

    def drive(self, depth: int, steps: range) -> kernels.Drive:
        """Return what the populations at a depth get in this block."""
        if depth not in self.drives:
            self.drives[depth] = kernels.Drive.of(
                [self.schedule.bias_steps(t, 0) for t in steps],
                [self.schedule.bias_steps(t, depth) for t in steps],
                [self.schedule.fires(t, depth) for t in steps],
            )
        return self.drives[depth]

    def scan(self, node: Population, values: dict[str, Any], steps: range, fired: Tensor) -> Planes:
        """Fire through the block."""
        packed, state = self.engine.populations[node.name], self.state[node.name]
        drive, out = self.drive(node.depth, steps), self.plan.planes[node.name]
        if not drive.any:
            out = out.part(1, len(state))
            out.image.copy_(state)
            out.fill_border_()
            return out
        if packed.fused:
            if node.name not in self.currents:
                self.currents[node.name] = self.engine.image_charge(packed, values)
            charge = self.currents[node.name]
        else:
            charge = packed.numbers(self.charge(node, values, steps))
            drive = kernels.Drive.of([1] * len(steps), [0] * len(steps), list(drive.fires))
        moved = self.plan.calls[node.name].fire(
            packed.sources(values),
            charge,
            drive,
            self.fired[node.name],
            threads=self.engine.threads,
            signed=self.network.signed(node),
        )
        return out.part(len(steps) if moved else 1, len(state))
