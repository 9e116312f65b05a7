"""What runs on a GPU gives what it gives on a CPU. Needs one: `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, converted, images
from random_networks import RandomNetwork
from test_end_to_end import CLASSIFIERS
from test_engine import SCHEDULES, differences
from test_finetune import data
from test_islands import BODIES
from test_islands import converted as with_islands
from test_train import RANDOM, Digits, noise

from snnconv.checkpoint import save_network
from snnconv.cli.main import run
from snnconv.engine import counts, endpoint, gpu, reference, simulate
from snnconv.engine.linear import bytes_multiply
from snnconv.finetune import FinetuneSettings, tune
from snnconv.network import SpikingNetwork
from snnconv.normalize import with_settings
from snnconv.pipeline import convert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]


def require_equal(
    network: SpikingNetwork,
    pixels: torch.Tensor,
    timesteps: int,
    schedules: list[dict[str, Any]] = SCHEDULES,
) -> None:
    engine, truth = (
        counts.Engine(network, timesteps, "cuda"),
        reference.Engine(network, timesteps, "cpu"),
    )
    for options in schedules:
        schedule = network.timetable(timesteps, **options)
        found = engine.simulate(pixels.cuda(), schedule, events=True).to("cpu")
        wanted = truth.simulate(pixels, schedule, events=True)
        assert not differences(found, wanted), options
    end, expected = engine.endpoint(pixels.cuda()), truth.endpoint(pixels)
    for what in ("counts", "charges"):
        for key, value in getattr(expected, what).items():
            assert torch.equal(getattr(end, what)[key].cpu().long(), value.long()), key


@pytest.mark.parametrize("neuron", ["signed", "unsigned"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_counts_engine_is_the_reference(name: str, neuron: str) -> None:
    network = with_settings(converted(name).network, neuron=neuron)
    for timesteps in (1, 5):
        require_equal(network, images(5), timesteps)
    require_equal(network, images(5), 150, [{"name": "paper"}])  # counts are no bytes


@pytest.mark.parametrize("seed", range(8))
def test_on_random_networks_too(seed: int) -> None:
    pixels = noise(RANDOM, 4, seed)
    timesteps = (1, 3, 7, 15)[seed % 4]
    network = convert(RandomNetwork(seed), RANDOM, [pixels], timesteps=timesteps).network
    require_equal(network, pixels, timesteps)


def test_the_reference_takes_images_from_a_gpu() -> None:
    network, pixels = converted("residual").network, images(3)
    schedule = network.timetable(5)
    found = simulate(network, pixels.cuda(), schedule, "reference").to("cpu")
    assert not differences(found, simulate(network, pixels, schedule, "reference"))


def test_fast_ways_are_taken_and_their_absence_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = torch.device("cuda")
    if (reason := gpu.unavailable(place)) is not None:
        pytest.skip(reason)
    assert bytes_multiply(place)
    network, pixels = converted("residual").network, images(5)
    engine = counts.Engine(network, 5, "cuda")
    found = engine.endpoint(pixels.cuda())
    assert {engine.charge(p).dtype for p in network.populations} == {torch.int32}
    assert sum(b is not None for p in network.populations for b in engine.charge(p).in_bytes) > 5
    monkeypatch.setattr(gpu, "unavailable", lambda device: "not wanted")
    monkeypatch.setattr("snnconv.engine.linear.bytes_multiply", lambda device: False)
    require_equal(network, images(5), 5)
    plain = endpoint(network, pixels.cuda(), 5)
    assert all(torch.equal(found.counts[name], plain.counts[name]) for name in plain.counts)


@pytest.mark.parametrize(
    "settings",
    [
        {"amp": False},
        {"amp": True},
        {"batch_statistics": 0.6, "optimizer": "nadamuon"},
        {"batch_statistics": 1.0, "optimizer": "sgd", "lr": 0.01},
    ],
)
def test_retraining_on_a_gpu_learns_and_ends_with_the_same_bytes(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    one, two = (Digits(folder, **settings) for folder in folders)
    found = one.run(device="cuda")
    assert found["held_out_kl"] < 0.6 * one.metrics()[0]["held_out_kl"]
    assert set(one.training.captured.values()) != {None}
    two.run(device="cuda")
    assert one.bytes() == two.bytes() and one.metrics() == two.metrics()


def test_recorded_steps_train_as_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"optimizer": "nadamuon", "batch_statistics": 0.6, "amp": False}
    one, two = (Digits(tmp_path, **how) for _ in "ab")
    found = one.run(device="cuda")["held_out_kl"], one.metrics()
    assert one.training.rates is not None
    monkeypatch.setattr("snnconv.train.loop.Training._alone_on_gpu", lambda self: False)
    expected = two.run(device="cuda")["held_out_kl"], two.metrics()
    assert not two.training.captured
    # Fifteen steps at T = 2 differ in what rounding makes of the last bits, and no more.
    assert found[1][1]["loss"] == pytest.approx(expected[1][1]["loss"], rel=0.02)
    assert found[0] == pytest.approx(expected[0], rel=0.5)


@pytest.mark.parametrize("name", BODIES)
def test_islands_too(name: str) -> None:
    require_equal(with_islands(name).network, images(5), 6, [{"name": "paper"}, {"name": "drain"}])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_fine_tuning_on_a_gpu_ends_with_the_same_bytes(tmp_path: Path, name: str) -> None:
    network = converted(name).network
    settings = FinetuneSettings(epochs_per_layer=1, epochs=1, batch_size=16, lr=0.3)
    files = [tmp_path / f"{k}.safetensors" for k in "ab"]
    for file in files:
        tuned = tune(network, data(), settings, device="cuda")
        save_network(tuned, file)
        require_equal(tuned, images(5), 5, [{"name": "paper"}])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_commands_take_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {k: str(tmp_path / f"{k}.snn.safetensors") for k in ("converted", "tuned")}
    source = ["--data", "zoo:digits", "--quiet"]
    assert run(["convert", "zoo:digits", *source, "-T", "3", "-o", names["converted"]]) == 0
    assert run(["finetune", names["converted"], "--layerwise", *source, "-o", names["tuned"]]) == 0
    for engine in ("counts", "reference"):
        capsys.readouterr()
        assert run(["eval", names["tuned"], *source, "--engine", engine, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        if engine == "counts":
            first = found
    assert first["snn"] == found["snn"]
