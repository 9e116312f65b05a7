"""Layer-wise fine-tuning: repair what latency T leaves unsettled (docs/concepts.md, "Fine-tuning").

After T steps of the schedule `paper` charge is still on its way, so counts miss those of the
quantised ANN. Fast-SNN (arXiv 2305.19868) tunes one layer of neurons after the other, front to
back: its weights and bias learn to bring the spikes of the network, tuned as far as that layer,
to the activations the quantised ANN had before. Thresholds and scales stay, so what comes out is a
network of the same kind of integers. The first layer, whose input is constant, and the readouts
are left alone.

Where Fast-SNN takes SGD with a rate for all weights, here Adam moves the integers: folded weights
differ a thousandfold between layers and rows, and what counts is how far they are from the next
integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snnconv.engine import counts
from snnconv.engine.linear import exact_arithmetic
from snnconv.finetune.agreement import Agreement
from snnconv.finetune.course import CACHE_BYTES, SCHEDULE, Course, Courses
from snnconv.finetune.images import Images
from snnconv.finetune.master import Master, Means, learnt, moved, with_learnt
from snnconv.finetune.settings import FinetuneSettings, tunable
from snnconv.network import Population, SpikingNetwork
from snnconv.normalize import layer_bits
from snnconv.ops import per_channel
from snnconv.progress import Progress, silent


@dataclass(frozen=True)
class LayerResult:
    """A layer before and after it was tuned, on held-out images, and whether that was kept.

    The error is the squared distance between the values of its spikes at T and the activations
    they stand for, over the sum of the squares of those. The divergence is that of the network's
    probabilities at T from those of the quantised ANN before tuning, None if it is no classifier.
    """

    layer: str
    error_before: float
    error_after: float
    kl_before: float | None
    kl_after: float | None
    accepted: bool


class LayerwiseTuning:
    """The fine-tuning of one network, layer after layer."""

    def __init__(
        self,
        images: Images,
        settings: FinetuneSettings,
        taught: np.ndarray,
        held_out: np.ndarray,
        agreement: Agreement,
        *,
        memory: int = CACHE_BYTES,
        progress: Progress = silent,
    ) -> None:
        """Choose layers. `taught` and `held_out` are indices of the images that do either.

        Raises UsageError if no layer is left to be tuned.
        """
        network = images.network
        self.network, self.settings, self.seed = network, settings, images.seed
        self.agreement, self.progress = agreement, progress
        self.positions = tunable(network, settings.layers)
        self.bits = layer_bits(network, network.weight_bits)
        self.taught = taught
        engine = counts.Engine(network, network.timesteps, images.device)
        self.engine, self.means = engine, Means(network, images.device)
        # A batch is of all classes, though the data may be sorted by them.
        mixed = np.random.Generator(np.random.PCG64(self.seed)).permutation(taught)
        # Both share the memory as they share the images.
        share = len(held_out) / (len(taught) + len(held_out))
        self.learning, self.judging = (
            Courses(engine, images, indices, settings.batch_size, int(memory * part))
            for indices, part in ((mixed, 1 - share), (held_out, share))
        )
        self.nodes: list[Any] = list(network.nodes)
        self.done: list[LayerResult] = []

    @property
    def tuned(self) -> SpikingNetwork:
        """The network with the layers as they are now."""
        return replace(self.network, nodes=tuple(self.nodes), schedule=SCHEDULE, drain=None)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been tuned, to go on from."""
        return {
            "layers": [asdict(layer) for layer in self.done],
            "nodes": learnt(self.nodes, self.positions),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the layers a state has."""
        self.done = [LayerResult(**layer) for layer in state["layers"]]
        self.nodes = with_learnt(self.network.nodes, state["nodes"])

    def run(self) -> Iterator[LayerResult]:
        """Tune the layers that are left; yield what became of each."""
        for count in range(len(self.done), len(self.positions)):
            found = self._tune(self.positions[count], count)
            self.done.append(found)
            yield found
        self.learning.forget()
        self.judging.forget()

    def _tune(self, position: int, number: int) -> LayerResult:
        """Tune one layer; take the change back if it does harm on held-out images."""
        node = self.nodes[position]
        error_before, kl_before = self._judged(position, node)
        master = Master(
            moved(node, self.engine.device),
            self.means.values,
            self.bits[node.name],
            weights=not self.settings.bias_only,
        )
        self._learn(position, number, master)
        found = moved(master.integers(), "cpu")
        error_after, kl_after = self._judged(position, found)
        if kl_before is not None and kl_after is not None:
            accepted = kl_after <= kl_before
        else:
            accepted = error_after <= error_before
        if accepted:
            self.nodes[position] = found
        return LayerResult(node.path, error_before, error_after, kl_before, kl_after, accepted)

    def _learn(self, position: int, number: int, master: Master) -> None:
        batches = len(self.learning.parts)
        steps = self.settings.epochs_per_layer * batches
        trained = [p for p in master.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, self.settings.lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = np.random.Generator(np.random.PCG64([self.seed, position]))
        done = 0
        for _ in range(self.settings.epochs_per_layer):
            order = generator.permutation(batches).tolist()
            with exact_arithmetic(), torch.no_grad():
                for course in self.learning.at(self.nodes, position, order):
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        proxy = self._proxy(master, course)
                    distance = self._distance(course, master.integers())
                    proxy.backward(2 * distance / distance.numel())
                    optimizer.step()
                    falling.step()
                    done += 1
                    self.progress(
                        "fine-tune",
                        number * steps + done,
                        len(self.positions) * steps,
                        f"layer {number + 1}/{len(self.positions)}, {master.node.path}",
                    )

    def _proxy(self, master: Master, course: Course) -> Tensor:
        """Return what the quantised ANN makes of the mean spike values before a layer."""
        inputs = [
            self.means(synapse.source, course.values[synapse.source][-1])
            for synapse in master.node.branches
        ]
        return master.quantised(inputs, self.network.timesteps, self.network.rounding_offset)

    def _distance(self, course: Course, node: Population) -> Tensor:
        """Return the values of a layer's spikes at T less its targets, `[N, ...]`."""
        assert course.target is not None
        missed = course.fired(node)[-1].float() - course.target[0].float()
        return missed * self._step(node, missed.ndim)

    def _step(self, node: Population, ndim: int) -> Tensor:
        """Return what one spike adds to the mean."""
        clip = self.means.values[node.name].float()
        return per_channel(clip / self.network.timesteps, ndim)

    def _judged(self, position: int, node: Population) -> tuple[float, float | None]:
        """Return error and divergence on held-out images with a population in its place."""
        missed = wanted = 0.0
        with exact_arithmetic(), torch.no_grad():
            for course in self.judging.at(self.nodes, position):
                assert course.target is not None
                distance = self._distance(course, node)
                target = course.target[0].float() * self._step(node, distance.ndim)
                missed += float(distance.square().sum(dtype=torch.float64))
                wanted += float(target.square().sum(dtype=torch.float64))
        nodes = [*self.nodes]
        nodes[position] = node
        found = self.agreement(replace(self.network, nodes=tuple(nodes)))
        error = missed / max(wanted, torch.finfo(torch.float64).tiny)
        return error, None if found is None else found["kl"]
