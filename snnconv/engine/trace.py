"""What a simulation yields, the same from every engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from snnconv.errors import UsageError
from snnconv.network import SpikingNetwork
from snnconv.neuron import initial_membrane, step
from snnconv.schedule import Schedule


@dataclass(frozen=True)
class Trace:
    """The course of one batch of N images over `steps` time steps; all tensors are integers.

    `charges` hold per readout the accumulated charge after each step, `[steps, N, ...]`, and
    `bias_steps` how many times its bias was in it. `counts` are the final counts per population,
    `[N, ...]`, of the engine's type (uint8 wraps around in differences); `spikes` the number of
    positive and negative spikes per population and image, `[N, 2]`. `last_spike` is the step of
    each image's last spike, 0 if there was none, `[N]`. `events`, if asked for, are per node of
    `SpikingNetwork.eventful` how often each of its counts has moved up or down by one, in all
    images together, int64 `[*shape]`.

    An image that is quiet is not affected by others of its batch that are not: its charges
    simply stay as they are.
    """

    schedule: Schedule
    steps: int
    charges: dict[str, Tensor]
    bias_steps: dict[str, list[int]]
    counts: dict[str, Tensor]
    spikes: dict[str, Tensor]
    last_spike: Tensor
    events: dict[str, Tensor] | None = None

    @property
    def drain_steps(self) -> Tensor:
        """Return per image the steps between the last bias and the last spike, `[N]`."""
        return (self.last_spike - self.schedule.steps_before_drain).clamp_min(0)

    def to(self, device: torch.device | str) -> Trace:
        """Return the trace with its tensors on a device."""
        moved: dict[str, Any] = {
            what: {name: value.to(device) for name, value in getattr(self, what).items()}
            for what in ("charges", "counts", "spikes", "events")
            if getattr(self, what) is not None
        }
        return replace(self, last_spike=self.last_spike.to(device), **moved)

    def logits(self, network: SpikingNetwork, name: str) -> Tensor:
        """Return a readout after every step, float64 `[steps, N, ...]`.

        Not-a-number before the readout's first active step.
        """
        readout = network.readout(name)
        injected = torch.tensor(self.bias_steps[name], dtype=torch.float64)
        divisor = torch.where(injected > 0, injected, torch.nan)
        charge = self.charges[name].double()
        return readout.unit * charge / divisor.view(-1, *[1] * (charge.ndim - 1)).to(charge.device)

    def readout_counts(self, network: SpikingNetwork, name: str) -> tuple[Tensor, Tensor] | None:
        """Return spike counts and membranes of neurons in place of a readout, after every step.

        Both are int64 `[steps, N, ...]`. Spiking ResNet (arXiv 1805.01352) decides by the counts;
        where they are equal, the membranes tell. None if the readout has no threshold, and under
        other schedules than `paper`: these neurons would settle long after the others.
        """
        readout = network.readout(name)
        if readout.threshold is None or self.schedule.name != "paper":
            return None
        charges = self.charges[name]
        threshold = torch.tensor(readout.threshold, device=charges.device)
        start = initial_membrane(threshold, network.initial_membrane)
        fired = torch.zeros_like(charges[0])
        counts, membranes = torch.empty_like(charges), torch.empty_like(charges)
        for at, charge in enumerate(charges):
            membrane = charge + start - threshold * fired
            _, membranes[at], fired = step(
                membrane, fired, threshold, self.schedule.timesteps, 0, network.neuron == "signed"
            )
            counts[at] = fired
        return counts, membranes


@dataclass(frozen=True)
class Endpoint:
    """Where every exact schedule ends: final counts and readout charges, integers `[N, ...]`.

    Their types are the engine's: counts may be uint8, of which differences wrap around.
    """

    timesteps: int
    counts: dict[str, Tensor]
    charges: dict[str, Tensor]

    def logits(self, network: SpikingNetwork, name: str) -> Tensor:
        """Return a readout, float64 `[N, ...]`."""
        readout = network.readout(name)
        return readout.unit * self.charges[name].double() / self.timesteps


def check_schedule(network: SpikingNetwork, timesteps: int, schedule: Schedule) -> None:
    """Raise UsageError unless a schedule is one of this T for the network."""
    if (schedule.timesteps, schedule.depth) != (timesteps, network.depth):
        raise UsageError(
            f"the schedule is for T = {schedule.timesteps} and depth {schedule.depth}, the engine "
            f"for T = {timesteps} and the network of depth {network.depth}"
        )


def check_images(network: SpikingNetwork, pixels: Tensor) -> None:
    """Raise UsageError unless pixels are one image or more of the kind the network takes."""
    network.preprocessing.check(pixels)
    if not len(pixels):
        raise UsageError("an engine takes at least one image")
