"""Error compensation without training: what spiking neurons lose in T steps, made up for.

Spiking Deep Residual Networks (Hu, Tang, Pan; arXiv 1805.01352) compensate the loss of charge from
layer to layer of plain unsigned neurons. `gain` multiplies all weights and shortcuts, but no bias,
by one number, chosen on images that calibrated nothing; its neurons start at V0 = 0. `bias` goes
from layer to layer and adds to the bias of every channel what its neurons fire too little, on
average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snnconv.choices import COMPENSATIONS
from snnconv.divergence import divergence
from snnconv.engine import counts, prepare
from snnconv.engine.linear import exact_arithmetic
from snnconv.errors import UsageError, require_one_of
from snnconv.finetune import SCHEDULE, Course
from snnconv.network import Population, Readout, SpikingNetwork
from snnconv.progress import Progress, silent
from snnconv.quant import Layer, Qann

GAINS = tuple(1 + k / 50 for k in range(21))
# The divergence falls with the gain and then rises: after so many larger ones, no more are tried.
PATIENCE = 3
# Neurons answer a larger bias with less than its worth where they are silent or full.
ROUNDS = 3
# Counts of all steps of one layer's largest plane that are computed at once.
NUMBERS_AT_ONCE = 2**26
# What arrives at a layer does not depend on its bias: it is kept up to so many bytes.
ARRIVED_BYTES = 2**32


def compensate(
    network: SpikingNetwork,
    kind: str,
    qann: Qann,
    images: Iterable[Tensor],
    progress: Progress = silent,
) -> tuple[SpikingNetwork, dict[str, Any]]:
    """Return the compensated network, and what was done as plain JSON values.

    `qann` is the float network it was made from, `images` batches of uint8 `[N, C, H, W]` that did
    not calibrate it. Both kinds look at the end of T steps of the schedule `paper`. Raises
    UsageError for an unknown kind, without images, and for a gain of neurons that do not start at
    V0 = 0.
    """
    require_one_of("compensation", kind, COMPENSATIONS)
    if kind == "none":
        return network, {"kind": kind}
    batches = [pixels for pixels in images if len(pixels)]
    if not batches:
        raise UsageError(f"compensation {kind!r} needs images that did not calibrate")
    described = {"kind": kind, "images": sum(map(len, batches))}
    if kind == "bias":
        return with_biases(network, qann, batches, progress), described
    if network.initial_membrane != "zero":
        raise UsageError(
            "compensation by a gain needs neurons that start at V0 = 0: with half a "
            "threshold they would fire too much"
        )
    divergences = gain_divergences(network, qann, batches, progress)
    gain = min(divergences, key=lambda g: divergences[g])
    described |= {"gain": gain, "kl": divergences[gain], "kl_without": divergences[1.0]}
    return with_gain(network, gain), described


def with_gain(network: SpikingNetwork, gain: float) -> SpikingNetwork:
    """Return the network with all weights multiplied by a gain, but no bias.

    The integers of weights stay; thresholds and biases are divided, which is the same.
    """

    def node(node: Any) -> Any:
        if isinstance(node, Population):
            return replace(
                node,
                threshold=_divided(node.threshold, gain).clamp_min(1),
                bias=_divided(node.bias, gain),
                row_unit=node.row_unit * gain,
            )
        if isinstance(node, Readout):
            threshold = node.threshold and max(1, round(node.threshold / gain))
            bias = _divided(node.bias, gain)
            return replace(node, bias=bias, unit=node.unit * gain, threshold=threshold)
        return node

    return replace(network, nodes=tuple(map(node, network.nodes)))


def _divided(integers: Tensor, gain: float) -> Tensor:
    return (integers.double() / gain).round().to(torch.int32)


def gain_divergences(
    network: SpikingNetwork, qann: Qann, batches: Sequence[Tensor], progress: Progress = silent
) -> dict[float, float]:
    """Return, per gain, the mean divergence of a classifier's probabilities at T from the ANN's.

    The gains rise from 1; beyond the best one few are tried.
    """
    readout = network.logits
    if readout is None:
        raise UsageError(
            "compensation by a gain is chosen by class probabilities; the network is no classifier"
        )
    wanted = [_float_outputs(network, qann, pixels)[readout.name] for pixels in batches]
    schedule = network.timetable(name=SCHEDULE)
    divergences: dict[float, float] = {}
    for number, gain in enumerate(GAINS):
        way = with_gain(network, gain)
        runner = prepare(way, network.timesteps)
        total, images = 0.0, 0
        for pixels, logits in zip(batches, wanted, strict=True):
            found = runner.simulate(pixels, schedule).logits(way, readout.name)[-1].flatten(1)
            total += divergence(found, logits.flatten(1))
            images += len(pixels)
        divergences[gain] = total / images
        progress("compensate", number + 1, len(GAINS), f"gain {gain:.2f}")
        if min(divergences.values()) < min([*divergences.values()][-PATIENCE:]):
            break
    return divergences


def with_biases(
    network: SpikingNetwork, qann: Qann, batches: Sequence[Tensor], progress: Progress = silent
) -> SpikingNetwork:
    """Return the network with the mean error of every channel at T taken out of its biases.

    The error is what the float network's activations are above the values of the spikes, averaged
    over images and positions; layer after layer, with those before it compensated.
    """
    engine = counts.Engine(network, network.timesteps)
    wanted = _mean_activations(network, qann, batches)
    largest = max(torch.Size(n.shape).numel() for n in network.nodes)
    size = max(1, NUMBERS_AT_ONCE // (network.timesteps * largest))
    nodes = list(network.nodes)
    positions = [k for k, node in enumerate(nodes) if isinstance(node, Population)]
    with exact_arithmetic(), torch.no_grad():
        courses = [Course(engine, part) for pixels in batches for part in pixels.split(size)]
        for number, position in enumerate(positions):
            node: Any = nodes[position]
            unit = node.clip / node.threshold
            memory = ARRIVED_BYTES
            for course in courses:
                course.advance(nodes, position)
                memory -= course.remember(node, memory)
            for _ in range(ROUNDS):
                missing = wanted[node.name] - _mean_spikes(node, courses)
                added = (missing / unit).round().to(torch.int32)
                node = replace(node, bias=node.bias + added)
            nodes[position] = node
            progress("compensate", number + 1, len(positions), node.path)
    return replace(network, nodes=tuple(nodes))


def _mean_spikes(node: Population, courses: Sequence[Course]) -> Tensor:
    """Return the mean value of a layer's spikes at T per channel, float64 `[C]`."""
    total, images = torch.zeros_like(node.clip), 0
    for course in courses:
        spikes = course.last(node)
        total += _channel_means(spikes)
        images += len(spikes)
    return total / images * node.clip / course.engine.timesteps


def _channel_means(x: Tensor) -> Tensor:
    """Return the mean of `[N, C, ...]` over positions, summed over images, float64 `[C]`."""
    x = x.double()
    return x.flatten(2).mean(2).sum(0) if x.ndim > 2 else x.sum(0)


def _float_outputs(network: SpikingNetwork, qann: Qann, pixels: Tensor, **observe: Any) -> Any:
    with torch.no_grad():
        return qann(network.preprocessing.normalize(pixels), **observe)


def _mean_activations(
    network: SpikingNetwork, qann: Qann, batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the float network's mean activation per layer and channel, float64 `[C]`."""
    totals: dict[str, Tensor] = {}
    images = 0

    def observe(layer: Layer, activation: Tensor) -> None:
        totals[layer.name] = totals.get(layer.name, 0) + _channel_means(activation)

    for pixels in batches:
        _float_outputs(network, qann, pixels, observe=observe)
        images += len(pixels)
    return {name: total / images for name, total in totals.items()}
