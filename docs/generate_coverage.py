"""Write docs/coverage.md and docs/coverage.json from a sweep's state; --check: is the page stale?

    python docs/generate_coverage.py [STATE | --check]

The page is made from coverage.json, and that from the state of tests/coverage.py, if one is given.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from stored import write

TARGET = Path(__file__).with_name("coverage.md")
STORED = Path(__file__).with_name("coverage.json")
REASONS = 25
# Reasons kept of an architecture.
PROBLEMS = 6

HEAD = """# Coverage

What becomes of timm's architectures, made by `make coverage`. *Examined* is every architecture
from its shapes, as by `snnconv check`. *Verified* is a conversion with random weights (T = 3, two
small images) that equals its quantised ANN count for count, while in every layer of neurons between
5 and 95 % of the counts were not zero and some were saturated. Networks of more than 30 M
parameters, and those that take more than 20 s, are examined only.

"""

Row = dict[str, Any]


def main(args: list[str]) -> int:
    """Write the files, or with --check compare the page; return the exit code."""
    if args and args[0] != "--check":
        _store(Path(args[0]))
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    text = HEAD + _page(stored)
    return write({TARGET: text}, args)


def _store(state: Path) -> None:
    """Keep the last line of every architecture."""
    import timm
    import torch

    from snnconv import __version__

    lines = state.read_text(encoding="utf-8").splitlines()
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for row in rows.values():
        row["problems"] = row["problems"][:PROBLEMS]
    contents = {
        "schema": "snnconv.coverage/1",
        "version": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "architectures": len(timm.list_models()),
        "rows": [rows[name] for name in sorted(rows)],
    }
    STORED.write_text(_compact(contents), encoding="utf-8")


def _compact(contents: dict[str, Any]) -> str:
    """Return JSON with a line for each architecture."""
    head = {key: value for key, value in contents.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row) for row in contents["rows"])
    return f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n'


def _page(stored: dict[str, Any]) -> str:
    rows: list[Row] = stored["rows"]
    convertible = [r for r in rows if r["convertible"]]
    pure = [r for r in convertible if not r["analog"]]
    tried = [r for r in convertible if "equal" in r.get("verified", {})]
    proved = [r for r in tried if not r["verified"]["unsuited_layers"]]
    replaced = [r for r in rows if r.get("replaced_convertible")]
    either = {r["name"] for r in (*convertible, *replaced)}
    all_spiking = {r["name"] for r in pure} | {
        r["name"] for r in replaced if not r["replaced_analog"]
    }
    table = [
        ("examined", f"{len(rows)} of {stored['architectures']}"),
        ("convertible", str(len(convertible))),
        ("of these without analog islands", str(len(pure))),
        ("of these with analog islands", str(len(convertible) - len(pure))),
        ("convertible as they are or with `--replace-activations relu`", str(len(either))),
        ("of these without analog islands", str(len(all_spiking))),
        ("verified", str(len(proved))),
        ("equal, but with layers that were too quiet or too busy", str(len(tried) - len(proved))),
        ("too slow to verify", str(_ended(convertible, "skipped"))),
        ("refused while converting", str(_ended(convertible, "refused", "broken"))),
    ]
    text = f"timm {stored['timm']}, torch {stored['torch']}, snnconv {stored['version']}.\n\n"
    text += "| | architectures |\n| --- | --- |\n"
    text += "".join(f"| {what} | {count} |\n" for what, count in table)
    text += "\n## What is in the way\n\n| architectures | reason |\n| --- | --- |\n"
    text += "".join(f"| {count} | {reason} |\n" for reason, count in _reasons(rows))
    refused = [r for r in convertible if {"refused", "broken"} & set(r.get("verified", {}))]
    if refused:
        text += "\n## Refused while converting\n\n| architecture | reason |\n| --- | --- |\n"
        for row in refused:
            why = row["verified"].get("refused") or row["verified"]["broken"]
            text += f"| {row['name']} | {why.replace('|', '/')} |\n"
    text += (
        "\n## Architectures\n\nVerdicts: `spiking`, `islands` (with analog ones), `replaced` (only "
    )
    text += "with other activations), `no`.\n\n"
    text += "| architecture | M parameters | verdict | spiking MACs, % | verified |\n"
    text += "| --- | --- | --- | --- | --- |\n" + "".join(map(_line, rows))
    return text


def _ended(rows: list[Row], *how: str) -> int:
    return sum(bool(set(how) & set(row.get("verified", {}))) for row in rows)


def _reasons(rows: list[Row]) -> list[tuple[str, int]]:
    """Count architectures by the reasons against them, numbers left out."""
    counted: Counter[str] = Counter()
    for row in rows:
        if not row["convertible"]:
            found = row["problems"] or [row.get("broken", "unknown")]
            counted.update({re.sub(r"\d+", "N", p).replace("|", "/")[:160] for p in found})
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:REASONS]


def _line(row: Row) -> str:
    verdict = "no"
    if row["convertible"]:
        verdict = "islands" if row["analog"] else "spiking"
    elif row.get("replaced_convertible"):
        verdict = "replaced"
    found = row.get("verified", {})
    proof = ""
    if "equal" in found:
        proof = "partly" if found["unsuited_layers"] else "yes"
    elif found:
        proof = next(iter(found))
    share = f"{row['spiking_percent']:g}" if row["convertible"] else ""
    millions = f"{row['parameters'] / 1e6:.1f}" if "parameters" in row else ""
    return f"| {row['name']} | {millions} | {verdict} | {share} | {proof} |\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
