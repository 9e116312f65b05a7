"""Training images: augmented by timm's and torchvision's transforms, keyed by what they are.

What happens to an image depends on (seed, epoch, index) alone, so neither the number of worker
processes, nor that of ranks, nor an interruption changes what a network is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snnconv.data.images import (
    NAMED,
    UNREADABLE_SHARE,
    ImageData,
    Transform,
    UnreadableImage,
    compose,
    evaluation_transform,
)
from snnconv.errors import DataError, UsageError, require_types
from snnconv.preprocess import Preprocessing

CROPS = ("shift", "scale", "none")
# Images up to this many pixels a side are shifted; larger ones are cropped and scaled.
SMALL_SIDE = 64
# The label of an image that has none, which torch's losses pass over.
UNLABELLED = -100


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image.

    `crop` is `shift` (padded by an eighth of its size, then cropped: He et al., arXiv 1512.03385,
    section 4.2), `scale` (timm's random resized crop of at least the share `scale` of its area)
    or `none`; None chooses by size. `flip` is the probability of a horizontal flip; None is one
    half for color images and 0 for grey ones, which are digits as a rule. `auto_augment` is a
    policy as timm spells it, for example `rand-m9-mstd0.5`. `mix` is the share of images that are
    mixed with another one, half of them pixel by pixel (mixup, Zhang et al., arXiv 1710.09412),
    half by a rectangle put in (CutMix, Yun et al., arXiv 1905.04899); what they show, only a
    teacher can say (Beyer et al., arXiv 2106.05237), so they have no label.
    """

    crop: str | None = None
    scale: float = 0.35
    flip: float | None = None
    auto_augment: str | None = None
    mix: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values of a wrong type and values that make no sense."""
        require_types("augmentation", self)
        if self.crop not in (None, *CROPS):
            raise UsageError(f"crop must be one of {', '.join(CROPS)}, not {self.crop!r}")
        for name, value in (("scale", self.scale), ("flip", self.flip), ("mix", self.mix)):
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} must be between 0 and 1, not {value}")

    def transform(self, preprocessing: Preprocessing) -> Transform:
        """Return a transform from PIL images to PIL images of the network's size.

        Raises UsageError for a policy timm does not know, and for other than 1 or 3 channels.
        """
        from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
        from torchvision.transforms import RandomCrop, RandomHorizontalFlip

        channels, height, width = preprocessing.input_size
        if channels not in (1, 3):
            raise UsageError(
                f"training images have 1 or 3 channels, the network takes {channels}; take "
                "--epochs 0"
            )
        crop = self.crop or ("shift" if max(height, width) <= SMALL_SIDE else "scale")
        flip = self.flip if self.flip is not None else (0.5 if channels == 3 else 0.0)
        try:
            scaled = create_transform(
                preprocessing.input_size,
                is_training=True,
                scale=(self.scale, 1.0),
                hflip=flip,
                color_jitter=0.0,
                auto_augment=self.auto_augment,
                interpolation=preprocessing.interpolation,
                # Policies fill what they uncover with it.
                mean=preprocessing.mean if channels == 1 else IMAGENET_DEFAULT_MEAN,
            ).transforms
        except Exception as error:  # timm checks a policy's text by assertions
            raise UsageError(
                f"timm knows no auto_augment {self.auto_augment!r}; an example is rand-m9-mstd0.5"
            ) from error
        _keep_one_bit(scaled)
        if crop == "scale":
            return compose(scaled)
        steps: list[Any] = [evaluation_transform(preprocessing)]
        if crop == "shift":
            steps.append(RandomCrop((height, width), padding=(width // 8, height // 8)))
        if flip:
            steps.append(RandomHorizontalFlip(flip))
        return compose(steps + [t for t in scaled if "Augment" in type(t).__name__])


def _keep_one_bit(transforms: Iterable[Any]) -> None:
    """Let policies of timm posterise to one bit at least: Pillow refuses to keep none."""
    for transform in transforms:
        operations = [*getattr(transform, "ops", ())]
        operations += [op for policy in getattr(transform, "policy", ()) for op in policy]
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = partial(_posterized, operation.aug_fn)


def _posterized(posterize: Callable[..., Any], image: Any, bits: int, **options: Any) -> Any:
    return posterize(image, max(bits, 1), **options)


def training_batches(
    data: ImageData,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    batches: Iterable[tuple[int, np.ndarray]],
    *,
    seed: int,
    workers: int = 0,
    partners: np.ndarray | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented pixels uint8 `[n, C, H, W]` and labels int64 `[n]` of each batch.

    A batch is an epoch and the indices of images; the processes live through all of them. Images
    are mixed with those at `partners`, without these never, and are `UNLABELLED` then.
    Images that cannot be read are left out, so n may be 0, and their names kept in
    `data.unreadable`; raises DataError once they are more than one in a hundred of the data.
    """
    dataset = _Augmented(data, preprocessing, augmentation, seed, partners)
    loader = DataLoader(
        dataset,
        # Epoch and index of every image, made as they are asked for.
        batch_sampler=([(epoch, i) for i in part.tolist()] for epoch, part in batches),
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else it draws from the global one
    )
    for pixels, labels, unreadable in loader:
        data.unreadable.extend(n for n in unreadable if n not in data.unreadable)
        if len(data.unreadable) > UNREADABLE_SHARE * len(data):
            raise DataError(
                f"{data.name}: {len(data.unreadable)} of {len(data)} images cannot be read; mend "
                "or remove them",
                data.unreadable[:NAMED],
            )
        yield pixels.view(-1, *preprocessing.input_size), labels


class _Augmented(Dataset[Any]):
    """Augmented images by epoch and index; a text is the name of one that cannot be read."""

    def __init__(
        self,
        data: ImageData,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        partners: np.ndarray | None,
    ) -> None:
        self.data, self.preprocessing, self.seed = data, preprocessing, seed
        self.transform = augmentation.transform(preprocessing)
        self.partners, self.mix = partners, augmentation.mix

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[np.ndarray, int] | str]:
        with _generators_kept():
            return [self.one(epoch, index) for epoch, index in keys]

    def one(self, epoch: int, index: int) -> tuple[np.ndarray, int] | str:
        found = self.alone(epoch, index)
        if self.partners is None or not self.mix or isinstance(found, str):
            return found
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, index]))
        if generator.random() >= self.mix:
            return found
        other = self.alone(epoch, int(generator.choice(self.partners)))
        return (
            found if isinstance(other, str) else (_mixed(found[0], other[0], generator), UNLABELLED)
        )

    def alone(self, epoch: int, index: int) -> tuple[np.ndarray, int] | str:
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))  # timm's policies draw from the global generators
        torch.default_generator.manual_seed(int(state[2]))  # those of GPUs take no part
        try:
            pixels = self.data.images.pixels(index, self.preprocessing, self.transform)
        except UnreadableImage as error:
            return str(error)
        return pixels, int(self.data.labels[index])


def _mixed(image: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the mean of two images `[C, H, W]`, or one with a rectangle of the other in it."""
    share = generator.random()
    if generator.random() < 0.5:
        return (image + share * (other.astype(np.float32) - image)).round().astype(np.uint8)
    sides = np.array(image.shape[1:])
    center, half = generator.random(2) * sides, np.sqrt(share) * sides / 2
    top, left = (center - half).round().astype(int).clip(0)
    bottom, right = (center + half).round().astype(int)
    mixed = image.copy()
    mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return mixed


def _collate(items: list[tuple[np.ndarray, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    read = [i for i in items if not isinstance(i, str)]
    images = np.stack([p for p, _ in read]) if read else np.empty(0, np.uint8)
    pixels = torch.from_numpy(images)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    return pixels, labels, [i for i in items if isinstance(i, str)]


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the generators of Python, numpy and torch as they were found."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
