"""Choose the clip of every population without training (method.md, section 5).

Statistics stream through histograms of fixed size, so memory does not grow with the number of
images. Without data, the histograms are computed from BatchNorm's statistics, as the mixture of
one normal distribution per channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from snnconv.errors import DataError, UsageError
from snnconv.plan import Relay, Source
from snnconv.quant import Branch, Layer, Qann, quantize

METHODS = ("mse", "percentile", "max", "bn")
BINS = 2048
CANDIDATES = 256


class Histogram:
    """Counts of activation magnitudes in `BINS` equal bins whose range doubles when needed."""

    def __init__(self) -> None:
        """Start empty."""
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.range = 0.0
        self.largest = 0.0
        self.total = 0.0

    def add(self, values: Tensor) -> None:
        """Add non-negative values of any shape. Raises DataError if one is not finite."""
        largest = float(values.max())
        if not math.isfinite(largest):
            raise DataError("calibration: the network computes infinite or undefined activations")
        self.total += values.numel()
        self.largest = max(self.largest, largest)
        if largest == 0:
            return
        if self.range == 0:
            self.range = largest
        while largest > self.range:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.range *= 2
        positive = values[values > 0].float().cpu()
        self.counts += torch.histc(positive, BINS, 0, self.range).double()

    def percentile(self, percent: float) -> float:
        """Return the value that `percent` of all added values, zeros included, lie below."""
        above = self.total * (1 - percent / 100)
        tail = self.counts.flip(0).cumsum(0).flip(0)
        over = int((tail > above).sum())
        return min(over * self.range / BINS, self.largest)

    def least_error_clip(self, timesteps: int, largest: float) -> float:
        """Return the clip up to `largest` whose T levels have the least mean squared error."""
        centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.range / BINS)
        fractions = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
        clips = (fractions * largest)[:, None]
        errors = (quantize(centers, clips, timesteps) - centers).square() @ self.counts
        return float(clips[errors.argmin()])


def calibrate_(
    qann: Qann,
    batches: Iterable[Tensor] | None,
    timesteps: int,
    method: str = "mse",
    percentile: float = 99.9,
) -> None:
    """Set the clip of every population of a QANN, in place.

    `batches` are normalised images `[N, C, H, W]`, ignored and unnecessary for `bn`. `mse`
    minimises the squared error at T levels, `percentile` is Spiking ResNet's choice, `max` the
    largest activation seen. A natural clip (ReLU6) is never exceeded. Populations that are
    silent get a clip of 1. Raises UsageError for an unknown method or missing data, DataError
    if there are no images.
    """
    if method not in METHODS:
        raise UsageError(f"unknown calibration {method!r}; choose from {', '.join(METHODS)}")
    if method == "bn":
        histograms = _from_statistics(qann)
    elif batches is None:
        raise UsageError(f"calibration {method!r} needs images; without data use 'bn'")
    else:
        histograms = _from_images(qann, batches)
    for layer in qann.populations():
        histogram = histograms[layer.name]
        largest = min(histogram.largest, layer.cap or math.inf)
        if largest == 0:
            clip = layer.cap or 1.0
        elif method == "max":
            clip = largest
        elif method == "percentile":
            clip = min(histogram.percentile(percentile), largest) or largest
        else:
            clip = histogram.least_error_clip(timesteps, largest)
        layer.clip.fill_(clip)


def _from_images(qann: Qann, batches: Iterable[Tensor]) -> dict[str, Histogram]:
    histograms = {layer.name: Histogram() for layer in qann.populations()}

    def observe(layer: Layer, current: Tensor) -> None:
        values = current.abs() if layer.two_sided else current.clamp(min=0)
        histograms[layer.name].add(values.clamp(max=layer.cap) if layer.cap else values)

    seen = 0
    with torch.no_grad():
        for images in batches:
            qann(images, observe=observe)
            seen += len(images)
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
        elif not node.readout:
            current = _layer_moments(node, moments)
            histograms[node.name] = _normal_mixture(current, node.two_sided)
            moments[node.name] = current if node.two_sided else _rectified(current)
    return histograms


def _relay_moments(node: Relay, inputs: list[_Moments]) -> _Moments:
    mean, variance = (torch.cat([getattr(m, key) for m in inputs]) for key in ("mean", "variance"))
    channels = node.shape[0]
    if node.op == "slice":
        kept = slice(*node.attributes["slices"][0])
        return _Moments(mean[kept], variance[kept])
    if node.op == "pad" and channels != len(mean):
        before = node.attributes["padding"][4]
        grown = torch.zeros(2, channels)
        grown[:, before : before + len(mean)] = torch.stack([mean, variance])
        return _Moments(grown[0], grown[1])
    if node.op == "flatten":
        pixels = channels // len(mean)
        return _Moments(mean.repeat_interleave(pixels), variance.repeat_interleave(pixels))
    return _Moments(mean, variance)


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
    for branch, weight in zip(layer.branches, layer.weights, strict=True):
        if normalized and branch.statistics is not None:
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


def _normal_mixture(current: _Moments, two_sided: bool) -> Histogram:
    """Return the histogram of an activation whose channels are normally distributed."""
    histogram = Histogram()
    mean, deviation = current.mean.double(), current.variance.double().sqrt().clamp_min(1e-12)
    reach = mean.abs() if two_sided else mean
    histogram.largest = histogram.range = max(float((reach + 4 * deviation).max()), 0.0)
    histogram.total = float(len(mean))
    edges = torch.linspace(0, histogram.range or 1.0, BINS + 1, dtype=torch.float64)[:, None]
    mass = torch.special.ndtr((edges - mean) / deviation).diff(dim=0)
    if two_sided:
        mass = mass + torch.special.ndtr((edges + mean) / deviation).diff(dim=0)
    histogram.counts = mass.sum(1)
    return histogram
