"""The errors a user can cause, each with the exit code the command line ends with.

A message says what is wrong, where, and what to do; when there are several problems it names
them all. Nobody sees a traceback for a mistake of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable


class SnnconvError(Exception):
    """Fail with one clear message (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        """Keep the headline and, below it, every single problem found."""
        self.message = message
        self.problems = list(problems)
        super().__init__("\n".join([message, *(f"  - {p}" for p in self.problems)]))


class UsageError(SnnconvError):
    """The request itself is wrong: an option, a name, a missing input (exit code 2)."""

    exit_code = 2


class CheckpointError(SnnconvError):
    """A file is not what it should be: damaged, foreign, incomplete (exit code 1)."""


class DataError(SnnconvError):
    """The images or labels do not fit (exit code 1)."""


class NotConvertibleError(SnnconvError):
    """The network cannot become spiking; `problems` names every reason (exit code 3)."""

    exit_code = 3


class NotEqualError(SnnconvError):
    """The spiking network differs from its quantised ANN (exit code 3)."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error's text, or its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
