"""Files: the names of checkpoints, and writing whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from snnconv.errors import UsageError

SUFFIX = ".snn.safetensors"
# What the checkpoints of ANNs are called.
ANN_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".safetensors", ".bin", ".ckpt")


def ann_stem(name: str) -> str:
    """Return the name of an ANN's checkpoint file without its suffixes, as of `NAME.pth.tar`."""
    while Path(name).suffix in ANN_SUFFIXES:
        name = Path(name).stem
    return name


def require_named(path: Path, suffix: str, what: str) -> None:
    """Raise UsageError unless an output has the suffix by which files of its kind are known."""
    if not path.name.endswith(suffix):
        raise UsageError(f"--output {path}: {what} is named *{suffix}")


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
