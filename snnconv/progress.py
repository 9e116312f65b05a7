"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callable that is told how much of a stage is done."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take notice: `done` of `total` (0 if unknown), and what else is worth a glance."""


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """Show no progress."""
