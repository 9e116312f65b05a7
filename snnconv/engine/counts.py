"""The counts engine: layer after layer, all steps of a block at once.

Counts are the state (docs/concepts.md, "Engines"), so the charge of every time step is a
convolution of its own, and one call computes a block of them. With `target(t)` the count a neuron
would settle at if nothing more arrived,

    target(t) = clip(floor((charge(t) + V0) / theta), low, T)
    S(t) = S(t-1) + clip(target(t) - S(t-1), -1, 1)

is the neuron of `snnconv.neuron`: its membrane is at least theta exactly when the target is above
S, and negative exactly when it is below. Memory holds one block of planes for the layers that are
still read, and one plane per population, whatever T.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from snnconv.analog import emitted
from snnconv.engine import gpu
from snnconv.engine.linear import Charge, exact_arithmetic, exact_dtype
from snnconv.engine.trace import Endpoint, Trace, check_images, check_schedule
from snnconv.network import (
    Image,
    Island,
    Population,
    Readout,
    SpikingNetwork,
    count_dtype,
    largest_image,
)
from snnconv.neuron import initial_membrane
from snnconv.ops import per_channel
from snnconv.plan import Relay
from snnconv.quant import last_uses, relay
from snnconv.schedule import Schedule

# Steps computed at once. Blocks end at multiples of T, where `wait` changes layers.
BLOCK_STEPS = 8
# Images at once: as many as keep one block of the largest layer within this many numbers; a GPU
# has more to do at once, as far as its memory goes, which a number takes so many bytes of.
BLOCK_NUMBERS = 2**22
GPU_NUMBERS, GPU_BYTES = 2**27, 64


class Engine:
    """The counts engine for one network at one T, on any device.

    Parts of it are made anew by `snnconv.engine.native`: what a node's value is, how maps and
    populations are computed, how many images are worked on at once.
    """

    name = "counts"

    def __init__(
        self, network: SpikingNetwork, timesteps: int, device: torch.device | str = "cpu"
    ) -> None:
        """Take a network and a T."""
        self.network, self.timesteps = network, timesteps
        self.device = torch.device(device)
        self.limits = network.count_limits(timesteps)
        # The membrane's type is int32 where one kernel scans a block of steps.
        self.scans = gpu.unavailable(self.device) is None
        self._charges: dict[str, Charge] = {}
        self._rows: dict[str, tuple[Population, Tensor]] = {}
        # Maps nobody reads, for those behind them read what is before.
        self.hidden: frozenset[str] = frozenset()
        self.images = frozenset(n.name for n in network.nodes if isinstance(n, Image))
        self.neurons = frozenset(p.name for p in network.populations)
        self.last_use = last_uses(list(network.nodes))
        self.worths = network.worths
        self.largest = largest_image(network)

    def charge(self, node: Population | Readout) -> Charge:
        """Return the linear part of a node, its weights converted when it is first asked for.

        A node of the same name with other weights takes its place.
        """
        found = self._charges.get(node.name)
        if found is None or found.node is not node:
            found = Charge(
                node, self.limits, self.timesteps, self.device, self.scans, self.network.steady
            )
            self._charges[node.name] = found
        return found

    def rows(self, node: Population) -> Tensor:
        """Return bias, threshold and initial membrane, int32 `[3, C]`, as the kernel reads them."""
        known, rows = self._rows.get(node.name, (None, torch.empty(0)))
        if known is not node:
            start = initial_membrane(node.threshold, self.network.initial_membrane)
            rows = torch.stack([node.bias, node.threshold, start]).to(self.device, torch.int32)
            self._rows[node.name] = node, rows
        return rows

    def simulate(self, pixels: Tensor, schedule: Schedule, *, events: bool = False) -> Trace:
        """Simulate uint8 images `[N, C, H, W]` under a schedule of this T."""
        check_schedule(self.network, self.timesteps, schedule)
        check_images(self.network, pixels)
        size = self.images_at_once(min(BLOCK_STEPS, self.timesteps))
        counts = {
            p.name: laid_out(
                (len(pixels), *p.shape), count_dtype(*self.limits[p.name]), self.device
            )
            for p in self.network.populations
        }
        parts = []
        with exact_arithmetic():
            for first in range(0, len(pixels), size):
                here = slice(first, first + size)
                simulation = self.simulation(pixels[here], schedule)
                simulation.watch(events)
                parts.append(simulation.run({name: c[here] for name, c in counts.items()}))
        return _join(parts, counts)

    def endpoint(self, pixels: Tensor, *, maps: bool = False) -> Endpoint:
        """Compute where every exact schedule ends, in one pass (docs/concepts.md, "Engines").

        `pixels` are uint8 `[N, C, H, W]`. With `maps` the counts of pooling, concatenation and the
        like are kept beside the neurons'.
        """
        check_images(self.network, pixels)
        with exact_arithmetic():
            parts = [self._end(x, maps) for x in pixels.split(self.images_at_once(1))]
        first = parts[0]
        if len(parts) == 1:
            return first
        return Endpoint(
            self.timesteps,
            {name: torch.cat([p.counts[name] for p in parts]) for name in first.counts},
            {name: torch.cat([p.charges[name] for p in parts]) for name in first.charges},
        )

    def _end(self, pixels: Tensor, maps: bool) -> Endpoint:
        self.begin(1, len(pixels))
        values: dict[str, Any] = {}
        ends: dict[str, Any] = {}
        charges: dict[str, Tensor] = {}
        for position, node in enumerate(self.network.nodes):
            if isinstance(node, Readout):
                charge = self.end_charge(node, values)
                charges[node.name] = charge[0].long().reshape(len(pixels), *node.shape)
            elif isinstance(node, Image) or node.name not in self.hidden:
                values[node.name] = self.end_value(node, values, pixels)
                if isinstance(node, Population) or (maps and isinstance(node, Relay | Island)):
                    ends[node.name] = values[node.name]
            for name in self.last_use.get(position, ()):
                values.pop(name, None)
        return Endpoint(
            self.timesteps, {n: self.end_counts(n, v) for n, v in ends.items()}, charges
        )

    def end_value(
        self, node: Image | Relay | Population | Island, values: dict[str, Any], pixels: Tensor
    ) -> Any:
        """Return a node's counts in the end, `[1, N, ...]`, from those of the nodes it reads."""
        if isinstance(node, Image):
            return self.end_image(node, pixels)
        if isinstance(node, Relay):
            return self.map(node, [values[name] for name in node.inputs])
        if isinstance(node, Island):
            steps = torch.tensor([self.timesteps], device=self.device)
            return self.island(node, [values[name] for name in node.inputs], steps)
        return self.settle(node, values)

    def end_image(self, node: Image, pixels: Tensor) -> Any:
        """Return what has come from an image in the end."""
        return self.timesteps * centered(node, pixels)

    def end_counts(self, name: str, value: Any) -> Tensor:
        """Return the final counts of a node, `[N, ...]`: a population's in the smallest type."""
        found = self.counts(value)[0]
        return found.to(count_dtype(*self.limits[name])) if name in self.neurons else found

    def end_charge(self, node: Population | Readout, values: dict[str, Any]) -> Tensor:
        """Return what has arrived in the end, `[1, N, C, ...]`."""
        total = self.end_arrived(node, values)
        return total + self.charge(node).bias_charge(torch.tensor([self.timesteps]), total.ndim)

    def end_arrived(self, node: Population | Readout, values: dict[str, Any]) -> Tensor:
        """Return the same without the bias."""
        charge = self.charge(node)
        currents = [
            charge.current(i, self.counts(values[synapse.source]))
            for i, synapse in enumerate(node.branches)
        ]
        return sum(currents[1:], currents[0])

    def settle(self, node: Population, values: dict[str, Any]) -> Any:
        """Return the counts a population ends at."""
        return self.settled(node, self.end_arrived(node, values), torch.tensor([self.timesteps]))

    def settled(self, node: Population, arrived: Tensor, injected: Tensor) -> Tensor:
        """Return clip(floor((charge + V0)/theta), low, high), writing over what has arrived.

        The bias has been `injected` so often, `[steps]`. A correctly rounded quotient of integers
        has the right floor as long as they are exact in a float type: v/theta is at least 1/theta
        below the next integer k, and k theta is about v.
        """
        low, high = self.limits[node.name]
        threshold = per_channel(node.threshold.to(arrived.device, arrived.dtype), arrived.ndim - 1)
        start = initial_membrane(threshold, self.network.initial_membrane)
        offset = self.charge(node).bias_charge(injected, arrived.ndim) + start
        charge = arrived.add_(offset) if len(arrived) >= len(offset) else arrived + offset
        if not charge.is_floating_point():
            charge.div_(threshold, rounding_mode="floor").clamp_(low, high)
        elif low < 0:
            charge.div_(threshold).floor_().clamp_(low, high)
        else:
            charge.div_(threshold).clamp_(low, high)  # becoming an integer rounds down
        return charge.to(course_dtype(low, high))

    def begin(self, steps: int, images: int) -> None:
        """Get ready for blocks of so many steps, or an end point, of so many images."""

    def map(self, node: Relay, inputs: list[Any]) -> Any:
        """Apply a map that is exact on counts, to values of the block's steps or of one for all."""
        low, high = self.limits[node.name]
        dtype = course_dtype(low, high)
        if node.op == "clamp":  # what it takes away must fit, too
            low, high = self.limits[node.inputs[0]]
        within = course_dtype(low, high)
        # Poolings work on floats only.
        if node.op in ("max_pool", "sum_pool"):
            within = exact_dtype(max(-low, high))
        counts = [self.counts(value) for value in inputs]
        steps = max(len(x) for x in counts)
        flat = [x.to(within).expand(steps, *x.shape[1:]).flatten(0, 1) for x in counts]
        result = relay(node, flat, self.limits[node.inputs[0]][0])
        return result.to(dtype).unflatten(0, (steps, -1))

    def island(self, node: Island, inputs: list[Any], steps: Tensor) -> Tensor:
        """Return what an island has emitted after it has been at work for `steps` `[steps]`."""
        low, high = self.limits[node.name]
        worths = [self.worths[name].to(steps.device) for name in node.inputs]
        counts = [self.counts(value) for value in inputs]
        unit = node.unit.to(steps.device)
        found = emitted(node.function, node.attributes, counts, worths, steps, unit)
        return found.to(course_dtype(low, high))

    def counts(self, value: Any) -> Tensor:
        """Return a node's counts `[steps, N, ...]`."""
        counts: Tensor = value
        return counts

    def images_at_once(self, steps: int) -> int:
        """Return how many images to run at once, for planes of so many steps."""
        numbers = BLOCK_NUMBERS
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
            numbers = min(GPU_NUMBERS, memory // GPU_BYTES)
        return max(1, numbers // (steps * self.largest))

    def simulation(self, pixels: Tensor, schedule: Schedule) -> Simulation:
        """Begin a simulation of some images."""
        return Simulation(self, pixels, schedule)


def centered(node: Image, pixels: Tensor) -> Tensor:
    """Return pixels minus their zero point, float `[1, N, C, H, W]`."""
    zero = torch.tensor(node.zero_point, device=pixels.device).view(-1, 1, 1)
    return (pixels - zero.to(torch.int16)).float()[None]


def course_dtype(low: int, high: int) -> torch.dtype:
    """Return the smallest type that holds counts from low to high and all their differences."""
    for dtype in (torch.int8, torch.int16):
        if high - low <= torch.iinfo(dtype).max:
            return dtype
    return exact_dtype(high - low)


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an empty tensor `[..., C, H, W]` with the channels last in memory, or `[..., F]`."""
    if len(shape) < 4:
        return torch.empty(shape, dtype=dtype, device=device)
    *lead, channels, height, width = shape
    return torch.empty(*lead, height, width, channels, dtype=dtype, device=device).movedim(-1, -3)


def total(x: Tensor) -> Tensor:
    """Sum over images: integers or truths `[N, ...]` to int64 `[...]`."""
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if x.device.type != "cpu" or x.itemsize > 1:
        return x.sum(0, dtype=torch.int64)
    # As many at once as a byte can hold the sum of: that is an order of magnitude faster.
    numbers = x.movedim(1, -1).numpy() if x.ndim > 2 else x.numpy()
    largest = max(int(numbers.max(initial=0)), -int(numbers.min(initial=0)), 1)
    at_once = max(1, np.iinfo(numbers.dtype).max // largest)
    starts = range(0, len(numbers), at_once)
    parts = (numbers[s : s + at_once].sum(0, dtype=numbers.dtype) for s in starts)
    sums = torch.from_numpy(sum((part.astype(np.int64) for part in parts), np.int64(0)))
    return sums.movedim(-1, 0) if x.ndim > 2 else sums


def per_image(x: Tensor) -> Tensor:
    """Sum each image's numbers: integers `[N, C, ...]` to int64 `[N]`."""
    rows = x.movedim(1, -1).flatten(1)  # no copy if the channels are last in memory
    if rows.device.type == "cpu":  # where torch sums small integers ten times slower than numpy
        return torch.from_numpy(rows.numpy().sum(1, dtype=np.int64))
    return rows.sum(1, dtype=torch.int64)


class Simulation:
    """One chunk of images; images that have become quiet leave it between blocks."""

    def __init__(self, engine: Engine, pixels: Tensor, schedule: Schedule) -> None:
        """Begin before the first step."""
        self.engine, self.schedule = engine, schedule
        self.network = engine.network
        self.images, self.device = len(pixels), pixels.device
        self.pixels = pixels
        self.running = torch.arange(self.images, device=self.device)
        self.state: dict[str, Tensor] = {}
        self.spikes = {p.name: self._zeros(2, dtype=torch.int64) for p in self.network.populations}
        self.last_spike = self._zeros(dtype=torch.int64)
        self.charges: dict[str, list[Tensor]] = {r.name: [] for r in self.network.readouts}
        # What arrives at nodes where somebody has computed it before.
        self.known: dict[str, Tensor] = {}
        # Events of maps, and negative spikes, of every neuron `[*shape]`, if they are watched.
        self.watches = False
        self.moved: dict[str, Tensor] = {}
        self.mapped: dict[str, Tensor] = {}  # the maps' counts before the block, `[n, *shape]`
        self.falls: dict[str, Tensor] = {}

    def watch(self, events: bool) -> None:
        """Count the events of every neuron, or do not."""
        self.watches = events
        if events:
            for node in self.network.eventful:
                counted = self.falls if isinstance(node, Population) else self.moved
                zeros = torch.zeros(node.shape, dtype=torch.int64, device=self.device)
                counted[node.name] = zeros

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.images, *shape, dtype=dtype, device=self.device)

    def initial(self, node: Population) -> Tensor:
        """Return a population's state before the first step, `[N, ...]`."""
        dtype = course_dtype(*self.engine.limits[node.name])
        return laid_out((self.images, *node.shape), dtype, self.device).zero_()

    def final(self, node: Population) -> Tensor:
        """Return a population's counts `[n, ...]`."""
        return self.state[node.name]

    def run(self, counts: dict[str, Tensor]) -> Trace:
        """Simulate until the schedule ends, or nothing fires where it says so.

        The final counts are written into `counts`, `[N, ...]` per population.
        """
        schedule = self.schedule
        done = 0
        while done < schedule.longest and len(self.running):
            boundary = (done // schedule.timesteps + 1) * schedule.timesteps
            end = min(done + BLOCK_STEPS, boundary, schedule.longest)
            fired = self._block(range(done + 1, end + 1))
            done = end
            if schedule.drain is None and done >= schedule.steps_before_drain:
                self._retire(fired[-1] == 0, counts)
        self._retire(torch.ones_like(self.running, dtype=torch.bool), counts)
        steps = done
        if schedule.drain is None:
            steps = max(int(self.last_spike.max()), schedule.steps_before_drain)
        return Trace(
            schedule,
            steps,
            {name: torch.cat(charges)[:steps] for name, charges in self.charges.items()},
            {
                r.name: [schedule.bias_steps(t, r.depth) for t in range(1, steps + 1)]
                for r in self.network.readouts
            },
            counts,
            self.spikes,
            self.last_spike,
            self._events(counts) if self.watches else None,
        )

    def _events(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all events: spikes in both directions, of which the negative ones are known."""
        events = {name: total(counts[name]) + 2 * falls for name, falls in self.falls.items()}
        return events | self.moved

    def _retire(self, quiet: Tensor, counts: dict[str, Tensor]) -> None:
        """Take images out, `[n]`: nothing can happen to them any more."""
        if not bool(quiet.any()):
            return
        everything = bool(quiet.all()) and len(quiet) == self.images
        for p in self.network.populations:
            final = self.final(p)
            if everything:
                counts[p.name].copy_(final)
            else:
                counts[p.name][self.running[quiet]] = final[quiet].to(counts[p.name].dtype)
        self.keep(~quiet)

    def keep(self, still: Tensor) -> None:
        """Go on with some of the running images."""
        self.running, self.pixels = self.running[still], self.pixels[still]
        self.state = {name: state[still] for name, state in self.state.items()}
        self.mapped = {name: counts[still] for name, counts in self.mapped.items()}

    def image(self, node: Image) -> Any:
        """Return an image, as it is injected at every step."""
        return centered(node, self.pixels)

    def begin(self, steps: range) -> None:
        """Begin a block."""

    def end(self, fired: Tensor) -> None:
        """End a block; `fired`, `[steps, N]`, is how many neurons fired."""

    def _block(self, steps: range) -> Tensor:
        """Simulate a block of steps; return how many neurons fired, `[steps, N]`."""
        self.begin(steps)
        values: dict[str, Any] = {}
        size = len(steps), len(self.running)
        fired = torch.zeros(size, dtype=torch.int64, device=self.device)
        for position, node in enumerate(self.network.nodes):
            if isinstance(node, Readout):
                self._read(node, self.charge(node, values, steps), len(steps))
            elif isinstance(node, Image) or node.name not in self.engine.hidden:
                values[node.name] = self.value(node, values, steps, fired)
            for name in self.engine.last_use.get(position, ()):
                values.pop(name, None)
        self.end(fired)
        happened = torch.tensor(steps, device=self.device)[:, None] * (fired > 0)
        last = happened.amax(0)
        self.last_spike[self.running] = torch.maximum(self.last_spike[self.running], last)
        return fired

    def value(
        self,
        node: Image | Relay | Population | Island,
        values: dict[str, Any],
        steps: range,
        fired: Tensor,
    ) -> Any:
        """Return a node's counts after each of the steps, from those of the nodes it reads.

        `fired`, `[steps, N]`, is increased by how many of its neurons fire.
        """
        if isinstance(node, Image):
            return self.image(node)
        if isinstance(node, Relay):
            value = self.engine.map(node, self._held(node, values, steps))
            if node.name in self.moved:
                self._follow(node, value)
            return value
        if isinstance(node, Island):
            injected = self._injections(steps, node.depth)
            return self.engine.island(node, self._held(node, values, steps), injected)
        return self.scan(node, values, steps, fired)

    def _follow(self, node: Relay, value: Any) -> None:
        """Count the events of a map's counts."""
        counts = self.engine.counts(value)
        before = self.mapped.get(node.name, torch.zeros_like(counts[0]))[None]
        self.moved[node.name] += torch.cat([before, counts]).diff(dim=0).abs().sum((0, 1)).long()
        self.mapped[node.name] = counts[-1].clone()

    def _injections(self, steps: range, depth: int) -> Tensor:
        """Return B(t) for the block, `[steps]`, or `[1]` if it does not change."""
        injected = [self.schedule.bias_steps(t, depth) for t in steps]
        if len(set(injected)) == 1:
            injected = injected[:1]
        return torch.tensor(injected, dtype=torch.float32, device=self.device)

    def _held(self, node: Relay | Island, values: dict[str, Any], steps: range) -> list[Any]:
        """Return the inputs of a map or an island, images times the steps they have been held."""
        held = []
        for name in node.inputs:
            x = values[name]
            if name in self.engine.images:
                x = x * self._injections(steps, 0).view(-1, 1, 1, 1, 1)
            held.append(x)
        return held

    def charge(self, node: Population | Readout, values: dict[str, Any], steps: range) -> Tensor:
        """Return the accumulated charge, `[steps, N, C, ...]`, or one step if it is constant."""
        total = self.arrived(node, values, steps)
        injected = self._injections(steps, node.depth)
        return total + self.engine.charge(node).bias_charge(injected, total.ndim)

    def arrived(self, node: Population | Readout, values: dict[str, Any], steps: range) -> Tensor:
        """Return the accumulated charge without the bias, to write over."""
        if node.name in self.known:
            return self.known[node.name].to(self.engine.charge(node).dtype, copy=True)
        charge = self.engine.charge(node)
        total: Tensor | None = None
        for i, synapse in enumerate(node.branches):
            current = charge.current(i, self.engine.counts(values[synapse.source]))
            if synapse.source in self.engine.images:
                held = self._injections(steps, 0).to(current.dtype)
                current = current * held.view(-1, *[1] * (current.ndim - 1))
            if total is not None and total.shape == current.shape:
                total += current  # new memory costs more than the sum
            else:
                total = current if total is None else total + current
        assert total is not None
        return total

    def _read(self, node: Readout, charge: Tensor, steps: int) -> None:
        whole = charge.long().expand(steps, *charge.shape[1:])
        whole = whole.reshape(steps, len(self.running), *node.shape)
        past = self.charges[node.name]
        if len(self.running) < self.images:
            everyone = past[-1][-1:].repeat(steps, *[1] * (whole.ndim - 1))
            everyone[:, self.running] = whole
            whole = everyone
        past.append(whole)

    def scan(self, node: Population, values: dict[str, Any], steps: range, fired: Tensor) -> Any:
        """Fire through the block; return the counts, `[steps, N, ...]`, one step if none fires."""
        if node.name not in self.state:
            self.state[node.name] = self.initial(node)
        state = self.state[node.name]
        active = [self.schedule.fires(t, node.depth) for t in steps]
        if not any(active):
            return state[None].clone(memory_format=torch.preserve_format)
        if self.engine.charge(node).dtype == torch.int32:
            counts, here = self._fire_at_once(node, values, steps, active)
        else:
            counts, here = self._fire_by_step(node, values, steps, active)
        state.copy_(counts[-1])
        fired += here
        emitted = here.sum(0)
        net = per_image(state)
        past = self.spikes[node.name][self.running]
        total = past.sum(1) + emitted
        self.spikes[node.name][self.running] = torch.stack([total + net, total - net], 1) // 2
        return counts if bool(here.any()) else counts[:1]

    def _fire_by_step(
        self, node: Population, values: dict[str, Any], steps: range, active: list[bool]
    ) -> tuple[Tensor, Tensor]:
        """Return the counts after each step, and how many neurons fired, `[steps, N]`."""
        count = self.state[node.name]
        injected = self._injections(steps, node.depth)
        target = self.engine.settled(node, self.arrived(node, values, steps), injected)
        down = -1 if self.network.signed(node) else 0
        counts, spikes = (
            laid_out((len(steps), *count.shape), count.dtype, self.device) for _ in range(2)
        )
        for i, fires in enumerate(active):
            if fires:
                missing = torch.sub(target[i if len(target) > 1 else 0], count, out=spikes[i])
                torch.add(count, missing.clamp_(down, 1), out=counts[i])
                if down and self.watches:
                    self.falls[node.name] += total(missing < 0)
            else:
                spikes[i], counts[i] = 0, count
            count = counts[i]
        return counts, per_image(spikes.abs_().flatten(0, 1)).view(len(steps), -1)

    def last(self, node: Population, values: dict[str, Any], steps: range) -> Tensor:
        """Return the counts after the last of the first steps, `[N, ...]`, and keep no others."""
        arrived, dtype = self.known.get(node.name), self.engine.charge(node).dtype
        if arrived is None:
            arrived = self.arrived(node, values, steps)
        injected = self._injections(steps, node.depth)
        down = -1 if self.network.signed(node) else 0
        count = self.initial(node)
        for i, t in enumerate(steps):
            if self.schedule.fires(t, node.depth):
                charge, bias_steps = (
                    x[i : i + 1] if len(x) > 1 else x for x in (arrived, injected)
                )
                target = self.engine.settled(node, charge.to(dtype, copy=True), bias_steps)[0]
                count += target.sub_(count).clamp_(down, 1)
        return count

    def _fire_at_once(
        self, node: Population, values: dict[str, Any], steps: range, active: list[bool]
    ) -> tuple[Tensor, Tensor]:
        """Do the same with one kernel."""
        injected = [self.schedule.bias_steps(t, node.depth) for t in steps]
        timetable = torch.tensor([injected, active], dtype=torch.int32, device=self.device)
        signed = self.network.signed(node)
        counts, fired = gpu.scan(
            self.arrived(node, values, steps),
            timetable,
            self.engine.rows(node),
            self.state[node.name],
            self.engine.limits[node.name],
            signed,
        )
        if signed and self.watches:
            before = torch.cat([self.state[node.name][None], counts[:-1]])
            self.falls[node.name] += total((counts < before).flatten(0, 1))
        return counts, fired


def _join(parts: list[Trace], counts: dict[str, Tensor]) -> Trace:
    """Put chunks side by side, with the counts of all; one that ended early stays as it was."""
    if len(parts) == 1:
        return parts[0]
    steps = max(part.steps for part in parts)
    longest = max(parts, key=lambda part: part.steps)

    def prolonged(charge: Tensor) -> Tensor:
        missing = steps - len(charge)
        return torch.cat([charge, charge[-1:].expand(missing, *charge.shape[1:])])

    return Trace(
        longest.schedule,
        steps,
        {
            name: torch.cat([prolonged(part.charges[name]) for part in parts], 1)
            for name in longest.charges
        },
        longest.bias_steps,
        counts,
        {name: torch.cat([part.spikes[name] for part in parts]) for name in longest.spikes},
        torch.cat([part.last_spike for part in parts]),
        _sums([part.events for part in parts]),
    )


def _sums(parts: list[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Add what is there of every part."""
    sums: dict[str, Tensor] | None = None
    for part in parts:
        if part is not None:
            sums = part if sums is None else {name: sums[name] + part[name] for name in part}
    return sums
