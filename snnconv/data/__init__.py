"""Images and labels: folders, arrays, and the zoo's own, one batch at a time.

Images come as 8-bit pixels `[N, C, H, W]`; what a network does to them first is its own matter
(`snnconv.preprocess`).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snnconv.errors import DataError, UsageError
from snnconv.preprocess import Preprocessing

SPLITS = ("train", "test")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TEST_SHARE = 0.2

Read = Callable[[np.ndarray, Preprocessing], np.ndarray]


@dataclass(frozen=True)
class ImageData:
    """One split of a data set.

    `labels` are int64 `[N]`; `sha256` covers images and labels; `note` says how the split came
    about when it was not given. `read` maps indices to uint8 pixels `[n, C, H, W]`.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...] | None
    sha256: str
    note: str
    read: Read

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batches(
        self, preprocessing: Preprocessing, indices: Sequence[int] | np.ndarray, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 `[n, C, H, W]` and labels int64 `[n]` in the order of `indices`."""
        indices = np.asarray(indices, dtype=np.int64)
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            pixels = np.ascontiguousarray(self.read(part, preprocessing))
            yield torch.from_numpy(pixels), torch.from_numpy(self.labels[part])


def choose_indices(total: int, count: int | None, seed: int) -> np.ndarray:
    """Draw `count` of `total` images without replacement, sorted; None or too many means all."""
    if count is None or count >= total:
        return np.arange(total)
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.sort(generator.permutation(total)[:count])


def check_labels(data: ImageData, num_classes: int) -> None:
    """Raise DataError unless every label is one of the network's classes."""
    largest = int(data.labels.max())
    if largest >= num_classes or int(data.labels.min()) < 0:
        raise DataError(
            f"{data.name}: labels go from {int(data.labels.min())} to {largest}, the network has "
            f"{num_classes} classes; the data belong to another network"
        )


def open_data(source: str, split: str) -> ImageData:
    """Open one split (`train` or `test`) of a data set.

    A source is `zoo:digits`, a folder with train.npz and test.npz (`images` uint8 `[N, H, W, C]` or
    `[N, H, W]`, `labels` `[N]`), one such file, or a folder of images: `train/CLASS/*` and
    `test/CLASS/*` (or `val`), or `CLASS/*`, of which every fifth image, drawn once, is the test
    split. Raises DataError if there are no images, or some cannot be read.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if source.startswith("zoo:"):
        return _zoo(source, split)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such folder or file")
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{source}: give a folder, or an .npz file with images and labels")
        return _arrays(path, split, "one file, used for every split")
    if any((path / f"{s}.npz").exists() for s in SPLITS):
        file = path / f"{split}.npz"
        if not file.exists():
            raise DataError(f"{source}: there is no {split}.npz in it")
        return _arrays(file, split, "")
    return _folder(path, split)


def _zoo(source: str, split: str) -> ImageData:
    if source != "zoo:digits":
        raise UsageError(f"the zoo has no images {source!r}; it has zoo:digits")
    from snnconv.model_zoo.digits import digits_images

    images, labels = digits_images(split)
    return _from_arrays("zoo:digits", split, images, labels, None, "")


def _arrays(path: Path, split: str, note: str) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path}: has no {' and no '.join(sorted(missing))}")
            images, labels = file["images"], file["labels"]
            names = tuple(map(str, file["class_names"])) if "class_names" in file else None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged or no .npz file ({error})") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{path}: images must be uint8 [N, H, W, C] or [N, H, W], not {images.dtype} "
            f"{list(images.shape)}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: labels must be {len(images)} integers, not {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if not len(images):
        raise DataError(f"{path}: holds no images")
    images = images.reshape(*images.shape[:3], -1)
    return _from_arrays(path.parent.name, split, images, labels.astype(np.int64), names, note)


def _from_arrays(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...] | None,
    note: str,
) -> ImageData:
    """Wrap images `[N, H, W, C]`."""

    def read(indices: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        channels, height, width = preprocessing.input_size
        if images.shape[1:] != (height, width, channels):
            have = "x".join(map(str, images.shape[1:]))
            raise DataError(
                f"{name}: images are {have}, the network takes {height}x{width}x{channels}; give "
                "arrays of that size, or a folder of images, which are resized"
            )
        return images[indices].transpose(0, 3, 1, 2)

    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels).data)
    return ImageData(name, split, labels, class_names, digest.hexdigest(), note, read)


def _class_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _folder(path: Path, split: str) -> ImageData:
    """Read a folder of images, one subfolder per class."""
    present = {
        s: next((path / f for f in SPLIT_FOLDERS[s] if (path / f).is_dir()), None) for s in SPLITS
    }
    note = ""
    root = path
    if any(present.values()):
        chosen = present[split]
        if chosen is None:
            raise DataError(f"{path}: there is no folder {' or '.join(SPLIT_FOLDERS[split])} in it")
        root = chosen
    classes = _class_folders(root)
    files = [(file, label) for label, folder in enumerate(classes) for file in _images_in(folder)]
    if not files:
        raise DataError(
            f"{root}: no images in it; expected CLASS/IMAGE ({', '.join(IMAGE_SUFFIXES)}), or "
            "train.npz and test.npz"
        )
    if root == path:
        test = choose_indices(len(files), max(1, round(TEST_SHARE * len(files))), seed=0)
        mask = np.zeros(len(files), dtype=bool)
        mask[test] = True
        files = [f for f, held in zip(files, mask, strict=True) if held == (split == "test")]
        note = f"no split given: {len(files)} images drawn with seed 0 are {split}"
        if not files:
            raise DataError(f"{path}: too few images for a {split} split")
    labels = np.array([label for _, label in files], dtype=np.int64)
    return ImageData(
        path.name,
        split,
        labels,
        tuple(c.name for c in classes),
        _hash_files(root, files),
        note,
        _ImageReader([file for file, _ in files]),
    )


def _hash_files(root: Path, files: list[tuple[Path, int]]) -> str:
    digest = hashlib.sha256()
    for file, label in files:
        digest.update(f"{file.relative_to(root).as_posix()} {label}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _ImageReader:
    """Decode, resize and crop image files as timm does in evaluation."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __call__(self, indices: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        transform = _transform(preprocessing)
        return np.stack([self._image(self.files[i], preprocessing, transform) for i in indices])

    def _image(self, file: Path, preprocessing: Preprocessing, transform: Any) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        mode = {1: "L", 3: "RGB"}.get(preprocessing.input_size[0])
        if mode is None:
            channels = preprocessing.input_size[0]
            raise DataError(f"the network takes {channels} channels, image files have 1 or 3")
        try:
            with Image.open(file) as image:
                pixels = np.asarray(transform(image.convert(mode)), dtype=np.uint8)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise DataError(f"{file}: cannot be read as an image ({error})") from error
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _transform(preprocessing: Preprocessing) -> Any:
    """Return timm's resize and centre crop, without its normalisation."""
    from timm.data import create_transform
    from torchvision.transforms import Compose

    whole = create_transform(
        preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
    )
    return Compose([t for t in whole.transforms if type(t).__name__ in ("Resize", "CenterCrop")])
