"""Images from folders, arrays and the zoo; mistakes named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from snnconv.data import check_labels, choose_indices, open_data
from snnconv.errors import DataError, UsageError
from snnconv.preprocess import Preprocessing

SMALL = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def pixels(count: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def arrays(folder: Path, **splits: int) -> Path:
    for split, count in splits.items():
        np.savez(folder / f"{split}.npz", images=pixels(count), labels=np.arange(count) % 3)
    return folder


def image_folder(folder: Path, count: int, height: int = 20, width: int = 30) -> Path:
    for i, picture in enumerate(pixels(count, height, width)):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return folder


def test_arrays_come_in_order(tmp_path: Path) -> None:
    data = open_data(str(arrays(tmp_path, train=5, test=4)), "test")
    (first, labels), (second, _) = data.batches(SMALL, [3, 0, 1], 2)
    assert torch.equal(first[0], torch.from_numpy(pixels(4)[3].transpose(2, 0, 1)))
    assert labels.tolist() == [0, 0]
    assert (first.dtype, second.shape) == (torch.uint8, (1, 3, 8, 8))


def test_the_hash_tells_data_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    for folder in (one, two):
        folder.mkdir()
        arrays(folder, train=4, test=4)
    assert open_data(str(one), "test").sha256 == open_data(str(two), "test").sha256
    changed = pixels(4)
    changed[0, 0, 0, 0] ^= 1
    np.savez(two / "test.npz", images=changed, labels=np.arange(4) % 3)
    assert open_data(str(one), "test").sha256 != open_data(str(two), "test").sha256


def test_image_folders_are_resized_as_timm_does(tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, 0.875, "bicubic")
    folder = image_folder(tmp_path / "test", 4).parent
    data = open_data(str(folder), "test")
    transform = create_transform(
        (3, 16, 16), interpolation="bicubic", crop_pct=0.875, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    ((batch, labels),) = data.batches(preprocessing, range(4), 4)
    files = sorted(folder.rglob("*.png"))
    expected = torch.stack([transform(Image.open(f)) for f in files])
    assert torch.allclose(preprocessing.normalize(batch), expected, atol=1e-6)
    assert labels.tolist() == [0, 0, 1, 1]
    assert data.class_names == ("a", "b")


def test_a_folder_without_splits_is_split_once_and_says_so(tmp_path: Path) -> None:
    folder = str(image_folder(tmp_path, 20))
    train, test = open_data(folder, "train"), open_data(folder, "test")
    assert (len(train), len(test)) == (16, 4)
    assert "seed 0" in test.note
    seen = [
        tuple(x.flatten().tolist())
        for d in (train, test)
        for x, _ in d.batches(SMALL, range(len(d)), 1)
    ]
    assert len(set(seen)) == 20


def test_grey_images_serve_a_network_of_one_channel(tmp_path: Path) -> None:
    grey = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    data = open_data(str(image_folder(tmp_path / "test", 2).parent), "test")
    ((batch, _),) = data.batches(grey, [0, 1], 2)
    assert batch.shape == (2, 1, 8, 8)


def test_the_digits_are_split_without_overlap() -> None:
    train, test = open_data("zoo:digits", "train"), open_data("zoo:digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.sha256 != test.sha256


def test_indices_are_drawn_with_a_seed() -> None:
    assert choose_indices(10, None, 0).tolist() == list(range(10))
    assert choose_indices(10, 20, 0).tolist() == list(range(10))
    drawn = choose_indices(1000, 50, 3)
    assert len(set(drawn.tolist())) == 50
    assert drawn.tolist() == sorted(drawn.tolist()) == choose_indices(1000, 50, 3).tolist()
    assert drawn.tolist() != choose_indices(1000, 50, 4).tolist()


def write(path: Path, **fields: np.ndarray) -> str:
    np.savez(path, **fields)
    return str(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": pixels(3)}, "no labels"),
        ({"images": pixels(3).astype(float), "labels": np.arange(3)}, "uint8"),
        ({"images": pixels(3), "labels": np.arange(4)}, "3 integers"),
        ({"images": pixels(0), "labels": np.arange(0)}, "no images"),
        ({"images": np.array([None, 1]), "labels": np.arange(2)}, "damaged"),
    ],
)
def test_wrong_arrays_are_named(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_data(write(tmp_path / "a.npz", **fields), "test")


def test_missing_empty_and_damaged_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such"):
        open_data(str(tmp_path / "none"), "test")
    with pytest.raises(DataError, match="no images in it"):
        open_data(str(tmp_path), "test")
    (tmp_path / "a.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match="damaged"):
        open_data(str(tmp_path / "a.npz"), "test")
    arrays(tmp_path, train=3)
    with pytest.raises(DataError, match=r"no test\.npz"):
        open_data(str(tmp_path), "test")
    with pytest.raises(UsageError, match="zoo:digits"):
        open_data("zoo:faces", "test")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "test", 2).parent
    (folder / "test" / "a" / "0.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"0\.png"):
        list(open_data(str(folder), "test").batches(SMALL, [0, 1], 2))


def test_images_and_labels_must_fit_the_network(tmp_path: Path) -> None:
    data = open_data(str(arrays(tmp_path, train=4, test=4)), "test")
    with pytest.raises(DataError, match="images are 8x8x3, the network takes 9x9x3"):
        next(data.batches(Preprocessing((3, 9, 9), SMALL.mean, SMALL.std), [0], 1))
    check_labels(data, 3)
    with pytest.raises(DataError, match="from 0 to 2, the network has 2 classes"):
        check_labels(data, 2)
