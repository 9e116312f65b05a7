"""Batches of images on their way through a network that is tuned meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snnconv.engine import counts
from snnconv.finetune.images import Images
from snnconv.network import Readout

SCHEDULE = "paper"
# Counts of batches stay from layer to layer up to so many bytes, and are computed anew beyond.
CACHE_BYTES = 2**32


class Course:
    """The counts of one batch on its way through a network that is tuned meanwhile.

    `values` are those after each step, `[T or 1, N, ...]`, `ends` what the network before tuning
    ends at, `[1, N, ...]`: both of the nodes that are still read. `target` is the end of the
    population the batch has come to. `arrived` is the charge without the bias that arrives there
    in each step, once it has been remembered.
    """

    def __init__(self, engine: counts.Engine, pixels: Tensor) -> None:
        """Begin at images uint8 `[N, C, H, W]`."""
        self.engine, self.pixels = engine, pixels
        self.values: dict[str, Tensor] = {}
        self.ends: dict[str, Tensor] = {}
        self.target: Tensor | None = None
        self.arrived: dict[str, Tensor] = {}
        self.position = 0

    @property
    def bytes(self) -> int:
        """How much memory the batch takes."""
        tensors = [self.pixels, *self.values.values(), *self.ends.values()]
        tensors += [] if self.target is None else [self.target]
        return sum(t.numel() * t.element_size() for t in tensors)

    def advance(self, nodes: Sequence[Any], position: int) -> None:
        """Go on to a population; `nodes` are those of the network tuned as far as that."""
        if position == self.position:
            return
        originals, simulation = self.engine.network.nodes, self._simulation()
        for at in range(self.position, position):
            node = nodes[at]
            if not isinstance(node, Readout):
                end = self.target if at == self.position else None
                self.ends[node.name] = self._end(originals[at]) if end is None else end
                self.values[node.name] = self.fired(node, simulation)
            for name in self.engine.last_use.get(at, ()):
                self.values.pop(name, None)
                self.ends.pop(name, None)
            self.arrived.clear()
        self.position, self.target = position, self._end(originals[position])

    def remember(self, node: Any, memory: int) -> int:
        """Compute what arrives at the population come to, if it takes no more than some bytes.

        It serves whatever bias the population has. Returns the bytes taken.
        """
        steps = range(1, self.engine.timesteps + 1)
        size = len(steps) * len(self.pixels) * math.prod(node.shape)
        if size * self.engine.charge(node).dtype.itemsize > memory:
            return 0
        arrived = self._simulation().arrived(node, self.values, steps)
        self.arrived = {node.name: arrived}
        return arrived.numel() * arrived.element_size()

    def _end(self, node: Any) -> Tensor:
        end: Tensor = self.engine.end_value(node, self.ends, self.pixels)
        return end

    def _simulation(self) -> counts.Simulation:
        schedule = self.engine.network.timetable(self.engine.timesteps, name=SCHEDULE)
        simulation = self.engine.simulation(self.pixels, schedule)
        simulation.known = self.arrived
        return simulation

    def last(self, node: Any) -> Tensor:
        """Return the counts after T steps of a population that reads what is here, `[N, ...]`."""
        simulation = self._simulation()
        return simulation.last(node, self.values, range(1, self.engine.timesteps + 1))

    def fired(self, node: Any, simulation: counts.Simulation | None = None) -> Tensor:
        """Return the counts of a node that reads what is here, `[T or 1, N, ...]`."""
        steps = range(1, self.engine.timesteps + 1)
        fired = torch.zeros(len(steps), len(self.pixels), dtype=torch.int64)
        simulation = simulation or self._simulation()
        value: Tensor = simulation.value(node, self.values, steps, fired.to(self.pixels.device))
        return value


class Courses:
    """Batches of images; as many as fit into the memory stay where they have come to."""

    def __init__(
        self,
        engine: counts.Engine,
        images: Images,
        indices: np.ndarray,
        batch: int,
        memory: int = CACHE_BYTES,
    ) -> None:
        """Divide the images at `indices` into batches."""
        self.engine, self.images, self.memory = engine, images, memory
        self.parts = divided(indices, batch)
        self.kept: dict[int, Course] = {}
        self.sizes: dict[int, int] = {}

    def at(
        self, nodes: Sequence[Any], position: int, order: Iterable[int] | None = None
    ) -> Iterator[Course]:
        """Yield the batches, in an order, at a population of the network tuned as far as that."""
        for number in range(len(self.parts)) if order is None else order:
            course = self.kept.get(number)
            if course is None:
                (pixels,) = self.images.batches([self.parts[number]])
                if not len(pixels):
                    continue
                course = Course(self.engine, pixels)
            course.advance(nodes, position)
            self._keep(number, course)
            yield course

    def forget(self) -> None:
        """Free the memory."""
        self.kept.clear()
        self.sizes.clear()

    def _keep(self, number: int, course: Course) -> None:
        self.sizes.pop(number, None)
        self.kept.pop(number, None)
        if sum(self.sizes.values()) + course.bytes <= self.memory:
            self.sizes[number], self.kept[number] = course.bytes, course


def divided(indices: np.ndarray, batch: int) -> list[np.ndarray]:
    """Divide indices into batches."""
    return [indices[k : k + batch] for k in range(0, len(indices), batch)]
