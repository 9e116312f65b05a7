"""Say where a spiking network loses what its ANN knew: how much, by which cause, in which layer.

A chain of networks leads from the ANN to the spiking network, each with one cause of error more
than the one before: activations are clipped, rounded to T levels, weights and thresholds become
integers, and spikes take their time. The errors of a layer along the chain are sums of squares
against the ANN's activations, so the differences between neighbours add up to the whole. Where
other weights than the ANN's were learnt, they are the first link: as the integers they were learnt
as, and with the clips they were learnt with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from snnconv.divergence import divergence
from snnconv.engine import Engine
from snnconv.errors import UsageError
from snnconv.network import SpikingNetwork
from snnconv.normalize import network_qann
from snnconv.ops import per_channel
from snnconv.pipeline import float_qann
from snnconv.progress import Progress, silent
from snnconv.quant import Activation, Layer, Qann, activate
from snnconv.schedule import Schedule

CLIPPING, LEVELS, TIME = "clipping", "levels", "time"
INTEGERS, OTHER_WEIGHTS = "integers", "new weights and clips"
# Images at once, and at most; fewer of networks with more neurons. Layers are restored on a part.
BATCH, MOST_IMAGES, MOST_RESTORED = 16, 256, 64
MOST_NEURONS = 2**27
# Of all images at once: every stage keeps their activations, 40 bytes for each in sum.
NEURONS_AT_ONCE = 2**25
# A loss nobody need mend: the divergence of the outputs, in nats.
NEGLIGIBLE = 1e-3
# A sequential error nobody need mend.
SETTLED = 1e-9

Found = tuple[dict[str, Tensor], Tensor]


@dataclass
class _Sums:
    """Squared errors per stage and layer, squares of the reference, and what outputs say."""

    errors: dict[str, dict[str, float]]
    squares: dict[str, float]
    divergence: dict[str, float]
    agreeing: dict[str, int]

    def add(self, stage: str, found: Found, reference: Found) -> None:
        """Add a batch: activations per layer `[N, ...]` and logits `[N, classes]`."""
        errors = self.errors.setdefault(stage, {})
        for name, wanted in reference[0].items():
            off = float((found[0][name] - wanted).double().square().sum())
            errors[name] = errors.get(name, 0.0) + off
        lost = divergence(found[1], reference[1])
        self.divergence[stage] = self.divergence.get(stage, 0.0) + lost
        same = int((found[1].argmax(1) == reference[1].argmax(1)).sum())
        self.agreeing[stage] = self.agreeing.get(stage, 0) + same


def images_wanted(network: SpikingNetwork) -> int:
    """Return how many images a diagnosis looks at, as far as there are so many."""
    return max(BATCH, min(MOST_IMAGES, MOST_NEURONS // max(network.neurons, 1)))


def images_at_once(network: SpikingNetwork) -> int:
    """Return on how many images all stages are held in memory."""
    return max(1, min(BATCH, NEURONS_AT_ONCE // max(network.neurons, 1)))


def diagnose(
    network: SpikingNetwork,
    runner: Engine,
    pixels: Tensor,
    schedule: Schedule,
    ann: nn.Module | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return the errors of every layer by cause, what the outputs lose, and what to mend first.

    `pixels` are uint8 `[N, C, H, W]`, `runner` an engine for the network at the schedule's T. `ann`
    is the model the network was made from; without it, or where activations were replaced in it,
    errors are against the quantised ANN, and time is their only cause. Raises UsageError if `ann`
    is of another architecture, there are no images, or the network has several outputs.
    """
    if not len(pixels):
        raise UsageError("a diagnosis takes at least one image")
    if len(network.readouts) != 1:
        names = ", ".join(r.name for r in network.readouts)
        raise UsageError(f"a diagnosis is of one output, the network has {names}")
    if network.provenance.get("replaced_activations"):
        ann = None
    chain = _Chain(network, runner, schedule, ann, pixels.device)
    sums, alone = (_Sums({}, {}, {}, {}) for _ in range(2))
    size = images_at_once(network)
    for start in range(0, len(pixels), size):
        batch = pixels[start : start + size]
        with torch.no_grad():
            stages, isolated = chain.run(batch)
        reference = stages.pop("reference")
        for name, wanted in reference[0].items():
            sums.squares[name] = sums.squares.get(name, 0.0) + float(wanted.double().square().sum())
        for stage, found in stages.items():
            sums.add(stage, found, reference)
        for stage, found in isolated.items():
            alone.add(stage, found, reference)
        if isolated:
            *_, settled, spiking = stages.values()
            alone.add(TIME, spiking, settled)
        progress("diagnose", min(start + size, len(pixels)), len(pixels))
    # Spread over all of them, as they are over the data set: it may be sorted by class.
    some = pixels[:: -(-len(pixels) // MOST_RESTORED)]
    restored = chain.restored(some, progress) if chain.layers else None
    paths = {p.name: p.path for p in network.populations}
    layers = [_row(paths[name], name, sums, alone) for name in sums.squares]
    output = {
        "kl": {stage: value / len(pixels) for stage, value in sums.divergence.items()},
        "agreement_percent": {s: 100 * n / len(pixels) for s, n in sums.agreeing.items()},
    }
    diagnosis: dict[str, Any] = {
        "images": len(pixels),
        "against": "qann" if ann is None else "ann",
        "stages": list(sums.errors),
        "layers": layers,
        "output": output,
        "restored": restored
        and {
            "images": len(some),
            "kl": restored.pop(""),
            "layers": [{"layer": paths[name], "kl": kl} for name, kl in restored.items()],
        },
    }
    made = network.provenance
    retrained = bool(made.get("retraining"))
    compensated = (made.get("compensation") or {}).get("kind", "none") != "none"
    adapted = compensated or made.get("finetuning") is not None
    return {**diagnosis, "mend": mend(diagnosis, schedule, retrained, adapted)}


class _Chain:
    """The networks between the ANN and the spiking network, run on the same images."""

    def __init__(
        self,
        network: SpikingNetwork,
        runner: Engine,
        schedule: Schedule,
        ann: nn.Module | None,
        device: torch.device,
    ) -> None:
        self.network, self.runner, self.schedule = network, runner, schedule
        (readout,) = network.readouts
        self.readout = readout.name
        self.ann: Qann | None = None
        self.layers: list[Layer] = []
        if ann is not None:
            self.ann = float_qann(ann, network).to(device)
            integers = network_qann(self.ann, network, schedule.timesteps)
            self.integers = integers.float().to(device)
            self.layers = list(self.integers.populations())
        self.other_weights = has_other_weights(network)

    def run(self, pixels: Tensor) -> tuple[dict[str, Found], dict[str, Found]]:
        """Return what every stage computes, `reference` first, and each cause switched on alone."""
        network, timesteps = self.network, self.schedule.timesteps
        end, course = self.runner.endpoint(pixels), self.runner.simulate(pixels, self.schedule)
        settled = self._values(end.counts), end.logits(network, self.readout).flatten(1)
        final = course.logits(network, self.readout)[-1].flatten(1)
        spiking = self._values(course.counts), final
        if self.ann is None:
            return {"reference": settled, TIME: spiking}, {}
        images, centered = self._normalized(pixels), self.network.preprocessing.center(pixels)
        offset = network.rounding_offset

        def levels(layer: Layer, x: Tensor) -> Tensor:
            return activate(layer, x, timesteps, offset)

        def stepped(layer: Layer, x: Tensor) -> Tensor:
            return _stepped(layer, x, timesteps, offset)

        alone = {LEVELS: self._float(self.ann, images, stepped)}
        chain = {"reference": self._float(self.ann, images)}
        if self.other_weights:
            chain[OTHER_WEIGHTS] = self._float(self.integers, centered, _clipped)
            chain[LEVELS] = settled
        else:
            chain[CLIPPING] = alone[CLIPPING] = self._float(self.ann, images, _clipped)
            chain[LEVELS] = self._float(self.ann, images, levels)
            chain[INTEGERS] = settled
            alone[INTEGERS] = self._float(self.integers, centered)
        chain[TIME] = spiking
        return chain, alone

    def restored(self, pixels: Tensor, progress: Progress) -> dict[str, float]:
        """Return how far the quantised ANN's outputs are off, with each layer alone left in float.

        The key "" has them with none.
        """
        assert self.ann is not None
        names = ["", *(layer.name for layer in self.layers)]
        found = dict.fromkeys(names, 0.0)
        size = images_at_once(self.network)
        for start in range(0, len(pixels), size):
            batch = pixels[start : start + size]
            images = self.network.preprocessing.center(batch)
            with torch.no_grad():
                wanted = self._float(self.ann, self._normalized(batch))[1]
                for done, name in enumerate(names):
                    logits = self._float(self.integers, images, self._but(name))[1]
                    found[name] += divergence(logits, wanted) / len(pixels)
                    share = len(batch) * (done + 1) // len(names)
                    progress("restore layers", start + share, len(pixels))
        return found

    def _but(self, name: str) -> Activation:
        """Return the quantised activation, left in float in one layer."""
        timesteps, offset = self.schedule.timesteps, self.network.rounding_offset
        return lambda layer, x: activate(
            layer, x, None if layer.name == name else timesteps, offset
        )

    def _normalized(self, pixels: Tensor) -> Tensor:
        return self.network.preprocessing.normalize(pixels)

    def _values(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what counts are worth, `[N, ...]`."""
        values = {}
        for p in self.network.populations:
            found = counts[p.name]
            worth = (p.clip / self.schedule.timesteps).to(found.device)
            values[p.name] = found.double() * per_channel(worth, found.ndim)
        return values

    def _float(self, qann: Qann, images: Tensor, activation: Activation | None = None) -> Found:
        """Return activations and logits of a float network."""
        found: dict[str, Tensor] = {}

        def observe(layer: Layer, x: Tensor) -> None:
            found[layer.name] = x.reshape(len(x), *layer.shape)

        outputs = qann(images, observe=observe, activation=activation)
        return found, outputs[self.readout].flatten(1)


def has_other_weights(network: SpikingNetwork) -> bool:
    """Return whether the network has other weights than its ANN, beside their rounding."""
    told = network.provenance
    compensation = told.get("compensation") or {}
    return bool(
        told.get("retraining")
        or told.get("finetuning")
        or (told.get("reconstruction") or {}).get("kept")
        or compensation.get("kind", "none") != "none"
        or told.get("shortcut_normalization") is False
    )


def _clipped(layer: Layer, x: Tensor) -> Tensor:
    """Clip a current at what T counts are worth, and round nothing."""
    clip = per_channel(layer.clip, x.ndim).to(x.dtype)
    return torch.minimum(x, clip).maximum(-clip if layer.two_sided else torch.zeros_like(clip))


def _stepped(layer: Layer, x: Tensor, timesteps: int, offset: float) -> Tensor:
    """Round a current to steps of one level, however many, and clip nothing."""
    step = per_channel(layer.clip, x.ndim).to(x.dtype) / timesteps
    return activate(layer, step * (x / step + offset).floor(), None)


def _row(path: str, name: str, sums: _Sums, alone: _Sums) -> dict[str, Any]:
    """Return one layer's errors, relative to the reference's square."""
    square = sums.squares[name] or 1.0  # of a layer that is silent the errors are absolute
    cumulative = {stage: errors[name] / square for stage, errors in sums.errors.items()}
    last = next(reversed(cumulative.values()), 0.0)
    return {
        "layer": path,
        "cumulative": cumulative,
        "by_cause": dict(zip(cumulative, _rises(cumulative.values()), strict=True)),
        "isolated": {s: errors[name] / square for s, errors in alone.errors.items()} or None,
        "sqnr_db": -10 * math.log10(last) if last > 0 else None,
    }


def _rises(values: Iterable[float]) -> list[float]:
    """Return how much each of some errors is above the one before, the first above none."""
    errors = [0.0, *values]
    return [after - before for before, after in pairwise(errors)]


def mend(
    diagnosis: dict[str, Any],
    schedule: Schedule,
    retrained: bool = False,
    adapted: bool = False,
) -> dict[str, Any] | None:
    """Return the layer to mend first, the cause, its share of the loss in percent, and how.

    The cause is the stage at which the outputs lose most; weights that were learnt for their levels
    are one with these. Of time the layer is the one at which the error of counts grows most; else
    the one that, left in float alone, brings most of the loss back. None where there is nothing to
    gain. A network that was `adapted` to the end of T steps, by fine-tuning or compensation, gains
    nothing from counts that settle.
    """
    if not diagnosis["layers"]:
        return None
    kl = dict(diagnosis["output"]["kl"])
    kl.pop(OTHER_WEIGHTS, None)
    losses = dict(zip(kl, _rises(kl.values()), strict=True))
    cause = max(losses, key=lambda stage: losses[stage])
    if losses[cause] < NEGLIGIBLE:
        return None
    restored = diagnosis["restored"]
    if cause == TIME or restored is None:
        rises = _rises(row["by_cause"][TIME] for row in diagnosis["layers"])
        worst = max(range(len(rises)), key=rises.__getitem__)
        share = rises[worst] / max(sum(r for r in rises if r > 0), SETTLED)
        layer = diagnosis["layers"][worst]["layer"]
    else:
        best = min(restored["layers"], key=lambda row: row["kl"])
        layer, share = best["layer"], 1 - best["kl"] / restored["kl"]
    return {
        "layer": layer,
        "cause": cause,
        "share_percent": 100 * max(share, 0.0),
        "suggestion": ADAPTED if adapted and cause == TIME else _advice(cause, retrained, schedule),
    }


def _advice(cause: str, retrained: bool, schedule: Schedule) -> str:
    if cause == LEVELS:
        more = f"More levels, a larger -T than {schedule.timesteps}"
        return (
            f"{more}, or longer retraining." if retrained else f"{more}, or retraining at this one."
        )
    if cause != TIME:
        return ADVICE[cause]
    if schedule.exact:
        return "Neurons that take spikes back: --neuron signed."
    if schedule.name != "paper":
        return (
            "Give counts the time to settle: --drain auto, and neurons that take spikes back "
            "(--neuron signed)."
        )
    return (
        "--schedule drain lets counts settle where the quantised ANN's are, a few steps later; at "
        "the same latency snnconv finetune --layerwise wins a part of it back."
    )


ADAPTED = (
    "This network was made for the end of T steps, not for where its counts would settle; the one "
    "it was made from loses nothing by time under --schedule drain."
)
ADVICE = {
    CLIPPING: "Higher clips: calibrate on more images, or by --calibration percentile; or retrain, "
    "which learns them.",
    INTEGERS: "Weights of more bits (--weight-bits 8), or retraining, which rounds them as they "
    "will be stored.",
}
