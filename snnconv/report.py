"""Reports: evaluations and conversions as JSON files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from snnconv.checkpoint import SUFFIX, write_atomically
from snnconv.errors import UsageError


def default_path(checkpoint: Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Name the report of a checkpoint, or of one way to evaluate it."""
    name = checkpoint.name.removesuffix(SUFFIX)
    if evaluation is None:
        return checkpoint.with_name(f"{name}.convert.json")
    keys = ("schedule", "neuron")
    parts = [f"T{evaluation['timesteps']}", *(str(evaluation[key]) for key in keys)]
    return checkpoint.with_name(f"{name}.{'-'.join(parts)}.eval.json")


def require_writable(path: Path, force: bool, schema: str = "") -> None:
    """Raise UsageError unless a file may be written: its folder is there, and it is not.

    With `schema`, an existing report of that kind may be replaced: it is the tool's own.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder for the output")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not force and not (schema and _schema(path) == schema):
        raise UsageError(f"{path} exists; give --force to overwrite it, or another --output")


def _schema(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("schema", "")) if isinstance(found, dict) else ""


def write(path: Path, contents: dict[str, Any], command: Sequence[str]) -> None:
    """Write a report with the command it came from and the time; whole or not at all."""
    stamped = {
        **contents,
        "command": shlex.join(["snnconv", *command]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(stamped, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())
