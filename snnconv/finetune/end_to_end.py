"""Fine-tuning of all layers together, by what the network says at T.

Layer-wise fine-tuning mends every layer by itself, and what does not reach the outputs counts as
much as what does. Here all layers, the readout as well, learn at once from the divergence of the
probabilities at T from those of the quantised ANN. The spiking network runs forward; backward the
gradient is that of the quantised layers at the mean spike values, as in layer-wise fine-tuning
(tandem learning: Wu et al., arXiv 1907.01167).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnconv.analog import compute
from snnconv.engine import counts, prepare
from snnconv.engine.linear import exact_arithmetic
from snnconv.errors import UsageError
from snnconv.finetune.agreement import Agreement
from snnconv.finetune.course import SCHEDULE, divided
from snnconv.finetune.images import Images
from snnconv.finetune.master import Master, Means, learnt, moved, with_learnt
from snnconv.finetune.settings import FinetuneSettings, tunable
from snnconv.network import Image, Island, Population, Readout, SpikingNetwork
from snnconv.normalize import layer_bits
from snnconv.plan import Relay
from snnconv.progress import Progress, silent
from snnconv.quant import relay


@dataclass(frozen=True)
class EpochResult:
    """An epoch of all layers together: the mean loss, and the agreement on held-out images."""

    epoch: int
    loss: float | None
    kl: float
    argmax_percent: float


class EndToEndTuning:
    """The fine-tuning of all layers of one network."""

    def __init__(
        self,
        images: Images,
        settings: FinetuneSettings,
        taught: np.ndarray,
        agreement: Agreement,
        *,
        progress: Progress = silent,
    ) -> None:
        """Choose layers. `taught` are indices of the images to learn from.

        The quantised ANN of the images' network teaches. Raises UsageError if it is no classifier.
        """
        network = images.network
        if network.logits is None:
            raise UsageError(
                "all layers together learn from class probabilities, and the network is no "
                "classifier; tune it layer by layer"
            )
        self.network, self.images, self.settings, self.taught = network, images, settings, taught
        self.agreement, self.progress = agreement, progress
        self.readout = network.logits
        self.positions = tunable(network, settings.layers, also=self.readout)
        self.engine = counts.Engine(network, network.timesteps, images.device)
        self.teacher = prepare(network, network.timesteps, device=self.engine.device.type)
        self.means = Means(network, images.device)
        self.steps = len(divided(taught, settings.batch_size))
        self.done: list[EpochResult] = []
        self.begin(network)

    def begin(self, network: SpikingNetwork) -> None:
        """Begin at another network, one that has been tuned already."""
        self.nodes: list[Any] = list(network.nodes)
        self.masters = nn.ModuleDict()
        bits = layer_bits(network, network.weight_bits)
        for position, node in enumerate(network.nodes):
            if isinstance(node, Population | Readout):
                learns = position in self.positions
                self.masters[str(position)] = Master(
                    moved(node, self.engine.device),
                    self.means.values,
                    bits[node.name],
                    weights=learns and not self.settings.bias_only,
                    bias=learns,
                )
        trained = [p for p in self.masters.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, self.settings.lr)

    @property
    def tuned(self) -> SpikingNetwork:
        """The network of the epoch with the least divergence."""
        return replace(self.network, nodes=tuple(self.nodes), schedule=SCHEDULE, drain=None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to go on after the last epoch."""
        return {
            "epochs": [asdict(epoch) for epoch in self.done],
            "best": learnt(self.nodes, self.positions),
            "masters": self.masters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the epochs a state has."""
        self.done = [EpochResult(**epoch) for epoch in state["epochs"]]
        self.nodes = with_learnt(self.network.nodes, state["best"])
        self.masters.load_state_dict(state["masters"])
        self.optimizer.load_state_dict(state["optimizer"])

    def run(self) -> Iterator[EpochResult]:
        """Tune through the epochs that are left; yield each, the state before them first."""
        for epoch in range(len(self.done), self.settings.epochs + 1):
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ):
                loss = self._epoch(epoch) if epoch else None
            nodes = self._integers()
            found = self.agreement(replace(self.network, nodes=tuple(nodes)))
            assert found is not None
            if all(found["kl"] < past.kl for past in self.done):
                self.nodes = nodes
            self.done.append(EpochResult(epoch, loss, found["kl"], found["argmax_percent"]))
            yield self.done[-1]

    def _integers(self) -> list[Any]:
        nodes = list(self.nodes)
        for position in self.positions:
            nodes[position] = moved(self._master(position).integers(), "cpu")
        return nodes

    def _master(self, position: int) -> Any:
        return self.masters[str(position)]

    def _epoch(self, epoch: int) -> float:
        """Learn from every image once, augmented; return the mean loss."""
        generator = np.random.Generator(np.random.PCG64([self.images.seed, epoch]))
        parts = divided(generator.permutation(self.taught), self.settings.batch_size)
        total, every = 0.0, self.settings.epochs * self.steps
        for step, pixels in enumerate(self.images.batches(parts, epoch)):
            done = (epoch - 1) * self.steps + step
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * (1 + math.cos(math.pi * done / every)) / 2
            if len(pixels):
                total += self._step(pixels)
            self.progress(
                "fine-tune",
                done + 1,
                every,
                f"epoch {epoch}/{self.settings.epochs}, KL {total / (step + 1):.4f}",
            )
        return total / self.steps

    def _step(self, pixels: Tensor) -> float:
        end = self.teacher.endpoint(pixels)
        wanted = end.logits(self.network, self.readout.name).flatten(1).float()
        logits = self.logits(pixels)
        loss = F.kl_div(
            logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def logits(self, pixels: Tensor) -> Tensor:
        """Return what the spiking network says at T, `[N, classes]`, with its gradients."""
        engine, timesteps = self.engine, self.network.timesteps
        simulation = engine.simulation(pixels, self.network.timetable(name=SCHEDULE, drain=None))
        steps = range(1, timesteps + 1)
        fired = torch.zeros(timesteps, len(pixels), dtype=torch.int64, device=pixels.device)
        counted: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        for position, node in enumerate(self.network.nodes):
            if isinstance(node, Readout) and node.name != self.readout.name:
                continue
            layer = self._master(position).integers() if position in self.positions else node
            with exact_arithmetic(), torch.no_grad():
                if isinstance(layer, Readout):
                    charge = simulation.charge(layer, counted, steps)[-1]
                    found = charge.float() * (layer.unit / timesteps)
                else:
                    counted[node.name] = simulation.value(layer, counted, steps, fired)
                    found = self.means(node.name, counted[node.name][-1])
            if not isinstance(node, Image):
                # In the forward pass what fired, in the backward pass what the quantised ANN does.
                proxy = self._proxy(position, node, means)
                found = proxy + (found - proxy).detach() if proxy.requires_grad else found
            if isinstance(node, Readout):
                return found.flatten(1)
            means[node.name] = found
            for name in engine.last_use.get(position, ()):
                counted.pop(name, None)
                means.pop(name, None)
        raise AssertionError("the network has no readout")

    def _proxy(self, position: int, node: Any, means: dict[str, Tensor]) -> Tensor:
        if isinstance(node, Relay):
            return relay(node, [means[name] for name in node.inputs], averaged=True)
        if isinstance(node, Island):
            return compute(node.function, node.attributes, [means[name] for name in node.inputs])
        inputs = [means[synapse.source] for synapse in node.branches]
        proxy: Tensor = self._master(position).quantised(
            inputs, self.network.timesteps, self.network.rounding_offset
        )
        return proxy
