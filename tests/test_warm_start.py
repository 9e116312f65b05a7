"""Retraining that begins with the integers of a spiking network."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import PREPROCESSING as SMALL
from networks import converted
from torch import Tensor, nn

from snnconv.engine import endpoint
from snnconv.errors import UsageError
from snnconv.normalize import integerize
from snnconv.pipeline import Conversion, convert
from snnconv.train import Student
from snnconv.train.warm_start import warm_start_

T = 5
NETWORKS = ("residual", "pools", "depthwise", "concat", "pyramid")


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *SMALL.input_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def moved(model: nn.Module) -> nn.Module:
    """Return a copy with other weights, biases, gains and statistics."""
    generator = torch.Generator().manual_seed(7)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor *= 1 + 0.8 * torch.rand(tensor.shape, generator=generator)
    return other


def both(name: str, timesteps: int = T) -> tuple[Conversion, Conversion]:
    """Return a conversion, and that of the same network with other parameters."""
    model = converted(name).traced.module
    one, two = (
        convert(m, SMALL, [images(64)], timesteps=timesteps, calibration="percentile")
        for m in (model, moved(model))
    )
    return one, two


def start(one: Conversion, two: Conversion, pixels: Tensor) -> None:
    membrane = one.network.initial_membrane
    warm_start_(one.traced, one.plan, one.qann, SMALL, membrane, two.network, [pixels])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_start_is_the_network_started_from(name: str) -> None:
    one, two = both(name)
    pixels = images(32, 1)
    start(one, two, pixels)
    student = Student(one.traced, one.plan, one.qann, SMALL, T)
    student.refresh()
    found = endpoint(integerize(one.qann, SMALL, T), pixels, T)
    wanted = endpoint(two.network, pixels, T)
    before = endpoint(one.network, pixels, T)
    for population in two.network.populations:
        same = found.counts[population.name] == wanted.counts[population.name]
        assert float(same.float().mean()) > 0.95, population.name
    expected = wanted.logits(two.network, "logits")
    error = float((found.logits(two.network, "logits") - expected).abs().max())
    assert error < 0.1 * float((before.logits(one.network, "logits") - expected).abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norm_has_the_statistics_of_the_start(name: str) -> None:
    """By the batch that was measured, a network in training gives what it gives in inference."""
    one, two = both(name, 255)
    pixels = images(64, 1)
    start(one, two, pixels)
    student = Student(one.traced, one.plan, one.qann, SMALL, 255)
    with torch.no_grad():
        expected = student(pixels)["logits"]
        student.batch_statistics = True
        found = student(pixels)["logits"]
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    if student.norms.norms:
        two.traced.module.train()
        by_others = two.traced.module(SMALL.normalize(pixels)).detach()
        assert float((by_others - expected).abs().max()) > 0.1 * float(expected.abs().max())


def test_what_is_of_another_network_is_refused() -> None:
    one, two = both("residual")
    other = convert(converted("pools").traced.module, SMALL, [images(8)], timesteps=T)
    with pytest.raises(UsageError, match="made from another"):
        start(one, other, images(4))
    darker = replace(two.network, preprocessing=replace(SMALL, mean=(0.1, 0.1, 0.1)))
    with pytest.raises(UsageError, match="prepares its images otherwise"):
        start(one, replace(two, network=darker), images(4))
    empty = replace(two.network, initial_membrane="zero")
    with pytest.raises(UsageError, match="has --initial-membrane zero, this one half"):
        start(one, replace(two, network=empty), images(4))


class Shared(nn.Module):
    """One convolution that becomes two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


def test_what_cannot_be_written_back_is_refused() -> None:
    """Tuned layer by layer, one parameter would have to be two; a large bias hides nothing."""
    model = Shared()
    torch.nn.init.constant_(model.conv.bias, 10.0)
    conversion = convert(model, SMALL, [images(8)], timesteps=T)
    nodes: list[Any] = list(conversion.network.nodes)
    index = nodes.index(conversion.network.populations[1])
    synapse = nodes[index].branches[0]
    nodes[index] = replace(nodes[index], branches=(replace(synapse, weight=-synapse.weight),))
    network = replace(conversion.network, nodes=tuple(nodes))
    fresh = convert(conversion.traced.module, SMALL, [images(8)], timesteps=T)
    with pytest.raises(UsageError, match="cannot be written back"):
        start(fresh, replace(fresh, network=network), images(4))


def test_no_gain_does_no_harm() -> None:
    model = converted("residual").traced.module
    with torch.no_grad():
        model.get_parameter("a1.1.weight").zero_()
    one, two = (convert(m, SMALL, [images(8)], timesteps=T) for m in (model, moved(model)))
    start(one, two, images(8))
    assert all(bool(t.isfinite().all()) for t in one.traced.module.state_dict().values())
