"""`snnconv reproduce`: run a report's command again, and compare the numbers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.errors import SnnconvError, UsageError
from snnconv.files import SUFFIX
from snnconv.schemas import BASELINES, CONVERSION, EVALUATION

from . import console, options

if TYPE_CHECKING:
    from snnconv.report.difference import Difference

KINDS = {
    EVALUATION: "eval",
    BASELINES: "eval",
    CONVERSION: "convert",
}
SHOWN = 20


@options.command(
    "reproduce",
    example="snnconv reproduce resnet20.T8-drain-signed.eval.json\n"
    "snnconv reproduce results/resnet20.convert.json --cwd .",
)
@click.argument("file", metavar="REPORT.json", type=click.Path(path_type=Path))
@click.option(
    "--cwd",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the command was run, to which its paths are relative.  [default: the report's "
    "folder]",
)
@options.json_option
@options.verbosity_options
def command(
    file: Path, folder: Path | None, as_json: bool, verbose: bool, quiet: bool
) -> int | None:
    """Run the command of a report of eval or convert again, and say which numbers differ.

    What it writes goes to a temporary folder. Times and paths are not compared, and neither are
    numbers that the older report does not hold. The exit code is 0 if all numbers are the same, 1
    if not. -v lists every value.
    """
    from snnconv.report import difference, reading

    old = reading.read(file, tuple(KINDS)).contents
    kind = KINDS[old["schema"]]
    arguments = _arguments(old, file, kind)
    where = folder or file.absolute().parent
    if not where.is_dir():
        raise UsageError(f"--cwd {where}: no such folder")
    console.note(f"running in {where}: {shlex.join(['snnconv', *arguments])}", quiet)
    with tempfile.TemporaryDirectory(prefix="snnconv-") as made:
        name, written = _outputs(old, file, kind)
        extra = ["--output", str(Path(made) / name)]
        # The last --output counts; what follows -- are arguments alone.
        end = arguments.index("--") if "--" in arguments else len(arguments)
        _run([*arguments[:end], *extra, *arguments[end:]], where, Path(made) / written, quiet)
        new = reading.read(Path(made) / written, (old["schema"],)).contents
    found = difference.compare(old, new)
    if as_json:
        console.emit_json(_contents(file, arguments, found))
    else:
        _print(found, verbose)
    return 0 if found.equal else 1


def _arguments(old: dict[str, Any], file: Path, kind: str) -> list[str]:
    """Return the arguments of a report's command, if it is one of ours that fits the report."""
    recorded = old.get("command")
    if not isinstance(recorded, str):
        raise SnnconvError(f"{file} does not say by which command it was made")
    try:
        words = shlex.split(recorded)
    except ValueError as error:
        raise SnnconvError(f"{file}: its command cannot be read: {recorded}") from error
    if words[:2] != ["snnconv", kind]:
        raise SnnconvError(
            f"{file}: its command is not snnconv {kind}, and nothing else is run: {recorded}"
        )
    # An interrupted run that was resumed gives the same as one in a piece.
    return [word for word in words[1:] if word != "--resume"]


def _outputs(old: dict[str, Any], file: Path, kind: str) -> tuple[str, str]:
    """Name what the command is to write, and the report among it."""
    if kind == "eval":
        return "again.json", "again.json"
    name = Path(str(old.get("checkpoint") or f"again{SUFFIX}")).name
    if not name.endswith(SUFFIX):
        raise SnnconvError(f"{file}: its checkpoint {name!r} is not named *{SUFFIX}")
    return name, f"{name.removesuffix(SUFFIX)}.convert.json"


def _run(arguments: list[str], where: Path, report: Path, quiet: bool) -> None:
    """Run a command line in a process of its own; hand on its progress, and its error as ours."""
    import snnconv

    paths = [str(Path(snnconv.__file__).absolute().parents[1]), os.environ.get("PYTHONPATH", "")]
    # What the environment and snnconv.toml say today is not what they said then.
    kept = {k: v for k, v in os.environ.items() if k != options.DATA_VARIABLE}
    kept[options.WITHOUT_SETTINGS] = "1"
    # -P: files in the folder that are named like modules must not take their place.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "snnconv.cli.main", *arguments],
        cwd=where,
        env={**kept, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in map(str.rstrip, process.stderr):
            if said or line.startswith(("error: ", "internal error: ")):
                said.append(line)
            else:
                console.note(line, quiet)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    # A missed --max-drop is no obstacle: the report is there.
    if not report.is_file():
        reason = said[0].removeprefix("error: ") if said else f"it ended with exit code {code}"
        failed = SnnconvError(
            f"the command failed: {reason} (it ran in {where}; --cwd names another folder)",
            [line.strip().removeprefix("- ") for line in said[1:]],
        )
        failed.exit_code = code or 1
        raise failed


def _contents(file: Path, arguments: list[str], found: Difference) -> dict[str, Any]:
    changes = [{"place": c.place, "old": c.old, "new": c.new} for c in found.changes]
    return {
        "schema": "snnconv.reproduction/1",
        "report": str(file),
        "command": shlex.join(["snnconv", *arguments]),
        "equal": found.equal,
        "same": sum(found.same.values()),
        "different": changes,
        "new": found.added,
        "machine": [{"place": c.place, "old": c.old, "new": c.new} for c in found.machine],
    }


def _part(place: str) -> str:
    """Name the part of a report that a value stands in."""
    return re.split(r"[.\[]", place, maxsplit=1)[0]


def _print(found: Difference, verbose: bool) -> None:
    changed: dict[str, list[Any]] = {}
    for change in found.changes:
        changed.setdefault(change.group, []).append(change)
    alike: dict[str, int] = {}
    for group, same in found.same.items():
        place = group if verbose else _part(group)
        alike[place] = alike.get(place, 0) + same
    rows = [(place, "same" if same == 1 else f"{same:,} same") for place, same in alike.items()]
    for group in changed:
        differing = changed[group]
        shown = differing if verbose else differing[:SHOWN]
        rows += [(c.place, f"{_short(c.old)} → {_short(c.new)}") for c in shown]
        if len(shown) < len(differing):
            rows.append((group, f"{len(differing) - len(shown):,} more differ; -v lists them"))
    console.print_table(None, ["value", "then → now"], rows)
    for change in found.machine:
        console.note(f"then {change.place} {_short(change.old)}, now {_short(change.new)}")
    if found.added:
        console.note(f"not in the older report: {', '.join(found.added)}")
    total = sum(found.same.values())
    if found.equal:
        verdict = f"reproduced: all {total:,} values are the same"
    else:
        differ = len(found.changes)
        verdict = f"not reproduced: {differ:,} of {total + differ:,} values differ"
    click.echo(verdict)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
