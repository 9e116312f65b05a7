"""`snnconv report`: make a page of stored evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.errors import SnnconvError, UsageError, first_line

from . import console, options

if TYPE_CHECKING:
    from snnconv.report.reading import Report


@options.command(
    "report",
    example="snnconv report\n"
    "snnconv report resnet20.snn.safetensors -o resnet20.html\n"
    "snnconv report a.eval.json b.eval.json --energy add_int32_pj=0.05 -o both.md",
)
@click.argument(
    "sources", nargs=-1, metavar="[CHECKPOINT|REPORT.json]...", type=click.Path(path_type=Path)
)
@click.option(
    "--energy",
    "assumptions",
    multiple=True,
    metavar="NAME=PJ",
    help="Change an energy assumption, in picojoules; may be given again.",
)
@options.output_option(
    "Page, FILE.html or FILE.md.  [default: the report's name with .html, beside it; of several "
    "report.html]"
)
@options.force_option
@options.json_option
@options.verbosity_options
def command(
    sources: tuple[Path, ...],
    assumptions: tuple[str, ...],
    output: Path | None,
    force: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Make a page of evaluations, by default the newest here: figures, tables, verdicts.

    Of a checkpoint all evaluations beside it are taken (NAME.*.eval.json). Several reports are
    compared. Nothing is measured; energies follow from the operations, so their assumptions may be
    changed. A page made before is replaced.
    """
    from snnconv import __version__, report
    from snnconv.report import comparison, html, markdown, reading

    changes = _parse(assumptions)
    found = [reading.read(path) for path in _paths(sources, quiet)]
    if changes:
        found = [reading.with_assumptions(r, changes) if r.is_evaluation else r for r in found]
    found.sort(key=reading.order)
    path = output or _default(sources, found)
    if path.suffix not in (".html", ".md"):
        raise UsageError(f"--output {path}: a page is named *.html or *.md")
    report.require_writable(path, force or (output is None and html.is_own(path)))
    evaluations = [r for r in found if r.is_evaluation]
    try:
        page = comparison.document(found)
        text = (html if path.suffix == ".html" else markdown).render(page)
        rows = comparison.rows(evaluations) if len(evaluations) > 1 else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        names = ", ".join(str(r.path) for r in found)
        raise SnnconvError(
            f"{names}: not as snnconv eval writes it: {first_line(error)} (-v shows where)"
        ) from error
    report.write_text(path, text)
    if as_json:
        contents = {
            "schema": "snnconv.report/1",
            "version": __version__,
            "page": str(path),
            "changed_assumptions": changes,
            "comparison": rows,
            "reports": [{"file": r.path.name, "report": r.contents} for r in found],
        }
        console.emit_json(contents)
        return
    _print(page)
    console.note(f"page: {path}", quiet)


def _parse(assumptions: tuple[str, ...]) -> dict[str, float]:
    """Read NAME=PJ; whether there is such an assumption, each report tells."""
    changes = {}
    for given in assumptions:
        name, _, value = given.partition("=")
        try:
            changes[name.strip()] = float(value)
        except ValueError:
            changes[name.strip()] = math.nan
        if not name.strip() or not 0 <= changes[name.strip()] < math.inf:
            raise UsageError(f"--energy {given}: give it as NAME=PJ, such as add_int32_pj=0.05")
    return changes


def _paths(sources: tuple[Path, ...], quiet: bool) -> list[Path]:
    """Find the reports that are meant, each once."""
    from snnconv.report import reading

    if not sources:
        path = reading.newest(Path())
        console.note(f"using {path}", quiet)
        return [path]
    paths: list[Path] = []
    for source in sources:
        if source.suffix == ".json":
            paths.append(source)
        elif source.is_dir():
            raise UsageError(f"{source} is a folder; name reports or a checkpoint in it")
        else:
            _, named = options.spiking_checkpoint(str(source), quiet)
            if not str(source).startswith("zoo:") and not source.exists():
                raise UsageError(f"{source}: there is no such checkpoint")
            paths += reading.beside(named)
    return list(dict.fromkeys(paths))


def _default(sources: tuple[Path, ...], found: Sequence[Report]) -> Path:
    from snnconv import report

    if len(found) == 1:
        return found[0].path.with_suffix(".html")
    if len(sources) == 1 and sources[0].suffix != ".json":
        checkpoint = found[0].path.with_name(found[0].contents["checkpoint"])
        return report.default_path(checkpoint, "report").with_suffix(".html")
    return Path("report.html")


def _print(page: Any) -> None:
    """Print what a page says at its top, and the tables of comparisons."""
    if page.facts:
        rows = [(fact.label, fact.value, fact.note) for fact in page.facts]
        console.print_table(f"{page.title}: {page.subtitle}", ["", "measured", ""], rows)
        for text in [*page.marks, *page.verdicts]:
            click.echo(text)
        return
    for part in [page, *(part for part in page.parts if not part.facts)]:
        for table in (table for section in part.sections for table in section.tables):
            columns = [column.name for column in table.columns]
            console.print_table(f"{part.title}: {table.title}", columns, table.rows)
        for text in part.marks:
            click.echo(text)
