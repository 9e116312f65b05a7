"""Reports: JSON files of what was done and measured, and pages made of them.

Nothing here imports torch or numpy: a report is read and rendered at once.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from snnconv.errors import UsageError
from snnconv.files import SUFFIX, write_atomically


def default_path(checkpoint: Path, kind: str, settings: Sequence[str] = ()) -> Path:
    """Name the report of a kind (`convert`, `eval`) beside its checkpoint, with its settings."""
    name = checkpoint.name.removesuffix(SUFFIX)
    parts = [name, *(["-".join(settings)] if settings else []), kind, "json"]
    return checkpoint.with_name(".".join(parts))


def require_writable(path: Path, force: bool, replaces: Mapping[str, Any] | None = None) -> None:
    """Raise UsageError unless a file may be written: its folder is there, and it is not.

    An existing report with the values of `replaces` is the tool's own and may be replaced.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder for the output")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.parent}: no permission to write there")
    if os.path.lexists(path) and not force and not (replaces and _has(path, replaces)):
        raise UsageError(f"{path} exists; give --force to overwrite it, or another --output")


def _has(path: Path, values: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(k) == v for k, v in values.items())


def write(path: Path, contents: dict[str, Any], command: Sequence[str]) -> None:
    """Write a report with the command it came from and the time; whole or not at all."""
    stamped = {
        **contents,
        "command": shlex.join(["snnconv", *command]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(path, json.dumps(stamped, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    write_atomically(path, text.encode())
