"""A document as GitHub's Markdown: the same numbers; of a figure what it shows in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from snnconv import __version__
from snnconv.report.document import Document, Section, Table

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")


def render(document: Document) -> str:
    """Write a document as Markdown."""
    lines = [*_document(document, 1), f"Made by snnconv {__version__}.", ""]
    return "\n".join(lines)


def _document(document: Document, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {_escape(document.title)}", "")
    if document.subtitle:
        yield from (_escape(document.subtitle), "")
    for mark in document.marks:
        yield from (f"> **{_escape(mark)}**", "")
    if document.facts:
        rows = [[fact.label, f"**{_escape(fact.value)}**", fact.note] for fact in document.facts]
        yield from _grid(["", "", ""], ["---", "---:", "---"], rows, escaped=1)
    for text in document.verdicts:
        yield f"- {_escape(text)}"
    if document.verdicts:
        yield ""
    for section in document.sections:
        yield from _section(section, level + 1)
    for part in document.parts:
        about = "; ".join([part.title, part.subtitle, *(f.value for f in part.facts[:1])])
        yield from ("<details>", f"<summary>{_escape(about)}</summary>", "")
        yield from _document(part, level + 1)
        yield from ("</details>", "")


def _section(section: Section, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {_escape(section.title)}", "")
    if section.strong:
        yield from (f"**{_escape(section.strong)}**", "")
    for text in section.texts:
        yield from (_escape(text), "")
    if section.pairs:
        yield from _grid(["", ""], ["---", "---"], section.pairs)
    for figure in section.figures:
        yield from (f"*{_escape(figure.title)}.* {_escape(figure.description)}", "")
    for table in section.tables:
        yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    if table.folded:
        yield from ("<details>", f"<summary>{_escape(table.title)}</summary>", "")
    else:
        yield from (f"**{_escape(table.title)}**", "")
    ruler = ["---:" if column.number else "---" for column in table.columns]
    rows = list(table.rows)
    total = rows.pop() if table.totals and rows else None
    bold = [[f"**{_escape(cell)}**" if cell else "" for cell in total]] if total else []
    names = [column.name for column in table.columns]
    yield from _grid(names, ruler, [[_escape(c) for c in row] for row in rows] + bold, escaped=None)
    for column in table.columns:
        if column.meaning:
            yield f"- *{_escape(column.name) or 'number'}*: {_escape(column.meaning)}"
    yield ""
    if table.folded:
        yield from ("</details>", "")


def _grid(
    names: Sequence[str],
    ruler: Sequence[str],
    rows: Sequence[Sequence[str]],
    escaped: int | None = -1,
) -> Iterator[str]:
    """Write a table; the cells of column `escaped` are Markdown already, of all if None."""
    yield _row([_escape(name) for name in names])
    yield _row(ruler)
    for row in rows:
        done = [c if escaped is None or i == escaped else _escape(c) for i, c in enumerate(row)]
        yield _row(done)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)
