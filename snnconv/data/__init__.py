"""Images and labels: folders, arrays, original files, timm's data sets, and the zoo's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from snnconv.data.arrays import SPLITS, find_arrays, from_arrays, read_npz
from snnconv.data.folders import read_folder
from snnconv.data.images import ImageData, default_batch
from snnconv.data.timm_sets import is_timm_set, read_timm
from snnconv.errors import DataError, UsageError, require_one_of

__all__ = [
    "SPLITS",
    "ImageData",
    "check_labels",
    "choose_indices",
    "default_batch",
    "from_arrays",
    "open_data",
    "open_held_out",
]


def choose_indices(total: int, count: int | None, seed: int, *, others: bool = False) -> np.ndarray:
    """Draw `count` of `total` images without replacement, sorted; None or too many means all.

    `others` draws from the other end of the same order: images that no draw with the same seed
    has, as long as both together do not ask for more than there are.
    """
    if count is None or count >= total:
        return np.arange(total)
    generator = np.random.Generator(np.random.PCG64(seed))
    order = generator.permutation(total)
    return np.sort(order[total - count :] if others else order[:count])


def check_labels(
    data: ImageData, num_classes: int, class_names: Sequence[str] | None = None
) -> None:
    """Raise DataError unless labels, and the classes by name, are those of the network.

    Names are compared where both have the same ones: their order is what labels mean.
    """
    if data.class_names is not None and len(data.class_names) != num_classes:
        raise DataError(
            f"{data.name}: there are {len(data.class_names)} classes "
            f"({', '.join(data.class_names[:5])}, ...), the network has {num_classes}; the labels "
            "would not be the network's"
        )
    if data.class_names is not None and class_names is not None:
        ours, its = list(data.class_names), list(class_names)
        if ours != its and sorted(ours) == sorted(its):
            at = next(i for i, (a, b) in enumerate(zip(ours, its, strict=True)) if a != b)
            raise DataError(
                f"{data.name}: the classes are those of the network in another order (class {at} "
                f"is {ours[at]!r}, the network's is {its[at]!r})"
            )
    largest = int(data.labels.max())
    if largest >= num_classes or int(data.labels.min()) < 0:
        raise DataError(
            f"{data.name}: labels go from {int(data.labels.min())} to {largest}, the network has "
            f"{num_classes} classes; the data belong to another network"
        )


def open_data(
    source: str | Path, split: str, *, calibration_images: int = 1000, seed: int = 0
) -> ImageData:
    """Open one split (`train` or `test`) of a data set.

    A source is `zoo:digits`; a timm name like `torch/cifar100@DIR`; an npz file, or a folder with
    train.npz and test.npz (`images` uint8 `[N, H, W, C]` or `[N, H, W]`, `labels` `[N]`); a folder
    with the original files of CIFAR-10, CIFAR-100, MNIST or Fashion-MNIST; or a folder of images,
    `train/CLASS/*` and `test/CLASS/*` (or `val`), or `CLASS/*`.

    Where there is only one part, `calibration_images` of it (half of it at most), drawn with
    `seed`, are `train` and the rest is `test`; with 0 both are the whole. The `note` says so.
    Raises DataError if there are no images or they cannot be read.
    """
    require_one_of("split", split, SPLITS)
    parts = _parts(str(source))
    if set(parts) == set(SPLITS):
        return parts[split]
    ((given, whole),) = parts.items()
    return _divide(whole, given, split, calibration_images, seed)


def open_held_out(source: str, split: str, calibrated_on: dict[str, Any] | None) -> ImageData:
    """Open a split for a network calibrated as its provenance says (`calibration.on`).

    Of data in one part, `test` leaves the images out that the network was calibrated on, if they
    are the same data: the hash of the calibration images decides.
    """
    if calibrated_on is not None:
        drawn = {"calibration_images": calibrated_on["images"], "seed": calibrated_on["seed"]}
        data = open_data(source, split, **drawn)
        if not data.note:
            return data
        train = open_data(source, "train", **drawn)
        if train.sha256(np.arange(len(train))) == calibrated_on["data_sha256"]:
            return data
    return open_data(source, split, calibration_images=0)


def _parts(source: str) -> dict[str, ImageData]:
    """Return the splits of a source by name, or its one part under whatever name."""
    if source.startswith("zoo:"):
        return _zoo(source)
    if is_timm_set(source):
        return read_timm(source)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such folder or file")
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{source}: give a folder, or an .npz file with images and labels")
        return {"all": read_npz(path, path.stem, "all")}
    return find_arrays(path.resolve()) or read_folder(path.resolve())


def _divide(whole: ImageData, given: str, split: str, count: int, seed: int) -> ImageData:
    what = "one part" if given == "all" else f"only a {given} split"
    if count == 0:
        return whole.part(np.arange(len(whole)), split, f"{what} given, all of it measured")
    count = min(count, len(whole) // 2)
    if count == 0:
        raise DataError(f"{whole.name}: one image cannot be divided into calibration and test")
    drawn = choose_indices(len(whole), count, seed)
    note = f"{what} given: {count} of {len(whole)} images, drawn with seed {seed}, calibrate"
    if split == "test":
        drawn = np.setdiff1d(np.arange(len(whole)), drawn)
        note += ", the rest is measured"
    return whole.part(drawn, split, note)


def _zoo(source: str) -> dict[str, ImageData]:
    if source != "zoo:digits":
        raise UsageError(f"the zoo has no images {source!r}; it has zoo:digits")
    from snnconv.model_zoo.digits import digits_images

    return {split: from_arrays(source, split, *digits_images(split)) for split in SPLITS}
