"""The errors a user can cause, each with the exit code the command line ends with.

A message says what is wrong, where, and what to do; when there are several problems it names
them all. Nobody sees a traceback for a mistake of theirs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


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


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return `; did you mean A or B?` for a misspelt name, or `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; {otherwise}" if otherwise else ""


def refuse_unknown(where: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError, with near names, if there are keys beside the known ones."""
    known = list(known)
    if unknown := [k for k in keys if k not in known]:
        among = f"there are {', '.join(known)}"
        raise UsageError(
            f"{where} has unknown keys", [f"{k}{suggestion(k, known, among)}" for k in unknown]
        )


def require_one_of(what: str, value: Any, known: Iterable[str]) -> None:
    """Raise UsageError, naming the choices, unless the value is one of the known names."""
    known = list(known)
    if value not in known:
        raise UsageError(f"unknown {what} {value!r}; choose from {', '.join(known)}")


def require_types(where: str, settings: Any) -> None:
    """Raise UsageError unless every field of a dataclass has a value of its declared type."""
    wrong = [
        f"{name} must be {getattr(hint, '__name__', hint)}, not {getattr(settings, name)!r}"
        for name, hint in get_type_hints(type(settings)).items()
        if not _fits(getattr(settings, name), hint)
    ]
    if wrong:
        raise UsageError(f"{where}: values of a wrong type", wrong)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(_fits(v, get_args(hint)[0]) for v in value)
    return type(value) in ((int, float) if hint is float else (hint,))
