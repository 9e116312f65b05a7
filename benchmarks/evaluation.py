"""What `snnconv eval` takes beside the engine: reading images, checking counts, statistics.

    python benchmarks/evaluation.py CHECKPOINT DATA [--images N] [--json FILE]

Evaluations in one process, without and with statistics in turns, the whole of each against the
simulations and end points of the one without, all by the clock; medians of five. Rendering the page
comes on top.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from snnconv import __version__
from snnconv.checkpoint import load_network
from snnconv.data import choose_indices, open_data
from snnconv.engine import Engine, prepare
from snnconv.measure import evaluate
from snnconv.report import html
from snnconv.report.evaluation import document
from snnconv.schedule import Schedule

REPETITIONS = 5
SCHEDULES = ("paper", "drain")


def _simulated(runner: Engine, pixels: torch.Tensor, schedule: Schedule) -> None:
    for part in pixels.split(256):
        runner.simulate(part, schedule)
        runner.endpoint(part)


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
    runner = prepare(network, network.timesteps)
    pixels = torch.cat([x for x, _ in data.batches(network.preprocessing, indices, 256)])

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    rows = []
    for name in SCHEDULES:
        schedule = network.timetable(name=name)
        taken: dict[str, list[float]] = {key: [] for key in ("plain", "statistics", "engine")}
        for _ in range(1 + REPETITIONS):
            for key in ("plain", "statistics"):
                told = key == "statistics"
                whole = partial(evaluate, network, data, indices, schedule, statistics=told)
                taken[key].append(seconds(whole))
            simulated = partial(_simulated, runner, pixels, schedule)
            taken["engine"].append(seconds(simulated))
        plain, told, engine = (statistics.median(taken[key][1:]) for key in taken)
        row = {
            "schedule": name,
            "ratio_to_engine": plain / engine,
            "statistics_percent_of_engine": 100 * (told - plain) / engine,
        }
        rows.append(row)
        print(json.dumps(row))
    evaluation = evaluate(network, data, indices[:256], schedule, statistics=True)
    page = {**evaluation, "command": "", "created": ""}
    rendering = seconds(lambda: html.render(document(page, "evaluation.json")))
    contents = {
        "schema": "snnconv.benchmark.evaluation/1",
        "version": __version__,
        "torch": torch.__version__,
        "command": shlex.join(["python", "benchmarks/evaluation.py", *sys.argv[1:]]),
        "network": network.model.get("name"),
        "timesteps": network.timesteps,
        "engine": runner.name,
        "images": len(pixels),
        "rows": rows,
        "rendering_seconds": rendering,
    }
    print(f"rendering: {rendering:.3f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
