"""Error compensation: what it changes, and that it takes the mean error away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import PREPROCESSING, build, converted, images
from torch import Tensor

from snnconv.checkpoint import load_network
from snnconv.cli.main import run
from snnconv.compensation import (
    GAINS,
    PATIENCE,
    compensate,
    gain_divergences,
    with_biases,
    with_gain,
)
from snnconv.engine import counts
from snnconv.engine.reference import Engine as Reference
from snnconv.errors import NotEqualError, UsageError
from snnconv.finetune import Course
from snnconv.network import Population, SpikingNetwork
from snnconv.normalize import without_shortcut_normalization
from snnconv.pipeline import Conversion, check_equal, convert

HELD_OUT = images(40, 7)
UNSIGNED = {"neuron": "unsigned", "schedule": "paper"}


def mean_errors(conversion: Conversion, network: SpikingNetwork) -> dict[str, Tensor]:
    """Return per layer and channel what the spikes at T are below the ANN's activations."""
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        conversion.qann(
            PREPROCESSING.normalize(HELD_OUT),
            observe=lambda layer, x: wanted.update({layer.name: x}),
        )
    trace = Reference(network, network.timesteps).simulate(HELD_OUT, network.timetable())
    errors = {}
    for p in network.populations:
        clip = p.clip.view(-1, *[1] * (len(p.shape) - 1))
        missed = wanted[p.name] - trace.counts[p.name] * clip / network.timesteps
        errors[p.name] = missed.double().transpose(0, 1).flatten(1).mean(1) / p.clip
    return errors


@pytest.mark.parametrize("name", ["residual", "concat", "pools", "depthwise"])
def test_biases_take_the_mean_error_away(name: str) -> None:
    conversion = converted(name, timesteps=8, **UNSIGNED)
    network, described = compensate(conversion.network, "bias", conversion.qann, [HELD_OUT])
    assert described == {"kind": "bias", "images": 40}
    before, after = (mean_errors(conversion, n) for n in (conversion.network, network))
    total_before, total_after = (
        sum(float(e.abs().mean()) for e in errors.values()) for errors in (before, after)
    )
    assert total_after < 0.8 * total_before
    for old, new in zip(conversion.network.populations, network.populations, strict=True):
        assert torch.equal(old.threshold, new.threshold)
        assert old.branches == new.branches


@pytest.mark.parametrize("memory", [0, 200_000])
def test_what_is_kept_in_memory_changes_no_bias(
    monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    conversion = converted("residual", timesteps=8, **UNSIGNED)
    batches = [images(5), images(3)]
    expected = with_biases(conversion.network, conversion.qann, batches)
    remembered: list[int] = []
    remember = Course.remember
    monkeypatch.setattr("snnconv.compensation.ARRIVED_BYTES", memory)
    monkeypatch.setattr(
        Course, "remember", lambda *a: remembered.append(remember(*a)) or remembered[-1]
    )
    found = with_biases(conversion.network, conversion.qann, batches)
    for one, two in zip(found.populations, expected.populations, strict=True):
        assert torch.equal(one.bias, two.bias)
    assert 0 in remembered and bool(memory) == any(remembered)


@pytest.mark.parametrize("neuron", ["signed", "unsigned"])
@pytest.mark.parametrize("start", ["half", "zero"])
def test_the_last_counts_are_those_of_a_simulation(neuron: str, start: str) -> None:
    network = converted("concat", timesteps=5, neuron=neuron, initial_membrane=start).network
    pixels = images(6)
    trace = Reference(network, 5).simulate(pixels, network.timetable(name="paper"))
    course = Course(counts.Engine(network, 5), pixels)
    for position, node in enumerate(network.nodes):
        if isinstance(node, Population):
            course.advance(network.nodes, position)
            course.remember(node, 10**9)
            assert torch.equal(course.last(node).long(), trace.counts[node.name].long())
            assert torch.equal(course.last(node), course.fired(node)[-1])


def test_a_gain_multiplies_charges_but_no_bias() -> None:
    network = converted("residual", **UNSIGNED, initial_membrane="zero").network
    changed = with_gain(network, 1.25)
    assert with_gain(network, 1.0).populations[0].threshold.equal(network.populations[0].threshold)
    for old, new in zip(network.populations, changed.populations, strict=True):
        assert old.branches == new.branches
        # One spike, and one step's bias, are worth what they were; a weight is worth more.
        for name in ("threshold", "bias"):
            values = [getattr(p, name) * p.row_unit for p in (old, new)]
            assert bool(((values[0] - values[1]).abs() <= 0.51 * new.row_unit).all())
        torch.testing.assert_close(new.row_unit, 1.25 * old.row_unit)
    assert changed.readouts[0].unit == pytest.approx(1.25 * network.readouts[0].unit)


def test_the_gain_with_the_least_divergence_is_taken() -> None:
    conversion = converted("residual", **UNSIGNED, initial_membrane="zero")
    batches = [HELD_OUT[:25], HELD_OUT[25:]]
    network, described = compensate(conversion.network, "gain", conversion.qann, batches)
    found = gain_divergences(conversion.network, conversion.qann, batches)
    assert tuple(found) == GAINS[: len(found)]
    everything = [len(GAINS), GAINS.index(described["gain"]) + 1 + PATIENCE]
    assert len(found) == min(everything)
    assert described["kl"] == min(found.values()) == found[described["gain"]]
    assert described["kl_without"] == found[1.0]
    expected = with_gain(conversion.network, described["gain"])
    for new, wanted in zip(network.populations, expected.populations, strict=True):
        assert torch.equal(new.threshold, wanted.threshold) and torch.equal(new.bias, wanted.bias)


def test_a_compensated_network_is_checked_as_it_was_before() -> None:
    calibrating = [images(8, 1)]
    settings = {**UNSIGNED, "compensation": "bias", "held_out": [HELD_OUT]}
    conversion = convert(build("residual"), PREPROCESSING, calibrating, timesteps=5, **settings)
    assert conversion.uncompensated is not None
    assert check_equal(conversion, images(4, 2))[0].equal
    bias = conversion.uncompensated.populations[1].bias
    bias += 1
    with pytest.raises(NotEqualError):
        check_equal(conversion, images(4, 2))


def test_shortcuts_that_are_not_normalised_weigh_a_threshold() -> None:
    """An identity's spike brings a whole threshold, whatever its source's is; the rest stays."""
    settings = {"calibration": "percentile", "timesteps": 5}
    whole, without = (
        convert(
            build("residual"), PREPROCESSING, [images(8, 1)], shortcut_normalization=n, **settings
        )
        for n in (True, False)
    )
    assert whole.uncompensated is None and without.uncompensated is not None
    assert check_equal(without, images(4, 2))[0].equal
    identities = 0
    for old, new in zip(whole.network.populations, without.network.populations, strict=True):
        kinds = [s.kind for s in old.branches]
        if "scale" not in kinds or len(kinds) == 1:
            continue
        identities += 1
        (shortcut,) = (s for s in new.branches if s.kind == "scale")
        worth = (shortcut.weight.long() << shortcut.shift.long()).double()
        live = worth != 0
        assert bool(((worth - new.threshold)[live].abs() <= 1).all())
        assert torch.equal(old.clip, new.clip)
    assert identities


def test_a_projection_without_normalisation_is_scaled_with_its_bias() -> None:
    """Its own 99.9 percentile, of weights and bias, becomes the threshold of where it ends."""
    model = build("residual")
    conversion = convert(
        model, PREPROCESSING, [images(8, 1)], timesteps=5, calibration="percentile"
    )
    ablated = without_shortcut_normalization(conversion.qann, PREPROCESSING)
    (layer,) = (n for n in ablated.populations() if n.name == "relu_4")
    with torch.no_grad():
        x = model.stem(PREPROCESSING.normalize(images(4, 2))).relu()
        x = (model.a2(model.a1(x).relu()) + x).relu()
        inner = model.b1(x).relu()
        norm = model.project[1]
        factor = layer.clip / (norm.bias + 3.09 * norm.weight.abs()).max()
        expected = model.b2(inner) + factor.view(1, -1, 1, 1) * model.project(x)
        own = [x if branch.source == "relu_2" else inner for branch in layer.branches]
        torch.testing.assert_close(layer(own), expected, rtol=1e-4, atol=1e-4)


def test_what_makes_no_sense_is_refused() -> None:
    conversion = converted("residual", **UNSIGNED)
    with pytest.raises(UsageError, match="V0 = 0"):
        compensate(conversion.network, "gain", conversion.qann, [HELD_OUT])
    with pytest.raises(UsageError, match="choose from none, gain, bias"):
        compensate(conversion.network, "more", conversion.qann, [HELD_OUT])
    two = converted("two_outputs", **UNSIGNED, initial_membrane="zero")
    with pytest.raises(UsageError, match="no classifier"):
        compensate(two.network, "gain", two.qann, [HELD_OUT])


DIGITS = ["convert", "zoo:digits", "--data", "zoo:digits", "--neuron", "unsigned", "-T", "3"]


def test_the_command_says_what_was_compensated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = [*DIGITS, "--schedule", "paper", "--epochs", "0", "--compensation", "gain"]
    assert run([*whole, "-q"]) == 0
    assert "before compensation" in capsys.readouterr().out
    network = load_network(Path("digits.snn.safetensors"))
    report = json.loads(Path("digits.convert.json").read_text())
    assert report["compensation"] == network.provenance["compensation"]
    assert report["compensation"]["images"] == 200
    assert network.initial_membrane == "zero"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compensation", "bias"], "give --epochs 0"),
        (["--no-shortcut-normalization"], "give --epochs 0"),
        (["--epochs", "0", "--compensation", "gain", "--initial-membrane", "half"], "zero"),
    ],
)
def test_the_command_refuses(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*DIGITS, *options, "-o", str(tmp_path / "x.snn.safetensors")]) == 2
    assert says in capsys.readouterr().err
