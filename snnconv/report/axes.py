"""Axes of figures: round ticks, places of values, and the SVG of lines and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) within a range."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within a range; fewer where it is long."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [v for v in found if low <= v <= high]
    return inside if len(inside) <= 7 else [v for v in inside if math.log10(v) % 1 < 1e-9]


def tick(value: float) -> str:
    """Write the value of a tick."""
    return f"{value:,.10g}"


def draw_text(x: float, y: float, said: str, kind: str) -> str:
    """Write a text at a place; its kind is a class of the style sheet."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(said)}</text>'


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Draw a straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


class Plane:
    """The axes of a figure: from values to places, and the lines that show them."""

    def __init__(
        self,
        width: int,
        height: int,
        x: tuple[float, float],
        y: tuple[float, float],
        log_x: bool = False,
    ) -> None:
        """Leave room for labels; `x` and `y` are the ranges of values."""
        self.left, self.right, self.top, self.bottom = 46, width - 14, 26, height - 42
        self.x_range, self.y_range, self.log_x = x, y, log_x

    def x(self, value: float) -> float:
        """Return how far from the left a value stands."""
        low, high = self.x_range
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Return how far from the top a value stands."""
        low, high = self.y_range
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def axes(self, x_name: str, y_name: str, x_ticks: Sequence[float]) -> list[str]:
        """Draw grid lines, tick labels and the names of both axes."""
        shapes = [draw_text(0, 12, y_name, "axis")]
        for value in ticks(*self.y_range):
            y = self.y(value)
            kind = "zero" if value == 0 else "grid"
            shapes.append(draw_line(self.left, y, self.right, y, kind))
            shapes.append(draw_text(self.left - 8, y + 4, tick(value), "tick end"))
        for value in x_ticks:
            shapes.append(draw_text(self.x(value), self.bottom + 18, tick(value), "tick middle"))
        shapes.append(draw_text(self.right, self.bottom + 36, x_name, "axis end"))
        return shapes
