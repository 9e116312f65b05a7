"""Reconstruction: less loss on images that taught nothing, and still the same integers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, PREPROCESSING, build, images
from torch import Tensor

from snnconv.calibrate import calibrate_
from snnconv.checkpoint import load_network
from snnconv.cli.main import run
from snnconv.engine import endpoint
from snnconv.errors import DataError, NotEqualError, UsageError
from snnconv.folding import fold
from snnconv.graph import trace
from snnconv.normalize import integerize
from snnconv.pipeline import Conversion, check_equal, convert
from snnconv.plan import make_plan
from snnconv.quant import Qann
from snnconv.reconstruction import Reservoir, reconstruct_

T = 4
PIXELS = images(64, 3)


def calibrated(name: str) -> Qann:
    traced = trace(build(name), PREPROCESSING.input_size)
    qann = fold(traced, make_plan(traced))
    calibrate_(qann, [PREPROCESSING.normalize(PIXELS)], T)
    return qann


def errors(qann: Qann, reference: Qann) -> dict[str, float]:
    """Return how far each layer's counts are worth from the float activations, relative, squared.

    On the images that judge, the first quarter.
    """
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        x = PREPROCESSING.normalize(PIXELS[:16])
        reference(x, observe=lambda layer, a: wanted.update({layer.name: a}))
    network = integerize(qann, PREPROCESSING, T)
    counts = endpoint(network, PIXELS[:16], T).counts
    found = {}
    for p in network.populations:
        clip = p.clip.view(-1, *[1] * (len(p.shape) - 1))
        missed = counts[p.name].double() * clip / T - wanted[p.name]
        found[p.name] = float(missed.norm() / wanted[p.name].double().norm()) ** 2
    return found


def reconstructed(name: str, timesteps: int = T) -> Conversion:
    model = build(name)
    return convert(model, PREPROCESSING, [PIXELS], timesteps=timesteps, calibration="reconstruct")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_reconstructed_network_equals_its_quantised_ann(name: str) -> None:
    conversion = reconstructed(name)
    assert check_equal(conversion, images(6, 11))[0].equal


def test_the_errors_told_are_those_of_the_network() -> None:
    before = calibrated("depthwise")
    after = copy.deepcopy(before)
    result = reconstruct_(after, PREPROCESSING, PIXELS, T)
    assert result.kept and result.held_out_images == 16 and result.images == 48
    assert result.kl_after < result.kl_before  # type: ignore[operator]
    now = errors(after, before)
    fallen = 0
    for row, layer in zip(result.layers, after.populations(), strict=True):
        assert row.layer == layer.path
        assert row.error_after == pytest.approx(now[layer.name], rel=0.01)
        assert (row.error_after < row.error_before) == bool(row.kept)
        fallen += bool(row.kept)
    assert fallen > 2


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "pools"])
def test_the_probabilities_come_no_further_from_the_anns(name: str) -> None:
    before = calibrated(name)
    after = copy.deepcopy(before)
    result = reconstruct_(after, PREPROCESSING, PIXELS, T)
    (readout,) = before.readouts()

    def divergence(qann: Qann) -> float:
        with torch.no_grad():
            x = PREPROCESSING.normalize(PIXELS[:16])
            wanted = before(x)[readout.name].double().softmax(1)
        network = integerize(qann, PREPROCESSING, T)
        logits = endpoint(network, PIXELS[:16], T).logits(network, readout.name)
        found = logits.flatten(1).softmax(1)
        return float((wanted * (wanted / found).log()).sum(1).mean())

    assert divergence(before) == pytest.approx(result.kl_before, rel=1e-2)
    if result.kept:
        assert divergence(after) == pytest.approx(result.kl_after, rel=1e-2)
        assert divergence(after) < divergence(before)
    else:
        assert divergence(after) == divergence(before)


def test_a_reconstruction_that_is_no_gain_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = calibrated("residual")
    after = copy.deepcopy(before)
    judged = iter([1.0, 2.0])
    monkeypatch.setattr("snnconv.reconstruction.divergence", lambda *logits: next(judged))
    result = reconstruct_(after, PREPROCESSING, PIXELS, 3)
    assert any(row.kept for row in result.layers) and not result.kept
    for old, new in zip(before.weighted(), after.weighted(), strict=True):
        assert torch.equal(old.bias, new.bias) and torch.equal(old.clip, new.clip)
        assert all(torch.equal(*pair) for pair in zip(old.weights, new.weights, strict=True))
    for change in result.changes.values():
        assert not bool(change.bias.any()) and not any(
            bool(w.any()) for w in change.weights.values()
        )


def test_changes_are_what_was_added_to_the_ann() -> None:
    conversion = reconstructed("depthwise")
    pretrained = calibrated("depthwise")
    assert conversion.changes is not None
    moved = 0
    for old, new in zip(pretrained.weighted(), conversion.qann.weighted(), strict=True):
        change = conversion.changes[old.name]
        torch.testing.assert_close(old.bias.double() + change.bias, new.bias.double())
        for branch, weight, was in zip(new.branches, new.weights, old.weights, strict=True):
            torch.testing.assert_close(was.double() + change.weights[branch.key], weight.double())
            moved += int(bool(change.weights[branch.key].any()))
    assert moved


@pytest.mark.parametrize("what", ["weights", "bias"])
def test_verification_finds_changes_that_were_not_meant(what: str) -> None:
    conversion = reconstructed("residual")
    assert conversion.changes is not None
    change = conversion.changes[conversion.network.populations[1].name]
    if what == "bias":
        change.bias.add_(0.5)
    else:
        next(iter(change.weights.values())).add_(0.5)
    with pytest.raises(NotEqualError, match="not the ANN's"):
        check_equal(conversion, images(4, 2))


def test_the_integers_are_the_same_every_time() -> None:
    first, second = reconstructed("depthwise").network, reconstructed("depthwise").network
    for a, b in zip(first.populations, second.populations, strict=True):
        assert torch.equal(a.threshold, b.threshold) and torch.equal(a.bias, b.bias)
        for x, y in zip(a.branches, b.branches, strict=True):
            assert torch.equal(x.weight, y.weight)


def test_a_reservoir_gives_every_image_the_same_chance() -> None:
    batches = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).split(7)
    all_of_them, some = Reservoir(100), Reservoir(10)
    for batch in batches:
        assert all_of_them.add(batch) is batch
        some.add(batch)
    assert sorted(all_of_them.images().flatten().tolist()) == list(range(40))
    chosen = some.images().flatten().tolist()
    assert len(set(chosen)) == 10 and max(chosen) > 20 and chosen != sorted(chosen)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="needs images"):
        convert(build("residual"), PREPROCESSING, calibration="reconstruct")
    with pytest.raises(DataError, match="8 images"):
        convert(build("residual"), PREPROCESSING, [PIXELS[:5]], calibration="reconstruct")
    with pytest.raises(UsageError, match="place of training"):
        convert(
            build("residual"),
            PREPROCESSING,
            [PIXELS],
            calibration="reconstruct",
            retrain=lambda *_: {},
        )


DIGITS = ["convert", "zoo:digits", "--data", "zoo:digits", "-T", "3", "-q"]


def test_the_command_reconstructs_where_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*DIGITS, "--epochs", "0"]) == 0
    assert "reconstructed" in capsys.readouterr().out
    report = json.loads(Path("digits.convert.json").read_text())
    assert report["calibration"]["method"] == "reconstruct"
    told = report["reconstruction"]
    assert told == load_network(Path("digits.snn.safetensors")).provenance["reconstruction"]
    assert told["kept"] and told["kl_after"] < told["kl_before"]
    assert {"layer", "kept", "error_before", "error_after"} == set(told["layers"][0])
    assert run([*DIGITS, "--epochs", "0", "--calibration", "mse", "--force"]) == 0
    assert json.loads(Path("digits.convert.json").read_text())["reconstruction"] is None


def test_the_command_refuses_both_training_and_reconstruction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "x.snn.safetensors")
    assert run([*DIGITS, "--calibration", "reconstruct", "-o", output]) == 2
    assert "give --epochs 0" in capsys.readouterr().err
