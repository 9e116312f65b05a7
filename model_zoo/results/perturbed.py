"""Measure how much of a spiking network's predictions hangs on single units of its weights.

    python model_zoo/results/perturbed.py CHECKPOINT... --data DIR -o FILE.json

In every copy a share of the weights, drawn anew, is moved by one unit up or down. The report has
the accuracy of the network, of the copies on average, and of the mean of their probabilities, and
how often network and copy agree, on all test images at the end point of exact schedules; seed 0.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from snnconv import __version__
from snnconv.checkpoint import load_network, sha256
from snnconv.data import ImageData, open_data
from snnconv.engine import prepare
from snnconv.network import Population, Readout, SpikingNetwork
from snnconv.normalize import layer_bits


def moved(network: SpikingNetwork, share: float, generator: torch.Generator) -> SpikingNetwork:
    """Return a copy in which a share of the weights is one unit larger or smaller."""
    bits = layer_bits(network, network.weight_bits)

    def synapse(s: Any, top: int) -> Any:
        if s.kind == "scale":
            return s
        chosen = torch.rand(s.weight.shape, generator=generator) < share
        signs = 2 * torch.randint(0, 2, s.weight.shape, generator=generator) - 1
        signs = torch.where(s.weight.abs() == top, -s.weight.sign(), signs)  # the only way left
        return replace(s, weight=(s.weight + chosen * signs).to(s.weight.dtype))

    nodes = [
        replace(
            node, branches=tuple(synapse(s, 2 ** (bits[node.name] - 1) - 1) for s in node.branches)
        )
        if isinstance(node, Population | Readout)
        else node
        for node in network.nodes
    ]
    return replace(network, nodes=tuple(nodes))


def probabilities(network: SpikingNetwork, data: ImageData) -> Tensor:
    """Return what the network makes of all images, `[N, classes]`."""
    assert network.logits is not None
    engine = prepare(network, network.timesteps, device="cpu")
    parts = []
    for pixels, _ in data.batches(network.preprocessing, np.arange(len(data))):
        end = engine.endpoint(pixels)
        parts.append(end.logits(network, network.logits.name).flatten(1).double().softmax(1))
    return torch.cat(parts)


@click.command(help=__doc__)
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", required=True)
@click.option("--share", default=0.01, show_default=True)
@click.option("--copies", default=10, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(checkpoints: tuple[Path, ...], data: str, share: float, copies: int, output: Path) -> None:
    """Measure and store."""
    images = open_data(data, "test")
    labels = torch.from_numpy(images.labels)
    rows = []
    for path in checkpoints:
        network = load_network(path)
        generator = torch.Generator().manual_seed(0)
        own = probabilities(network, images)
        others = [probabilities(moved(network, share, generator), images) for _ in range(copies)]

        def percent(found: Tensor, expected: Tensor) -> float:
            return 100 * float((found == expected).double().mean())

        rows.append(
            {
                "checkpoint": path.name,
                "sha256": sha256(network),
                "timesteps": network.timesteps,
                "weight_bits": network.weight_bits,
                "top1_percent": percent(own.argmax(1), labels),
                "copies_top1_percent": mean(percent(p.argmax(1), labels) for p in others),
                "copies_agree_percent": mean(percent(p.argmax(1), own.argmax(1)) for p in others),
                "mean_top1_percent": percent(torch.stack(others).mean(0).argmax(1), labels),
            }
        )
        click.echo(json.dumps(rows[-1]))
    report = {
        "schema": "snnconv.perturbed/1",
        "version": __version__,
        "data": images.name,
        "images": len(images),
        "share": share,
        "copies": copies,
        "seed": 0,
        "command": shlex.join(["python", *sys.argv]),
        "checkpoints": rows,
    }
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
