"""What differs between a report and the one that its command gives now."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Not compared: when it was made and how long it took, and the command, which names paths.
APART = frozenset({"command", "created", "seconds", "wall_ms_per_image"})
# Where it ran: told, but no number of the result.
MACHINE = ("version", "device", "engine", "threads", "processes")
# What rows of lists are named by.
NAMES = ("layer", "step", "epoch", "node")


@dataclass(frozen=True)
class Change:
    """A value that is not the same: its place in the report, before and now."""

    place: str
    old: Any
    new: Any

    @property
    def group(self) -> str:
        """Name the place without the rows of lists."""
        return group(self.place)


@dataclass(frozen=True)
class Difference:
    """All values compared: how many are the same by group, what changed, what is only new."""

    same: dict[str, int]
    changes: list[Change]
    added: list[str]
    machine: list[Change]

    @property
    def equal(self) -> bool:
        """Tell whether every value of the old report is what it was."""
        return not self.changes


def group(place: str) -> str:
    """Name a place without the rows of lists: `layers[relu].neurons` is of `layers[].neurons`."""
    return re.sub(r"\[[^\]]*\]", "[]", place)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Difference:
    """Compare reports value by value; values that only a newer version knows are no difference."""
    before, now = dict(_leaves(old)), dict(_leaves(new))
    same: dict[str, int] = {}
    changes = []
    for place, value in before.items():
        found = now[place] if place in now else _at(new, place)
        if found == value:
            same[group(place)] = same.get(group(place), 0) + 1
        else:
            changes.append(Change(place, value, found))
    # An object in place of null is told as one change, not also by what it holds.
    replaced = [c.place for c in changes if c.old is None]
    added = [
        place
        for place, value in now.items()
        if place not in before
        and value is not None
        and not any(place.startswith((f"{p}.", f"{p}[")) for p in replaced)
    ]
    machine = [
        Change(key, old.get(key), new.get(key)) for key in MACHINE if old.get(key) != new.get(key)
    ]
    return Difference(same, changes, sorted({group(place) for place in added}), machine)


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """List texts, numbers and nulls with their places."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key not in APART and not (not place and key in MACHINE):
                yield from _leaves(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and value:
        for name, item in zip(_names(value), value, strict=True):
            yield from _leaves(item, f"{place}[{name}]")
    else:
        yield place, value


def _names(rows: list[Any]) -> list[str]:
    """Name the rows of a list by what tells them apart, else by number."""
    for key in NAMES:
        names = [str(row.get(key)).replace("]", "") for row in rows if isinstance(row, dict)]
        if len({n for n in names if n != "None"}) == len(rows):
            return names
    return [str(i) for i in range(len(rows))]


def _at(contents: dict[str, Any], place: str) -> Any:
    """Find what stands at a place that leads through no list; None if nothing does."""
    value: Any = contents
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
