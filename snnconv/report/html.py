"""A document as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape as quote
from importlib import resources
from itertools import count
from pathlib import Path

from snnconv import __version__
from snnconv.report.document import Column, Document, Fact, Figure, Section, Table
from snnconv.report.figures import legend, svg

_TOGETHER = re.compile(r"(?<=\S) (?=%)|(?<=\bT) (?=\d)")
GENERATOR = '<meta name="generator" content="snnconv'


def render(document: Document) -> str:
    """Write a document as HTML."""
    style = resources.files("snnconv.report").joinpath("style.css").read_text(encoding="utf-8")
    numbers = count()
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'{GENERATOR} {__version__}">',
            f"<title>{escape(document.title)} · snnconv</title>",
            f"<style>\n{style}</style></head><body><main>",
            *_document(document, 1, numbers),
            f"</main><footer>Made by snnconv {__version__}.</footer></body></html>",
            "",
        ]
    )


def escape(text: str) -> str:
    """Quote a text; what belongs together, such as `5 %` and `T 8`, stays on one line."""
    return _TOGETHER.sub("\u00a0", quote(text))


def is_own(path: Path) -> bool:
    """Tell whether a file is a page that this module has written."""
    try:
        with path.open(encoding="utf-8") as file:
            return GENERATOR in file.read(1000)
    except (OSError, UnicodeDecodeError):
        return False


def _document(document: Document, level: int, numbers: Iterator[int]) -> Iterator[str]:
    """Write a document below a heading of a level; its parts are folded away."""
    yield f"<header><h{level}>{escape(document.title)}</h{level}>"
    if document.subtitle:
        yield f'<p class="subtitle">{escape(document.subtitle)}</p>'
    if document.marks:
        marks = "".join(f"<li>{escape(mark)}</li>" for mark in document.marks)
        yield f'<ul class="marks">{marks}</ul>'
    yield "</header>"
    if document.facts:
        yield f'<dl class="facts">{"".join(map(_fact, document.facts))}</dl>'
    if document.verdicts:
        said = "".join(f"<li>{escape(text)}</li>" for text in document.verdicts)
        yield f'<ul class="verdicts">{said}</ul>'
    for section in document.sections:
        yield from _section(section, level + 1, numbers)
    for part in document.parts:
        about = "; ".join(fact.value for fact in part.facts[:1])
        yield (
            f'<details class="part"><summary><b>{escape(part.title)}</b> '
            f"<span>{escape(part.subtitle)}</span> <b>{escape(about)}</b></summary>"
        )
        yield from _document(part, level + 1, numbers)
        yield "</details>"


def _fact(fact: Fact) -> str:
    note = f'<dd class="note">{escape(fact.note)}</dd>' if fact.note else ""
    first = ' class="first"' if fact.key.startswith("snn.") else ""
    return (
        f"<div{first}><dt>{escape(fact.label)}</dt>"
        f'<dd class="value"><data data-key="{fact.key}" value="{fact.number!r}">'
        f"{escape(fact.value)}</data></dd>{note}</div>"
    )


def _section(section: Section, level: int, numbers: Iterator[int]) -> Iterator[str]:
    yield f"<section><h{level}>{escape(section.title)}</h{level}>"
    if section.strong:
        yield f'<p class="strong">{escape(section.strong)}</p>'
    for text in section.texts:
        yield f"<p>{escape(text)}</p>"
    if section.pairs:
        rows = (
            f"<div><dt>{escape(name)}</dt><dd>{_value(name, text)}</dd></div>"
            for name, text in section.pairs
        )
        yield f'<dl class="pairs">{"".join(rows)}</dl>'
    for figure in section.figures:
        yield from _figure(figure, numbers)
    for table in section.tables:
        yield from _table(table, numbers)
    yield "</section>"


def _value(name: str, text: str) -> str:
    return f"<code>{escape(text)}</code>" if name in ("command", "report") else escape(text)


def _figure(figure: Figure, numbers: Iterator[int]) -> Iterator[str]:
    number = next(numbers)
    yield f"<figure><figcaption>{escape(figure.title)}</figcaption>"
    if keys := legend(figure):
        items = (
            f'<li><i class="key k-{color.split()[0]} {color}"></i>{escape(name)}</li>'
            for name, color in keys
        )
        yield f'<ul class="legend">{"".join(items)}</ul>'
    yield svg(figure, "wide", f"f{number}w")
    yield svg(figure, "narrow", f"f{number}n")
    yield "</figure>"


def _table(table: Table, numbers: Iterator[int]) -> Iterator[str]:
    name = f"t{next(numbers)}"
    if table.folded:
        yield f'<details><summary id="{name}">{escape(table.title)}</summary>'
    else:
        yield f'<p class="caption" id="{name}">{escape(table.title)}</p>'
    yield f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}"><table>'
    heads = "".join(
        f'<th scope="col"{_class(column)}>{escape(column.name) or "&nbsp;"}</th>'
        for column in table.columns
    )
    yield f"<thead><tr>{heads}</tr></thead><tbody>"
    head = _row_head(table.columns)
    last = len(table.rows) - 1
    for i, row in enumerate(table.rows):
        if table.totals and i == last:
            yield "</tbody><tfoot>"
        cells = []
        for j, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            tag, scope = ("th", ' scope="row"') if j == head else ("td", "")
            cells.append(f"<{tag}{scope}{_class(column)}>{escape(cell)}</{tag}>")
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tfoot></table></div>" if table.totals and table.rows else "</tbody></table></div>"
    meanings = [c for c in table.columns if c.meaning]
    if meanings:
        told = "".join(
            f"<div><dt>{escape(c.name) or '#'}</dt><dd>{escape(c.meaning)}</dd></div>"
            for c in meanings
        )
        yield '<details class="columns"><summary>What the columns mean</summary>'
        yield f'<dl class="pairs">{told}</dl></details>'
    if table.folded:
        yield "</details>"


def _row_head(columns: Sequence[Column]) -> int:
    """Find the column that names the rows: the first with words, else the first."""
    return next((i for i, c in enumerate(columns) if not c.number), 0)


def _class(column: Column) -> str:
    return ' class="number"' if column.number else ""
