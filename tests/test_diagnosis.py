"""The diagnosis names the cause and the layer that were made worse on purpose."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import NETWORKS, PREPROCESSING, build, converted, images
from torch import nn

from snnconv.calibrate import calibrate_
from snnconv.diagnosis import (
    CLIPPING,
    INTEGERS,
    LEVELS,
    OTHER_WEIGHTS,
    TIME,
    _Chain,
    diagnose,
    images_at_once,
    mend,
)
from snnconv.engine import endpoint, prepare
from snnconv.folding import fold
from snnconv.graph import trace
from snnconv.network import SpikingNetwork
from snnconv.normalize import integerize, network_qann
from snnconv.pipeline import convert, float_qann
from snnconv.plan import make_plan
from snnconv.progress import Progress
from snnconv.schedule import Schedule

CLASSIFIERS = sorted(set(NETWORKS) - {"two_outputs"})


def found(network: SpikingNetwork, model: nn.Module | None, schedule: str = "drain") -> dict:
    timetable = network.timetable(name=schedule)
    runner = prepare(network, timetable.timesteps)
    return diagnose(network, runner, images(40, 2), timetable, model)


def sure(seed: int = 0) -> nn.Module:
    """Build a network that is sure of its classes, so that there is something to lose."""
    model = build("residual", seed)
    model.head.weight.data *= 150
    return model


def with_clip(layer: str, factor: float, timesteps: int = 31) -> SpikingNetwork:
    """Convert a network with one layer's clip changed."""
    traced = trace(sure(), PREPROCESSING.input_size)
    qann = fold(traced, make_plan(traced))
    calibrate_(qann, [PREPROCESSING.normalize(images(24, 1))], timesteps, method="max")
    (changed,) = (x for x in qann.populations() if x.path == layer)
    changed.clip *= factor
    return integerize(qann, PREPROCESSING, timesteps)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_errors_add_up_and_end_where_the_network_does(name: str) -> None:
    network = converted(name).network
    diagnosis = found(network, build(name), "paper")
    assert diagnosis["stages"] == [CLIPPING, LEVELS, INTEGERS, TIME]
    pixels = images(40, 2)
    qann = float_qann(build(name), network)
    wanted: dict[str, torch.Tensor] = {}
    qann(PREPROCESSING.normalize(pixels), observe=lambda layer, x: wanted.update({layer.name: x}))
    course = prepare(network, 5).simulate(pixels, network.timetable(name="paper"))
    for row, p in zip(diagnosis["layers"], network.populations, strict=True):
        assert row["layer"] == p.path
        assert sum(row["by_cause"].values()) == pytest.approx(row["cumulative"][TIME])
        value = course.counts[p.name] * (p.clip / 5).view(-1, *[1] * (len(p.shape) - 1))
        exact = wanted[p.name].detach().double().view_as(value)
        error = float(((value - exact) ** 2).sum() / (exact**2).sum())
        assert row["cumulative"][TIME] == pytest.approx(error, rel=1e-4)
    assert not any(row["by_cause"][TIME] for row in found(network, build(name))["layers"])


@pytest.mark.parametrize("timesteps", [3, 31])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_networks_integers_as_floats_end_where_it_ends(name: str, timesteps: int) -> None:
    network = converted(name, timesteps=timesteps).network
    qann = network_qann(float_qann(build(name), network), network, timesteps)
    end = endpoint(network, images(8, 3), timesteps)
    clips = {p.name: p.clip for p in network.populations}

    def observe(layer: nn.Module, x: torch.Tensor) -> None:
        step = (clips[layer.name] / timesteps).view(-1, *[1] * (x.ndim - 2))
        counts = (x / step).round().view_as(end.counts[layer.name])
        assert torch.equal(counts.long(), end.counts[layer.name].long()), layer.name

    centered = PREPROCESSING.center(images(8, 3)).double()
    qann(centered, timesteps, offset=network.rounding_offset, observe=observe)


def test_a_clip_that_is_too_low_is_named() -> None:
    healthy = found(with_clip("relu_2", 1), sure())
    ill = found(with_clip("relu_2", 0.2), sure())
    assert (ill["mend"]["layer"], ill["mend"]["cause"]) == ("relu_2", CLIPPING)
    assert ill["mend"]["share_percent"] > 50
    assert "clip" in ill["mend"]["suggestion"]
    assert ill["output"]["kl"][CLIPPING] > 10 * healthy["output"]["kl"][CLIPPING]


def test_a_clip_that_is_too_high_leaves_few_levels() -> None:
    ill = found(with_clip("relu_2", 40), sure())
    assert (ill["mend"]["layer"], ill["mend"]["cause"]) == ("relu_2", LEVELS)


def test_a_weight_that_was_changed_is_no_rounding() -> None:
    network = convert(sure(), PREPROCESSING, [images(8, 1)], timesteps=31).network
    kl = found(network, sure())["output"]["kl"]
    assert kl[INTEGERS] - kl[LEVELS] < 0.01
    nodes = list(network.nodes)
    (at,) = (k for k, n in enumerate(nodes) if getattr(n, "path", "") == "relu_2")
    nodes[at] = replace(nodes[at], bias=nodes[at].bias + nodes[at].threshold)
    wrong = found(replace(network, nodes=tuple(nodes)), sure())
    rises = [row["by_cause"][INTEGERS] for row in wrong["layers"]]
    paths = [row["layer"] for row in wrong["layers"]]
    assert all(rise < 0.01 for rise in rises[: paths.index("relu_2")])
    assert rises[paths.index("relu_2")] > 0.1
    assert wrong["mend"]["cause"] == INTEGERS


def test_neurons_that_cannot_take_spikes_back_lose_by_time() -> None:
    network = convert(sure(1), PREPROCESSING, [images(8, 1)], timesteps=3).network
    network = replace(network, neuron="unsigned")
    diagnosis = found(network, sure(1), "paper")
    assert diagnosis["mend"]["cause"] == TIME
    assert "--schedule drain" in diagnosis["mend"]["suggestion"]
    alone = found(network, None, "paper")
    assert (alone["against"], alone["stages"]) == ("qann", [TIME])
    assert alone["restored"] is None
    assert alone["mend"]["cause"] == TIME


def test_learnt_weights_are_a_cause_of_their_own() -> None:
    network = converted("residual").network
    told = {**network.provenance, "retraining": {"settings": {}}}
    diagnosis = found(replace(network, provenance=told), build("residual"))
    assert diagnosis["stages"] == [OTHER_WEIGHTS, LEVELS, TIME]


def test_advice_against_lost_time_is_of_what_is_not_done_yet() -> None:
    row = {"layer": "relu", "by_cause": {TIME: 1.0}}
    lost = {"output": {"kl": {TIME: 1.0}}, "restored": None, "layers": [row]}
    for name, drain, wanted in (
        ("paper", None, "--schedule drain"),
        ("drain", 1, "--drain auto"),
        ("stagger", 0, "--drain auto"),
        ("drain", None, "--neuron signed"),
        ("wait", None, "--neuron signed"),
    ):
        told = mend(lost, Schedule(name, 3, 2, drain))
        assert told is not None and wanted in told["suggestion"]


@pytest.mark.parametrize("made", [{"finetuning": {}}, {"compensation": {"kind": "bias"}}])
def test_a_network_made_for_the_end_of_t_steps_is_not_sent_to_where_counts_settle(
    made: dict[str, Any],
) -> None:
    network = convert(sure(1), PREPROCESSING, [images(8, 1)], timesteps=3).network
    network = replace(network, neuron="unsigned", provenance={**network.provenance, **made})
    diagnosis = found(network, None, "paper")
    assert diagnosis["mend"]["cause"] == TIME
    assert "the one it was made from" in diagnosis["mend"]["suggestion"]


def test_a_layer_that_is_silent_in_the_ann_has_absolute_errors() -> None:
    model = build("residual")
    network = convert(model, PREPROCESSING, [images(8, 1)], timesteps=5).network
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    diagnosis = found(network, model, "paper")
    for row in diagnosis["layers"]:
        assert all(math.isfinite(v) for v in row["cumulative"].values())
    json.dumps(diagnosis, allow_nan=False)


def test_layers_are_restored_on_images_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    restored = _Chain.restored

    def watched(chain: _Chain, pixels: torch.Tensor, progress: Progress) -> dict[str, float]:
        seen.append(pixels)
        return restored(chain, pixels, progress)

    monkeypatch.setattr("snnconv.diagnosis.MOST_RESTORED", 3)
    monkeypatch.setattr(_Chain, "restored", watched)
    network = converted("residual").network
    pixels = images(8)
    engine = prepare(network, network.timesteps)
    told = diagnose(network, engine, pixels, network.timetable(name="paper"), build("residual"))
    assert torch.equal(seen[0], pixels[[0, 3, 6]])
    assert told["restored"]["images"] == 3


def test_large_networks_are_diagnosed_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    network = converted("residual").network
    whole = found(network, build("residual"), "paper")
    monkeypatch.setattr("snnconv.diagnosis.NEURONS_AT_ONCE", 3 * network.neurons)
    assert images_at_once(network) == 3
    parts = found(network, build("residual"), "paper")
    for row, other in zip(whole["layers"], parts["layers"], strict=True):
        assert row["cumulative"] == pytest.approx(other["cumulative"], rel=1e-4)
    assert whole["restored"]["kl"] == pytest.approx(parts["restored"]["kl"], rel=1e-3)
