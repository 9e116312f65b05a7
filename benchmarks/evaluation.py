"""What `snnconv eval` takes beside the engine: reading images, checking counts, statistics.

    python benchmarks/evaluation.py CHECKPOINT DATA [--images N] [--json FILE]

One evaluation in one process under schedule `paper`, the whole of it against the simulations in it,
both by the clock; the median of five.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from snnconv import __version__
from snnconv.checkpoint import load_network
from snnconv.data import choose_indices, open_data
from snnconv.measure import evaluate

REPETITIONS = 5


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    network = load_network(arguments.checkpoint)
    data = open_data(arguments.data, "test")
    indices = choose_indices(len(data), arguments.images, 0)
    ratios = []
    for _ in range(1 + REPETITIONS):
        start = time.perf_counter()
        found = evaluate(network, data, indices, network.timetable(name="paper"))
        whole = 1000 * (time.perf_counter() - start) / found["images"]
        ratios.append(whole / found["wall_ms_per_image"])
        print(f"{whole:.3f} ms an image, the engine {found['wall_ms_per_image']:.3f}")
    contents = {
        "schema": "snnconv.benchmark.evaluation/1",
        "version": __version__,
        "torch": torch.__version__,
        "command": shlex.join(["python", "benchmarks/evaluation.py", *sys.argv[1:]]),
        "network": network.model.get("name"),
        "timesteps": network.timesteps,
        "engine": found["engine"],
        "images": found["images"],
        "ratio_to_engine": statistics.median(ratios[1:]),
    }
    print(f"evaluation: {contents['ratio_to_engine']:.2f} times the engine alone")
    if arguments.json:
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
