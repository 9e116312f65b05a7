"""Figures as inline SVG, drawn by hand in two widths: for screens and paper, and for phones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from snnconv.report.axes import Plane, draw_line, draw_text, log_ticks, ticks
from snnconv.report.document import Bars, Curves, Figure, Point, Points, Stacks, amount

WIDTHS = {"wide": 720, "narrow": 358}
BREAK = 2.5  # a bar so many times longer than the next is drawn broken
SHAPES = {"paper": "circle", "drain": "square", "stagger": "triangle", "wait": "diamond"}
# Where a label may stand beside its point, the best place first; far ones get a line to it.
PLACES = (
    *((10, 4, "start"), (10, -9, "start"), (10, 17, "start")),
    *((-10, 4, "end"), (-10, -9, "end"), (-10, 17, "end"), (0, -13, "middle"), (0, 22, "middle")),
    *((14, 33, "start"), (14, -26, "start"), (-14, 33, "end"), (-14, -26, "end")),
)
LETTER = 6.3  # width of an average letter of the labels, for placing them


def svg(figure: Figure, kind: str, name: str) -> str:
    """Draw a figure, `wide` or `narrow`, under a name of its own on the page.

    Colors are classes of the style sheet.
    """
    draw: dict[type, Callable[..., tuple[int, list[str]]]] = {
        Curves: _curves,
        Stacks: _stacks,
        Bars: _bars,
        Points: _points,
    }
    width = WIDTHS[kind]
    height, shapes = draw[type(figure)](figure, width)
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}t {name}d"><title id="{name}t">{escape(figure.title)}</title>'
        f'<desc id="{name}d">{escape(figure.description)}</desc>{"".join(shapes)}</svg>'
    )


def legend(figure: Figure) -> list[tuple[str, str]]:
    """List what the colors mean: `(name, color)`; an empty list where nothing needs it."""
    if isinstance(figure, Curves):
        kinds = {True: "dots", False: "line"}
        found = [(line.name, f"{line.color} {kinds[line.dashed]}") for line in figure.lines]
        return found + [(name, f"{color} level") for name, color, _ in figure.levels]
    if isinstance(figure, Stacks):
        return [(name, color) for name, color, _ in figure.series]
    if isinstance(figure, Bars):
        return [(f"{name}", color) for name, color, _ in figure.rows[0][2]]
    groups = {p.group for p in figure.points}
    return [(group, f"{group} shape {shape}") for group, shape in SHAPES.items() if group in groups]


def _curves(figure: Curves, width: int) -> tuple[int, list[str]]:
    height = 320 if width > 500 else 280
    xs = [x for line in figure.lines for x, _ in line.points]
    ys = [y for line in figure.lines for _, y in line.points]
    ys += [y for _, _, y in figure.levels]
    ys += list(figure.interval or ())
    low, high = min(ys), max(ys)
    step = 10 if high - low > 15 else 2 if high - low > 3 else 0.5
    bounds = math.floor(low / step) * step, min(100.0, (math.floor(high / step) + 1) * step)
    plane = Plane(width, height, (min(xs), max(xs)), bounds)
    marks = [v for v in ticks(min(xs), max(xs), 8 if width > 500 else 5) if v == int(v)]
    shapes = plane.axes(figure.x, figure.y, marks)
    for name, color, value in figure.levels:
        y = plane.y(value)
        shapes.append(
            f"<g>{draw_line(plane.left, y, plane.right, y, f'level s-{color}')}"
            f"<title>{escape(name)}</title></g>"
        )
    if figure.interval is not None:
        _, least, most = figure.interval
        x = plane.x(max(xs))
        for y in (plane.y(least), plane.y(most)):
            shapes.append(draw_line(x - 5, y, x + 5, y, "whisker s-snn"))
        shapes.append(draw_line(x, plane.y(least), x, plane.y(most), "whisker s-snn"))
    for line in figure.lines:
        path = " ".join(f"{plane.x(x):g},{plane.y(y):g}" for x, y in line.points)
        dash = " dashed" if line.dashed else ""
        shapes.append(f'<polyline points="{path}" class="curve s-{line.color}{dash}"/>')
        few = len(line.points) <= 40
        for x, y in line.points:
            radius = 3 if few else 6
            shapes.append(
                f'<circle cx="{plane.x(x):g}" cy="{plane.y(y):g}" r="{radius}" '
                f'class="{f"f-{line.color}" if few else "touch"}">'
                f"<title>{escape(f'{line.name}, step {x:g}: {y:.2f} %')}</title></circle>"
            )
    return height, shapes


def _stacks(figure: Stacks, width: int) -> tuple[int, list[str]]:
    height = 320 if width > 500 else 280
    columns = list(zip(*(values for _, _, values in figure.series), strict=True))
    above = [sum(v for v in column if v > 0) for column in columns]
    below = [sum(v for v in column if v < 0) for column in columns]
    top, bottom = max(above) or 1.0, min(below)
    marked = figure.marked is not None
    plane = Plane(width, height, (0.5, len(columns) + 0.5), (bottom * 1.05, top * 1.08))
    if marked:
        plane.top += 14
    wanted = 10 if width > 500 else 6
    numbers = [v for v in ticks(0, len(columns), wanted) if v == int(v) and v >= 1]
    numbers += [1.0] if not numbers or numbers[0] > 3 else []
    shapes = plane.axes(figure.x, figure.y, numbers)
    step = (plane.right - plane.left) / len(columns)
    bar = max(1.0, min(28.0, step * 0.76))
    for i, column in enumerate(columns):
        x = plane.x(i + 1) - bar / 2
        up = down = 0.0
        told = "; ".join(
            f"{name} {amount(value)}"
            for (name, _, _), value in zip(figure.series, column, strict=True)
        )
        shapes.append(f"<g><title>{escape(f'{i + 1}, {figure.names[i]}: {told}')}</title>")
        for (_, color, _), value in zip(figure.series, column, strict=True):
            start = up if value >= 0 else down
            end = start + value
            up, down = (end, down) if value >= 0 else (up, end)
            y, length = plane.y(max(start, end)), abs(plane.y(start) - plane.y(end))
            if length >= 0.1:
                shapes.append(
                    f'<rect x="{x:.1f}" y="{y:g}" width="{bar:.1f}" height="{length:.1f}" '
                    f'class="f-{color} apart"/>'
                )
        shapes.append("</g>")
    if figure.marked is not None:
        x, y = plane.x(figure.marked + 1), plane.y(above[figure.marked]) - 5
        anchor = "start" if x < width * 0.25 else "end" if x > width * 0.75 else "middle"
        shift = {"start": -5, "end": 5, "middle": 0}[anchor]
        shapes.append(f'<path d="M{x - 5:g} {y - 7:g}h10l-5 7z" class="f-ink"/>')
        shapes.append(draw_text(x + shift, y - 12, figure.mark, f"label strong {anchor}"))
    return height, shapes


def _bars(figure: Bars, width: int) -> tuple[int, list[str]]:
    row, thick = 46, 18
    totals = [sum(value for _, _, value in parts) for _, _, parts in figure.rows]
    longest, second = sorted(totals, reverse=True)[:2] if len(totals) > 1 else (totals[0], 0.0)
    broken = second > 0 and longest > BREAK * second
    full = second * 1.3 if broken else longest
    shapes: list[str] = []
    for i, (label, text, parts) in enumerate(figure.rows):
        y = i * row
        shapes.append(draw_text(0, y + 14, label, "label strong" if i == 0 else "label"))
        shapes.append(draw_text(width, y + 14, text, "label number end"))
        shapes.append(f'<rect x="0" y="{y + 21}" width="{width}" height="{thick}" class="track"/>')
        cut = broken and totals[i] == longest
        x = 0.0
        for name, color, value in parts:
            length = width * value / (longest if cut else full) if full else 0
            shapes.append(
                f'<rect x="{x:.1f}" y="{y + 21}" width="{max(length, 0):.1f}" height="{thick}" '
                f'class="f-{color}{" apart" if len(parts) > 1 else ""}">'
                f"<title>{escape(f'{label}, {name}: {amount(value)} nJ')}</title></rect>"
            )
            x += length
        if cut:
            shapes += [
                f'<path d="M{width - 56 + shift} {y + 43}l8 -26" class="break"/>'
                for shift in (0, 9)
            ]
    return row * len(figure.rows), shapes


def _points(figure: Points, width: int) -> tuple[int, list[str]]:
    height = 360 if width > 500 else 320
    xs = [p.x for p in figure.points]
    log_x = min(xs) > 0 and max(xs) > 8 * min(xs)
    if log_x:
        room = (max(xs) / min(xs)) ** 0.12
        x_range = (min(xs) / room, max(xs) * room)
    else:
        room = (max(xs) - min(xs)) * 0.12 or max(xs) * 0.1 or 1.0
        x_range = (max(0.0, min(xs) - room), max(xs) + room)
    low, high = min(p.low for p in figure.points), max(p.high for p in figure.points)
    room = (high - low) * 0.08 or 1.0
    plane = Plane(width, height, x_range, (max(0.0, low - room), min(100.0, high + room)), log_x)
    wanted = 8 if width > 500 else 4
    marks = log_ticks(*x_range) if log_x else ticks(*x_range, wanted)
    shapes = plane.axes(figure.x + (" (logarithmic)" if log_x else ""), figure.y, marks)
    front = sorted((p for p in figure.points if p.front), key=lambda p: (p.x, p.y))
    path = " ".join(f"{plane.x(p.x):g},{plane.y(p.y):g}" for p in front)
    shapes.append(f'<polyline points="{path}" class="front"/>')
    for p in figure.points:
        x = plane.x(p.x)
        shapes.append(draw_line(x, plane.y(p.low), x, plane.y(p.high), f"whisker s-{_group(p)}"))
    labels = _labels(figure.points, plane, width)
    shapes += [_marker(plane.x(p.x), plane.y(p.y), p) for p in figure.points]
    return height, shapes + labels


def _group(p: Point) -> str:
    """Return the class of a point's schedule; that of `paper` for one unknown."""
    return p.group if p.group in SHAPES else "paper"


def _marker(x: float, y: float, p: Point) -> str:
    group = _group(p)
    kind = f"f-{group} s-{group}" if p.front else f"hollow s-{group}"
    shape = {
        "square": f"M{x - 5:g} {y - 5:g}h10v10h-10z",
        "triangle": f"M{x:g} {y - 6:g}l6.5 11h-13z",
        "diamond": f"M{x:g} {y - 7:g}l7 7l-7 7l-7 -7z",
    }.get(SHAPES[group], f"M{x - 5.5:g} {y:g}a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z")
    told = f"{p.label}: {p.y:.2f} %, {amount(p.x)}" + (", on the front" if p.front else "")
    return f'<path d="{shape}" class="marker {kind}"><title>{escape(told)}</title></path>'


def _labels(points: Sequence[Point], plane: Plane, width: int) -> list[str]:
    """Put a label beside every point where there is room; those of the front come first."""
    centers = [(plane.x(p.x), plane.y(p.y)) for p in points]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in centers]
    front = sorted(c for c, p in zip(centers, points, strict=True) if p.front)
    for (x1, y1), (x2, y2) in pairwise(front):
        for share in (n / 40 for n in range(41)):
            x, y = x1 + share * (x2 - x1), y1 + share * (y2 - y1)
            taken.append((x - 1, y - 1, x + 1, y + 1))
    named: dict[tuple[float, float], list[str]] = {}
    for center, p in zip(centers, points, strict=True):
        named.setdefault(center, []).append(p.label)
    shapes = []
    order = sorted(range(len(points)), key=lambda i: (not points[i].front, points[i].x))
    for x, y in dict.fromkeys(centers[i] for i in order):
        text = ", ".join(named[x, y])
        length = LETTER * len(text)
        own = (x - 8, y - 8, x + 8, y + 8)
        for dx, dy, anchor in PLACES:
            left = x + dx - {"start": 0, "end": length, "middle": length / 2}[anchor]
            box = (left, y + dy - 11, left + length, y + dy + 3)
            outside = box[0] < plane.left or box[2] > width or box[3] > plane.bottom or box[1] < 14
            if outside or any(_overlap(box, other) for other in taken if other != own):
                continue
            taken.append(box)
            if abs(dy) > 22:
                shapes.append(
                    draw_line(x, y, x + 0.8 * dx, y + dy - (9 if dy > 0 else -4), "leader")
                )
            shapes.append(draw_text(x + dx, y + dy, text, f"label {anchor}"))
            break
    return shapes


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
