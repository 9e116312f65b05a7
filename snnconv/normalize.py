"""Shortcut normalisation and integers: from the float QANN to the spiking network.

Each weight is multiplied by the threshold of the neurons it listens to, so that a spike is a
pure event; an identity shortcut becomes a synapse of weight theta_skip. Spiking ResNet states
this as weights theta_in/theta_out for basic blocks (arXiv 1805.01352, section on shortcut
normalisation); written per synapse it holds for any graph. Every row is then expressed in
integers of its own unit (docs/concepts.md, "The integer network").
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from snnconv.choices import MAX_WEIGHT_BITS
from snnconv.errors import UsageError
from snnconv.network import (
    Image,
    Island,
    Node,
    Population,
    Readout,
    SpikingNetwork,
    Synapse,
    check_weight_bits,
    count_values,
    depths,
)
from snnconv.plan import Relay, Source
from snnconv.preprocess import Preprocessing
from snnconv.quant import Branch, Layer, Qann
from snnconv.quant import Island as FloatIsland
from snnconv.schedule import check_timesteps

# Finest fraction of a level thresholds resolve: theta_int >= 32 T, an error of 1/64 level at most.
THRESHOLD_PER_LEVEL = 32
# T up to which that holds, whatever T the network is converted for.
TIMESTEPS_RESOLVED = 32
# Rows of nearly zero weights would have thresholds beyond any integer: floor of the row scale.
LARGEST_THRESHOLD_LOG2 = 15
LARGEST_STEM_THRESHOLD_LOG2 = 22
LARGEST_MEMBRANE_UNIT_LOG2 = 20
READOUT_FRACTION_BITS = 8
LARGEST_INTEGER = 2**31 - 1
# Biases and the weights of identities are as large at most, and so many bits finer than the row.
LARGEST_WHOLE = 2**30
LARGEST_SHIFT = 30
# A charge is an integer, a point of rounding an integer or a half: both are a quarter away.
BETWEEN_INTEGERS = 0.25
# Below so many bits the largest weight is no use as the upper end.
LEARNT_BELOW_BITS = 5


def integerize(
    qann: Qann,
    preprocessing: Preprocessing,
    timesteps: int,
    *,
    weight_bits: int = 8,
    **settings: Any,
) -> SpikingNetwork:
    """Turn a calibrated QANN into the integer spiking network it equals.

    `weight_bits` (2..8) holds for all layers but the first and the readouts, which have 8.
    `settings` are further fields of SpikingNetwork. Raises UsageError if bits or T are out of
    range or the QANN has not been calibrated.
    """
    check_timesteps(timesteps)
    if any(not bool((layer.clip > 0).all()) for layer in qann.populations()):
        raise UsageError("the QANN has no clips yet: calibrate it first")
    values = count_values(qann.nodes, preprocessing)
    layers = _integer_layers(qann, values, timesteps, weight_bits)
    nodes: list[Node] = []
    depth = depths(qann.nodes)
    for node in qann.nodes:
        if isinstance(node, Source):
            nodes.append(Image(node.name, node.shape, preprocessing.zero_point))
        elif isinstance(node, Relay):
            nodes.append(node)
        elif isinstance(node, FloatIsland):
            nodes.append(
                Island(
                    node.name,
                    node.path,
                    node.function,
                    node.attributes,
                    node.inputs,
                    node.shape,
                    depth[node.name],
                    node.unit.double(),
                )
            )
        else:
            layer = next(layers)
            if isinstance(layer, Readout):
                layer = replace(layer, unit=float(layer.unit))
                layer = replace(layer, threshold=_readout_threshold(node, layer.unit))
            nodes.append(layer)
    return SpikingNetwork(
        tuple(nodes), preprocessing, timesteps, weight_bits=weight_bits, **settings
    )


@dataclass(frozen=True)
class Rounded:
    """A layer in float with the values of its integers, in the shapes and units of the QANN.

    `weights` and `scales` `[C]` (the float value of one integer in `W theta_source`) are per
    branch; `bias` is `[C]`.
    """

    weights: list[Tensor]
    scales: list[Tensor]
    bias: Tensor


def rounded(
    qann: Qann,
    preprocessing: Preprocessing,
    timesteps: int,
    weight_bits: int,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Rounded]:
    """Yield, for every layer, the float tensors with which the QANN computes what integers do.

    In float64 the integers are those of `integerize`; in float32 a weight may be rounded to the
    other side now and then. The tensors hold for images of `Preprocessing.center`, in which a
    pixel of the zero point is 0. The rounding of a threshold is put into weights and bias, since
    `W x >= theta_int` is `W x clip/theta_int >= clip`. A quarter of an integer is added to every
    charge, which moves no integer across a threshold, and keeps rounding errors from doing so.
    """
    values = count_values(qann.nodes, preprocessing, dtype)
    integers = _integer_layers(qann, values, timesteps, weight_bits)
    for layer, node in zip(qann.weighted(), integers, strict=True):
        yield _rounded(layer, node, values, timesteps)


def rounded_layer(
    qann: Qann,
    layer: Layer,
    values: dict[str, tuple[Tensor, Tensor]],
    timesteps: int,
    weight_bits: int,
) -> Rounded:
    """Return of one layer what `rounded` yields; `values` are the QANN's `count_values`."""
    node = _integers(layer, values, 0, weight_bits, image_carriers(qann), timesteps)
    return _rounded(layer, node, values, timesteps)


def _rounded(
    layer: Layer,
    node: Population | Readout,
    values: dict[str, tuple[Tensor, Tensor]],
    timesteps: int,
) -> Rounded:
    dtype = values[layer.branches[0].source][0].dtype
    if isinstance(node, Population):
        unit = node.clip / node.threshold
        bias = node.bias.to(dtype) + BETWEEN_INTEGERS / timesteps
    else:
        unit, bias = torch.ones_like(layer.bias, dtype=dtype) * node.unit, node.bias
    weights, scales = [], []
    for branch, synapse in zip(layer.branches, node.branches, strict=True):
        lcm = math.prod(pool.lcm for pool in branch.pools)
        scales.append(unit * torch.exp2(synapse.shift) * lcm)
        row = synapse.weight.to(dtype)
        worth = values[branch.source][0]
        inverse = torch.where(worth > 0, 1 / worth, 0.0)
        row = row * scales[-1].view(-1, *[1] * (row.ndim - 1))
        weights.append(times_inputs(branch, row, inverse))
    return Rounded(weights, scales, bias * unit)


def rounded_qann(qann: Qann, network: SpikingNetwork) -> Qann:
    """Return a copy of the QANN that computes in float32 what the network made from it does.

    Its images are those of `Preprocessing.center`.
    """
    copied = copy.deepcopy(qann)
    tensors = rounded(qann, network.preprocessing, network.timesteps, network.weight_bits)
    for layer, found in zip(copied.weighted(), tensors, strict=True):
        layer.assign_(found.weights, found.bias)
    return copied


def network_qann(qann: Qann, network: SpikingNetwork, timesteps: int) -> Qann:
    """Return a copy of a QANN that has the network's integers for weights, whatever its own are.

    Quantised to T levels it computes the network's own end point.

    It computes in float64, on the CPU; its images are those of `Preprocessing.center`.
    """
    copied = copy.deepcopy(qann).cpu().double()
    values = count_values(copied.nodes, network.preprocessing)
    for layer, node in zip(copied.weighted(), network.weighted, strict=True):
        found = _rounded(layer, node, values, timesteps)
        layer.assign_(found.weights, found.bias)
    return copied


def _integer_layers(
    qann: Qann, values: dict[str, tuple[Tensor, Tensor]], timesteps: int, weight_bits: int
) -> Iterator[Population | Readout]:
    """Yield the integers of every layer of a calibrated QANN, in order.

    `values` are its `count_values`; their number type is the one it computes in.
    """
    check_weight_bits(weight_bits)
    images, depth = image_carriers(qann), depths(qann.nodes)
    for layer in qann.weighted():
        yield _integers(layer, values, depth[layer.name], weight_bits, images, timesteps)


def _integers(
    layer: Layer,
    values: dict[str, tuple[Tensor, Tensor]],
    depth: int,
    weight_bits: int,
    images: set[str],
    timesteps: int,
) -> Population | Readout:
    """Return the integers of one layer; `images` are the QANN's `image_carriers`."""
    if layer.readout:
        return _readout(layer, values, depth)
    bits = _bits(layer, weight_bits, images)
    stem = any(b.source in images for b in layer.branches)
    return _population(layer, values, depth, bits, stem, max(timesteps, TIMESTEPS_RESOLVED))


def layer_bits(network: Qann | SpikingNetwork, weight_bits: int) -> dict[str, int]:
    """Return the bits of every layer's weights: 8 where they read the image, and in readouts."""
    images = image_carriers(network)
    layers = network.weighted if isinstance(network, SpikingNetwork) else network.weighted()
    return {layer.name: _bits(layer, weight_bits, images) for layer in layers}


def _bits(layer: Layer | Population | Readout, weight_bits: int, images: set[str]) -> int:
    apart = getattr(layer, "readout", False) or any(b.source in images for b in layer.branches)
    return MAX_WEIGHT_BITS if apart else weight_bits


def image_carriers(network: Qann | SpikingNetwork) -> set[str]:
    """Return the nodes that carry pixels: the sources, and maps that read one."""
    names: set[str] = set()
    for node in network.nodes:
        if isinstance(node, Source | Image) or (
            isinstance(node, Relay) and names & set(node.inputs)
        ):
            names.add(node.name)
    return names


def times_inputs(branch: Branch | Synapse, weight: Tensor, vector: Tensor) -> Tensor:
    """Multiply weights `[O, C/groups, ...]` by a vector `[C]` over their input channels."""
    if branch.kind == "scale":
        return weight * vector
    if branch.kind == "linear":
        return weight * vector
    groups = branch.attributes["groups"]
    per_group = vector.view(groups, 1, -1, 1, 1)
    return (weight.view(groups, -1, *weight.shape[1:]) * per_group).view_as(weight)


def _rows(layer: Layer, values: dict[str, tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Return every branch's W' = W theta_source, and the bias with the inputs' constants."""
    dtype = values[layer.branches[0].source][0].dtype
    rows = []
    for branch, weight in zip(layer.branches, layer.weights, strict=True):
        row = times_inputs(branch, weight.detach().to(dtype), values[branch.source][0])
        rows.append(row / math.prod(pool.lcm for pool in branch.pools))
    return rows, layer.bias.detach().to(dtype) + source_constants(layer, values)


def source_constants(layer: Layer, values: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Return what the constants beside its sources' counts add to a layer's current, `[C]`."""
    dtype = values[layer.branches[0].source][0].dtype
    total = torch.zeros_like(layer.bias, dtype=dtype)
    for branch, weight in zip(layer.branches, layer.weights, strict=True):
        offset = times_inputs(branch, weight.detach().to(dtype), values[branch.source][1])
        total = total + (offset if branch.kind == "scale" else offset.flatten(1).sum(1))
    return total


def row_scale(rows: Tensor, bits: int, clip_share: Tensor | None = None) -> Tensor:
    """Return the scale per row of symmetric weights in `bits`, `[O]`.

    The largest weight sets it at 5 bits and above, since few levels cannot afford to reach it.
    Below, it is `clip_share` `[O]` of that, or without one the scale with the least squared error.
    """
    rows = rows.flatten(1)
    largest = rows.abs().amax(1)
    top = 2 ** (bits - 1) - 1
    if clip_share is not None and bits < LEARNT_BELOW_BITS:
        return largest * clip_share.to(largest) / top
    if bits >= LEARNT_BELOW_BITS:
        return largest / top
    candidates = torch.linspace(0.2, 1.0, 81, dtype=torch.float64).tolist()
    best, least = largest / top, torch.full_like(largest, math.inf)
    for fraction in candidates:
        scale = _positive(largest * fraction / top)
        rounded = (rows / scale[:, None]).round().clamp(-top, top) * scale[:, None]
        error = (rounded - rows).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def _log2_floor(ratio: Tensor) -> Tensor:
    return torch.log2(ratio.clamp(1.0, 2.0**40)).floor()


def _synapse(branch: Branch, rows: Tensor, scale: Tensor, shift: Tensor, bits: int) -> Synapse:
    """Round rows to integers of `scale` (per row); scale weights are exact int32."""
    per_row = scale.view(-1, *[1] * (rows.ndim - 1))
    integers = (rows / per_row).round()
    if branch.kind == "scale":
        weight = integers.to(torch.int32)
    else:
        top = 2 ** (bits - 1) - 1
        weight = integers.clamp(-top, top).to(torch.int8)
    return Synapse(
        branch.source,
        branch.key,
        branch.kind,
        weight,
        shift.to(torch.int32),
        branch.attributes,
        branch.pools,
    )


def _synapses(
    layer: Layer, rows: list[Tensor], scale: Tensor, unit_log2: Tensor, bits: int
) -> tuple[tuple[Synapse, ...], Tensor]:
    """Round all branches; return them and m, with which the row unit is `scale 2^-m`.

    A branch whose weights are small has `scale 2^-m_j` of its own, so that it uses its bits.
    """
    zero = torch.zeros_like(scale)
    finer = []
    for branch, row, share in zip(layer.branches, rows, layer.clip_shares, strict=True):
        if branch.kind == "scale":
            finer.append(zero)
            continue
        own = row_scale(row, bits, share)
        ratio = torch.where(own > 0, scale / _positive(own), torch.ones_like(own))
        finer.append(torch.minimum(_log2_floor(ratio), unit_log2[1]))
    m = torch.stack([unit_log2[0], *finer]).amax(0)
    synapses = []
    for branch, row, own in zip(layer.branches, rows, finer, strict=True):
        own = m if branch.kind == "scale" else own
        synapses.append(_synapse(branch, row, scale * 2.0**-own, m - own, bits))
    return tuple(synapses), m


def _weighted_scale(layer: Layer, rows: list[Tensor], bits: int) -> Tensor:
    """Return the largest row scale over the branches with weights, zero where there are none."""
    scales = [
        row_scale(row, bits, share)
        for branch, row, share in zip(layer.branches, rows, layer.clip_shares, strict=True)
        if branch.kind != "scale"
    ]
    return torch.stack([torch.zeros_like(layer.bias, dtype=rows[0].dtype), *scales]).amax(0)


def _population(
    layer: Layer,
    values: dict[str, tuple[Tensor, Tensor]],
    depth: int,
    bits: int,
    stem: bool,
    resolved: int,
) -> Population:
    rows, bias = _rows(layer, values)
    clip = layer.clip.to(bias.dtype)
    largest = LARGEST_STEM_THRESHOLD_LOG2 if stem else LARGEST_THRESHOLD_LOG2
    scale = _weighted_scale(layer, rows, bits)
    scale = torch.maximum(scale, torch.maximum(clip, bias.abs()) / 2**largest)
    whole = [r.abs() for b, r in zip(layer.branches, rows, strict=True) if b.kind == "scale"]
    highest = torch.stack([bias.abs(), *whole]).amax(0)
    scale = torch.maximum(scale, highest / LARGEST_WHOLE)
    room = _log2_floor(scale * LARGEST_WHOLE / _positive(highest)).clamp_max(LARGEST_SHIFT)
    needed = torch.log2(THRESHOLD_PER_LEVEL * resolved * scale / clip).ceil().clamp_min(0)
    allowed = _log2_floor(scale / clip * 2 ** max(largest, LARGEST_MEMBRANE_UNIT_LOG2))
    needed, allowed = torch.minimum(needed, room), torch.minimum(allowed, room)
    synapses, m = _synapses(layer, rows, scale, torch.stack([needed, allowed]), bits)
    unit = scale * 2.0**-m
    return Population(
        layer.name,
        layer.path,
        synapses,
        (clip / unit).round().clamp_min(1).to(torch.int32),
        (bias / unit).round().to(torch.int32),
        layer.shape,
        layer.two_sided,
        depth,
        unit,
        clip,
    )


def _readout(layer: Layer, values: dict[str, tuple[Tensor, Tensor]], depth: int) -> Readout:
    """Round a readout; all its classes share one unit, so that their charges compare.

    The unit stays a tensor here, for reading it would wait for a GPU.
    """
    rows, bias = _rows(layer, values)
    largest = _weighted_scale(layer, rows, bits=8).max()
    floor = torch.cat([bias.abs(), *(r.abs().flatten() for r in rows)]).max() / 2**15
    scale = torch.maximum(largest, floor.clamp_min(1e-12)).expand(len(bias))
    fraction = torch.full_like(scale, READOUT_FRACTION_BITS)
    synapses, m = _synapses(layer, rows, scale, torch.stack([fraction, fraction]), bits=8)
    unit: Any = scale[0] * 2.0 ** -m[0]
    return Readout(
        layer.name, synapses, (bias / unit).round().to(torch.int32), layer.shape, depth, unit
    )


def _readout_threshold(layer: Layer, unit: float) -> int | None:
    """Return the threshold of neurons in place of a readout; None if its clip is not known."""
    clip = float(layer.clip.max())
    return None if math.isnan(clip) else min(max(1, round(clip / unit)), LARGEST_INTEGER)


# How far above its mean 99.9 % of a normal variable lie below.
PERCENTILE_999 = 3.09


def without_shortcut_normalization(qann: Qann, preprocessing: Preprocessing) -> Qann:
    """Return a copy in which a spike that takes a shortcut is worth a threshold of where it ends.

    What Spiking ResNet (arXiv 1805.01352) compares shortcut normalisation with: an identity has the
    weight 1 in normalised units, and a projection is normalised, its weights and its bias, by the
    99.9 percentile of its own output, as BatchNorm's statistics have it. A shortcut is a branch
    whose source is less deep than another's. Raises UsageError for a projection without BatchNorm.
    """
    copied = copy.deepcopy(qann).requires_grad_(False)
    values, depth = count_values(copied.nodes, preprocessing), depths(copied.nodes)
    for layer in copied.populations():
        depth[layer.name] += 1  # that of what reads it
    for layer in copied.populations():
        # Parts of one of the ANN's layers are as deep as the deepest of them.
        ends: dict[Any, int] = {}
        for branch in layer.branches:
            whole = branch.part_of or branch.key
            ends[whole] = max(ends.get(whole, 0), depth[branch.source])
        deepest = max(ends.values())
        for branch, weight in zip(layer.branches, layer.weights, strict=True):
            if ends[branch.part_of or branch.key] == deepest:
                continue
            if branch.part_of:
                raise UsageError(
                    f"{layer.path}: a projection of several tensors, whose normalisation cannot be "
                    "taken back"
                )
            if branch.kind == "scale":
                worth = values[branch.source][0]
                factor = torch.where(worth > 0, layer.clip / worth, 0.0)
            elif branch.statistics is not None:
                mean, deviation = branch.statistics
                factor = layer.clip / (mean + PERCENTILE_999 * deviation).max()
                layer.bias.add_((factor - 1) * branch.shift.to(layer.bias))
            else:
                raise UsageError(
                    f"{layer.path}: a projection without BatchNorm, whose normalisation cannot be "
                    "taken back"
                )
            weight *= factor.view(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)
    return copied


def with_settings(network: SpikingNetwork, **settings: Any) -> SpikingNetwork:
    """Return the network with other settings, for example `neuron="unsigned"`."""
    return replace(network, **settings)
