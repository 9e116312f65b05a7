"""Render docs/schedules.html from stored evaluations; --check: is it stale?"""

from __future__ import annotations

import sys
from pathlib import Path

from stored import write

from snnconv.report import comparison, html, reading
from snnconv.schedule import SCHEDULES

TARGET = Path(__file__).with_name("schedules.html")
REPORTS = Path(__file__).parents[1] / "model_zoo" / "results"


def main(args: list[str]) -> int:
    """Write the page, or with --check compare it; return the exit code."""
    names = [f"cifar_resnet20.cifar10-t{t}-{s}-signed.eval.json" for t in (3, 7) for s in SCHEDULES]
    reports = sorted((reading.read(REPORTS / name) for name in names), key=reading.order)
    text = html.render(comparison.document(reports))
    return write({TARGET: text}, args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
