"""The counts engine: layer after layer, all steps of a block at once.

Counts are the state (method.md, eq. 3), so the charge of every time step is a convolution of its
own, and one call computes a block of them. With `target(t)` the count a neuron would settle at
if nothing more arrived,

    target(t) = clip(floor((charge(t) + V0) / theta), low, T)
    S(t) = S(t-1) + clip(target(t) - S(t-1), -1, 1)

is the neuron of `snnconv.neuron`: its membrane is at least theta exactly when the target is above
S, and negative exactly when it is below. Memory holds one block of planes for the layers that are
still read, and one plane per population, whatever T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snnconv.engine.linear import Charge, exact_arithmetic, exact_dtype
from snnconv.engine.trace import Endpoint, Trace, check_size
from snnconv.network import Image, Population, Readout, SpikingNetwork, count_dtype
from snnconv.neuron import initial_membrane
from snnconv.ops import per_channel
from snnconv.plan import Relay
from snnconv.quant import last_uses, relay
from snnconv.schedule import Schedule

# Steps computed at once. Blocks end at multiples of T, where `wait` changes layers.
BLOCK_STEPS = 8
# Images at once: as many as keep one block of the largest layer within this many numbers.
BLOCK_NUMBERS = 2**22


def run(network: SpikingNetwork, pixels: Tensor, schedule: Schedule) -> Trace:
    """Simulate uint8 images `[N, C, H, W]` under a schedule."""
    prepared = _prepare(network, schedule.timesteps, pixels.device)
    size = _chunk(network, min(BLOCK_STEPS, schedule.timesteps))
    with exact_arithmetic():
        parts = [_Simulation(prepared, part, schedule).run() for part in pixels.split(size)]
    return _join(parts, schedule)


def endpoint(
    network: SpikingNetwork, pixels: Tensor, timesteps: int, *, maps: bool = False
) -> Endpoint:
    """Compute where every exact schedule ends, in one pass (method.md, section 4.5).

    `pixels` are uint8 `[N, C, H, W]`. With `maps` the counts of pooling, concatenation and the like
    are kept beside the neurons'. Raises UsageError for images of another size than the network's.
    """
    check_size(network, pixels)
    prepared = _prepare(network, timesteps, pixels.device)
    with exact_arithmetic():
        parts = [_end(prepared, x, timesteps, maps) for x in pixels.split(_chunk(network, 1))]
    first = parts[0]
    return Endpoint(
        timesteps,
        {name: torch.cat([p.counts[name] for p in parts]) for name in first.counts},
        {name: torch.cat([p.charges[name] for p in parts]) for name in first.charges},
    )


def _end(prepared: _Prepared, pixels: Tensor, timesteps: int, maps: bool) -> Endpoint:
    network = prepared.network
    values: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    charges: dict[str, Tensor] = {}
    for position, node in enumerate(network.nodes):
        if isinstance(node, Image):
            values[node.name] = timesteps * _centered(node, pixels)
        elif isinstance(node, Relay):
            values[node.name] = _relay(node, values, prepared.limits)
            if maps:
                counts[node.name] = values[node.name][0]
        else:
            charge = prepared.charges[node.name]
            total = sum(charge.current(i, values[b.source]) for i, b in enumerate(node.branches))
            assert isinstance(total, Tensor)
            total = total + charge.bias_charge(torch.tensor([timesteps]), total.ndim)
            if isinstance(node, Readout):
                charges[node.name] = total[0].long().view(len(pixels), *node.shape)
            else:
                low = prepared.limits[node.name][0]
                settled = _settled(node, total, network.initial_membrane, low, timesteps)
                counts[node.name] = settled[0].to(count_dtype(low, timesteps))
                values[node.name] = settled
        for name in prepared.last_use.get(position, ()):
            del values[name]
    return Endpoint(timesteps, counts, charges)


def _chunk(network: SpikingNetwork, steps: int) -> int:
    """Return how many images to run at once, for planes of so many steps."""
    largest = max(torch.Size(n.shape).numel() for n in network.nodes)
    return max(1, BLOCK_NUMBERS // (steps * largest))


@dataclass(frozen=True)
class _Prepared:
    network: SpikingNetwork
    limits: dict[str, tuple[int, int]]
    charges: dict[str, Charge]
    images: frozenset[str]
    last_use: dict[int, list[str]]


def _prepare(network: SpikingNetwork, timesteps: int, device: torch.device) -> _Prepared:
    limits = network.count_limits(timesteps)
    charges = {
        n.name: Charge(n, limits, timesteps, device)
        for n in network.nodes
        if isinstance(n, (Population, Readout))
    }
    images = frozenset(n.name for n in network.nodes if isinstance(n, Image))
    return _Prepared(network, limits, charges, images, last_uses(list(network.nodes)))


def _centered(node: Image, pixels: Tensor) -> Tensor:
    """Return pixels minus their zero point, float `[1, N, C, H, W]`."""
    zero = torch.tensor(node.zero_point, device=pixels.device).view(-1, 1, 1)
    return (pixels - zero.to(torch.int16)).float()[None]


def _settled(node: Population, charge: Tensor, initial: str, low: int, high: int) -> Tensor:
    """Return clip(floor((charge + V0)/theta), low, high) as float32, writing over `charge`.

    A correctly rounded quotient of integers has the right floor as long as they are exact in the
    type: v/theta is at least 1/theta below the next integer k, and k theta is about v.
    """
    threshold = per_channel(node.threshold.to(charge.device), charge.ndim - 1)
    charge += initial_membrane(threshold, initial)
    return charge.div_(threshold.to(charge.dtype)).floor_().clamp_(low, high).float()


def _relay(node: Relay, values: dict[str, Tensor], limits: dict[str, tuple[int, int]]) -> Tensor:
    """Apply a map that is exact on counts to `[steps, N, ...]`, steps being 1 where constant."""
    low, high = limits[node.name]
    dtype = exact_dtype(max(-low, high))
    inputs = [values[name] for name in node.inputs]
    steps = max(len(x) for x in inputs)
    flat = [x.to(dtype).expand(steps, *x.shape[1:]).flatten(0, 1) for x in inputs]
    return relay(node, flat, limits[node.inputs[0]][0]).unflatten(0, (steps, -1))


class _Simulation:
    """One chunk of images; images that have become quiet leave it between blocks."""

    def __init__(self, prepared: _Prepared, pixels: Tensor, schedule: Schedule) -> None:
        self.prepared, self.schedule = prepared, schedule
        self.network = prepared.network
        self.images, self.device = len(pixels), pixels.device
        self.pixels = pixels
        self.running = torch.arange(self.images, device=self.device)
        self.state = {p.name: self._zeros(*p.shape) for p in self.network.populations}
        self.counts: dict[str, Tensor] = {}
        for p in self.network.populations:
            dtype = count_dtype(*prepared.limits[p.name])
            self.counts[p.name] = self._zeros(*p.shape, dtype=dtype)
        self.spikes = {p.name: self._zeros(2, dtype=torch.int64) for p in self.network.populations}
        self.last_spike = self._zeros(dtype=torch.int64)
        self.charges: dict[str, list[Tensor]] = {r.name: [] for r in self.network.readouts}

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.images, *shape, dtype=dtype, device=self.device)

    def run(self) -> Trace:
        schedule = self.schedule
        done = 0
        while done < schedule.longest and len(self.running):
            boundary = (done // schedule.timesteps + 1) * schedule.timesteps
            end = min(done + BLOCK_STEPS, boundary, schedule.longest)
            fired = self._block(range(done + 1, end + 1))
            done = end
            if schedule.drain is None and done >= schedule.steps_before_drain:
                self._retire(fired[-1])
        self._retire(torch.zeros(len(self.running), device=self.device))
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
            self.counts,
            self.spikes,
            self.last_spike,
        )

    def _retire(self, fired: Tensor) -> None:
        """Take the images out that fired nothing in the last step; nothing can happen to them."""
        quiet = fired == 0
        for name, state in self.state.items():
            self.counts[name][self.running[quiet]] = state[quiet].to(self.counts[name].dtype)
        self.running = self.running[~quiet]
        self.pixels = self.pixels[~quiet]
        self.state = {name: state[~quiet] for name, state in self.state.items()}

    def _block(self, steps: range) -> Tensor:
        """Simulate a block of steps; return how many neurons fired, `[steps, N]`."""
        values: dict[str, Tensor] = {}
        fired = torch.zeros(len(steps), len(self.running), device=self.device)
        for position, node in enumerate(self.network.nodes):
            if isinstance(node, Image):
                values[node.name] = _centered(node, self.pixels)
            elif isinstance(node, Relay):
                values[node.name] = _relay(
                    node, self._held(node, values, steps), self.prepared.limits
                )
            elif isinstance(node, Readout):
                self._read(node, self._charge(node, values, steps), len(steps))
            else:
                values[node.name] = self._scan(node, values, steps, fired)
            for name in self.prepared.last_use.get(position, ()):
                del values[name]
        happened = torch.tensor(steps, device=self.device)[:, None] * (fired > 0)
        last = happened.amax(0)
        self.last_spike[self.running] = torch.maximum(self.last_spike[self.running], last)
        return fired

    def _injections(self, steps: range, depth: int) -> Tensor:
        """Return B(t) for the block, `[steps]`, or `[1]` if it does not change."""
        injected = [self.schedule.bias_steps(t, depth) for t in steps]
        if len(set(injected)) == 1:
            injected = injected[:1]
        return torch.tensor(injected, dtype=torch.float32, device=self.device)

    def _held(self, node: Relay, values: dict[str, Tensor], steps: range) -> dict[str, Tensor]:
        """Return a map's inputs as counts: images times the steps they have been held."""
        held = {}
        for name in node.inputs:
            x = values[name]
            if name in self.prepared.images:
                x = x * self._injections(steps, 0).view(-1, 1, 1, 1, 1)
            held[name] = x
        return held

    def _charge(
        self, node: Population | Readout, values: dict[str, Tensor], steps: range
    ) -> Tensor:
        """Return the accumulated charge, `[steps, N, C, ...]`, or one step if it is constant."""
        prepared = self.prepared.charges[node.name]
        total: Tensor | None = None
        for i, synapse in enumerate(node.branches):
            current = prepared.current(i, values[synapse.source])
            if synapse.source in self.prepared.images:
                held = self._injections(steps, 0).to(current.dtype)
                current = current * held.view(-1, *[1] * (current.ndim - 1))
            total = current if total is None else total + current
        assert total is not None
        return total + prepared.bias_charge(self._injections(steps, node.depth), total.ndim)

    def _read(self, node: Readout, charge: Tensor, steps: int) -> None:
        whole = charge.long().expand(steps, *charge.shape[1:])
        whole = whole.reshape(steps, len(self.running), *node.shape)
        past = self.charges[node.name]
        if len(self.running) < self.images:
            everyone = past[-1][-1:].repeat(steps, *[1] * (whole.ndim - 1))
            everyone[:, self.running] = whole
            whole = everyone
        past.append(whole)

    def _scan(
        self, node: Population, values: dict[str, Tensor], steps: range, fired: Tensor
    ) -> Tensor:
        """Fire through the block; return the counts, `[steps, N, ...]`, one step if none fires."""
        state = self.state[node.name]
        active = [self.schedule.fires(t, node.depth) for t in steps]
        if not any(active):
            return state[None].clone()
        target = self._charge(node, values, steps)
        low, high = self.prepared.limits[node.name]
        target = _settled(node, target, self.network.initial_membrane, low, high)
        down = -1 if self.network.signed(node) else 0
        counts = torch.empty(len(steps), *state.shape, device=self.device)
        here = torch.zeros_like(fired)
        for i, fires in enumerate(active):
            if fires:
                spikes = torch.sub(target[i if len(target) > 1 else 0], state).clamp_(down, 1)
                state += spikes
                here[i] = spikes.abs_().flatten(1).sum(1)
            counts[i] = state
        fired += here
        emitted = here.sum(0).long()
        net = state.flatten(1).sum(1, dtype=torch.float64).long()
        past = self.spikes[node.name][self.running]
        total = past.sum(1) + emitted
        self.spikes[node.name][self.running] = torch.stack([total + net, total - net], 1) // 2
        return counts if bool(here.any()) else counts[:1]


def _join(parts: list[Trace], schedule: Schedule) -> Trace:
    """Put chunks side by side; one that ended early stays as it was."""
    steps = max(part.steps for part in parts)
    longest = max(parts, key=lambda part: part.steps)

    def prolonged(charge: Tensor) -> Tensor:
        missing = steps - len(charge)
        return torch.cat([charge, charge[-1:].expand(missing, *charge.shape[1:])])

    return Trace(
        schedule,
        steps,
        {
            name: torch.cat([prolonged(part.charges[name]) for part in parts], 1)
            for name in longest.charges
        },
        longest.bias_steps,
        {name: torch.cat([part.counts[name] for part in parts]) for name in longest.counts},
        {name: torch.cat([part.spikes[name] for part in parts]) for name in longest.spikes},
        torch.cat([part.last_spike for part in parts]),
    )
