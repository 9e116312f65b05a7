"""Engines agree bit for bit, and exact schedules end at the end point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, PREPROCESSING, converted, images
from torch import Tensor, nn

from snnconv.engine import Trace, counts, endpoint, native, prepare, simulate
from snnconv.engine.linear import bytes_multiply, exact_dtype
from snnconv.errors import SnnconvError, UsageError
from snnconv.network import SpikingNetwork
from snnconv.normalize import with_settings
from snnconv.pipeline import check_equal, convert
from snnconv.preprocess import Preprocessing

SCHEDULES = [
    {"name": "paper"},
    {"name": "drain"},
    {"name": "drain", "drain": 2},
    {"name": "stagger"},
    {"name": "stagger", "stagger": 2},
    {"name": "wait"},
]
NAMES = sorted(NETWORKS)


@cache
def network(name: str, seed: int = 0, timesteps: int = 5) -> SpikingNetwork:
    return converted(name, seed, timesteps).network


def differences(a: Trace, b: Trace) -> list[str]:
    """Name everything in which two traces differ."""
    found = []
    if a.steps != b.steps or a.bias_steps != b.bias_steps:
        found.append("steps")
    for what in ("charges", "counts", "spikes", "events"):
        left, right = getattr(a, what), getattr(b, what)
        if left is None or right is None:
            assert left is right
            continue
        assert left.keys() == right.keys()
        for name in left:
            if not torch.equal(left[name].long(), right[name].long()):
                found.append(f"{what} of {name}")
    if not torch.equal(a.last_spike, b.last_spike):
        found.append("last spike")
    return found


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("name", NAMES)
def test_engines_agree_bit_for_bit(name: str, schedule: dict) -> None:
    for seed, timesteps, neuron, start in (
        (0, 5, "signed", "half"),
        (1, 5, "unsigned", "half"),
        (1, 3, "signed", "zero"),
    ):
        net = with_settings(network(name, seed), neuron=neuron, initial_membrane=start)
        timetable = net.timetable(timesteps, **schedule)
        pixels = images(5, seed)
        fast = simulate(net, pixels, timetable, "counts", events=True)
        slow = simulate(net, pixels, timetable, "reference", events=True)
        assert slow.events
        assert not differences(fast, slow)


@pytest.mark.parametrize("timesteps", [1, 4, 11, 40])
@pytest.mark.parametrize("name", NAMES)
def test_exact_schedules_end_at_the_end_point(name: str, timesteps: int) -> None:
    net = network(name, 1)
    pixels = images(4, 3)
    end = endpoint(net, pixels, timesteps)
    for schedule in ({"name": "drain"}, {"name": "stagger"}, {"name": "wait"}):
        course = simulate(net, pixels, net.timetable(timesteps, **schedule))
        for population in net.populations:
            assert torch.equal(course.counts[population.name], end.counts[population.name])
        for readout in net.readouts:
            assert torch.equal(course.charges[readout.name][-1], end.charges[readout.name])
            final = course.logits(net, readout.name)[-1]
            assert torch.equal(final, end.logits(net, readout.name))


@pytest.mark.parametrize("name", ["residual", "concat"])
def test_wait_is_exact_and_positive_for_unsigned_neurons(name: str) -> None:
    net = with_settings(network(name), neuron="unsigned")
    pixels = images(4)
    course = simulate(net, pixels, net.timetable(name="wait"))
    end = endpoint(net, pixels, net.timesteps)
    for population in net.populations:
        counts_ = course.counts[population.name]
        assert torch.equal(counts_, end.counts[population.name])
        positive, negative = course.spikes[population.name].sum(0).tolist()
        assert negative == 0
        assert positive == int(counts_.long().sum())


def test_the_paper_schedule_is_not_exact() -> None:
    net = network("residual", 0)
    pixels = images(16)
    course = simulate(net, pixels, net.timetable(name="paper"))
    end = endpoint(net, pixels, net.timesteps)
    assert any(not torch.equal(course.counts[k], end.counts[k]) for k in end.counts)


def test_paper_at_t_equals_a_run_with_fewer_steps() -> None:
    net = network("residual", 0)
    long = simulate(net, images(4), net.timetable(6, name="paper"))
    short = simulate(net, images(4), net.timetable(4, name="paper"))
    # The cap of a count is T, which no neuron reaches before step T.
    assert torch.equal(long.charges["logits"][3], short.charges["logits"][3])


@pytest.mark.parametrize("engine", ["auto", "counts", "reference"])
def test_an_image_does_not_depend_on_its_batch(engine: str) -> None:
    net = network("residual", 1)
    pixels = images(6)
    together = simulate(net, pixels, net.timetable(), engine)
    for i in range(6):
        alone = simulate(net, pixels[i : i + 1], net.timetable(), engine)
        assert int(together.last_spike[i]) == int(alone.last_spike[0])
        charges = together.charges["logits"][:, i]
        assert torch.equal(charges[: alone.steps], alone.charges["logits"][:, 0])
        assert torch.equal(charges[-1], alone.charges["logits"][-1, 0])


def test_the_size_of_chunks_and_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network("pools", 1)
    whole = simulate(net, images(5), net.timetable(9), "reference")
    monkeypatch.setattr(counts, "BLOCK_STEPS", 2)
    monkeypatch.setattr(counts, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(native, "PASS_BYTES", 1)
    for engine in ("auto", "counts"):
        assert not differences(whole, simulate(net, images(5), net.timetable(9), engine))


def test_a_planted_mistake_is_noticed() -> None:
    net = network("residual", 0)
    nodes = list(net.nodes)
    where = next(i for i, n in enumerate(nodes) if n is net.populations[1])
    nodes[where] = replace(nodes[where], threshold=nodes[where].threshold + 300)
    other = replace(net, nodes=tuple(nodes))
    timetable = net.timetable()
    a, b = simulate(net, images(4), timetable), simulate(other, images(4), timetable)
    assert differences(a, b)


def test_large_integers_take_a_wider_type() -> None:
    assert exact_dtype(2**24 - 1) == torch.float32
    assert exact_dtype(2**24) == torch.float64
    with pytest.raises(SnnconvError, match="smaller --timesteps"):
        exact_dtype(2**53)


def test_engines_agree_beyond_float32() -> None:
    net = network("residual", 0)
    assert net.count_limits(4000)["relu"][1] == 4000
    pixels = images(1)
    timetable = net.timetable(600, name="paper")
    fast, slow = (simulate(net, pixels, timetable, e) for e in ("counts", "reference"))
    assert not differences(fast, slow)


def test_wrong_requests_are_refused() -> None:
    net = network("residual", 0)
    with pytest.raises(UsageError, match="unknown engine"):
        simulate(net, images(1), net.timetable(), "fast")
    with pytest.raises(UsageError, match="3x12x12, not 3x12x10"):
        simulate(net, images(1)[..., :10], net.timetable())
    for engine in ("counts", "reference", "auto"):
        ready = prepare(net, 5, engine)
        for schedule in (net.timetable(4), replace(net.timetable(5), depth=2)):
            with pytest.raises(UsageError, match="the schedule is for T"):
                ready.simulate(images(1), schedule)
        for pixels in (images(1)[:0], images(1).float()):
            with pytest.raises(UsageError, match=r"at least one image|tensors of uint8"):
                ready.simulate(pixels, net.timetable(5))
            with pytest.raises(UsageError, match=r"at least one image|tensors of uint8"):
                ready.endpoint(pixels)


@pytest.mark.parametrize("neuron", ["signed", "unsigned"])
@pytest.mark.parametrize("name", NAMES)
def test_counts_that_are_no_bytes_are_convolved_by_how_they_move(name: str, neuron: str) -> None:
    net = with_settings(network(name), neuron=neuron)
    timetable = net.timetable(300, name="paper")
    engine = counts.Engine(net, 300)
    found = engine.simulate(images(3), timetable)
    assert not differences(found, simulate(net, images(3), timetable, "reference"))
    charges = [engine.charge(p) for p in net.populations]
    apart = [
        b is not None and not w for c in charges for b, w in zip(c.in_bytes, c.whole, strict=True)
    ]
    assert any(apart) or not bytes_multiply(torch.device("cpu"))


@pytest.mark.parametrize("steps", [2, 128, 255, 256, 600])
def test_counts_beyond_a_byte_are_convolved_by_their_moves(steps: int) -> None:
    net = network("residual", timesteps=700)
    engine = counts.Engine(net, 700)
    (node,) = (p for p in net.populations if p.name == "relu_1")
    (synapse,) = node.branches
    draw = torch.Generator().manual_seed(steps)
    moves = torch.randint(-1, 2, (steps, 2, *net.populations[0].shape), generator=draw)
    course = (350 + moves.cumsum(0)).clamp(0, 700)
    weight = synapse.weight.double()
    padding = synapse.attributes["padding"][0]
    expected = torch.nn.functional.conv2d(course.flatten(0, 1).double(), weight, padding=padding)
    expected = expected * torch.exp2(synapse.shift.double()).view(-1, 1, 1)
    found = engine.charge(node).current(0, course.short())
    assert torch.equal(found.flatten(0, 1).double(), expected)


class Between(nn.Module):
    """Something between a neuron and a convolution."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.last = nn.Conv2d(3, 4, 3, padding=1), body, nn.LazyConv2d(4, 3)
        scales = torch.tensor([0.1, 1.0, 5.0, 20.0])
        self.first.weight.data *= scales.view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.body(F.relu(self.first(x))))).mean((2, 3))


UNUSUAL = {
    # Shapes at which oneDNN's convolution of bytes errs, and crashes.
    "one channel per group": nn.Sequential(
        nn.Conv2d(4, 16, (3, 12), stride=(1, 2), padding=(1, 0), groups=4), nn.ConstantPad2d(2, 0)
    ),
    "padding alone": nn.Conv2d(4, 5, 1, stride=(1, 3), padding=2, dilation=(3, 2)),
    "channels shifted": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "channels cropped": lambda x: F.pad(x, (0, 0, 0, 0, 0, -2)),
    "a scale that is not whole": nn.Upsample(scale_factor=2.3),
    "nearest exactly": lambda x: F.interpolate(x, size=(17, 9), mode="nearest-exact"),
    "a pool wider than high": lambda x: F.max_pool2d(
        x[..., :11], (1, 2), (1, 3), (0, 1), ceil_mode=True
    ),
    "keywords": lambda x: torch.add(torch.cat([x, x], axis=1), other=torch.cat([x, x], axis=1)),
}


@pytest.mark.parametrize("body", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_operations_are_computed_alike_everywhere(body: Callable) -> None:
    model, pixels = Between(body), images(4, 5)
    model(PREPROCESSING.normalize(pixels))
    conversion = convert(model.eval(), PREPROCESSING, [pixels], timesteps=7)
    assert check_equal(conversion, pixels)[0].equal
    net = conversion.network
    traces = [
        simulate(net, pixels, net.timetable(), engine, events=True)
        for engine in ("reference", "counts", "native")
    ]
    assert not differences(traces[0], traces[1]) and not differences(traces[0], traces[2])
    fine = convert(model, PREPROCESSING, [pixels], timesteps=1000).network
    with torch.no_grad():
        expected = model(PREPROCESSING.normalize(pixels))
    error = (endpoint(fine, pixels, 1000).logits(fine, "logits") - expected).abs().max()
    assert error < 0.02 * expected.abs().max()


def test_two_sided_counts_may_go_from_end_to_end_in_every_layer() -> None:
    """Steep layers that have all filled up the wrong way, and take it back one after another."""
    layers = [nn.Conv2d(1, 1, 1) for _ in range(8)]
    biases = [0.0, -32 * 0.55 / 7, *[-30.5] * 6]
    for layer, weight, bias in zip(layers, [1.2, *[32.0] * 7], biases, strict=True):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Hardtanh())), nn.Flatten())
    preprocessing = Preprocessing((1, 1, 1), (0.0,), (1.0,))
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    net = convert(model.eval(), preprocessing, [ends], timesteps=7, calibration="max").network
    pixels = torch.full((1, 1, 1, 1), 16, dtype=torch.uint8)
    end = endpoint(net, pixels, 7)
    for engine in ("reference", "counts", "native"):
        trace = simulate(net, pixels, net.timetable(name="drain"), engine)
        assert all(torch.equal(trace.counts[name], end.counts[name]) for name in end.counts)
    assert trace.steps > 7 * (net.depth + 2)


def test_moves_whose_sums_are_too_large_for_float32_are_not_convolved_in_bytes() -> None:
    """Charges of a wide readout, all of whose inputs fire in every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 600, 7, bias=True), nn.ReLU(), nn.Conv2d(600, 1, 6))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    nn.init.uniform_(model[2].weight, 0.93, 1.0)
    model.append(nn.Flatten())
    pixels = images(1)
    net = convert(model.eval(), PREPROCESSING, [pixels], timesteps=15).network
    charges = [
        simulate(net, pixels, net.timetable(), engine).charges["logits"]
        for engine in ("reference", "counts")
    ]
    assert int(charges[0].max()) > 2**24
    assert torch.equal(charges[0].long(), charges[1].long())
