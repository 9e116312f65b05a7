"""A small network on which an engine shows, on the machine at hand, that it is right."""

from __future__ import annotations

import torch
from torch import Tensor

from snnconv.engine import counts, reference
from snnconv.network import Image, Population, Readout, SpikingNetwork, Synapse
from snnconv.plan import Relay
from snnconv.preprocess import Preprocessing

TIMESTEPS = 3


def wrong(engine: counts.Engine) -> str | None:
    """Name what an engine for `sample` at `TIMESTEPS` gets wrong; None if nothing."""
    network = engine.network
    generator = torch.Generator().manual_seed(1)
    shape = network.preprocessing.input_size
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
    schedule = network.timetable(TIMESTEPS)
    truth = reference.Engine(network, TIMESTEPS)
    found, expected = (e.simulate(pixels, schedule) for e in (engine, truth))
    ends = engine.endpoint(pixels)
    for name in expected.counts:
        pairs = (
            (found.counts[name], expected.counts[name]),
            (found.spikes[name], expected.spikes[name]),
            (ends.counts[name], expected.counts[name]),
        )
        if not all(torch.equal(a.long(), b.long()) for a, b in pairs):
            return name
    same = all(torch.equal(found.charges[n], expected.charges[n]) for n in expected.charges)
    return None if same else "the readout"


def sample() -> SpikingNetwork:
    """Return a network with every kind of branch and every width of block, at odd sizes."""
    draw = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw, dtype=torch.int32)

    def convolution(
        source: str, rows: int, inputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> Synapse:
        margin = kernel // 2
        attributes = {
            "stride": (stride, stride),
            "padding": (margin,) * 4,
            "dilation": (1, 1),
            "groups": groups,
        }
        weight = integers(-127, 128, rows, inputs // groups, kernel, kernel).to(torch.int8)
        return Synapse(source, (), "conv", weight, integers(0, 3, rows), attributes)

    def population(
        name: str, shape: tuple[int, ...], depth: int, two_sided: bool, *branches: Synapse
    ) -> Population:
        rows = shape[0]
        ones = torch.ones(rows, dtype=torch.float64)
        spread = 40 * int(sum(b.weight[0].numel() for b in branches)) + 100
        threshold, bias = integers(50, spread, rows), integers(-spread, spread, rows)
        return Population(
            name, name, branches, threshold, bias, shape, two_sided, depth, ones, ones
        )

    shortcut = Synapse(
        "grouped", (), "scale", integers(-99, 99, 24), torch.zeros(24, dtype=torch.int32)
    )
    uneven = convolution("strided", 32, 64, 3)
    uneven.attributes["padding"] = (0, 2, 2, 0)
    depthwise = convolution("grouped", 24, 24, 3, groups=24)
    projection = convolution("stem", 24, 20, 1, 2)
    pool = {
        "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1), "dilation": (1, 1),
        "ceil_mode": False,
    }  # fmt: skip
    readout = Synapse(
        "flat", (), "linear", integers(-127, 128, 4, 32 * 6).to(torch.int8), integers(0, 1, 4)
    )
    nodes = (
        Image("image", (3, 7, 9), (120, 130, 110)),
        population("stem", (20, 7, 9), 0, False, convolution("image", 20, 3, 3)),
        Relay("pool", "max_pool", ("stem",), (20, 4, 5), pool),
        population("grouped", (24, 4, 5), 1, True, convolution("pool", 24, 20, 3, groups=4)),
        population("joined", (24, 4, 5), 2, False, shortcut, depthwise, projection),
        population("strided", (64, 2, 3), 3, False, convolution("joined", 64, 24, 3, 2)),
        population("narrow", (32, 2, 3), 4, False, uneven),
        Relay("flat", "flatten", ("narrow",), (32 * 6,), {}),
        Readout("logits", (readout,), integers(-99, 99, 4), (4,), 5, 1.0),
    )  # fmt: skip
    preprocessing = Preprocessing((3, 7, 9), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return SpikingNetwork(nodes, preprocessing, TIMESTEPS)
