"""Analog islands: what is no sum of spikes is computed apart, and verified all the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, images
from test_rewrite import Net
from torch import Tensor, nn

from snnconv.checkpoint import load_network, save_network
from snnconv.cli.main import run
from snnconv.engine import ENGINES, endpoint, prepare, simulate
from snnconv.engine.reference import Engine as Reference
from snnconv.errors import CheckpointError, NotConvertibleError, NotEqualError
from snnconv.graph import trace
from snnconv.network import Island
from snnconv.pipeline import Conversion, check_equal, convert, float_qann
from snnconv.plan import make_plan
from snnconv.train.student import Student


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


def convnext(net: Net, x: Tensor) -> Tensor:
    """A ConvNeXt block: normalised and mixed with the channels last, weighed, added."""
    y = net.layer_norm(net.second(x).permute(0, 2, 3, 1))
    y = net.linear(F.gelu(net.linear(y))) * net.gain
    return x + y.permute(0, 3, 1, 2)


def response_normalised(net: Net, x: Tensor) -> Tensor:
    """Channels measured against each other, over all pixels."""
    y = net.linear(x.permute(0, 2, 3, 1))
    length = y.norm(p=2, dim=(1, 2), keepdim=True)
    share = length / (length.mean(-1, keepdim=True) + 1e-6)
    y = y + torch.addcmul(net.mean.view(1, 1, 1, -1), net.gain.view(1, 1, 1, -1), y * share)
    return y.permute(0, 3, 1, 2)


def efficient_channels(net: Net, x: Tensor) -> Tensor:
    y = net.over_channels(x.mean((2, 3)).view(x.shape[0], 1, -1))
    y = torch.sigmoid(y).view(x.shape[0], -1, 1, 1)
    return net.second(x * y.expand_as(x))


def selective(net: Net, x: Tensor) -> Tensor:
    """Two paths, each with a share of every channel."""
    paths = torch.stack([F.relu(net.second(x)), x], dim=1)
    pooled = paths.sum(1).mean((2, 3), keepdim=True)
    weight = torch.cat([net.second.weight, -net.second.weight])[:, :, 1:2, 1:2]
    shares = F.conv2d(pooled, weight).view(x.shape[0], 2, 8, 1, 1).softmax(1)
    return (paths * shares).sum(1)


def split_attention(net: Net, x: Tensor) -> Tensor:
    x = F.relu(net.second(x))
    batch, _, height, width = x.shape
    apart = x.reshape((batch, 2, 4, height, width))
    pooled = apart.sum(dim=1).mean((2, 3), keepdim=True)
    scores = F.conv2d(pooled, net.second.weight[:, :4, 1:2, 1:2])
    scores = F.softmax(scores.view(batch, 1, 2, -1).transpose(1, 2), dim=1).reshape(batch, -1)
    apart = (apart * scores.view(batch, -1, 1, 1).reshape((batch, 2, 4, 1, 1))).sum(dim=1)
    return torch.cat([apart, apart], 1).contiguous()


def context(net: Net, x: Tensor) -> Tensor:
    """A mean over pixels, weighted by a softmax."""
    batch, channels, height, width = x.shape
    weights = F.conv2d(x, net.second.weight[:1, :, 1:2, 1:2]).reshape(batch, 1, height * width)
    weights = F.softmax(weights, dim=-1).unsqueeze(3)
    mean = (x.reshape(batch, channels, -1).unsqueeze(1) @ weights).view(batch, channels, 1, 1)
    return x + net.second(mean) + x * torch.sigmoid(mean)


def spatial(net: Net, x: Tensor) -> Tensor:
    """A gate per pixel, from the mean and the largest of all channels."""
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * torch.sigmoid(F.conv2d(seen, net.second.weight[:1, :2], padding=1))


def root_mean_square(net: Net, x: Tensor) -> Tensor:
    x = net.second(x)
    return x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-6) * net.gain.view(-1, 1, 1)


def shuffled(net: Net, x: Tensor) -> Tensor:
    """Pixels of four channels in one, and back."""
    return F.pixel_unshuffle(F.relu(F.pixel_shuffle(net.second(x), 2) - 0.1), 2)


def normalised_vectors(net: Net, x: Tensor) -> Tensor:
    vectors = F.normalize(x.mean((2, 3)), dim=1)
    return (net.layer_norm(vectors) - vectors)[..., None, None]


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
    "filter response": lambda n, x: (
        n.second(x)
        * torch.rsqrt(n.second(x)[..., :1].square().mean((2, 3), keepdim=True) * 1e-3 + 1e-6)
    ),
    "squared": lambda n, x: n.second(x) * n.second(x),
    "convnext": convnext,
    "groups": lambda n, x: F.relu(n.group_norm(n.second(x))) + x,
    "response normalised": response_normalised,
    "efficient channels": efficient_channels,
    "selective": selective,
    "split attention": split_attention,
    "context": context,
    "spatial": spatial,
    "root mean square": root_mean_square,
    "shuffled": shuffled,
    "normalised vectors": normalised_vectors,
    "axes turned": lambda n, x: n.second(x.reshape(x.shape[0], 12, 8, 12).transpose(1, 2)),
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
    torch.manual_seed(0)
    model, pixels = Net(BODIES[name]).eval(), PREPROCESSING.normalize(images(6, 2))
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(conversion.traced.module(pixels), expected)
        found = conversion.qann(pixels)["logits"]  # within the bounds that calibration has found
    assert float((found - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("name", BODIES)
def test_islands_need_no_data(name: str) -> None:
    torch.manual_seed(0)
    model = Net(BODIES[name]).eval()
    conversion = convert(model, PREPROCESSING, timesteps=15, calibration="bn")
    assert check_equal(conversion, images(4, 2))[0].equal


def programs(conversion: Conversion) -> list[Island]:
    return [n for n in conversion.network.nodes if getattr(n, "function", "") == "program"]


PROGRAMS = list(BODIES)[list(BODIES).index("convnext") :]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_program_is_found(name: str) -> None:
    """One that squares what it should give."""
    conversion = converted(name)
    assert programs(conversion)
    for island in programs(conversion):
        steps = island.attributes["steps"]
        last = (f"s{len(steps) - 1}",)
        island.attributes["steps"] = (*steps, ("mul", last * 2, {}))
        with pytest.raises(NotEqualError):
            check_equal(conversion, images(4, 2))
        island.attributes["steps"] = steps


def test_a_wrong_constant_of_a_program_is_found() -> None:
    conversion = converted("efficient channels")
    (island,) = programs(conversion)
    weight, _ = island.attributes["constants"]
    weight[0, 0, 2] *= 1.5
    with pytest.raises(NotEqualError):
        check_equal(conversion, images(4, 2))


@pytest.mark.parametrize(
    "name", ["filter response", "convnext", "response normalised", "split attention"]
)
def test_islands_can_be_trained_through(name: str) -> None:
    """What trains stands in front of them too; a program's own constants stay."""

    def retrain(traced: Any, plan: Any, qann: Any) -> dict[str, Any]:
        student = Student(traced, plan, qann, PREPROCESSING, 6)
        student(images(8, 1))["logits"].square().sum().backward()
        first = student.network.get_parameter("stem.weight")
        assert first.grad is not None and float(first.grad.abs().sum()) > 0
        with torch.no_grad():
            for parameter in student.trained():
                assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
                parameter -= 1e-2 * parameter.grad.sign()
        student.refresh()
        return {}

    before, after = (converted(name, retrain=how).network for how in (None, retrain))
    weights = [n.populations[0].branches[0].weight for n in (before, after)]
    assert not torch.equal(*weights)
    assert check_equal(converted(name, retrain=retrain), images(4, 2))[0].equal


@pytest.mark.parametrize(
    "name",
    ["test_convnext2", "test_nfnet", "test_efficientnet_gn", "test_efficientnet_evos",
     "test_mambaout"],
)  # fmt: skip
def test_networks_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    preprocessing = replace(PREPROCESSING, input_size=(3, 64, 64))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    conversion = convert(model, preprocessing, [pixels], timesteps=15)
    assert any(isinstance(node, Island) for node in conversion.network.nodes)
    assert check_equal(conversion, pixels)[0].equal


@pytest.mark.parametrize(
    "steps",
    [
        (("sin", ("x0",), {}),),
        (("mul", ("x0", "s1"), {}),),
        (("reshape", ("x0",), {"shape": (7,)}),),
        (("softmax", ("x0",), {"axis": 0}),),
        (("standardize", ("x0",), {"axes": (0, 1), "eps": 1e-5}),),
        (("permute", ("x0",), {"axes": (1, 0, 2, 3)}),),
        (("standardize", ("x0",), {"axes": (), "eps": 1e-5}),),
        (("mean", ("x0",), {"axes": (-1,)}), ("expand", ("s0",), {"shape": (8, 12, 12)})),
        (
            ("reshape", ("x0",), {"shape": (8, 144, 1)}),
            ("expand", ("s0",), {"shape": (8, 144, 2**40)}),
            ("sum", ("s1",), {"axes": (3,)}),
            ("reshape", ("s2",), {"shape": (8, 12, 12)}),
        ),
    ],
)
def test_a_program_that_cannot_run_is_refused(steps: object, tmp_path: Path) -> None:
    network = converted("convnext").network
    island = next(n for n in network.nodes if getattr(n, "function", "") == "program")
    island.attributes["steps"] = steps  # type: ignore[union-attr]
    save_network(network, tmp_path / "a.snn.safetensors")
    with pytest.raises(CheckpointError):
        load_network(tmp_path / "a.snn.safetensors")


def test_what_is_not_defined_is_nothing_also_after_a_reconstruction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(BODIES["filter response"]).eval()
    pixels = torch.cat([images(8, 1), torch.full((8, 3, 12, 12), 128, dtype=torch.uint8)])
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=3, calibration="reconstruct")
    assert check_equal(conversion, pixels)[0].equal
    found = conversion.network.provenance["reconstruction"]
    assert math.isfinite(found["kl_before"]) and math.isfinite(found["kl_after"])
    save_network(conversion.network, tmp_path / "a.snn.safetensors")


@pytest.mark.parametrize("neuron", ["signed", "unsigned"])
@pytest.mark.parametrize("schedule", ["paper", "drain", "stagger", "wait"])
@pytest.mark.parametrize("name", ["squeezed", "twice", "added", "convnext", "context"])
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


@pytest.mark.parametrize("name", ["squeezed", "efficient channels", "context"])
def test_islands_are_stored(name: str, tmp_path: Path) -> None:
    network = converted(name).network
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
    printed = capsys.readouterr().out
    assert "2 Sigmoid" in printed and "2 mul" in printed
    assert run(["check", "test_efficientnet", "--strict", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["verdict"] == "not convertible"
