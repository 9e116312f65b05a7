"""Measure how much memory a simulation takes, each in a process of its own.

    python benchmarks/memory.py [--output FILE]

The networks have random weights; schedule `paper`, so that T steps are run. `extra_mib` is the peak
resident memory during the simulation above what the process held before, `peak_mib` that peak.
Needs Linux, whose /proc resets the peak.
"""

from __future__ import annotations

import argparse
import json
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
    Path("/proc/self/clear_refs").write_text("5")
    before = _mib("VmRSS")
    simulate(network, pixels, network.timetable(name="paper"))
    peak = _mib("VmHWM")
    return {"extra_mib": round(peak - before, 1), "peak_mib": round(peak, 1)}


def _mib(key: str) -> float:
    """Read one of this process's memory figures."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


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
