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
from snnconv.data.augment import Augmentation, training_batches
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
