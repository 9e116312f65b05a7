"""The whole way of the data, on networks nobody thought of: every stage against the one before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import SIZE, RandomNetwork
from test_engine import differences

from snnconv.checkpoint import load_network, save_network
from snnconv.engine import endpoint, simulate
from snnconv.graph import difference
from snnconv.normalize import with_settings
from snnconv.pipeline import convert
from snnconv.preprocess import Preprocessing
from snnconv.schedule import SCHEDULES
from snnconv.verify import verify

PREPROCESSING = Preprocessing(SIZE, (0.4, 0.5, 0.45), (0.25, 0.2, 0.3))


def examine(seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    model = RandomNetwork(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (6, *SIZE), dtype=torch.uint8, generator=generator)
    x = PREPROCESSING.normalize(pixels)
    timesteps = draw.choice([1, 2, 3, 5, 7, 11])
    conversion = convert(
        model,
        PREPROCESSING,
        [pixels],
        timesteps=timesteps,
        calibration=draw.choice(["mse", "percentile", "max", "bn"]),
        weight_bits=draw.choice([8, 8, 4, 2]),
        initial_membrane=draw.choice(["half", "half", "zero"]),
    )
    with torch.no_grad():
        assert difference(conversion.qann(x)["logits"], model(x)) < 1e-4

    end = endpoint(conversion.network, pixels, timesteps, maps=True)
    found = verify(
        conversion.traced, conversion.plan, conversion.network, pixels, timesteps,
        end.counts, end.charges,
    )  # fmt: skip
    assert found.problems == ()

    path = folder / "a.snn.safetensors"
    save_network(conversion.network, path)
    network = load_network(path)
    for name in SCHEDULES:
        for neuron in ("signed", "unsigned"):
            net = with_settings(network, neuron=neuron)
            timetable = net.timetable(name=name, stagger=draw.choice([1, 2]))
            fast = simulate(net, pixels, timetable, "counts")
            assert not differences(fast, simulate(net, pixels, timetable))
            assert not differences(fast, simulate(net, pixels, timetable, "reference"))
            if name == "wait" or (neuron == "signed" and name != "paper"):
                for population in net.populations:
                    settled = end.counts[population.name]
                    assert torch.equal(fast.counts[population.name], settled)
                for readout in net.readouts:
                    last = fast.charges[readout.name][-1]
                    assert torch.equal(last, end.charges[readout.name])


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 10**6))
def test_a_random_network_is_the_same_at_every_stage(seed: int, tmp_path: Path) -> None:
    examine(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_random_networks_are_the_same_at_every_stage(part: int, tmp_path: Path) -> None:
    for seed in range(2_000_000 + 100 * part, 2_000_000 + 100 * (part + 1)):
        examine(seed, tmp_path)
