"""Data sets that timm knows by name: `torch/cifar100`, `hfds/...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from snnconv.data.folders import read_folder
from snnconv.data.images import ImageData, Transform, UnreadableImage, to_pixels
from snnconv.errors import DataError, first_line
from snnconv.preprocess import Preprocessing

STREAMS = ("hfids/", "tfds/", "wds/")
PREFIXES = ("torch/", "hfds/", *STREAMS)
FOLDERS = ("torch/image_folder", "torch/folder")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "val")}


def is_timm_set(source: str) -> bool:
    """Return whether a source is one of timm's names."""
    return source.startswith(PREFIXES)


def read_timm(source: str) -> dict[str, ImageData]:
    """Open `NAME` or `NAME@ROOT`; nothing is downloaded unless the name is one of a hub.

    `torch/image_folder@ROOT` and `torch/folder@ROOT` are the folder itself. Raises DataError, with
    timm's own message, if it cannot be opened, or if its images come as a stream only.
    """
    name, _, root = source.partition("@")
    if name.startswith(STREAMS):
        raise DataError(
            f"{source}: timm gives these images as a stream, and they are wanted by their number; "
            "save them as a folder of CLASS/* or as train.npz and test.npz"
        )
    if name.lower() in FOLDERS:  # timm takes the root itself for a split it does not find
        return read_folder(Path(root))
    found = {}
    problems = []
    for split, names in SPLIT_NAMES.items():
        for spelling in names:
            try:
                found[split] = _open(name, root or None, split, spelling)
                break
            except Exception as error:  # each backend raises its own
                text = first_line(error)
                problems.append(f"{spelling}: {text}")
    if not found:
        raise DataError(f"{source}: timm cannot open it", list(dict.fromkeys(problems)))
    return found


def _open(name: str, root: str | None, split: str, spelling: str) -> ImageData:
    from timm.data import create_dataset

    dataset = create_dataset(name, root=root, split=spelling, download=False)
    labels = _labels(dataset)
    names = getattr(dataset, "classes", None)
    return ImageData(
        name, split, _TimmImages(name, dataset), labels, tuple(names) if names else None
    )


def _labels(dataset: Any) -> np.ndarray:
    """Read all labels, without decoding images where the data set keeps them apart."""
    targets = getattr(dataset, "targets", None)
    if targets is None and (samples := getattr(dataset, "samples", None)) is not None:
        targets = [label for _, label in samples]
    if targets is None:
        targets = [dataset[i][1] for i in range(len(dataset))]
    return np.asarray(targets, dtype=np.int64)


class _TimmImages:
    """Images of one of timm's data sets, as PIL images."""

    size: tuple[int, int, int] | None = None

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def _image(self, index: int) -> Any:
        try:
            return self.dataset[index][0]
        except Exception as error:  # decoders raise whatever they like on damaged files
            raise UnreadableImage(f"{self.name}[{index}]: {error}") from error

    def pixels(
        self, index: int, preprocessing: Preprocessing, transform: Transform | None = None
    ) -> np.ndarray:
        return to_pixels(self._image(index), preprocessing, transform)

    def update(self, digest: Any, indices: np.ndarray) -> None:
        for index in indices:
            try:
                image = self._image(int(index))
                digest.update(f"{image.size} {image.mode}".encode() + image.tobytes())
            except UnreadableImage:
                digest.update(b"unreadable")
