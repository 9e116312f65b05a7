"""The reference engine: step by step, in int64, with the membrane of every neuron.

Slow and literal, it is the truth the other engines are held to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snnconv.analog import emitted
from snnconv.engine import counts
from snnconv.engine.trace import Trace, check_images, check_schedule
from snnconv.network import Image, Island, Population, Readout, SpikingNetwork
from snnconv.neuron import initial_membrane, step
from snnconv.ops import per_channel, sum_pool
from snnconv.plan import Relay
from snnconv.quant import apply_weight, relay
from snnconv.schedule import Schedule


class Engine(counts.Engine):
    """The reference engine, for images on any device; the end point is the counts engine's.

    It computes on the CPU: torch multiplies no matrices of int64 on GPUs.
    """

    name = "reference"

    def simulate(self, pixels: Tensor, schedule: Schedule, *, events: bool = False) -> Trace:
        """Simulate uint8 images `[N, C, H, W]` under a schedule."""
        check_schedule(self.network, self.timesteps, schedule)
        check_images(self.network, pixels)
        with torch.no_grad():
            simulation = _Simulation(self.network, pixels.cpu(), schedule, events)
            return simulation.run().to(pixels.device)


class _Simulation:
    """The state of every node: cumulative counts, membranes, and what has been injected."""

    def __init__(
        self, network: SpikingNetwork, pixels: Tensor, schedule: Schedule, events: bool
    ) -> None:
        self.network, self.schedule = network, schedule
        self.images = len(pixels)
        self.limits = network.count_limits(schedule.timesteps)
        self.pixels = pixels.long()
        self.counts: dict[str, Tensor] = {}
        self.previous: dict[str, Tensor] = {}
        self.membranes: dict[str, Tensor] = {}
        self.charges: dict[str, list[Tensor]] = {r.name: [] for r in network.readouts}
        self.injected = {n.name: 0 for n in network.nodes}
        self.spikes = {p.name: self._zeros(2) for p in network.populations}
        self.last_spike = self._zeros()
        watched = network.eventful if events else []
        self.events = {n.name: torch.zeros(n.shape, dtype=torch.int64) for n in watched}
        self.watches = events
        for p in network.populations:
            start = initial_membrane(p.threshold.long(), network.initial_membrane)
            shape = (self.images, *p.shape)
            self.membranes[p.name] = per_channel(start, len(shape)).expand(shape).clone()
            self.counts[p.name] = self._zeros(*p.shape)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.images, *shape, dtype=torch.int64)

    def run(self) -> Trace:
        schedule = self.schedule
        t = 0
        while t < schedule.longest:
            t += 1
            fired = self._step(t)
            if schedule.drain is None and t >= schedule.steps_before_drain and not fired:
                t = max(int(self.last_spike.max()), schedule.steps_before_drain)
                break
        return Trace(
            schedule,
            t,
            {name: torch.stack(charges[:t]) for name, charges in self.charges.items()},
            {
                r.name: [schedule.bias_steps(s, r.depth) for s in range(1, t + 1)]
                for r in self.network.readouts
            },
            {p.name: self.counts[p.name] for p in self.network.populations},
            self.spikes,
            self.last_spike,
            self.events if self.watches else None,
        )

    def _step(self, t: int) -> bool:
        """Advance by one step; return whether any neuron fired."""
        fired = False
        for node in self.network.nodes:
            if isinstance(node, Image):
                zero = torch.tensor(node.zero_point).view(-1, 1, 1)
                self.counts[node.name] = self.schedule.bias_steps(t, 0) * (self.pixels - zero)
            elif isinstance(node, Relay):
                inputs = [self.counts[i] for i in node.inputs]
                lowest = self.limits[node.inputs[0]][0]
                self.counts[node.name] = relay(node, inputs, lowest)
            elif isinstance(node, Island):
                steps = torch.tensor([self.schedule.bias_steps(t, node.depth)])
                inputs = [self.counts[name][None] for name in node.inputs]
                worths = [self.network.worths[name] for name in node.inputs]
                found = emitted(node.function, node.attributes, inputs, worths, steps, node.unit)
                self.counts[node.name] = found[0].long()
            elif isinstance(node, Readout):
                past = self.charges[node.name]
                charge = self._current(node, t).view(self.images, *node.shape)
                past.append(past[-1] + charge if past else charge)
            else:
                fired |= self._fire(node, t)
        for name, events in self.events.items():
            before = self.previous.get(name, 0)
            events += (self.counts[name] - before).abs().sum(0)
        self.previous = dict(self.counts)
        return fired

    def _current(self, node: Population | Readout, t: int) -> Tensor:
        """Return what arrives in this step: the spikes of the sources, and bias."""
        injected = self.schedule.bias_steps(t, node.depth)
        bias = node.bias.long() * (injected - self.injected[node.name])
        self.injected[node.name] = injected
        total: Tensor | None = None
        for synapse in node.branches:
            counts = self.counts[synapse.source]
            spikes = counts - self.previous.get(synapse.source, torch.zeros_like(counts))
            weight = synapse.weight.long()
            current = apply_weight(synapse.kind, synapse.attributes, weight, spikes)
            for pool in synapse.pools:
                current = sum_pool(current, pool)
            current = current << per_channel(synapse.shift.long(), current.ndim)
            total = current if total is None else total + current
        assert total is not None
        return total + per_channel(bias, total.ndim)

    def _fire(self, node: Population, t: int) -> bool:
        membrane = self.membranes[node.name] + self._current(node, t)
        if self.schedule.fires(t, node.depth):
            threshold = per_channel(node.threshold.long(), membrane.ndim)
            spikes, membrane, self.counts[node.name] = step(
                membrane,
                self.counts[node.name],
                threshold,
                self.schedule.timesteps,
                self.limits[node.name][0],
                self.network.signed(node),
            )
            per_image = spikes.flatten(1)
            self.spikes[node.name] += torch.stack(
                [(per_image > 0).sum(1), (per_image < 0).sum(1)], 1
            )
            self.last_spike[per_image.any(1)] = t
            self.membranes[node.name] = membrane
            return bool(per_image.any())
        self.membranes[node.name] = membrane
        return False
