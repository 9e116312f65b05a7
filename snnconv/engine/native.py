"""The native engine: the counts engine on bytes, its convolutions and neurons fused in C++.

A population is one task: int8 weights times uint8 counts for every step of the block, and the
neurons' course in the same pass over the image. What images bring it is summed once, apart. Tasks
are put off until somebody reads what they write, so that a usual network is one call a block. What
the kernels do not know (odd poolings, large linear layers) is computed as in the counts engine and
handed to them as charge.

Counts that a byte cannot hold are held in windows: each neuron's byte says how far its count is
above a base of its own. Bases stay for many steps, so what they bring is summed once, in full
precision, and goes into the membranes as what every step begins with.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from snnconv.engine import counts, kernels, selfcheck
from snnconv.engine.kernels import Border, Kind, Planes, Program, padded, spatial
from snnconv.engine.linear import INT32
from snnconv.engine.trace import Endpoint, Trace
from snnconv.errors import UsageError
from snnconv.network import (
    NONLINEAR,
    Image,
    Population,
    Readout,
    SpikingNetwork,
    Synapse,
    charge_bounds,
    count_dtype,
)
from snnconv.neuron import initial_membrane
from snnconv.ops import per_channel
from snnconv.plan import Relay
from snnconv.quant import relay
from snnconv.schedule import Schedule

# A threshold that the channels of padding, whose membranes stay 0, never reach.
UNREACHED = 2**20
# Bytes of the largest node's planes that one pass over the network works on.
PASS_BYTES = 2**22
# Linear layers of more weights than this are better multiplied as matrices.
LARGEST_LINEAR = 2**18
LARGEST_BYTE = 255
# The largest pixel.
PIXEL = 255
# What a shortcut reads that reads all there is: so many channels further on, the first pixel, and
# how many pixels to the next.
DIRECT = {"channel": 0, "start": (0, 0), "stride": (1, 1)}
# Bytes before and behind the buffers of counts, over which shortcuts may reach, to multiply by 0.
MARGIN = 512
NO_BORDER = (0, 0, 0, 0)
# A convolution of which each tap is read once.
WHOLE = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}


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
        if _bound(node, limits, timesteps) >= INT32:
            return f"{node.path}: its charges do not fit into the native engine's 32 bits"
    return None


def _bound(node: Population | Readout, limits: dict[str, tuple[int, int]], timesteps: int) -> float:
    """Bound every partial sum of a membrane, with counts split into a byte and a base."""
    total = timesteps * node.bias.double().abs()
    if isinstance(node, Population):
        low, high = limits[node.name]
        total += node.threshold.double() * (high - low + 2)
    for synapse in node.branches:
        low, high = limits[synapse.source]
        split = charge_bounds(synapse, 0, high - low) + charge_bounds(synapse, low, high)
        total += split.double() * torch.exp2(synapse.shift.double())
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
        self.spans = self._spans()
        self.windowed = self.spans is not self.limits
        # How long windows can stay: a count in the middle moves by one a step.
        self.window_steps = kernels.largest_count(self.level) // 2
        # Where counts end is seldom asked for so far out: torch does it.
        self.ends = counts.Engine(network, timesteps) if self.windowed else None
        self.in_bytes = _in_bytes(network, self.spans, self.windowed)
        self.nodes = {n.name: n for n in network.nodes}
        self.packed = {n.name: _Packed(n, self) for n in network.weighted}
        self.hidden = self._unread()
        self.borders = self._borders()
        self.plans: dict[int, _Plan] = {}
        self.plan: _Plan
        self.lock = threading.Lock()

    def _spans(self) -> dict[str, tuple[int, int]]:
        """Return the lowest and highest counts that bytes hold, per node: all, or windows."""
        largest = kernels.largest_count(self.level)
        sizes = {name: self.limits[name][1] - self.limits[name][0] for name in self.neurons}
        if max(sizes.values()) <= largest:
            return self.limits
        return {name: (0, min(sizes.get(name, largest), largest)) for name in self.limits}

    def _unread(self) -> frozenset[str]:
        """Return the nodes that nobody reads, for the kernels read what is before them."""
        read: set[str] = set()
        for node in reversed(self.network.nodes):
            if packed := self.packed.get(node.name):
                read.update(packed.read)
            elif node.name in read:
                read.update(getattr(node, "inputs", ()))
        return frozenset(set(self.nodes) - read - set(self.packed))

    def _borders(self) -> dict[str, Border]:
        """Return what convolutions read around each node."""
        borders = dict.fromkeys(self.nodes, NO_BORDER)
        for packed in self.packed.values():
            for synapse in (*packed.synapses, *packed.images):
                if synapse.kind == "conv":
                    source = spatial(self.nodes[synapse.source].shape)
                    reach = _reach(synapse, source, spatial(packed.node.shape))
                    border = zip(borders[synapse.source], reach, strict=True)
                    left, right, above, below = (max(pair) for pair in border)
                    borders[synapse.source] = left, right, above, below
        return borders

    def simulate(self, pixels: Tensor, schedule: Schedule, *, events: bool = False) -> Trace:
        """Simulate uint8 images `[N, C, H, W]` under a schedule of this T."""
        with self._own_threads(torch.get_num_threads()):
            return super().simulate(pixels, schedule, events=events)

    def endpoint(self, pixels: Tensor, *, maps: bool = False) -> Endpoint:
        """Compute where every exact schedule ends, in one pass."""
        if self.ends is not None:
            return self.ends.endpoint(pixels, maps=maps)
        with self._own_threads(torch.get_num_threads()):
            hidden = self.hidden
            try:
                self.hidden = frozenset() if maps else hidden
                return super().endpoint(pixels, maps=maps)
            finally:
                self.hidden = hidden

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
        return max(self.threads, PASS_BYTES // (steps * self.largest))

    def simulation(self, pixels: Tensor, schedule: Schedule) -> counts.Simulation:
        """Begin a simulation of some images."""
        return _Simulation(self, pixels, schedule)

    def counts(self, value: Any) -> Tensor:
        """Return a node's counts `[steps, N, ...]` in a float type."""
        return self.plan.done(value).counts() if isinstance(value, Planes) else value

    def begin(self, steps: int, images: int) -> None:
        """Have buffers for so many steps and images, the last ones if they are large enough."""
        plan = self.plans.get(steps)
        if plan is None or plan.most_images < images:
            with torch.inference_mode(False):  # for later simulations outside of it
                plan = self.plans[steps] = _Plan(self, steps, images)
        self.plan = plan
        plan.start(Kind.SETTLE, 1, images)

    def map(self, node: Relay, inputs: list[Any]) -> Any:
        """Apply a map that is exact on counts, on bytes where they hold its results."""
        plan = self.plan
        if node.name not in plan.planes:
            return super().map(node, inputs)
        if node.op == "max_pool":
            return plan.later(node.name)
        parts = [plan.done(value) for value in inputs]
        steps = max(len(p.data) for p in parts)
        out = plan.planes[node.name].part(steps, plan.images)
        flat = [p.bytes.expand(steps, *p.bytes.shape[1:]).flatten(0, 1) for p in parts]
        out.bytes.copy_(relay(node, flat).unflatten(0, (steps, plan.images)))
        out.fill_border_()
        out.moves.fill_(steps > 1)
        return out

    def settle(self, node: Population, values: dict[str, Any]) -> Planes:
        """Return the counts a population ends at."""
        packed = self.packed[node.name]
        if not packed.fused:
            self.plan.give(packed, self.end_arrived(node, values))
        elif packed.held and not packed.images:
            self.plan.give(packed, packed.image_charge(self, values))
        return self.plan.later(node.name)

    def end_charge(self, node: Population | Readout, values: dict[str, Any]) -> Tensor:
        """Return what has arrived in the end, `[1, N, C, ...]`."""
        if not self.packed[node.name].fused:
            return super().end_charge(node, values)
        return self.plan.sums(node) + self.timesteps * node.bias.long().view(-1, 1, 1)

    def end_image(self, node: Image, pixels: Tensor) -> Any:
        """Return what has come from an image in the end; the kernels have it in bytes."""
        self.plan.show(node, pixels)
        return None if node.name in self.hidden else super().end_image(node, pixels)

    def end_counts(self, name: str, value: Any) -> Tensor:
        """Return the final counts of a node, `[N, ...]`."""
        if name not in self.neurons:
            return super().end_counts(name, value)
        return _counts(self.plan.done(value)).to(count_dtype(*self.limits[name]), copy=True)


def _counts(planes: Planes) -> Tensor:
    """Return the counts of the first step, integers `[N, ...]`, perhaps in the planes' memory."""
    found = planes.bytes[0]
    if planes.base is not None:
        return found + planes.base
    return found.to(torch.int16) - planes.zero if planes.zero else found


def _in_bytes(
    network: SpikingNetwork, spans: dict[str, tuple[int, int]], windowed: bool
) -> set[str]:
    """Return the nodes whose counts are bytes: populations, and maps that keep to their inputs.

    Bytes with bases of their own cannot be compared.
    """
    found = {p.name for p in network.populations}
    others = {"sum_pool", "clamp"} | ({"max_pool"} if windowed else set())
    for node in network.nodes:
        if not isinstance(node, Relay) or node.op in others:
            continue
        if found.issuperset(node.inputs):
            lows = {spans[name][0] for name in node.inputs}
            if len(lows) == 1 and (node.op != "pad" or lows == {0}):
                found.add(node.name)
    return found


class _Plan:
    """Buffers for every node in bytes, and the kernels' tasks on them.

    A node's bytes take the place of those that nobody reads any more, but for a single step: what
    an end point ends at is read last. `states` are uint8 `[N, H, W, channels]` per population.
    """

    def __init__(self, engine: Engine, steps: int, images: int) -> None:
        self.engine, self.most_images = engine, images
        self.steps, self.images = steps, images
        nodes = engine.network.nodes
        self.moves = torch.zeros(len(nodes), 1, dtype=torch.int32)
        self.flags = dict(zip(engine.nodes, self.moves, strict=True))
        self.planes: dict[str, Planes] = {}
        self.states: dict[str, Tensor] = {}
        # Charges the kernels compute or are handed, int32 in one dimension.
        self.charges: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        # Negative spikes of every neuron, uint8 `[N, H, W, channels]`, while they are watched.
        self.falls: dict[str, Tensor] = {}
        # What the bases of windows bring populations, int32 `[N, H, W, channels]`.
        self.bases: dict[str, Tensor] = {}
        self.timetable = torch.zeros(engine.network.depth + 1, 2, steps, dtype=torch.int32)
        self.once = torch.ones(steps, dtype=torch.int32)
        self.end = torch.full((2, 1), engine.timesteps, dtype=torch.int32)
        self.programs = {kind: Program(engine.level) for kind in (Kind.FIRE, Kind.SETTLE)}
        self.tasks: dict[str, int] = {}
        self.kind = Kind.FIRE
        self.waiting: tuple[int, int] | None = None
        self.spikes = torch.zeros(len(engine.neurons), steps, images, 2, dtype=torch.int64)
        self._allocate(steps, images)
        for packed in engine.packed.values():
            if packed.images:
                self._add_image(packed)
        populations = [p.name for p in engine.network.populations]
        for node in nodes:
            if isinstance(node, Population):
                self._add_population(node, populations.index(node.name))
            elif isinstance(node, Readout) and engine.packed[node.name].fused:
                self._add_sum(node.name, engine.packed[node.name])
            elif isinstance(node, Relay) and node.op == "max_pool" and node.name in self.planes:
                for program in self.programs.values():
                    source, out = self.planes[node.inputs[0]], self.planes[node.name]
                    self.tasks[node.name] = program.max_pool(source, out, node.attributes)

    def _allocate(self, steps: int, images: int) -> None:
        """Make the buffers."""
        engine = self.engine
        last: dict[str, int] = {}
        for position, node in enumerate(engine.network.nodes):
            packed = engine.packed.get(node.name)
            for name in (node.name, *(packed.read if packed else getattr(node, "inputs", ()))):
                last[name] = position
        buffers: dict[str, Tensor] = {}
        free: list[Tensor] = []
        for position, node in enumerate(engine.network.nodes):
            name, border = node.name, engine.borders[node.name]
            if name in engine.in_bytes and name not in engine.hidden:
                size = Planes.size(steps, images, node.shape, border)
                count = math.prod(size)
                buffer = buffers[name] = _taken(free, count + 2 * MARGIN)
                data, zero = buffer[MARGIN:][:count].view(size), -engine.spans[name][0]
                self.planes[name] = Planes(data, node.shape, border, zero, self.flags[name])
            if isinstance(node, Image):
                size = Planes.size(1, images, node.shape, border)
                zeros = torch.zeros(size[-1], dtype=torch.uint8)
                zeros[: node.shape[0]] = torch.tensor(node.zero_point)
                data = zeros.expand(size).clone()
                self.planes[name] = Planes(data, node.shape, border, 0, self.flags[name])
            if isinstance(node, Population):
                channels, height, width = spatial(node.shape)
                state = torch.empty(images, height, width, padded(channels), dtype=torch.uint8)
                self.states[name] = state
            if steps > 1:
                free += [buffers[n] for n, at in last.items() if at == position and n in buffers]

    def _add_image(self, packed: _Packed) -> None:
        """Let the kernels sum what an image brings a population, once for all steps."""
        self._add_sum(f"{packed.node.name} image", packed, image=True)

    def _add_sum(self, name: str, packed: _Packed, image: bool = False) -> None:
        cell = packed.image_cell if image else packed.cell
        synapses = packed.images if image else packed.synapses
        _, height, width = spatial(packed.node.shape)
        steps = 1 if image else self.steps
        size = steps * self.most_images * height * width * len(cell.bias)
        sums = self.charges[name] = torch.empty(size, dtype=torch.int32)
        place = torch.empty(1, 1, height, width, len(cell.bias), dtype=torch.uint8)
        moves = torch.zeros(1, dtype=torch.int32) if image else self.flags[packed.node.name]
        out = Planes(place, packed.node.shape, NO_BORDER, 0, moves)
        for program in self.programs.values():
            self.tasks[name] = program.layer(
                Kind.SUM, cell, [self.planes[s.source] for s in synapses], out, sums=sums
            )

    def _add_population(self, node: Population, number: int) -> None:
        packed, charge = self.engine.packed[node.name], None
        if packed.images:
            _, height, width = spatial(node.shape)
            charge = self.charges[f"{node.name} image"].view(
                1, -1, height, width, len(packed.cell.bias)
            )
        network = self.engine.network
        if self.engine.windowed:
            size = *self.states[node.name].shape[:3], len(packed.cell.bias)
            self.bases[node.name] = torch.zeros(size, dtype=torch.int32)
        for kind, program in self.programs.items():
            fires = kind is Kind.FIRE
            self.tasks[node.name] = program.layer(
                kind,
                packed.cell,
                [self.planes[s.source] for s in packed.synapses],
                self.planes[node.name],
                state=self.states[node.name],
                timetable=self.timetable[node.depth] if fires else self.end,
                held=self._held(packed, fires),
                charge=charge,
                base=self.bases.get(node.name),
                signed=network.signed(node),
                population=number,
            )

    def _held(self, packed: _Packed, fires: bool) -> Tensor:
        """Return how often a charge that is handed in has arrived: an image's, at every step.

        What torch makes of an image in the end has it all in it.
        """
        if not packed.held or not (fires or packed.images):
            return self.once
        return self.timetable[0, 0] if fires else self.end[0]

    def start(self, kind: Kind, steps: int, images: int, spikes: Tensor | None = None) -> None:
        """Begin a block of steps, or an end point."""
        self.finish()
        self.kind, self.steps, self.images = kind, steps, images
        if spikes is not None:
            self.spikes = spikes

    def later(self, name: str) -> Planes:
        """Put a node's task off; return the planes it will write."""
        self._put_off(name)
        return self.planes[name]

    def _put_off(self, name: str) -> None:
        number = self.tasks[name]
        if self.waiting is not None and self.waiting[1] == number:
            self.waiting = self.waiting[0], number + 1
        else:
            self.finish()
            self.waiting = number, number + 1

    def finish(self) -> None:
        """Do what has been put off."""
        if self.waiting is not None:
            threads = self.engine.threads
            self.programs[self.kind].run(
                *self.waiting, self.spikes, self.steps, self.images, threads
            )
            self.waiting = None

    def done(self, planes: Planes) -> Planes:
        """Return the part of a node's planes that this block has written."""
        self.finish()
        return planes.part(self.steps if int(planes.moves) else 1, self.images)

    def show(self, image: Image, pixels: Tensor) -> None:
        """Take images, and sum what they bring to populations."""
        readers = [p for p in self.engine.packed.values() if image.name in p.shown]
        if readers:
            self.planes[image.name].part(1, self.images).bytes[0].copy_(pixels)
        for packed in readers:
            self._put_off(f"{packed.node.name} image")

    def give(self, packed: _Packed, charge: Tensor) -> None:
        """Hand a population a charge `[steps or 1, n, *shape]`, for its next task."""
        numbers = self.given[packed.node.name] = packed.numbers(charge)
        self.programs[self.kind].give(self.tasks[packed.node.name], numbers)

    def watch(self, events: bool) -> None:
        """Count the negative spikes of every neuron, or do not."""
        program = self.programs[Kind.FIRE]
        for name, state in self.states.items():
            node = self.engine.nodes[name]
            signed = isinstance(node, Population) and self.engine.network.signed(node)
            if events and signed:
                if name not in self.falls:
                    with torch.inference_mode(False):  # for later simulations outside of it
                        self.falls[name] = torch.empty_like(state)
                self.falls[name].zero_()
            program.watch(self.tasks[name], self.falls[name] if events and signed else None)

    def fallen(self, name: str, images: int) -> Tensor:
        """Return a population's negative spikes since this was asked last, int64 `[*shape]`."""
        falls, node = self.falls[name][:images], self.engine.nodes[name]
        planes = Planes(falls[None], node.shape, NO_BORDER, 0, self.once)
        found = counts.total(planes.bytes[0])
        falls.zero_()
        return found

    def move(self, name: str, base: Tensor) -> None:
        """Give the counts of a node other bases, `[n, *shape]`."""
        if name in self.planes:
            self.planes[name] = replace(self.planes[name], base=base)

    def sums(self, node: Population | Readout) -> Tensor:
        """Return the sums of a readout, int64 `[steps or 1, n, C, H, W]`."""
        self._put_off(node.name)
        self.finish()
        rows, height, width = spatial(node.shape)
        steps = self.steps if int(self.flags[node.name]) else 1
        channels = len(self.engine.packed[node.name].cell.bias)
        size = steps, self.images, height, width, channels
        sums = self.charges[node.name][: math.prod(size)].view(size)
        return sums[..., :rows].permute(0, 1, 4, 2, 3).long()


def _taken(free: list[Tensor], size: int) -> Tensor:
    """Take the smallest buffer that is large enough, or a new one."""
    fitting = [k for k, buffer in enumerate(free) if len(buffer) >= size]
    if not fitting:
        return torch.empty(size, dtype=torch.uint8)
    return free.pop(min(fitting, key=lambda k: len(free[k])))


class _Packed:
    """A population or a readout with its weights as the kernels want them.

    `fused` says whether they run its branches `synapses`, and `images` those from images, which are
    summed apart; `held` whether there are such. `read` are the nodes it reads.
    """

    def __init__(self, node: Population | Readout, engine: Engine) -> None:
        low, high = engine.spans.get(node.name, (0, 0))
        self.node, self.zero = node, -low
        branches = [_seen_through(s, engine) for s in node.branches]
        self.synapses = [s for s in branches if s.source not in engine.images]
        images = [s for s in branches if s.source in engine.images]
        # The kernels keep the last branch in registers, where shortcuts would gain nothing.
        self.synapses.sort(key=lambda s: s.kind != "scale")
        shown = all(_known_image(s, engine) for s in images)
        by_torch = all(any(s is b for b in node.branches) for s in images)
        self.fused = all(_known(s, engine) for s in self.synapses) and (shown or by_torch)
        if isinstance(node, Readout):
            bound = _bound(node, engine.limits, engine.timesteps)
            flat = node.shape[0] != len(node.bias)  # a map that was flattened
            self.fused &= bool(self.synapses) and not images and bound < INT32 and not flat
        if not self.fused:
            self.synapses = []
        self.held = self.fused and bool(images)
        self.images = images if self.held and shown else []
        self.shown = {s.source for s in self.images}
        used = branches if self.fused else node.branches
        self.read = [s.source for s in used if s.source not in self.shown]
        self.cell = _cell(node, self.synapses, engine, high - low)
        if self.images:
            self.image_cell = _image_cell(node, self.images, engine)

    def image_charge(self, engine: Engine, values: dict[str, Any]) -> Tensor:
        """Return what a population's branches make of the image, by torch."""
        return self._charge(engine, values, lambda source: source in engine.images)

    def base_charge(self, engine: Engine, bases: dict[str, Tensor]) -> Tensor:
        """Return what a node's branches make of the bases of windows `[1, N, *shape]`, by torch."""
        return self._charge(engine, bases, lambda source: source not in engine.images)

    def _charge(
        self, engine: Engine, values: dict[str, Any], takes: Callable[[str], bool]
    ) -> Tensor:
        charge = engine.charge(self.node)
        parts = [
            charge.current(i, values[synapse.source])
            for i, synapse in enumerate(self.node.branches)
            if takes(synapse.source)
        ]
        return sum(parts[1:], parts[0])

    def numbers(self, charge: Tensor) -> Tensor:
        """Return charges `[steps, N, *shape]` as int32 `[steps, N, H, W, channels]`."""
        rows, height, width = spatial(self.node.shape)
        steps, images = charge.shape[:2]
        numbers = torch.zeros(steps, images, height, width, len(self.cell.bias), dtype=torch.int32)
        charge = charge.reshape(steps, images, rows, height, width)
        numbers[..., :rows] = charge.permute(0, 1, 3, 4, 2)
        return numbers


def _cell(
    node: Population | Readout, synapses: list[Synapse], engine: Engine, high: int
) -> kernels.Cell:
    """Pack what a node sums. Sums of a readout have no bias but what moving the counts up asks."""
    channels = padded(node.shape[0])
    moved = torch.zeros(node.shape[0], dtype=torch.int64)
    for synapse in synapses:
        weight = synapse.weight.long()
        total = weight if synapse.kind == "scale" else weight.flatten(1).sum(1)
        moved += engine.spans[synapse.source][0] * total << synapse.shift.long()
    if isinstance(node, Readout):
        zeros = torch.zeros(channels, dtype=torch.int32)
        return _with_branches(synapses, engine, zeros, _per_channel(moved, channels), zeros, high)
    zero = -engine.spans[node.name][0]
    threshold = node.threshold.long()
    start = initial_membrane(threshold, engine.network.initial_membrane) + threshold * zero + moved
    return _with_branches(
        synapses,
        engine,
        _per_channel(threshold, channels, UNREACHED),
        _per_channel(node.bias, channels),
        _per_channel(start, channels, UNREACHED * zero),
        high,
    )


def _image_cell(
    node: Population | Readout, synapses: list[Synapse], engine: Engine
) -> kernels.Cell:
    """Pack what a node sums of images: pixels less their zero point, which the border has, too."""
    channels = padded(node.shape[0])
    bias = torch.zeros(node.shape[0], dtype=torch.int64)
    for synapse in synapses:
        image = engine.nodes[synapse.source]
        assert isinstance(image, Image)
        zero_point = torch.tensor(image.zero_point)
        per_group = synapse.weight.long().flatten(2).sum(2)
        group = torch.arange(len(bias)) // (len(bias) // synapse.attributes["groups"])
        inputs = group[:, None] * per_group.shape[1] + torch.arange(per_group.shape[1])
        bias -= (per_group * zero_point[inputs]).sum(1) << synapse.shift.long()
    zeros = torch.zeros(channels, dtype=torch.int32)
    return _with_branches(synapses, engine, zeros, _per_channel(bias, channels), zeros, 0)


def _with_branches(
    synapses: list[Synapse],
    engine: Engine,
    threshold: Tensor,
    bias: Tensor,
    start: Tensor,
    high: int,
) -> kernels.Cell:
    block = _block(synapses, len(bias), engine.level)
    branches = tuple(_branch(s, len(bias), block) for s in synapses)
    return kernels.Cell(branches, threshold, bias, start, block, high)


def _seen_through(synapse: Synapse, engine: Engine) -> Synapse:
    """Return a synapse as one that reads what is before maps: then nobody need apply them.

    Linear layers and convolutions may be convolutions of what is flattened or summed as a whole,
    and shortcuts skip pixels and shift channels by themselves.
    """
    source = engine.nodes[synapse.source]
    if synapse.kind == "scale":
        return _shortcut(synapse, source, engine) if isinstance(source, Relay) else synapse
    if synapse.kind == "linear" and synapse.weight.numel() <= LARGEST_LINEAR:
        shape = source.shape
        if isinstance(source, Relay) and source.op == "flatten":
            source = engine.nodes[source.inputs[0]]
            shape = source.shape
        weight = synapse.weight.view(len(synapse.weight), *spatial(shape))
        whole = replace(synapse, source=source.name, kind="conv", weight=weight, attributes=WHOLE)
        return _seen_through(whole, engine)
    if not (isinstance(source, Relay) and source.op == "sum_pool" and synapse.kind == "conv"):
        return synapse
    pool, before = source.attributes["pool"], engine.nodes[source.inputs[0]]
    if len(pool.h) * len(pool.w) > 1 or synapse.attributes != WHOLE:
        return synapse
    (top, bottom, _), (left, right, _) = pool.h[0], pool.w[0]
    weight = synapse.weight.new_zeros(*synapse.weight.shape[:2], *before.shape[1:])
    weight[..., top:bottom, left:right] = synapse.weight
    if weight.numel() > LARGEST_LINEAR:
        return synapse
    return replace(synapse, source=before.name, weight=weight)


def _shortcut(synapse: Synapse, relay: Relay, engine: Engine) -> Synapse:
    """Return a shortcut as one that reads what is before channels are padded, or pixels skipped."""
    before = engine.nodes[relay.inputs[0]]
    read = {**DIRECT, **synapse.attributes}
    weight = synapse.weight
    padding = relay.attributes.get("padding", ())
    if relay.op == "pad" and len(before.shape) == 3 and not any(padding[:4]):
        first = (padding[4] if len(padding) > 4 else 0) - read["channel"]
        inside = slice(max(first, 0), max(first + before.shape[0], 0))
        weight = torch.zeros_like(synapse.weight)
        weight[inside] = synapse.weight[inside]
        read["channel"] = -first
    elif relay.op == "slice" and len(before.shape) == 3:
        channels, *axes = (range(*s) for s in relay.attributes["slices"])
        if channels.step != 1 or any(axis.step < 1 for axis in axes):
            return synapse
        read["channel"] += channels.start
        read["start"] = tuple(
            axis.start + axis.step * start for axis, start in zip(axes, read["start"], strict=True)
        )
        read["stride"] = tuple(
            axis.step * stride for axis, stride in zip(axes, read["stride"], strict=True)
        )
    else:
        return synapse
    beyond = read["channel"] + padded(len(weight)) - padded(before.shape[0])
    if read["channel"] < -MARGIN or beyond > MARGIN:
        return synapse
    whole = replace(synapse, source=before.name, weight=weight, attributes=read)
    return _seen_through(whole, engine)


def _known(synapse: Synapse, engine: Engine) -> bool:
    """Return whether the kernels can run a branch."""
    low, high = engine.spans[synapse.source]
    exact = high - low <= kernels.largest_count(engine.level)
    known = synapse.kind in ("conv", "scale") and not synapse.pools
    return exact and known and synapse.source in engine.in_bytes


def _known_image(synapse: Synapse, engine: Engine) -> bool:
    """Return whether the kernels can run a branch that reads an image."""
    exact = kernels.largest_count(engine.level) >= PIXEL
    return exact and synapse.kind == "conv" and not synapse.pools


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
    weight, attributes = synapse.weight, synapse.attributes
    if synapse.kind == "scale":
        factors = _per_channel(weight << synapse.shift, channels)
        read = {**DIRECT, **attributes}
        geometry = {"stride": read["stride"], "padding": tuple(-n for n in read["start"])}
        return kernels.Branch(factors, geometry=geometry, channel=read["channel"])
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
        self.currents: dict[str, Tensor] = {}
        # Of windows: their bases `[n, *shape]`, what these bring readouts, `[1, n, C, H, W]`, and
        # the steps that are left until they must move.
        self.bases: dict[str, Tensor] = {}
        self.base_sums: dict[str, Tensor] = {}
        self.room = 0
        self.unread = 0  # steps whose negative spikes are still in bytes
        super().__init__(engine, pixels, schedule)
        self.state = {p.name: self.initial(p) for p in self.network.populations}
        self.totals = torch.zeros(len(self.state), self.images, 2, dtype=torch.int64)
        self.spikes = dict(zip(self.state, self.totals, strict=True))
        self.plan.start(Kind.FIRE, 1, self.images)
        for node in self.network.nodes:
            if isinstance(node, Image):
                self.plan.show(node, pixels)

    def initial(self, node: Population) -> Tensor:
        """Return the part of the plan's state that these images have."""
        state = self.plan.states[node.name][: self.images]
        return state.fill_(self.engine.packed[node.name].zero)

    def final(self, node: Population) -> Tensor:
        """Return the counts `[n, ...]` of the running images."""
        return _counts(self.stored(node))

    def stored(self, node: Population) -> Planes:
        """Return the state of the running images as planes."""
        state, zero = self.state[node.name][None], self.engine.packed[node.name].zero
        base = self.bases.get(node.name)
        return Planes(state, node.shape, NO_BORDER, zero, self.plan.once, base)

    def move_windows(self) -> None:
        """Move every neuron's window so that its count is in the middle, as far as counts reach."""
        engine, plan = self.engine, self.plan
        bases: dict[str, Tensor] = {}
        for node in self.network.nodes:
            if isinstance(node, Population):
                (low, high), width = engine.limits[node.name], engine.spans[node.name][1]
                count = self.final(node).int()
                bases[node.name] = (count - width // 2).clamp_(low, high - width)[None]
                self.stored(node).bytes.copy_(count - bases[node.name])
            elif isinstance(node, Relay) and node.op not in NONLINEAR:
                parts = [bases[name] for name in node.inputs if name in bases]
                if len(parts) == len(node.inputs):
                    bases[node.name] = counts.Engine.map(engine, node, parts)
        self.set_bases({name: base[0] for name, base in bases.items()})
        for name, packed in engine.packed.items():
            node = packed.node
            charge = packed.base_charge(engine, bases).long() if packed.synapses else 0
            if isinstance(node, Population):
                threshold = per_channel(node.threshold.long(), bases[name].ndim - 1)
                numbers = packed.numbers(charge - threshold * bases[name])
                plan.bases[name][: len(self.running)] = numbers[0]
            elif isinstance(charge, Tensor):
                self.base_sums[name] = charge.view(1, -1, *spatial(node.shape))
        self.room = engine.window_steps

    def watch(self, events: bool) -> None:
        """Count the events of every neuron, or do not."""
        super().watch(events)
        self.plan.watch(events)

    def _read_falls(self) -> None:
        """Take the negative spikes out of bytes, which hold so many."""
        for name in self.plan.falls:
            self.falls[name] += self.plan.fallen(name, self.images)
        self.unread = 0

    def _events(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        self._read_falls()
        return super()._events(counts)

    def set_bases(self, bases: dict[str, Tensor]) -> None:
        """Have other bases, `[n, *shape]`."""
        self.bases = bases
        for name, base in bases.items():
            self.plan.move(name, base)

    def keep(self, still: Tensor) -> None:
        """Go on with some of the running images, at the front of the plan's buffers."""
        count = len(self.running)
        for name, current in self.currents.items():
            self.currents[name] = current[:, still]
        for packed in self.engine.packed.values():
            if packed.images:
                charges = self.plan.charges[f"{packed.node.name} image"]
                rows = charges[: len(charges) // self.plan.most_images * count].view(count, -1)
                kept = rows[still]
                rows[: len(kept)] = kept
        for rows in self.plan.bases.values():
            kept = rows[:count][still]
            rows[: len(kept)] = kept
        self.base_sums = {name: sums[:, still] for name, sums in self.base_sums.items()}
        self.set_bases({name: base[still] for name, base in self.bases.items()})
        super().keep(still)
        for name, kept in self.state.items():
            self.state[name] = self.plan.states[name][: len(kept)].copy_(kept)

    def image(self, node: Image) -> Any:
        """Return an image where torch needs it; the kernels have its charges."""
        return None if node.name in self.engine.hidden else super().image(node)

    def begin(self, steps: range) -> None:
        """Begin a block."""
        if self.engine.windowed:
            if self.room < len(steps):
                self.move_windows()
            self.room -= len(steps)
        size = len(self.state), len(steps), len(self.running), 2
        self.fired = torch.zeros(size, dtype=torch.int64)
        by_offset: dict[int, list[list[int]]] = {}
        rows = []
        for depth in range(self.network.depth + 1):
            offset = self.schedule.offset(depth)
            if offset not in by_offset:
                by_offset[offset] = [
                    [self.schedule.bias_steps(t, depth) for t in steps],
                    [self.schedule.fires(t, depth) for t in steps],
                ]
            rows.append(by_offset[offset])
        self.plan.timetable[:, :, : len(steps)] = torch.tensor(rows, dtype=torch.int32)
        self.plan.start(Kind.FIRE, len(steps), len(self.running), self.fired)

    def end(self, fired: Tensor) -> None:
        """End a block: count its spikes."""
        self.plan.finish()
        self.totals[:, self.running] += self.fired.sum(1)
        if self.watches:
            self.unread += len(self.fired[0])
            if self.unread + counts.BLOCK_STEPS > LARGEST_BYTE:
                self._read_falls()
        fired += self.fired.sum((0, 3))

    def charge(self, node: Population | Readout, values: dict[str, Any], steps: range) -> Tensor:
        """Return the accumulated charge, `[steps, N, C, ...]`, or one step if it is constant."""
        if not self.engine.packed[node.name].fused:
            return super().charge(node, values, steps)
        injected = torch.tensor([self.schedule.bias_steps(t, node.depth) for t in steps])
        bias = injected.view(-1, 1, 1, 1, 1) * node.bias.long().view(-1, 1, 1)
        return self.plan.sums(node) + bias + self.base_sums.get(node.name, 0)

    def scan(self, node: Population, values: dict[str, Any], steps: range, fired: Tensor) -> Planes:
        """Fire through the block, once somebody wants to know."""
        packed = self.engine.packed[node.name]
        if not packed.fused:
            self.plan.give(packed, self.arrived(node, values, steps))
        elif packed.held and not packed.images:
            if node.name not in self.currents:
                self.currents[node.name] = packed.image_charge(self.engine, values)
            self.plan.give(packed, self.currents[node.name])
        return self.plan.later(node.name)
