"""Begin a retraining where a spiking network of the same ANN ended, for another T or weight bits.

Its integers are written back into the layers they were folded from. Each BatchNorm then gets the
statistics of what its layer gives now, and the gain and shift that leave the network as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from snnconv.errors import UsageError
from snnconv.folding import Folder
from snnconv.graph import Traced
from snnconv.network import Population, SpikingNetwork, count_values, wiring
from snnconv.normalize import network_qann, source_constants, times_inputs
from snnconv.operations import Operation
from snnconv.plan import ConversionPlan, Term
from snnconv.preprocess import Preprocessing
from snnconv.quant import Layer, Qann
from snnconv.train.batch_norm import SMALLEST_GAIN, BatchNorms

# Largest error of what was written back: weights by the largest of them, biases by the clip.
TOLERANCE = 0.1


def warm_start_(
    traced: Traced,
    plan: ConversionPlan,
    qann: Qann,
    preprocessing: Preprocessing,
    initial_membrane: str,
    network: SpikingNetwork,
    images: Iterable[Tensor],
) -> None:
    """Give a traced network and its QANN the weights, biases and clips of a spiking network.

    `images` are batches of pixels uint8 `[N, C, H, W]`. Raises UsageError if the spiking network
    has other layers, another preprocessing or `initial_membrane`, or if its integers cannot be
    written back, as where a parameter serves several layers and they have come apart.
    """
    _require_alike(qann, preprocessing, network)
    if network.initial_membrane != initial_membrane:
        raise UsageError(
            f"the network to start from has --initial-membrane {network.initial_membrane}, this "
            f"one {initial_membrane}"
        )
    folder = Folder(traced, plan, torch.float64)
    with torch.no_grad():
        wanted = _in_float(qann, preprocessing, network)
        for node, layer in zip(folder.planned, wanted.weighted(), strict=True):
            for term, weight in zip(node.terms, layer.weights, strict=True):
                _write_weight(folder, term, weight)
            _write_bias(folder, node.terms, layer.bias - folder.layer_bias(node))
        _follow(qann, folder)
        _require_written(qann, wanted, preprocessing)
        qann.load_state_dict(wanted.state_dict())
        _measure(qann, BatchNorms(folder), network, images)
        _follow(qann, folder)


def _require_alike(qann: Qann, preprocessing: Preprocessing, network: SpikingNetwork) -> None:
    """Raise UsageError for a spiking network that was not made from this ANN."""
    if network.preprocessing != preprocessing:
        raise UsageError("the network to start from prepares its images otherwise")
    theirs, ours = wiring(network.weighted), wiring(qann.weighted())
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if different or [n.name for n in qann.islands()] != [n.name for n in network.islands]:
        raise UsageError(
            "the network to start from was made from another one", different[:3] or ["its islands"]
        )


def _in_float(qann: Qann, preprocessing: Preprocessing, network: SpikingNetwork) -> Qann:
    """Return the QANN with the values of the network's integers, and its clips, in float64."""
    copied = copy.deepcopy(qann).double()
    for layer, node in zip(copied.weighted(), network.weighted, strict=True):
        if isinstance(node, Population):
            layer.clip.copy_(node.clip)
    for island, other in zip(copied.islands(), network.islands, strict=True):
        island.unit.copy_(other.unit)
    found = network_qann(copied, network, network.timesteps)
    values = count_values(found.nodes, preprocessing)
    for layer in found.weighted():
        layer.bias.copy_(layer.bias - source_constants(layer, values))
    return found


def _operations(folder: Folder, term: Term) -> list[Operation]:
    """Return what is folded into a branch: maps with weights, and BatchNorms."""
    return [o for o in folder.steps(term) if o.kind != "average_pool"]


def _write_weight(folder: Folder, term: Term, weight: Tensor) -> None:
    """Let the layer before a BatchNorm, or the BatchNorm alone, fold into this weight."""
    operations = _operations(folder, term)
    if not operations:
        return
    gain = torch.ones(len(weight), dtype=torch.float64)
    for operation in operations:
        if operation.kind == "batch_norm":
            gain = gain * folder.affine(operation)[0]
    usable = gain.abs() > SMALLEST_GAIN
    first = operations[0].module
    if operations[0].kind == "batch_norm":
        if first.weight is not None:
            first.weight.copy_(torch.where(usable, weight / gain * first.weight, first.weight))
        return
    rows = usable.view(-1, *[1] * (weight.ndim - 1))
    first.weight.copy_(torch.where(rows, weight / gain.view_as(rows), first.weight))


def _write_bias(folder: Folder, terms: Sequence[Term], difference: Tensor) -> None:
    """Add to the last bias of the first branch that has one."""
    for term in terms:
        gain = torch.ones_like(difference)
        for operation in reversed(_operations(folder, term)):
            if operation.module.bias is not None:
                usable = gain.abs() > SMALLEST_GAIN
                operation.module.bias += torch.where(usable, difference / gain, 0.0)
                return
            if operation.kind == "batch_norm":
                gain = gain * folder.affine(operation)[0]


def _follow(qann: Qann, folder: Folder) -> None:
    for layer, (weights, bias) in zip(qann.weighted(), folder.tensors(), strict=True):
        layer.assign_(weights, bias)


def _require_written(qann: Qann, wanted: Qann, preprocessing: Preprocessing) -> None:
    """Raise UsageError for a layer that has not become what it should."""
    values = count_values(wanted.nodes, preprocessing)
    for layer, target in zip(qann.weighted(), wanted.weighted(), strict=True):
        clip = target.bias.abs() if target.readout else target.clip
        pairs = [(layer.bias - target.bias, torch.maximum(clip.amax(), target.bias.abs().amax()))]
        for branch, found, weight in zip(
            layer.branches, layer.weights, target.weights, strict=True
        ):
            # Channels that never fire, such as padded ones, have lost their weights.
            heard = (values[branch.source][0] > 0).double()
            pairs.append((times_inputs(branch, found - weight, heard), weight.abs().amax()))
        if any(bool(error.abs().amax() > TOLERANCE * scale) for error, scale in pairs):
            raise UsageError(
                f"{layer.path}: what the network to start from holds cannot be written back; its "
                "parameters serve another layer, too, or have changed where the ANN has none"
            )


def _measure(
    qann: Qann,
    norms: BatchNorms,
    network: SpikingNetwork,
    images: Iterable[Tensor],
) -> None:
    """Give every BatchNorm the statistics of these images, and leave what it folds into."""
    numbers = {layer: i for i, layer in enumerate(qann.weighted())}
    sums: dict[tuple[int, int], Tensor] = {}

    def observe(layer: Layer, branch: int, current: Tensor) -> Tensor:
        place = numbers[layer], branch
        if place in norms.norms:
            values = current.double().transpose(0, 1).flatten(1)
            count = torch.full((len(values),), values.shape[1], dtype=torch.float64)
            found = torch.stack([count, values.sum(1), values.square().sum(1)])
            sums[place] = sums.get(place, 0) + found
        return current

    for pixels in images:
        qann(
            network.preprocessing.normalize(pixels),
            network.timesteps,
            offset=network.rounding_offset,
            normalize=observe,
        )
    for place, (count, total, squares) in sums.items():
        mean = total / count
        norms.expect_(*place, mean, squares / count - mean.square())
