"""What runs on a GPU gives what it gives on a CPU. Needs one: `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, converted, images
from test_engine import SCHEDULES, differences
from test_train import Digits

from snnconv.engine import endpoint, simulate
from snnconv.engine.trace import Trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]


def on_cpu(trace: Trace) -> Trace:
    moved = {
        what: {name: value.cpu() for name, value in getattr(trace, what).items()}
        for what in ("charges", "counts", "spikes")
    }
    return replace(trace, last_spike=trace.last_spike.cpu(), **moved)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_engines_on_a_gpu_are_the_reference_on_the_cpu(name: str) -> None:
    network, pixels = converted(name).network, images(5)
    for options in SCHEDULES:
        schedule = network.timetable(5, **options)
        expected = simulate(network, pixels, schedule, "reference")
        for engine in ("counts", "reference"):
            found = on_cpu(simulate(network, pixels.cuda(), schedule, engine))
            assert not differences(found, expected), (options, engine)
    end = endpoint(network, pixels.cuda(), 40)
    expected_end = endpoint(network, pixels, 40, "reference")
    for what in ("counts", "charges"):
        for key, value in getattr(expected_end, what).items():
            assert torch.equal(getattr(end, what)[key].cpu().long(), value.long()), key


@pytest.mark.parametrize("amp", [False, True])
def test_retraining_on_a_gpu_learns_and_ends_with_the_same_bytes(tmp_path: Path, amp: bool) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    one, two = (Digits(folder, amp=amp) for folder in folders)
    found = one.run(device="cuda")
    assert found["held_out_kl"] < 0.6 * one.metrics()[0]["held_out_kl"]
    two.run(device="cuda")
    assert one.bytes() == two.bytes() and one.metrics() == two.metrics()
