"""Training images depend on (seed, epoch, index) and on nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from snnconv.data import open_data
from snnconv.data.arrays import from_arrays
from snnconv.data.augment import UNLABELLED, Augmentation, training_batches
from snnconv.errors import DataError, UsageError
from snnconv.preprocess import Preprocessing

COLOR = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
GREY = Preprocessing((1, 16, 16), (0.5,), (0.5,))
COUNT = 24


def images(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, channels), dtype=np.uint8)


def drawn(
    augmentation: Augmentation,
    preprocessing: Preprocessing = COLOR,
    epoch: int = 0,
    seed: int = 0,
    batch: int = 5,
    order: np.ndarray | None = None,
    workers: int = 0,
) -> dict[int, Tensor]:
    data = from_arrays("d", "train", images(preprocessing.input_size[0]), np.arange(COUNT))
    order = np.arange(COUNT) if order is None else order
    batches = [(epoch, order[k : k + batch]) for k in range(0, COUNT, batch)]
    found = training_batches(data, preprocessing, augmentation, batches, seed=seed, workers=workers)
    return {int(n): p for pixels, labels in found for n, p in zip(labels, pixels, strict=True)}


def equal(one: dict[int, Tensor], two: dict[int, Tensor]) -> int:
    assert one.keys() == two.keys()
    return sum(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5"])
@pytest.mark.parametrize("crop", ["shift", "scale", "none"])
def test_order_batches_and_workers_change_nothing(crop: str, policy: str | None) -> None:
    how = Augmentation(crop=crop, auto_augment=policy)
    one = drawn(how)
    order = np.random.default_rng(1).permutation(COUNT)
    assert equal(one, drawn(how, batch=7, order=order)) == COUNT
    assert equal(one, drawn(how, epoch=1)) < COUNT
    assert equal(one, drawn(how, seed=1)) < COUNT
    if policy is None and crop == "shift":
        assert equal(one, drawn(how, workers=2)) == COUNT


def test_shift_moves_the_image_by_an_eighth_at_most() -> None:
    plain = images().transpose(0, 3, 1, 2)
    offsets = set()
    for n, pixels in drawn(Augmentation(flip=0.0)).items():
        padded = np.pad(plain[n], ((0, 0), (2, 2), (2, 2)))
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[:, y : y + 16, x : x + 16], pixels.numpy())
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 5


def test_grey_images_can_be_augmented_by_a_policy() -> None:
    how = Augmentation(crop="none", flip=0.0, auto_augment="rand-m9-n3")
    changed = [drawn(how, GREY, epoch=epoch) for epoch in range(3)]
    plain = drawn(Augmentation(crop="none", flip=0.0), GREY)
    assert all(p.shape == (1, 16, 16) for found in changed for p in found.values())
    assert all(equal(found, plain) < COUNT for found in changed)


def test_grey_images_are_not_flipped_unless_asked_for() -> None:
    plain = images(1).transpose(0, 3, 1, 2)
    kept = drawn(Augmentation(crop="none"), GREY)
    assert all(np.array_equal(plain[n], p.numpy()) for n, p in kept.items())
    flipped = drawn(Augmentation(crop="none", flip=1.0), GREY)
    assert all(np.array_equal(plain[n][..., ::-1], p.numpy()) for n, p in flipped.items())


def mixed(
    partners: np.ndarray | None, share: float = 1.0, batch: int = 5, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and labels of images of one color, 10 times their number."""
    plain = np.arange(COUNT, dtype=np.uint8).repeat(16 * 16 * 3).reshape(COUNT, 16, 16, 3) * 10
    data = from_arrays("d", "train", plain, np.arange(COUNT))
    found = training_batches(
        data,
        COLOR,
        Augmentation(crop="none", mix=share),
        [(0, np.arange(k, min(k + batch, COUNT))) for k in range(0, COUNT, batch)],
        seed=0,
        workers=workers,
        partners=partners,
    )
    pixels, labels = zip(*found, strict=True)
    return torch.cat(pixels).numpy(), torch.cat(labels).numpy()


def test_images_are_mixed_with_partners() -> None:
    """The 20th image is everyone's partner: means with it, and rectangles of it."""
    pixels, labels = mixed(np.array([20]))
    assert (labels == UNLABELLED).all()
    means, rectangles = set(), 0
    for n, image in enumerate(pixels):
        assert (image == image[:1]).all()
        changed = image[0] != 10 * n
        if changed.all() and (image[0] != 200).all():
            (value,) = np.unique(image)
            assert min(10 * n, 200) < value < max(10 * n, 200)
            means.add(int(value) - 10 * n)
        elif changed.any() and not changed.all():
            rectangles += 1
            rows, columns = np.nonzero(changed)
            assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            assert (image[0][changed] == 200).all()
    assert 5 < len(means) < 18 and 5 < rectangles < 18


def test_mixing_depends_on_the_image_alone_and_needs_partners() -> None:
    partners = np.arange(COUNT)
    pixels, labels = mixed(partners, 0.5)
    assert 4 < (labels == UNLABELLED).sum() < 20
    plain = labels != UNLABELLED
    assert (pixels[plain] == 10 * labels[plain].reshape(-1, 1, 1, 1)).all()
    for again in (mixed(partners, 0.5, batch=7), mixed(partners, 0.5, workers=2)):
        assert np.array_equal(again[0], pixels) and np.array_equal(again[1], labels)
    assert np.array_equal(mixed(None)[1], np.arange(COUNT))


def test_the_generators_of_others_are_left_alone() -> None:
    def states() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = states()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    drawn(Augmentation())
    assert states() == expected


def test_processes_go_on_from_epoch_to_epoch() -> None:
    data = from_arrays("d", "train", images(3), np.arange(COUNT))
    batches = [(epoch, np.arange(COUNT)[k::3]) for epoch in (4, 5) for k in range(3)]

    def found(workers: int, first: int = 0) -> list[Tensor]:
        given = training_batches(
            data, COLOR, Augmentation(), iter(batches[first:]), seed=0, workers=workers
        )
        return [pixels for pixels, _ in given]

    alone = found(0)
    assert len(alone) == 6 and not torch.equal(alone[0], alone[3])
    for workers, first in ((2, 0), (2, 4), (1, 1)):
        for one, two in zip(found(workers, first), alone[first:], strict=True):
            assert torch.equal(one, two)


def test_unreadable_images_are_left_out_or_refused(tmp_path: Path) -> None:
    for k in range(120):
        file = tmp_path / "train" / "ab"[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), k, np.uint8)).save(file)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    data = open_data(str(tmp_path), "train", calibration_images=0)

    def sizes() -> list[int]:
        batches = [(0, np.arange(60)), (0, np.arange(60, 120)), (0, np.arange(1))]
        found = training_batches(data, COLOR, Augmentation(), batches, seed=0)
        return [len(labels) for _, labels in found]

    assert sizes() == [59, 60, 0]
    assert len(data.unreadable) == 1 and "0.png" in data.unreadable[0]
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 120 images cannot be read"):
        sizes()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="crop"):
        Augmentation(crop="center")
    with pytest.raises(UsageError, match="flip"):
        Augmentation(flip=2.0)


def test_policies_keep_a_bit_where_they_would_keep_none() -> None:
    transform = Augmentation(auto_augment="rand-m10-mstd0-inc1-n30").transform(COLOR)
    image = Image.fromarray(images()[0])
    for seed in range(20):
        random.seed(seed)
        assert transform(image).size == (16, 16)
