"""Analog islands: what is no sum of spikes is computed apart, and verified all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, images
from test_rewrite import Net
from torch import Tensor, nn

from snnconv.checkpoint import load_network, save_network
from snnconv.cli.main import run
from snnconv.engine import ENGINES, endpoint, prepare, simulate
from snnconv.engine.reference import Engine as Reference
from snnconv.errors import NotConvertibleError, NotEqualError
from snnconv.graph import trace
from snnconv.network import Island
from snnconv.pipeline import Conversion, check_equal, convert, float_qann
from snnconv.plan import make_plan


def gated(net: Net, x: Tensor) -> Tensor:
    x = net.second(x)
    gate = torch.sigmoid(F.conv2d(x.mean((2, 3), keepdim=True), net.second.weight[:, :, 1:2, 1:2]))
    return x * gate


def squeezed(net: Net, x: Tensor) -> Tensor:
    """A squeeze-and-excitation block, its gate a clamped line."""
    gate = F.adaptive_avg_pool2d(x, 1)
    gate = F.relu(F.conv2d(gate, net.second.weight[:4, :, 1:2, 1:2]))
    gate = F.hardsigmoid(F.conv2d(gate, net.second.weight[:, :4, :1, :1], net.mean))
    return net.second(x * gate)


BODIES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "silu": lambda n, x: n.second(F.silu(n.second(x))),
    "gelu": lambda n, x: n.second(F.gelu(n.second(x), approximate="tanh")),
    "hardswish, pooled": lambda n, x: F.max_pool2d(F.hardswish(n.second(x)), 2),
    "gated": gated,
    "squeezed": squeezed,
    "added": lambda n, x: x + F.mish(n.second(x)),
    "twice": lambda n, x: n.second(torch.tanh(F.elu(n.second(x)))),
    "of counts": lambda n, x: n.second(x * torch.sigmoid(x)),
    "at the end": lambda n, x: F.silu(n.second(x)),
    "normalised": lambda n, x: F.batch_norm(
        F.softplus(n.second(x)), n.mean, n.variance, n.gain, None, False
    ),
    "squared": lambda n, x: n.second(x) * n.second(x),
}


def converted(name: str, timesteps: int = 6, **settings: object) -> Conversion:
    torch.manual_seed(0)
    model = Net(BODIES[name]).eval()
    return convert(model, PREPROCESSING, [images(8, 1)], timesteps=timesteps, **settings)


@pytest.mark.parametrize("name", BODIES)
def test_islands_are_verified(name: str) -> None:
    conversion = converted(name)
    assert any(isinstance(node, Island) for node in conversion.network.nodes)
    assert check_equal(conversion, images(6, 2))[0].equal


@pytest.mark.parametrize("neuron", ["signed", "unsigned"])
@pytest.mark.parametrize("schedule", ["paper", "drain", "stagger", "wait"])
@pytest.mark.parametrize("name", ["squeezed", "twice", "added"])
def test_engines_agree_on_islands(name: str, schedule: str, neuron: str) -> None:
    network = converted(name, neuron=neuron).network
    timetable = network.timetable(name=schedule, drain=None)
    pixels = images(5, 3)
    truth = Reference(network, network.timesteps).simulate(pixels, timetable)
    for engine in ("counts", "native"):
        found = prepare(network, network.timesteps, engine).simulate(pixels, timetable)
        assert found.steps == truth.steps
        for population in network.populations:
            mine, theirs = found.counts[population.name], truth.counts[population.name]
            assert torch.equal(mine.long(), theirs.long()), population.path
        for readout, charges in truth.charges.items():
            assert torch.equal(found.charges[readout], charges)
        assert torch.equal(found.last_spike, truth.last_spike)


def test_an_island_emits_what_the_function_says() -> None:
    """By hand, neuron by neuron, from the counts before it."""
    network = converted("silu").network
    (island,) = (node for node in network.nodes if isinstance(node, Island))
    (before,) = (p for p in network.populations if p.name == island.inputs[0])
    end = endpoint(network, images(2, 3), network.timesteps)
    counts = end.counts[before.name].numpy()
    spikes = next(p for p in network.populations if p.branches[0].source == island.name)
    found = end.counts[spikes.name].numpy()
    unit, clip, steps = float(island.unit[0]), before.clip.numpy(), network.timesteps
    (synapse,) = spikes.branches
    for at in np.ndindex(counts.shape):
        channel = at[1]
        x = counts[at] * clip[channel] / steps
        emitted = math.floor(steps * min(max(x / (1 + math.exp(-x)) / unit, -256), 256) + 0.5)
        charge = emitted * int(synapse.weight[channel]) << int(synapse.shift[channel])
        charge += steps * int(spikes.bias[channel])
        threshold = int(spikes.threshold[channel])
        wanted = (charge + threshold // 2) // threshold
        assert found[at] == min(max(wanted, -steps), steps)


def test_more_steps_come_closer_to_the_ann() -> None:
    torch.manual_seed(0)
    model = Net(squeezed).eval()
    pixels = images(16, 2)
    expected = model(PREPROCESSING.normalize(pixels)).detach()
    errors = []
    for timesteps in (4, 16, 64):
        network = convert(model, PREPROCESSING, [images(8, 1)], timesteps=timesteps).network
        found = endpoint(network, pixels, timesteps).logits(network, "logits")
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_islands_are_stored(tmp_path: Path) -> None:
    network = converted("squeezed").network
    save_network(network, tmp_path / "a.snn.safetensors")
    again = load_network(tmp_path / "a.snn.safetensors")
    pixels = images(4, 3)
    courses = [simulate(n, pixels, n.timetable()) for n in (network, again)]
    assert torch.equal(courses[0].charges["logits"], courses[1].charges["logits"])


def test_the_float_qann_has_the_same_bounds() -> None:
    conversion = converted("squeezed")
    torch.manual_seed(0)
    qann = float_qann(Net(BODIES["squeezed"]).eval(), conversion.network)
    pixels = PREPROCESSING.normalize(images(4, 5)) * 50
    for timesteps in (None, 6):
        expected = conversion.qann(pixels, timesteps)["logits"]
        assert torch.equal(qann(pixels, timesteps)["logits"], expected)


def test_a_wrong_island_is_found() -> None:
    conversion = converted("silu")
    for node in conversion.network.nodes:
        if isinstance(node, Island):
            node.unit.mul_(1.02)
    with pytest.raises(NotEqualError):
        check_equal(conversion, images(4, 2))


def test_islands_are_named_as_analog() -> None:
    plan = make_plan(trace(Net(squeezed).eval(), PREPROCESSING.input_size))
    roles = {e.operation: e.role for e in plan.entries if e.role == "analog"}
    assert set(roles) == {"hardsigmoid", "mul"}
    assert 0 < 100 - plan.spiking_mac_share < 5


def test_without_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip
    conversion = convert(model, PREPROCESSING, timesteps=15, calibration="bn")
    assert check_equal(conversion, images(4, 2))[0].equal


def test_every_engine_is_tried() -> None:
    assert {"counts", "native", "reference"} <= set(ENGINES)


def test_strict_refuses_islands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(NotConvertibleError, match="no sums of spikes") as raised:
        converted("squeezed", strict=True)
    assert len(raised.value.problems) == 2
    assert run(["check", "test_efficientnet"]) == 0
    assert "2 Sigmoid, 2 mul" in capsys.readouterr().out
    assert run(["check", "test_efficientnet", "--strict", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["verdict"] == "not convertible"
