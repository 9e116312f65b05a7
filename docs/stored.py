"""What the generators of this folder share: to write their files, or to see that they are stale."""

from __future__ import annotations

import sys
from pathlib import Path


def write(texts: dict[Path, str], args: list[str]) -> int:
    """Write files that differ, or with --check name them; return the exit code."""
    stale = [
        path
        for path, text in texts.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if "--check" in args:
            print(f"error: {path} is stale; run make docs", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
    return int("--check" in args and bool(stale))
