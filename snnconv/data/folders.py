"""Folders of image files, one subfolder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snnconv.data.images import FileImages, ImageData
from snnconv.errors import DataError

SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid")}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def read_folder(path: Path) -> dict[str, ImageData]:
    """Find the splits of a folder: `train/CLASS/*` and `test/CLASS/*` (or `val`), or `CLASS/*`.

    Classes are numbered in the order of their names, over all splits together. A folder without
    split folders gives one part, named `all`. Raises DataError if there are no images.
    """
    roots = {
        split: next((path / name for name in names if _has_folders(path / name)), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    found = {split: root for split, root in roots.items() if root is not None} or {"all": path}
    classes = sorted({folder.name for root in found.values() for folder in _class_folders(root)})
    return {split: _part(path.name, root, split, classes) for split, root in found.items()}


def _has_folders(path: Path) -> bool:
    """Return whether a folder may be a split; one with nothing but images is a class."""
    return path.is_dir() and (bool(_class_folders(path)) or not _images(path))


def _class_folders(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]


def _part(name: str, root: Path, split: str, classes: list[str]) -> ImageData:
    files = [(file, label) for label, c in enumerate(classes) for file in _images(root / c)]
    if not files:
        raise DataError(
            f"{root}: no images in it; expected CLASS/IMAGE ({', '.join(IMAGE_SUFFIXES)}), "
            "train.npz and test.npz, or the original files of CIFAR or MNIST"
        )
    labels = np.array([label for _, label in files], dtype=np.int64)
    return ImageData(
        name, split, FileImages(root, [file for file, _ in files]), labels, tuple(classes)
    )


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
