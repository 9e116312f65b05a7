"""Clips from data and from BatchNorm's statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from networks import PREPROCESSING, build, images
from torch import Tensor, nn

from snnconv.calibrate import SMALLEST_SHARE, Histogram, calibrate_
from snnconv.errors import DataError, UsageError
from snnconv.folding import fold
from snnconv.graph import trace
from snnconv.plan import make_plan
from snnconv.quant import Qann, quantize


def qann(name: str = "residual") -> Qann:
    traced = trace(build(name), PREPROCESSING.input_size)
    return fold(traced, make_plan(traced))


def activations(network: Qann, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        network(x, observe=lambda layer, activation: seen.update({layer.name: activation.clone()}))
    return seen


X = PREPROCESSING.normalize(images(12, 2))


class Sums(nn.Module):
    """A BatchNorm over a sum of convolutions."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(count))
        nn.init.constant_(self.norm.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        total = self.convolutions[0](x)
        for convolution in self.convolutions[1:]:
            total = total + convolution(x)
        found: Tensor = self.head(torch.relu(self.norm(total)).mean((2, 3)))
        return found


def test_statistics_of_a_sum_are_counted_once() -> None:
    clips = []
    for count in (1, 4):
        traced = trace(Sums(count).eval(), PREPROCESSING.input_size)
        network = fold(traced, make_plan(traced))
        calibrate_(network, None, 7, "bn")
        clips.append([*network.populations()][-1].clip)
    assert torch.equal(*clips)


def test_a_percentile_among_the_zeros_is_the_largest() -> None:
    histogram = Histogram(1)
    histogram.add(torch.tensor([0.0] * 90 + [1.0] * 9 + [4.0]).view(100, 1))
    assert histogram.percentile(50) == 4
    assert histogram.percentile(95) == pytest.approx(1, rel=0.01)


def test_a_channel_that_is_all_but_silent_is_counted() -> None:
    histogram = Histogram(2)
    histogram.add(torch.tensor([[1e-38, 1.0], [5e-39, 0.5]]))
    assert histogram.counts.sum(1).tolist() == [2, 2]
    assert 0 < float(histogram.least_error_clips(7)[0]) <= 1.001e-38


def test_max_is_the_largest_activation() -> None:
    network = qann()
    calibrate_(network, X.split(5), 7, "max")
    for layer in network.populations():
        largest = activations(network, X)[layer.name].max()
        assert torch.allclose(layer.clip, largest.expand_as(layer.clip))


def test_percentile_leaves_that_share_below() -> None:
    network = qann()
    calibrate_(network, X.split(5), 7, "percentile", percentile=95)
    for layer in network.populations():
        values = activations(network, X)[layer.name].clamp(min=0)
        assert abs(float((values <= layer.clip[0]).float().mean()) - 0.95) < 0.01


@pytest.mark.parametrize("offset", [0.5, 0.0])
def test_mse_is_no_worse_than_any_other_clip_of_a_channel(offset: float) -> None:
    network = qann()
    calibrate_(network, X.split(5), 4, "mse", offset=offset)
    for layer in network.populations():
        values = activations(network, X)[layer.name].clamp(min=0).transpose(0, 1).flatten(1)
        smallest = float(layer.clip.max()) * SMALLEST_SHARE
        assert len(set(layer.clip.tolist())) > 1
        for clip, channel in zip(layer.clip, values, strict=True):

            def error(clip: float, x: Tensor = channel) -> float:
                return float(
                    (quantize(x, torch.tensor(clip), 4, offset=offset) - x).square().mean()
                )

            largest = float(channel.max())
            candidates = [largest * i / 50 for i in range(1, 51)]
            allowed = [c for c in candidates if c >= smallest] or [smallest]
            assert error(float(clip)) <= 1.02 * min(map(error, allowed)) + 1e-5


def test_clips_do_not_depend_on_the_batches() -> None:
    whole, parts = qann(), qann()
    calibrate_(whole, [X], 7)
    calibrate_(parts, X.split(1), 7)
    for a, b in zip(whole.populations(), parts.populations(), strict=True):
        assert abs(float(a.clip[0] / b.clip[0]) - 1) < 0.02


def test_batches_are_read_once_and_one_at_a_time() -> None:
    alive = 0

    def batches() -> Iterator[Tensor]:
        nonlocal alive
        for part in X.split(3):
            alive += 1
            yield part

    calibrate_(qann(), batches(), 7)
    assert alive == 4


def test_without_data_clips_come_from_batch_norm() -> None:
    network = qann()
    calibrate_(network, None, 7, "bn")
    seen = activations(network, X)
    for layer in network.populations():
        clip = float(layer.clip[0])
        assert math.isfinite(clip) and clip > 0
        assert clip < 20 * float(seen[layer.name].abs().max()) + 5


def test_a_natural_clip_is_never_exceeded() -> None:
    for method in ("max", "mse", "percentile", "bn"):
        network = qann("depthwise")
        calibrate_(network, [10 * X], 7, method)
        for layer in network.populations():
            assert layer.cap is None or float(layer.clip.max()) <= layer.cap


def test_a_silent_layer_gets_a_clip() -> None:
    network = qann()
    first = next(network.populations())
    with torch.no_grad():
        for weight in first.weights:
            weight.zero_()
        first.bias.fill_(-1)
    calibrate_(network, [X], 7)
    assert torch.equal(first.clip, torch.ones_like(first.clip))


def test_a_silent_channel_gets_the_largest_clip_of_its_layer() -> None:
    network = qann()
    first = next(network.populations())
    with torch.no_grad():
        first.weights[0][2] = 0
        first.bias[2] = -1
    calibrate_(network, [X], 7)
    assert first.clip[2] == first.clip.max() > first.clip.min()


def test_the_histograms_grow_without_losing_values() -> None:
    histogram = Histogram(2)
    small = torch.cat([torch.rand(1000), 7 * torch.rand(1000), torch.zeros(500)])
    values = torch.stack([small, 100 * small.flip(0)], 1)
    for part in values.split(300):
        histogram.add(part)
    assert histogram.total == 2500
    assert torch.equal(histogram.counts.sum(1).long(), (values > 0).sum(0))
    assert torch.equal(histogram.largest, values.amax(0).double())
    expected = float(values.flatten().quantile(0.7))
    assert abs(histogram.percentile(70) - expected) < 0.002 * float(values.max())


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown calibration"):
        calibrate_(qann(), [X], 7, "guess")
    with pytest.raises(UsageError, match="needs images"):
        calibrate_(qann(), None, 7, "mse")
    with pytest.raises(DataError, match="no images"):
        calibrate_(qann(), [], 7, "mse")
    with pytest.raises(DataError, match="infinite or undefined"):
        calibrate_(qann(), [X * float("nan")], 7, "mse")
