"""A page as plain data: what the HTML, the Markdown and the terminal say, said once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

UNITS = ((1e6, "mJ"), (1e3, "µJ"), (1.0, "nJ"), (1e-3, "pJ"))


@dataclass(frozen=True)
class Fact:
    """One headline number: where it stands in the report, its text, and what to know about it."""

    key: str
    label: str
    value: str
    number: float
    note: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a table and what it means; numbers are aligned to the right."""

    name: str
    meaning: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Cells as texts. The last row is set apart if it holds totals; a folded table opens."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    totals: bool = False
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A curve `(x, y)`, in order; a dashed one tells itself apart without color."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Curves:
    """Curves over steps, horizontal levels `(name, color, y)`, and an interval at the last step."""

    title: str
    description: str
    x: str
    y: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, str, float]] = ()
    interval: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Stacks:
    """A stacked bar per name: series `(name, color, values)`, negative values below zero."""

    title: str
    description: str
    x: str
    y: str
    names: Sequence[str]
    series: Sequence[tuple[str, str, Sequence[float]]]
    marked: int | None = None
    mark: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars `(label, text, parts)` of parts `(name, color, value)`, one scale for all."""

    title: str
    description: str
    rows: Sequence[tuple[str, str, Sequence[tuple[str, str, float]]]]


@dataclass(frozen=True)
class Point:
    """One report in a plane of cost and accuracy, with the accuracy's interval."""

    label: str
    group: str
    x: float
    y: float
    low: float
    high: float
    front: bool


@dataclass(frozen=True)
class Points:
    """Reports in a plane; those on the Pareto front are filled and joined."""

    title: str
    description: str
    x: str
    y: str
    points: Sequence[Point]


Figure = Curves | Stacks | Bars | Points


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `pairs` are names and values, `strong` a conclusion."""

    title: str
    strong: str = ""
    texts: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Document:
    """A page. `marks` warn of what is not whole or not ours; `parts` are folded away below."""

    title: str
    subtitle: str = ""
    marks: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    verdicts: Sequence[str] = ()
    sections: Sequence[Section] = ()
    parts: Sequence[Document] = field(default=())


def percent(value: float, digits: int = 2) -> str:
    """Write a share in percent."""
    return f"{value:.{digits}f} %"


def number(value: float | None, form: str) -> str:
    """Format a number for a cell, which stays empty without one."""
    return "" if value is None else format(value, form)


def amount(value: float, digits: int = 3) -> str:
    """Write a quantity with so many significant digits, thousands apart, without exponents.

    Below a millionth it is written as such.
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return f"{value:.1e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole >= digits or value == int(value):
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.{digits - whole}f}"
    zeros = f"{abs(value):e}".rpartition("e-")[2]
    return f"{value:.{digits - 1 + int(zeros)}f}"


def nearly_all(percent: float) -> str:
    """Write a share of 100 at most, which is 100 only where nothing is missing."""
    return amount(percent if percent >= 100 else min(percent, 99.99), 4)


def in_steps(number: int) -> str:
    """Write a number of time steps."""
    return "1 step" if number == 1 else f"{number:,} steps"


def joules(nanojoules: float, unit: tuple[float, str] | None = None) -> str:
    """Write an energy in the largest unit in which it is one or more, or in the unit given."""
    scale, name = unit or unit_of([nanojoules])
    text = amount(nanojoules / scale)
    return text if unit else f"{text} {name}"


def unit_of(nanojoules: Sequence[float]) -> tuple[float, str]:
    """Choose the unit of a column of energies: how many nanojoules it is, and its name."""
    most = max((abs(v) for v in nanojoules), default=0.0)
    return next(((scale, name) for scale, name in UNITS if most >= scale), UNITS[-1])


def columns_in_use(
    columns: Sequence[Column], rows: Sequence[Sequence[str]]
) -> tuple[list[Column], list[list[str]]]:
    """Leave out the columns that no row has anything in."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]
