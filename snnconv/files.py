"""Files: the name of a spiking checkpoint, and writing whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from snnconv.errors import UsageError

SUFFIX = ".snn.safetensors"


def write_atomically(path: Path, contents: bytes, *, replace: bool = True) -> None:
    """Write a file beside its place and move it there when it is complete.

    Without `replace` a file that has appeared meanwhile stays, and UsageError is raised.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        if not replace and os.path.lexists(path):
            raise UsageError(f"{path} has appeared meanwhile, from another run; it was kept")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
