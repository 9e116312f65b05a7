"""A split of a data set: labels, and images read one batch at a time.

Images come as 8-bit pixels `[N, C, H, W]` of the size the network takes; what it does to them first
is its own matter (`snnconv.preprocess`). Resizing and cropping are timm's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from snnconv.errors import DataError, first_line
from snnconv.preprocess import Preprocessing

# More unreadable images than this share of those asked for, and the data are refused.
UNREADABLE_SHARE = 0.01
NAMED = 10
BATCH_NUMBERS = 2**22
Transform = Callable[[Any], Any]
TO_TENSOR = ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "Normalize")


class UnreadableImage(Exception):
    """One image cannot be decoded; the text names it."""


class Images(Protocol):
    """Where images come from.

    `size` is `(channels, height, width)` if all are alike by nature, else None.
    """

    @property
    def size(self) -> tuple[int, int, int] | None:
        """Return the common size."""

    def __len__(self) -> int:
        """Return the number of images."""

    def pixels(
        self, index: int, preprocessing: Preprocessing, transform: Transform | None = None
    ) -> np.ndarray:
        """Return one image, uint8 `[C, H, W]`, resized and cropped as in evaluation.

        A `transform` of PIL images takes the place of that. Raises UnreadableImage.
        """

    def update(self, digest: Any, indices: np.ndarray) -> None:
        """Feed the images as they are stored to a hash."""


@dataclass(frozen=True)
class ImageData:
    """One split of a data set.

    `labels` are int64 `[N]`; `note` says how the split came about when it was not given.
    `unreadable` collects the names of images that could not be decoded, as they are met.
    """

    name: str
    split: str
    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    note: str = ""
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def sha256(self, indices: Sequence[int] | np.ndarray) -> str:
        """Return a hash over the images at `indices`, as they are stored, and their labels."""
        chosen = np.asarray(indices, dtype=np.int64)
        digest = hashlib.sha256()
        self.images.update(digest, chosen)
        digest.update(np.ascontiguousarray(self.labels[chosen]).data)
        return digest.hexdigest()

    def part(self, indices: np.ndarray, split: str, note: str) -> ImageData:
        """Return the images at `indices` as a split of its own."""
        chosen = _Chosen(self.images, indices)
        return replace(
            self, split=split, images=chosen, labels=self.labels[indices], note=note, unreadable=[]
        )

    def batches(
        self,
        preprocessing: Preprocessing,
        indices: Sequence[int] | np.ndarray,
        batch_size: int | None = None,
        *,
        asked: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels uint8 `[n, C, H, W]` and labels int64 `[n]` in the order of `indices`.

        Without a `batch_size` it is `default_batch`. Images that cannot be read are left out and
        their names kept in `unreadable`. Raises DataError once they are more than one in a hundred
        of those asked for, `asked` if `indices` are only a share of them.
        """
        indices = np.asarray(indices, dtype=np.int64)
        batch_size = batch_size or default_batch(preprocessing)
        asked = asked or len(indices)
        failed = 0
        for start in range(0, len(indices), batch_size):
            kept, pixels = [], []
            for index in indices[start : start + batch_size]:
                try:
                    pixels.append(self.images.pixels(int(index), preprocessing))
                    kept.append(index)
                except UnreadableImage as error:
                    failed += 1
                    if str(error) not in self.unreadable:
                        self.unreadable.append(str(error))
            if failed > UNREADABLE_SHARE * asked:
                more = len(self.unreadable) - NAMED
                raise DataError(
                    f"{self.name}: {failed} of the first {min(start + batch_size, len(indices))} "
                    "images cannot be read; mend or remove them",
                    [*self.unreadable[:NAMED], *([f"and {more} more"] if more > 0 else [])],
                )
            if kept:
                yield torch.from_numpy(np.stack(pixels)), torch.from_numpy(self.labels[kept])


def default_batch(preprocessing: Preprocessing) -> int:
    """Return the images in a batch: 100, or fewer for images of more than 118 pixels."""
    return max(1, min(100, BATCH_NUMBERS // math.prod(preprocessing.input_size)))


class _Chosen:
    """Some of the images of another source."""

    def __init__(self, images: Images, indices: np.ndarray) -> None:
        self.images, self.indices, self.size = images, indices, images.size

    def __len__(self) -> int:
        return len(self.indices)

    def pixels(
        self, index: int, preprocessing: Preprocessing, transform: Transform | None = None
    ) -> np.ndarray:
        return self.images.pixels(int(self.indices[index]), preprocessing, transform)

    def update(self, digest: Any, indices: np.ndarray) -> None:
        self.images.update(digest, self.indices[indices])


class ArrayImages:
    """Images in memory, uint8 `[N, H, W, C]`."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        """Hold the array; `name` stands in messages."""
        self.name, self.images = name, images
        height, width, channels = images.shape[1:]
        self.size = (channels, height, width)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def pixels(
        self, index: int, preprocessing: Preprocessing, transform: Transform | None = None
    ) -> np.ndarray:
        """Return one image, resized if it has another size than the network takes."""
        image = self.images[index]
        if transform is None and self.size == tuple(preprocessing.input_size):
            return np.ascontiguousarray(image.transpose(2, 0, 1))
        from PIL import Image

        if self.size[0] not in (1, 3):
            raise DataError(
                f"{self.name}: images have {self.size[0]} channels, the network takes "
                f"{preprocessing.input_size[0]}"
            )
        picture = Image.fromarray(image[..., 0] if self.size[0] == 1 else image)
        return to_pixels(picture, preprocessing, transform)

    def update(self, digest: Any, indices: np.ndarray) -> None:
        """Feed shape and pixels to a hash."""
        digest.update(f"{(len(indices), *self.images.shape[1:])}".encode())
        whole = len(indices) == len(self.images) and bool((np.diff(indices) == 1).all())
        digest.update(np.ascontiguousarray(self.images if whole else self.images[indices]).data)


class FileImages:
    """Image files, decoded when they are needed."""

    size: tuple[int, int, int] | None = None

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        """Hold the paths; `root` is what names in the hash are relative to."""
        self.root, self.files = root, files

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def pixels(
        self, index: int, preprocessing: Preprocessing, transform: Transform | None = None
    ) -> np.ndarray:
        """Decode, resize and crop one file."""
        from PIL import Image

        file = self.files[index]
        try:
            with Image.open(file) as image:
                return to_pixels(image, preprocessing, transform)
        except DataError:
            raise
        except Exception as error:  # decoders raise whatever they like on damaged files
            reason = first_line(error)
            raise UnreadableImage(f"{file}: {reason}") from error

    def update(self, digest: Any, indices: np.ndarray) -> None:
        """Feed names and contents to a hash."""
        for index in indices:
            file = self.files[index]
            digest.update(f"{file.relative_to(self.root).as_posix()}\n".encode())
            try:
                digest.update(file.read_bytes())
            except OSError:
                digest.update(b"unreadable")


def to_pixels(
    image: Any, preprocessing: Preprocessing, transform: Transform | None = None
) -> np.ndarray:
    """Turn a PIL image into pixels uint8 `[C, H, W]` as timm does in evaluation, or a transform."""
    mode = {1: "L", 3: "RGB"}.get(preprocessing.input_size[0])
    if mode is None:
        channels = preprocessing.input_size[0]
        raise DataError(f"the network takes {channels} channels, images have 1 or 3")
    transform = transform or evaluation_transform(preprocessing)
    pixels = np.asarray(transform(_in_bytes(image).convert(mode)), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _in_bytes(image: Any) -> Any:
    """Scale grey levels of 16 bits to 8, which PIL would cut off.

    Raises UnreadableImage for floats and 32 bits.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImage("its pixels are floats or have 32 bits; save it with 8 or 16")
    return image


@lru_cache(maxsize=8)
def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Return timm's resize and centre crop, without its normalisation."""
    from timm.data import create_transform

    whole = create_transform(
        preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
    )
    return compose(whole.transforms)


def compose(steps: Sequence[Any]) -> Transform:
    """Put transforms in a row, without those that make tensors and normalise them."""
    from torchvision.transforms import Compose

    return Compose([t for t in steps if type(t).__name__ not in TO_TENSOR])
