"""Write the tables of docs/performance.md from stored benchmarks; --check: are they stale?"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stored import write

TARGET = Path(__file__).with_name("performance.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
ENGINES = ("engines-32px.json", "engines-224px.json", "engines-mobilenet.json")
STEPS, BATCH = 8, 16
BLOCK = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)

Row = dict[str, Any]


def main(args: list[str]) -> int:
    """Write the file, or with --check compare it; return the exit code."""
    text = TARGET.read_text(encoding="utf-8")
    rows = [row for name in ENGINES for row in _load(name)["rows"]]

    def filled(block: re.Match[str]) -> str:
        name = block[1]
        return f"<!-- {name} -->\n{TABLES[name](rows)}<!-- /{name} -->"

    return write({TARGET: BLOCK.sub(filled, text)}, args)


def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _one(rows: list[Row], network: str, engine: str, batch: int, steps: int) -> Row | None:
    wanted = (network, engine, batch, steps)
    for row in rows:
        if (row["network"], row["engine"], row["batch"], row["timesteps"]) == wanted:
            return row
    return None


def _number(row: Row | None, key: str, form: str = ".2f") -> str:
    return "–" if row is None or row.get(key) is None else format(row[key], form)


def _networks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def _engines(rows: list[Row]) -> str:
    engines = list(dict.fromkeys(row["engine"] for row in rows if row["engine"] != "ann"))
    return _table(
        ["network", *engines],
        [
            [
                network,
                *(
                    _number(_one(rows, network, e, BATCH, STEPS), "ratio_to_ann_cpu")
                    for e in engines
                ),
            ]
            for network in _networks(rows)
        ],
    )


def _peer(rows: list[Row]) -> str:
    body = []
    for network in _networks(rows):
        row = _one(rows, network, "native", BATCH, STEPS)
        share = row and row["ratio_to_spikingjelly_cpu"]
        body.append(
            [
                network,
                f"{1 / share:.1f}" if share else "–",
                _number(row, "extra_memory_mib", ".0f"),
                _number(_one(rows, network, "native", BATCH, 32), "extra_memory_mib", ".0f"),
                _number(
                    _one(rows, network, "spikingjelly multi", BATCH, STEPS),
                    "extra_memory_mib",
                    ".0f",
                ),
            ]
        )
    head = ["network", "times as fast", "MiB, T 8", "MiB, T 32", "SpikingJelly's MiB, T 8"]
    return _table(head, body)


def _steps(rows: list[Row]) -> str:
    steps = sorted({row["timesteps"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    return _table(
        ["network", "N", *(f"T {t}" for t in steps)],
        [
            [
                network,
                str(batch),
                *(
                    _number(_one(rows, network, "native", batch, t), "ratio_to_ann_cpu")
                    for t in steps
                ),
            ]
            for network in _networks(rows)
            for batch in batches
            if _one(rows, network, "native", batch, STEPS)
        ],
    )


def _events(rows: list[Row]) -> str:
    found = _load("events.json")["rows"]
    shares = sorted({row["changes_percent"] for row in found})
    return _table(
        ["input channels", *(f"{share} %" for share in shares)],
        [
            [
                str(channels),
                *(f"{r['speedup']:.2f}" for r in found if r["channels"] == channels),
            ]
            for channels in sorted({row["channels"] for row in found})
        ],
    )


def _gpu(rows: list[Row]) -> str:
    """Tell wall times on a GPU in forward passes, as measured in one run there."""
    found = _load("engines-gpu.json")
    engines = list(dict.fromkeys(r["engine"] for r in found["rows"] if r["engine"] != "ann"))
    body = []
    for network in _networks(found["rows"]):
        here = {r["engine"]: r for r in found["rows"] if r["network"] == network}
        times = [_number(here.get(e), "ratio_to_ann_wall") for e in engines]
        body.append([network, *times, _number(here["ann"], "wall_ms_per_image", ".4f")])
    (size,) = {(r["timesteps"], r["batch"]) for r in found["rows"]}
    head = ["network", *engines, "ANN, ms an image"]
    return (
        f"One {found['device']}, torch {found['torch']}, T = {size[0]}, {size[1]} images:\n\n"
        + _table(head, body)
    )


def _evaluation(rows: list[Row]) -> str:
    found = _load("evaluation.json")
    head = ["schedule", "evaluation, times the engine", "statistics, % of the engine"]
    body = [
        [
            row["schedule"],
            _number(row, "ratio_to_engine"),
            _number(row, "statistics_percent_of_engine", ".0f"),
        ]
        for row in found["rows"]
    ]
    return (
        f"{found['images']:,} images, {found['network']} at T = {found['timesteps']}, simulation "
        f"and end point by the {found['engine']} engine. Rendering the page takes "
        f"{found['rendering_seconds']:.3f} s.\n\n{_table(head, body)}"
    )


def _commands(rows: list[Row]) -> str:
    lines = [_load(name)["command"] for name in (*ENGINES, "engines-gpu.json", "evaluation.json")]
    files = " ".join(f"--stored benchmarks/results/{name}" for name in ENGINES)
    lines.append(f"python benchmarks/engines.py {files} --plot docs/engines.png")
    return "```sh\n" + "\n".join(lines) + "\n```\n"


def _machine(rows: list[Row]) -> str:
    found = _load(ENGINES[0])
    return (
        f"Measured on {found['threads']} threads of an {found['processor']} with "
        f"{found['instructions']}, torch {found['torch']}.\n"
    )


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "machine": _machine,
    "engines": _engines,
    "peer": _peer,
    "steps": _steps,
    "gpu": _gpu,
    "events": _events,
    "evaluation": _evaluation,
    "commands": _commands,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
