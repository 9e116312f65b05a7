"""Write to the terminal: progress and notes on stderr, tables or one JSON object on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from snnconv.launch import is_leader
from snnconv.progress import Progress, silent

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 5.0
UNCUT = 10_000

_emitted = False
_muted = False
_error_style = {"as_json": False, "verbose": False}
_arguments: tuple[str, ...] = ()


def start(arguments: Sequence[str]) -> None:
    """Begin a run of the command line: remember its arguments, and that nothing was printed.

    Of the processes of one job (torchrun) only the first prints anything but errors.
    """
    global _emitted, _muted, _arguments
    _emitted = False
    _muted = not is_leader()
    _arguments = tuple(arguments)
    set_error_style(
        as_json="--json" in arguments, verbose=bool({"-v", "--verbose"} & set(arguments))
    )


def set_error_style(**wanted: bool) -> None:
    """Say how errors are printed: `as_json` as an object, too, `verbose` with a traceback."""
    _error_style.update(wanted)


def error_style(name: str) -> bool:
    """Tell whether errors are to be printed `as_json`, `verbose`."""
    return _error_style[name]


def arguments() -> tuple[str, ...]:
    """Return the arguments of this run, as reports state them."""
    return _arguments


def emitted() -> bool:
    """Tell whether this run has printed its JSON object."""
    return _emitted


def emit_json(obj: dict[str, Any]) -> None:
    """Print the one JSON object of this run on stdout; not-a-number and infinity become null."""
    global _emitted
    _emitted = True
    if _muted:
        return
    click.echo(json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def stderr_console() -> Console:
    """Return a rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str, quiet: bool = False) -> None:
    """Print one line for the reader on stderr, unless quiet."""
    if not quiet and not _muted:
        click.echo(text, err=True)


def print_table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    """Print a table on stdout; columns of numbers only are aligned to the right.

    Never call it under --json, where stdout holds one object and nothing else. Away from a
    terminal no cell is cut or wrapped.
    """
    if _muted:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows]
        number = bool(cells) and all(_is_number(cell) for cell in cells)
        table.add_column(Text(name), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        needed = Console(width=UNCUT).measure(table).maximum
        console = Console(highlight=False, width=max(80, needed))
    console.print(table)


def _is_number(cell: object) -> bool:
    if cell is None or cell in ("", "-", "–"):
        return True
    try:
        float(str(cell).rstrip("%").replace(",", "").strip())
    except ValueError:
        return False
    return True


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Yield a callable `(stage, done, total)` that shows how far the work is, on stderr.

    Bars with the remaining time on a terminal, plain lines elsewhere, nothing if quiet.
    """
    if quiet or _muted:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _plain_lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as RichProgress,
    )

    tasks: dict[str, Any] = {}
    with RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr_console(),
    ) as bars:

        def report(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            text = f"{stage} {detail}".rstrip()
            bars.update(tasks[stage], completed=done, total=total or None, description=text)

        yield report


def _plain_lines() -> Progress:
    """Return a callable that prints a line when a stage starts, ends, and every few seconds."""
    printed: dict[str, float] = {}

    def report(stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        ended = total > 0 and done >= total
        if stage in printed and not ended and now - printed[stage] < PLAIN_SECONDS:
            return
        printed[stage] = now
        note(f"{stage}: {done}/{total} {detail}".rstrip() if total else f"{stage}: {done}")

    return report


def tallied(names: Iterable[str]) -> str:
    """Say how often each name comes, as an appendix: `: 16 SiLU, 4 sigmoid`."""
    counted = Counter(names).most_common()
    return ": " + ", ".join(f"{count} {name}" for name, count in counted) if counted else ""
