"""Layer-wise fine-tuning: repair what latency T leaves unsettled (method.md, section 6).

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

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnconv.data import ImageData, choose_indices
from snnconv.engine import counts, prepare
from snnconv.engine.linear import exact_arithmetic
from snnconv.errors import DataError, UsageError, require_types
from snnconv.network import Population, Readout, SpikingNetwork, Synapse
from snnconv.normalize import count_values, times_inputs
from snnconv.ops import average_pool, per_channel
from snnconv.progress import Progress, silent
from snnconv.quant import FakeQuantize, apply_weight

SCHEDULE = "paper"
# Counts of batches stay from layer to layer up to so many bytes, and are computed anew beyond.
CACHE_BYTES = 2**32
HELD_OUT_SHARE = 0.1
BOUNDS = {
    "epochs_per_layer": (1, 1000),
    "lr": (1e-6, 100),
    "batch_size": (1, 10**6),
    "images": (1, 10**9),
    "held_out": (1, 10**9),
}


@dataclass(frozen=True)
class FinetuneSettings:
    """How to tune: `epochs_per_layer` passes over `images` training images, by Adam.

    `lr` is the first rate, in integers a step; it falls to 0 along half a cosine in every layer.
    `layers` is a pattern of layers' paths, `bias_only` leaves weights as they are. `held_out`
    images, a tenth of all at most, decide whether what a layer has learnt is kept.
    """

    epochs_per_layer: int = 3
    lr: float = 0.05
    batch_size: int = 64
    bias_only: bool = False
    layers: str = "*"
    images: int = 10_000
    held_out: int = 2_000

    def __post_init__(self) -> None:
        """Refuse values of a wrong type and values that make no sense."""
        require_types("fine-tuning", self)
        for key, (low, high) in BOUNDS.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise UsageError(
                    f"fine-tuning: {key} must be from {low:g} to {high:g}, not {value:g}"
                )


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


class Course:
    """The counts of one batch on its way through a network that is tuned meanwhile.

    `values` are those after each step, `[T or 1, N, ...]`, `ends` what the network before tuning
    ends at, `[1, N, ...]`: both of the nodes that are still read. `target` is the end of the
    population the batch has come to.
    """

    def __init__(self, engine: counts.Engine, pixels: Tensor) -> None:
        """Begin at images uint8 `[N, C, H, W]`."""
        self.engine, self.pixels = engine, pixels
        self.values: dict[str, Tensor] = {}
        self.ends: dict[str, Tensor] = {}
        self.target: Tensor | None = None
        self.position = 0

    @property
    def bytes(self) -> int:
        """How much memory the batch takes."""
        tensors = [self.pixels, *self.values.values(), *self.ends.values()]
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
        self.position, self.target = position, self._end(originals[position])

    def _end(self, node: Any) -> Tensor:
        end: Tensor = self.engine.end_value(node, self.ends, self.pixels)
        return end

    def _simulation(self) -> counts.Simulation:
        schedule = self.engine.network.timetable(self.engine.timesteps, name=SCHEDULE)
        return self.engine.simulation(self.pixels, schedule)

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
        data: ImageData,
        indices: np.ndarray,
        batch: int,
        memory: int = CACHE_BYTES,
    ) -> None:
        """Divide the images at `indices` into batches."""
        self.engine, self.data, self.memory = engine, data, memory
        self.parts = [indices[k : k + batch] for k in range(0, len(indices), batch)]
        self.kept: dict[int, Course] = {}
        self.sizes: dict[int, int] = {}

    def at(
        self, nodes: Sequence[Any], position: int, order: Iterable[int] | None = None
    ) -> Iterator[Course]:
        """Yield the batches, in an order, at a population of the network tuned as far as that."""
        for number in range(len(self.parts)) if order is None else order:
            course = self.kept.get(number) or self._begin(number)
            if course is None:
                continue
            course.advance(nodes, position)
            self._keep(number, course)
            yield course

    def pixels(self) -> Iterator[Tensor]:
        """Yield the images of all batches."""
        for number in range(len(self.parts)):
            course = self.kept.get(number) or self._begin(number)
            if course is not None:
                yield course.pixels

    def _begin(self, number: int) -> Course | None:
        """Read a batch; None if none of its images can be read."""
        preprocessing = self.engine.network.preprocessing
        indices = self.parts[number]
        for pixels, _ in self.data.batches(
            preprocessing, indices, len(indices), asked=len(self.data)
        ):
            return Course(self.engine, pixels.to(self.engine.device))
        return None

    def _keep(self, number: int, course: Course) -> None:
        self.sizes.pop(number, None)
        self.kept.pop(number, None)
        if sum(self.sizes.values()) + course.bytes <= self.memory:
            self.sizes[number], self.kept[number] = course.bytes, course


class Master(nn.Module):
    """Weights and bias of one population as floats in place of its integers.

    A weight of 1 is worth `units`, a bias of 1 `unit`, in the values of the quantised ANN.
    Shortcuts are no parameters.
    """

    def __init__(
        self, node: Population, values: dict[str, Tensor], bits: int, bias_only: bool
    ) -> None:
        """Begin at the integers; `values` are what a count of each source is worth, `[C]`."""
        super().__init__()
        self.node, self.top = node, 2 ** (bits - 1) - 1
        unit = node.clip / node.threshold
        self.unit = unit.float()
        self.units: list[Tensor] = []
        self.weights = nn.ParameterList()
        for synapse in node.branches:
            rows = unit * torch.exp2(synapse.shift.double())
            rows = rows * math.prod(pool.lcm for pool in synapse.pools)
            worth = values[synapse.source]
            ones = torch.ones(synapse.weight.shape, dtype=worth.dtype, device=worth.device)
            units = times_inputs(synapse, ones, torch.where(worth > 0, 1 / worth, 0.0))
            self.units.append((units * rows.view(-1, *[1] * (units.ndim - 1))).float())
            learns = synapse.kind != "scale" and not bias_only
            self.weights.append(nn.Parameter(synapse.weight.float(), requires_grad=learns))
        self.bias = nn.Parameter(node.bias.float())

    def integers(self) -> Population:
        """Return the population with the rounded weights and bias."""
        branches = [
            replace(synapse, weight=self._whole(weight).to(synapse.weight.dtype))
            if weight.requires_grad
            else synapse
            for synapse, weight in zip(self.node.branches, self.weights, strict=True)
        ]
        bias = self.bias.detach().round().to(torch.int32)
        return replace(self.node, branches=tuple(branches), bias=bias)

    def _whole(self, weight: Tensor) -> Tensor:
        return weight.detach().round().clamp(-self.top, self.top)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Return the current that mean spike values bring; gradients pass the rounding straight."""
        bias = _straight(self.bias, self.bias.detach().round()) * self.unit
        total = per_channel(bias, inputs[0].ndim)
        for synapse, weight, units, x in zip(
            self.node.branches, self.weights, self.units, inputs, strict=True
        ):
            whole = _straight(weight, self._whole(weight)) if weight.requires_grad else weight
            current = apply_weight(synapse.kind, synapse.attributes, whole * units, x)
            for pool in synapse.pools:
                current = average_pool(current, pool)
            total = total + current
        return total


def divergence(logits: Tensor, wanted: Tensor) -> float:
    """Return the KL divergence of class probabilities from those of `wanted`, summed over images.

    Both are logits, float64 `[N, classes]`.
    """
    logs = logits.log_softmax(1), wanted.log_softmax(1)
    return float(F.kl_div(*logs, log_target=True, reduction="sum"))


def _straight(parameter: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded values with the gradient of the parameter."""
    return parameter + (rounded - parameter).detach()


class LayerwiseTuning:
    """The fine-tuning of one network, layer after layer."""

    def __init__(
        self,
        network: SpikingNetwork,
        data: ImageData,
        settings: FinetuneSettings,
        *,
        seed: int = 0,
        device: str = "cpu",
        memory: int = CACHE_BYTES,
        progress: Progress = silent,
    ) -> None:
        """Choose images and layers.

        `data` is a training split. Raises DataError for too few images, UsageError if no layer is
        left to be tuned.
        """
        self.network, self.settings, self.seed = network, settings, seed
        self.progress = progress
        self.positions = _tunable(network, settings.layers)
        taught, held_out = divide(network, len(data), settings, seed)
        if not len(held_out):
            raise DataError(f"{data.name}: {len(data)} training images are too few to tune on")
        self.taught, self.held_out = taught, held_out
        engine = counts.Engine(network, network.timesteps, device)
        self.engine = engine
        batch = settings.batch_size
        # Both share the memory as they share the images.
        share = len(held_out) / (len(taught) + len(held_out))
        self.learning = Courses(engine, data, taught, batch, int(memory * (1 - share)))
        self.judging = Courses(engine, data, held_out, batch, int(memory * share))
        self.nodes: list[Any] = list(network.nodes)
        self.done: list[LayerResult] = []
        self.wanted: list[tuple[Tensor, Tensor]] | None = None
        self.values = {
            name: value.to(device)
            for name, (value, _) in count_values(network.nodes, network.preprocessing).items()
        }

    def resume(self, tuned: SpikingNetwork, done: list[LayerResult]) -> None:
        """Go on after the layers that are `done`, with what they have become."""
        self.nodes, self.done = list(tuned.nodes), list(done)

    @property
    def tuned(self) -> SpikingNetwork:
        """The network with the layers as they are now."""
        return replace(self.network, nodes=tuple(self.nodes), schedule=SCHEDULE, drain=None)

    def run(self) -> Iterator[LayerResult]:
        """Tune the layers that are left; yield what became of each."""
        for count in range(len(self.done), len(self.positions)):
            found = self._tune(self.positions[count], count)
            self.done.append(found)
            yield found

    def _tune(self, position: int, number: int) -> LayerResult:
        """Tune one layer; take the change back if it does harm on held-out images."""
        node = self.nodes[position]
        error_before, kl_before = self._judged(position, node)
        bits, bias_only = self.network.weight_bits, self.settings.bias_only
        master = Master(_moved(node, self.engine.device), self.values, bits, bias_only)
        self._learn(position, number, master)
        found = _moved(master.integers(), "cpu")
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
        inputs = []
        for synapse in master.node.branches:
            counted = course.values[synapse.source][-1].float()
            if synapse.source not in self.engine.images:  # an image's are of one step
                counted = counted / self.network.timesteps
            worth = self.values[synapse.source].float()
            inputs.append(counted * per_channel(worth, counted.ndim))
        clip = master.node.clip.float()
        offset = self.network.rounding_offset
        result: Tensor = FakeQuantize.apply(
            master(inputs), clip, self.network.timesteps, master.node.two_sided, offset
        )
        return result

    def _distance(self, course: Course, node: Population) -> Tensor:
        """Return the values of a layer's spikes at T less its targets, `[N, ...]`."""
        assert course.target is not None
        missed = course.fired(node)[-1].float() - course.target[0].float()
        return missed * self._step(node, missed.ndim)

    def _step(self, node: Population, ndim: int) -> Tensor:
        """Return what one spike adds to the mean."""
        clip = self.values[node.name].float()
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

    def agreement(self, network: SpikingNetwork) -> dict[str, float] | None:
        """Compare a network at T with the quantised ANN before tuning, on the held-out images.

        Returns the mean KL divergence of its probabilities and the share of equal arg-maxes; None
        if the network is no classifier.
        """
        readout = network.logits
        if readout is None:
            return None
        timesteps, device = network.timesteps, self.engine.device.type
        if self.wanted is None:
            before = prepare(self.network, timesteps, device=device)
            self.wanted = [
                (pixels, before.endpoint(pixels).logits(self.network, readout.name).flatten(1))
                for pixels in self.judging.pixels()
            ]
        runner = prepare(network, timesteps, device=device)
        schedule = network.timetable(name=SCHEDULE)
        total, same, images = 0.0, 0, 0
        for pixels, wanted in self.wanted:
            found = runner.simulate(pixels, schedule).logits(network, readout.name)[-1].flatten(1)
            total += divergence(found, wanted)
            same += int((found.argmax(1) == wanted.argmax(1)).sum())
            images += len(found)
        return {"kl": total / images, "argmax_percent": 100 * same / images}

    def described(self) -> dict[str, Any]:
        """Return settings and results as plain JSON values, for the provenance."""
        return {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "images": len(self.taught),
            "held_out_images": len(self.held_out),
            "layers": [asdict(layer) for layer in self.done],
        }


def finetune_layerwise(
    network: SpikingNetwork,
    data: ImageData,
    settings: FinetuneSettings | None = None,
    **options: Any,
) -> tuple[SpikingNetwork, list[LayerResult]]:
    """Tune a network for the end of its T steps, one layer after the other.

    `data` is a training split; `options` are those of `LayerwiseTuning`. Returns the tuned network,
    which runs under `paper`, and what became of each layer.
    """
    tuning = LayerwiseTuning(network, data, settings or FinetuneSettings(), **options)
    results = list(tuning.run())
    tuned = tuning.tuned
    told = {**tuned.provenance, "finetuning": tuning.described()}
    return replace(tuned, provenance=told), results


def divide(
    network: SpikingNetwork, total: int, settings: FinetuneSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the images that teach and those that decide, as sorted indices.

    Both come from where the network's own making had them: what was held out of its retraining
    teaches nothing here either.
    """
    retraining = network.provenance.get("retraining") or {}
    count = min(settings.held_out, int(total * HELD_OUT_SHARE))
    apart = max(count, min(int(retraining.get("held_out_images", 0)), total // 2))
    drawn = int(retraining.get("seed", seed))
    held_out = choose_indices(total, count, drawn, others=True) if count else np.arange(0)
    others = choose_indices(total, apart, drawn, others=True) if apart else np.arange(0)
    pool = np.setdiff1d(np.arange(total), others)
    return pool[choose_indices(len(pool), settings.images, seed)], held_out


def _tunable(network: SpikingNetwork, pattern: str) -> list[int]:
    """Return the positions of the populations that can be tuned and whose path fits a pattern."""
    able = {
        position: node
        for position, node in enumerate(network.nodes)
        if isinstance(node, Population)
        and node.depth > 0
        and any(synapse.kind != "scale" for synapse in node.branches)
    }
    found = [k for k, node in able.items() if fnmatch.fnmatchcase(node.path, pattern)]
    if not found:
        known = ", ".join(node.path for node in able.values()) or "none"
        raise UsageError(
            f"no layer to tune fits {pattern!r}; there are {known} (the first layer and the "
            "readout have nothing to mend)"
        )
    return found


def _moved(node: Population, device: torch.device | str) -> Population:
    """Return a population with its tensors on a device."""

    def synapse(s: Synapse) -> Synapse:
        return replace(s, weight=s.weight.to(device), shift=s.shift.to(device))

    return replace(
        node,
        branches=tuple(synapse(s) for s in node.branches),
        **{
            name: getattr(node, name).to(device)
            for name in ("threshold", "bias", "row_unit", "clip")
        },
    )
