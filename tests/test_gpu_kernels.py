"""The pieces of the counts engine for GPUs, on the CPU: Triton's interpreter, products of bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from snnconv.engine.gpu import unavailable
from snnconv.engine.linear import _ByteProduct, bytes_multiply
from snnconv.network import Synapse
from snnconv.ops import convolve

triton = pytest.importorskip("triton", reason="torch brings no Triton here")

INTERPRETED = """
import sys
import torch
from networks import NETWORKS, converted, images
from test_engine import SCHEDULES, differences
from snnconv.engine import counts, gpu, linear, reference
from snnconv.normalize import with_settings

assert gpu.unavailable(torch.device("cpu")) is None
linear.BYTES["cpu"] = linear._ByteProduct
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
        charges = [engine.charge(p) for p in network.populations]
        assert {c.dtype for c in charges} == {torch.int32}
        # The pools come before the shifts.
        shifted = any(b is not None and b.shifted for c in charges for b in c.in_bytes)
        assert shifted == (name != "pools")
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


def test_kernels_are_tried_before_they_are_used() -> None:
    program = """
import torch
from snnconv.engine import gpu
print(gpu.unavailable(torch.device("cpu")))
gpu.unavailable.cache_clear()
right = gpu.scan
gpu.scan = lambda charge, *rest: right(charge + 1, *rest)
print(gpu.unavailable(torch.device("cpu")))
gpu.unavailable.cache_clear()
gpu.scan, right = right, gpu.Convolution.__call__
gpu.Convolution.__call__ = lambda self, x: right(self, x.clamp(-127))
print(gpu.unavailable(torch.device("cpu")))
"""
    first, *others = interpreted(program).stdout.splitlines()
    assert first == "None" and len(others) == 2 and all("something else" in o for o in others)
    assert "no Triton for cpu" in str(unavailable(torch.device("cpu")))


def random_convolution(seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Draw counts, weights, and what else a convolution is told."""
    draw = torch.Generator().manual_seed(seed)

    def among(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=draw))]

    channels, rows = among(1, 5, 16, 33, 70), among(1, 7, 16, 40, 130)
    kernel = among(1, 2, 3), among(1, 3)
    attributes = {
        "stride": (among(1, 2), among(1, 3)),
        "padding": tuple(among(0, 1, 2) for _ in range(4)),
        "dilation": (among(1, 2), among(1, 2)),
        "groups": 1,
    }
    x = torch.randint(-128, 128, (among(1, 3), channels, 9, 8), generator=draw)
    weight = torch.randint(-127, 128, (rows, channels, *kernel), generator=draw)
    return x, weight, attributes


CONVOLVED = """
import torch
from snnconv.engine import gpu
from snnconv.ops import convolve
from test_gpu_kernels import random_convolution
for seed in range(24):
    x, weight, attributes = random_convolution(seed)
    shift = torch.arange(len(weight)) % 4
    convolution = gpu.Convolution(weight.to(torch.int8), shift, attributes, torch.device("cpu"))
    truth = convolve(x, weight, **attributes) << shift.view(-1, 1, 1)
    assert torch.equal(convolution(x.to(torch.int8)).long(), truth)
print("all equal")
"""


def test_triton_convolves_bytes() -> None:
    done = interpreted(CONVOLVED)
    assert done.stdout == "all equal\n", done.stderr[-2000:]


@pytest.mark.parametrize("seed", range(8))
def test_products_of_bytes_are_convolutions(seed: int) -> None:
    x, weight, attributes = random_convolution(seed)
    shift = torch.zeros(len(weight), dtype=torch.int32)
    synapse = Synapse("", (), "conv", weight.to(torch.int8), shift, attributes)
    product = _ByteProduct(synapse, torch.device("cpu"))
    assert torch.equal(product(x.to(torch.int8)).long(), convolve(x, weight, **attributes))
    flat = Synapse("", (), "linear", weight[..., 0, 0].to(torch.int8), synapse.shift, {})
    product = _ByteProduct(flat, torch.device("cpu"))
    assert torch.equal(product(x[..., 0, 0]).long(), x[..., 0, 0] @ weight[..., 0, 0].t())


def test_no_bytes_on_unknown_devices() -> None:
    assert not bytes_multiply(torch.device("meta"))
