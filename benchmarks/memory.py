"""Measure how much memory a simulation takes, each in a process of its own.

    python benchmarks/memory.py [--output FILE]

The networks have random weights; schedule `paper`, so that T steps are run. `extra_mib` is the peak
resident memory above that of the process before the simulation, `peak_mib` that of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

IMAGES = 16
CASES = (
    ("cifar_resnet20", 32, 8),
    ("cifar_resnet20", 32, 32),
    ("cifar_resnet20", 32, 128),
    ("resnet18", 224, 31),
)


def measure(name: str, size: int, timesteps: int) -> dict[str, float]:
    """Return what simulating `IMAGES` images adds to this process's peak, and the peak, in MiB."""
    import timm
    import torch

    from snnconv.engine import simulate
    from snnconv.model_zoo import register
    from snnconv.pipeline import convert
    from snnconv.preprocess import Preprocessing

    register()
    torch.manual_seed(0)
    preprocessing = Preprocessing((3, size, size), (0.5,) * 3, (0.25,) * 3)
    model = timm.create_model(name)
    network = convert(model, preprocessing, calibration="bn", timesteps=timesteps).network
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    simulate(network, pixels[:1], network.timetable(1, name="paper"))
    before = _peak()
    simulate(network, pixels, network.timetable(name="paper"))
    return {"extra_mib": round(_peak() - before, 1), "peak_mib": round(_peak(), 1)}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run every case in a fresh process and print, or write, the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, size, timesteps = arguments.one
        print(json.dumps(measure(name, int(size), int(timesteps))))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--one", *map(str, case)]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        rows.append(dict(zip(("network", "pixels", "timesteps"), case, strict=True)) | found)
    report = {"benchmark": "memory", "engine": "counts", "images": IMAGES, "cases": rows}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
