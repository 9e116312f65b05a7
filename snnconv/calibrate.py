"""Choose the clips of every layer without training (docs/concepts.md, "Reconstruction").

Statistics stream through histograms of fixed size, one per channel, so memory does not grow with
the number of images. Without data, the histograms are those of normal distributions whose moments
come from BatchNorm's statistics. A clip per channel costs nothing at run time: it is folded into
the thresholds and the weights behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from snnconv.analog import RESOLUTION, compute
from snnconv.choices import CALIBRATIONS, DEFAULT_PERCENTILE
from snnconv.errors import DataError, UsageError, require_one_of
from snnconv.ops import padded_channels, per_channel, rearranged_channels
from snnconv.plan import Relay, Source
from snnconv.quant import Branch, Island, Layer, Qann, quantize
from snnconv.schedule import check_timesteps

# Reconstruction comes after one of them.
METHODS = tuple(name for name in CALIBRATIONS if name != "reconstruct")
BINS = 2048
# Points by which the moments of an analog function are estimated.
QUANTILES = 1024
# The same for programs: numbers to draw, and images at least.
NUMBERS_DRAWN, FEWEST_IMAGES = 2**20, 4
CANDIDATES = 512
# Smallest clip of a channel, as a share of its layer's largest: a bound on the range of integers.
SMALLEST_SHARE = 1 / 16
BINNED_AT_ONCE = 2**22


class Histogram:
    """Magnitudes of the activations of C channels, `BINS` equal bins each.

    `counts` is float64 `[C, BINS]`; bin i of a channel ends at `range * (i + 1) / BINS`, and a
    channel's `range` `[C]` doubles when a larger value comes. `total` is the number of values per
    channel, zeros included, `largest` `[C]` the largest of them.
    """

    def __init__(self, channels: int) -> None:
        """Start empty."""
        self.counts = torch.zeros(channels, BINS, dtype=torch.float64)
        self.range = torch.zeros(channels, dtype=torch.float64)
        self.largest = torch.zeros(channels, dtype=torch.float64)
        self.total = 0.0

    def add(self, values: Tensor) -> None:
        """Add non-negative values `[N, C, ...]`. Raises DataError if one is not finite."""
        values = values.cpu().transpose(0, 1).flatten(1)
        largest = values.amax(1).double()
        if not bool(largest.isfinite().all()):
            raise DataError("calibration: the network computes infinite or undefined activations")
        self.total += values.shape[1]
        self.largest = torch.maximum(self.largest, largest)
        self.range = torch.where(self.range == 0, largest, self.range)
        while bool((grown := self.largest > self.range).any()):
            merged = self.counts[grown].view(-1, BINS // 2, 2).sum(2)
            self.counts[grown] = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.range[grown] *= 2
        scale = torch.where(self.range > 0, BINS / self.range, 0.0)
        scale = scale.clamp_max(torch.finfo(torch.float32).max).float()[:, None]
        offset = (torch.arange(len(scale)) * BINS)[:, None]
        for part in values.split(max(1, BINNED_AT_ONCE // len(scale)), 1):
            bins = (part * scale).long().clamp_max_(BINS - 1).add_(offset)
            found = torch.bincount(bins[part > 0], minlength=self.counts.numel())
            self.counts += found.view_as(self.counts)

    def percentile(self, percent: float) -> float:
        """Return the value that `percent` of all values of all channels lie below.

        The largest, where so many are 0 that this would be 0.
        """
        edges, order = self._edges().flatten().sort(descending=True)
        above = self.counts.flatten()[order].cumsum(0)
        allowed = self.total * len(self.counts) * (1 - percent / 100)
        over = (above > allowed).nonzero()
        largest = float(self.largest.max())
        return min(float(edges[over[0]]), largest) if len(over) else largest

    def _edges(self) -> Tensor:
        """Return where every bin ends, `[C, BINS]`."""
        ends = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
        return self.range[:, None] * ends

    def least_error_clips(self, timesteps: int, offset: float = 0.5) -> Tensor:
        """Return per channel the clip whose T levels have the least mean squared error, `[C]`.

        Zero for channels that are silent. With `offset` 0 levels are floors (V0 = 0).
        """
        centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
        shares = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
        errors = (quantize(centers, shares[:, None], timesteps, offset=offset) - centers).square()
        best = shares[(self.counts @ errors.t()).argmin(1)]
        return torch.minimum(best * self.range, self.largest)


def calibrate_(
    qann: Qann,
    batches: Iterable[Tensor] | None,
    timesteps: int,
    method: str = "mse",
    percentile: float = DEFAULT_PERCENTILE,
    *,
    offset: float = 0.5,
) -> None:
    """Set the clips of every layer of a QANN, in place.

    `batches` are normalised images `[N, C, H, W]`, ignored and unnecessary for `bn`. `mse`
    minimises the squared error at T levels (floors for an `offset` of 0, which is V0 as a share of
    the threshold) channel by channel, as `bn` does without images;
    `percentile` is Spiking ResNet's choice (arXiv 1805.01352), all channels of a layer together
    (its largest activation where that percentage of them is 0), `max` the layer's largest
    activation. A natural clip (ReLU6) is never exceeded. Populations
    that are silent get a clip of 1. That of a readout is for those who count its spikes: the
    percentile, else its largest output. Raises UsageError for a T out of range, an unknown method
    or missing data, DataError if there are no images.
    """
    check_timesteps(timesteps)
    require_one_of("calibration", method, METHODS)
    if not 0 < percentile <= 100:
        raise UsageError(f"the percentile must be above 0 and at most 100, not {percentile:g}")
    if method == "bn":
        histograms = _from_statistics(qann)
    elif batches is None:
        raise UsageError(f"calibration {method!r} needs images; without data use 'bn'")
    else:
        histograms = _from_images(qann, batches)
    for layer in qann.weighted():
        histogram = histograms[layer.name]
        if method == "percentile":
            clips = torch.full_like(histogram.largest, histogram.percentile(percentile))
        elif method == "max" or layer.readout:
            clips = histogram.largest.amax().expand(len(layer.clip))
        else:
            clips = histogram.least_error_clips(timesteps, offset)
        layer.clip.copy_(_settled(clips, layer.cap))
    for island in qann.islands():
        largest = histograms[island.name].largest.amax()
        unit = largest / RESOLUTION if largest > 0 else 1.0
        island.unit.fill_(float(unit))


def _settled(clips: Tensor, cap: float | None) -> Tensor:
    """Keep clips below the natural one and within a range; silent channels get the largest."""
    clips = clips if cap is None else clips.clamp(max=cap)
    largest = clips.amax()
    if largest == 0:
        return torch.full_like(clips, cap or 1.0)
    return torch.where(clips > 0, clips.clamp(min=largest * SMALLEST_SHARE), largest)


def _from_images(qann: Qann, batches: Iterable[Tensor]) -> dict[str, Histogram]:
    histograms = {layer.name: Histogram(len(layer.clip)) for layer in qann.weighted()}
    histograms |= {island.name: Histogram(1) for island in qann.islands()}

    def observe(layer: Layer, activation: Tensor) -> None:
        histograms[layer.name].add(activation.abs())

    def observe_island(island: Any, _: Any, output: Tensor) -> None:
        histograms[island.name].add(output.abs().reshape(len(output), 1, -1))

    hooks = [island.register_forward_hook(observe_island) for island in qann.islands()]

    seen = 0
    try:
        with torch.no_grad():
            for images in batches:
                outputs = qann(images, observe=observe)
                for layer in qann.readouts():
                    output = outputs[layer.name].clamp_min(0)
                    histograms[layer.name].add(output.reshape(len(output), len(layer.clip), -1))
                seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise DataError("calibration: no images; give at least one")
    return histograms


class _Moments:
    """Mean and variance per channel of a tensor, as far as statistics tell."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.variance = mean, variance


def _from_statistics(qann: Qann) -> dict[str, Histogram]:
    """Follow per-channel moments through the network; BatchNorm's own replace the estimate."""
    moments: dict[str, _Moments] = {}
    histograms = {}
    for node in qann.nodes:
        if isinstance(node, Source):
            moments[node.name] = _Moments(torch.zeros(node.shape[0]), torch.ones(node.shape[0]))
        elif isinstance(node, Relay):
            moments[node.name] = _relay_moments(node, [moments[i] for i in node.inputs])
        elif isinstance(node, Island):
            moments[node.name] = _island_moments(node, [moments[i] for i in node.inputs])
            histograms[node.name] = _normal_histogram(moments[node.name], two_sided=True)
        else:
            current = _layer_moments(node, moments)
            histograms[node.name] = _normal_histogram(current, node.two_sided)
            moments[node.name] = current if node.two_sided else _rectified(current)
    return histograms


def _relay_moments(node: Relay, inputs: list[_Moments]) -> _Moments:
    mean, variance = (torch.cat([getattr(m, key) for m in inputs]) for key in ("mean", "variance"))
    if node.op == "slice":
        kept = slice(*node.attributes["slices"][0])
        return _Moments(mean[kept], variance[kept])
    if node.op == "pad":
        return _Moments(*(padded_channels(v, node.attributes["padding"]) for v in (mean, variance)))
    if node.op == "rearrange":
        a = node.attributes
        return _Moments(*(rearranged_channels(v, a["shape"], a["steps"]) for v in (mean, variance)))
    if node.op == "clamp":
        sign = 1 if node.attributes["high"] is None else -1
        part = _rectified(_Moments(sign * mean, variance))
        return _Moments(sign * part.mean, part.variance)
    if node.op == "flatten":
        pixels = node.shape[0] // len(mean)
        return _Moments(mean.repeat_interleave(pixels), variance.repeat_interleave(pixels))
    return _Moments(mean, variance)


def _island_moments(node: Island, inputs: list[_Moments]) -> _Moments:
    """Estimate the moments of a function of independent normal variables by their quantiles."""
    if node.function == "program":
        return _program_moments(node, inputs)
    shares = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normal = torch.special.ndtri(shares)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for given in inputs:
        order = torch.randperm(QUANTILES, generator=generator)
        drawn.append(given.mean.double() + given.variance.double().sqrt() * normal[order, None])
    result = compute(node.function, node.attributes, drawn)
    return _Moments(result.mean(0), result.var(0))


def _program_moments(node: Island, inputs: list[_Moments]) -> _Moments:
    """Estimate the moments of a program's result from images of independent normal numbers."""
    generator = torch.Generator().manual_seed(0)
    largest = max(math.prod(shape) for shape in node.input_shapes)
    images = min(max(NUMBERS_DRAWN // largest, FEWEST_IMAGES), QUANTILES)
    drawn = []
    for given, shape in zip(inputs, node.input_shapes, strict=True):
        normal = torch.randn(images, *shape, generator=generator, dtype=torch.float64)
        deviation = per_channel(given.variance.double().sqrt(), normal.ndim)
        drawn.append(per_channel(given.mean.double(), normal.ndim) + deviation * normal)
    result = compute(node.function, node.attributes, drawn).transpose(0, 1).flatten(1)
    result = result.nan_to_num(0.0, 0.0, 0.0)  # what was drawn may lie where it is infinite
    return _Moments(result.mean(1), result.var(1))


def _branch_moments(branch: Branch, weight: Tensor, source: _Moments) -> _Moments:
    if branch.kind == "scale":
        return _Moments(source.mean * weight, source.variance * weight.square())
    groups = branch.attributes.get("groups", 1)
    rows = weight.detach().flatten(2).transpose(1, 2) if weight.ndim == 4 else weight[:, None]
    grouped = rows.reshape(groups, -1, *rows.shape[1:])
    mean = source.mean.view(groups, 1, 1, -1)
    variance = source.variance.view(groups, 1, 1, -1)
    return _Moments(
        (grouped * mean).sum((2, 3)).flatten(), (grouped.square() * variance).sum((2, 3)).flatten()
    )


def _layer_moments(layer: Layer, moments: dict[str, _Moments]) -> _Moments:
    weighted = [b for b in layer.branches if b.kind != "scale" or b.statistics is not None]
    normalized = bool(weighted) and all(b.statistics is not None for b in weighted)
    mean = torch.zeros_like(layer.bias) if normalized else layer.bias.detach().clone()
    variance = torch.zeros_like(mean)
    counted: set[str] = set()
    for branch, weight in zip(layer.branches, layer.weights, strict=True):
        if normalized and branch.statistics is not None:
            if branch.norm in counted:
                continue
            counted.add(branch.norm)
            mean = mean + branch.statistics[0].float()
            variance = variance + branch.statistics[1].float().square()
        else:
            part = _branch_moments(branch, weight.detach(), moments[branch.source])
            mean, variance = mean + part.mean, variance + part.variance
    return _Moments(mean, variance)


def _rectified(current: _Moments) -> _Moments:
    """Return the moments of `max(0, x)` for normal x."""
    deviation = current.variance.sqrt().clamp_min(1e-12)
    z = current.mean / deviation
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(z)
    mean = current.mean * below + deviation * density
    second = (current.mean.square() + current.variance) * below + current.mean * deviation * density
    return _Moments(mean, (second - mean.square()).clamp_min(0))


def _normal_histogram(current: _Moments, two_sided: bool) -> Histogram:
    """Return the histograms of an activation whose channels are normally distributed."""
    mean, deviation = current.mean.double(), current.variance.double().sqrt().clamp_min(1e-12)
    histogram = Histogram(len(mean))
    reach = mean.abs() if two_sided else mean
    histogram.largest = histogram.range = (reach + 4 * deviation).clamp_min(0)
    histogram.total = 1.0
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64) * histogram.range[:, None]
    mean, deviation = mean[:, None], deviation[:, None]
    histogram.counts = torch.special.ndtr((edges - mean) / deviation).diff(dim=1)
    if two_sided:
        histogram.counts += torch.special.ndtr((edges + mean) / deviation).diff(dim=1)
    return histogram
