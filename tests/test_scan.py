"""The pieces of the counts engine for GPUs, on the CPU: Triton's interpreter, products of bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snnconv.engine.linear import _ByteProduct, bytes_multiply
from snnconv.engine.scan import unavailable
from snnconv.network import Synapse
from snnconv.ops import convolve

triton = pytest.importorskip("triton", reason="torch brings no Triton here")

INTERPRETED = """
import sys
import torch
from networks import NETWORKS, converted, images
from test_engine import SCHEDULES, differences
from snnconv.engine import counts, reference, scan, triton_kernels
from snnconv.normalize import with_settings

assert scan.unavailable(torch.device("cpu")) is None
for neuron in ("signed", "unsigned"):
    for name in NETWORKS:
        network, pixels = with_settings(converted(name).network, neuron=neuron), images(3)
        engine = counts.Engine(network, 5)
        for options in SCHEDULES:
            schedule = network.timetable(5, **options)
            found, expected = (
                e.simulate(pixels, schedule) for e in (engine, reference.Engine(network, 5))
            )
            assert not differences(found, expected), (name, options, neuron)
        assert {engine.charge(p).dtype for p in network.populations} == {torch.int32}
print("all equal")
"""


def interpreted(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program with Triton's interpreter, which is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_blocks_scanned_by_triton_are_the_reference() -> None:
    done = interpreted(INTERPRETED)
    assert done.stdout == "all equal\n", done.stderr[-2000:]


def test_the_kernel_is_held_against_the_neuron_before_it_is_used() -> None:
    program = """
import torch
from snnconv.engine import scan
print(scan.unavailable(torch.device("cpu")))
scan.unavailable.cache_clear()
right = scan.scan
scan.scan = lambda charge, *rest: right(charge + 1, *rest)
print(scan.unavailable(torch.device("cpu")))
"""
    first, second = interpreted(program).stdout.splitlines()
    assert first == "None" and "something else" in second
    assert "no Triton for cpu" in str(unavailable(torch.device("cpu")))


@pytest.mark.parametrize("seed", range(8))
def test_products_of_bytes_are_convolutions(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def among(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=draw))]

    channels, rows = among(1, 5, 16, 33), among(1, 7, 16, 40)
    kernel = among(1, 2, 3), among(1, 3)
    attributes = {
        "stride": (among(1, 2), among(1, 3)),
        "padding": tuple(among(0, 1, 2) for _ in range(4)),
        "dilation": (among(1, 2), among(1, 2)),
        "groups": 1,
    }
    x = torch.randint(-128, 128, (among(1, 3), channels, 9, 8), generator=draw)
    weight = torch.randint(-127, 128, (rows, channels, *kernel), generator=draw)
    synapse = Synapse(
        "", (), "conv", weight.to(torch.int8), torch.zeros(rows, dtype=torch.int32), attributes
    )
    product = _ByteProduct(synapse, torch.device("cpu"))
    assert torch.equal(product(x.to(torch.int8)).long(), convolve(x, weight, **attributes))
    flat = Synapse("", (), "linear", weight[..., 0, 0].to(torch.int8), synapse.shift, {})
    product = _ByteProduct(flat, torch.device("cpu"))
    assert torch.equal(product(x[..., 0, 0]).long(), x[..., 0, 0] @ weight[..., 0, 0].t())


def test_no_bytes_on_unknown_devices() -> None:
    assert not bytes_multiply(torch.device("meta"))
