"""Measure how much memory a simulation takes, at several T, each in a process of its own.

    python benchmarks/memory.py [--output FILE]

The network is a ResNet-20 with random weights; schedule `paper`, so that T steps are run. What is
reported is the peak resident memory above that of the process before the simulation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

TIMESTEPS = (8, 32, 128)
IMAGES = 16


def measure(timesteps: int) -> float:
    """Return the MiB that simulating `IMAGES` images adds to this process's peak."""
    import timm
    import torch

    from snnconv.engine import simulate
    from snnconv.model_zoo import register
    from snnconv.pipeline import convert
    from snnconv.preprocess import Preprocessing

    register()
    torch.manual_seed(0)
    preprocessing = Preprocessing((3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    model = timm.create_model("cifar_resnet20")
    network = convert(model, preprocessing, calibration="bn", timesteps=timesteps).network
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    simulate(network, pixels[:1], network.timetable(1, name="paper"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    simulate(network, pixels, network.timetable(name="paper"))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Run every T in a fresh process and print, or write, the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(arguments.one))
        return
    extra = {}
    for timesteps in TIMESTEPS:
        command = [sys.executable, __file__, "--one", str(timesteps)]
        extra[timesteps] = float(subprocess.run(command, capture_output=True, check=True).stdout)
    report = {
        "benchmark": "memory",
        "network": "cifar_resnet20, random weights, 32x32",
        "engine": "counts",
        "schedule": "paper",
        "images": IMAGES,
        "extra_mib": {f"T{t}": round(v, 1) for t, v in extra.items()},
        "growth_over_T8": {f"T{t}": round(v / extra[8], 2) for t, v in extra.items()},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
