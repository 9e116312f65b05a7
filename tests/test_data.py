"""Images from folders, arrays and the zoo; mistakes named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from snnconv.data import ImageData, check_labels, choose_indices, open_data, open_held_out
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


def test_the_hash_tells_images_apart_and_covers_those_that_are_used(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    for folder in (one, two):
        folder.mkdir()
        arrays(folder, train=4, test=4)
    same = open_data(str(one), "test"), open_data(str(two), "test")
    assert same[0].sha256(range(4)) == same[1].sha256(range(4)) != same[0].sha256([0, 1])
    changed = pixels(4)
    changed[0, 0, 0, 0] ^= 1
    np.savez(two / "test.npz", images=changed, labels=np.arange(4) % 3)
    other = open_data(str(two), "test")
    assert other.sha256(range(4)) != same[0].sha256(range(4))
    assert other.sha256([1, 2, 3]) == same[0].sha256([1, 2, 3])


def test_image_folders_are_resized_as_timm_does(tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, 0.875, "bicubic")
    folder = image_folder(tmp_path / "test", 4).parent
    data = open_data(str(folder), "test", calibration_images=0)
    transform = create_transform(
        (3, 16, 16), interpolation="bicubic", crop_pct=0.875, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    ((batch, labels),) = data.batches(preprocessing, range(4), 4)
    files = sorted(folder.rglob("*.png"))
    expected = torch.stack([transform(Image.open(f)) for f in files])
    assert torch.allclose(preprocessing.normalize(batch), expected, atol=1e-6)
    assert labels.tolist() == [0, 0, 1, 1]
    assert data.class_names == ("a", "b")


def contents(data: ImageData) -> set[tuple]:
    return {tuple(x.flatten().tolist()) for x, _ in data.batches(SMALL, range(len(data)), 1)}


@pytest.mark.parametrize("layout", ["classes", "val", "npz", "train_only"])
def test_one_part_is_divided_by_the_seed_and_says_so(layout: str, tmp_path: Path) -> None:
    source = tmp_path
    if layout == "npz":
        np.savez(tmp_path / "all.npz", images=pixels(20), labels=np.arange(20) % 2)
        source = tmp_path / "all.npz"
    elif layout == "train_only":
        arrays(tmp_path, train=20)
    else:
        image_folder(tmp_path / "val" if layout == "val" else tmp_path, 20)
    drawn = {"calibration_images": 6, "seed": 3}
    train, test = (open_data(str(source), s, **drawn) for s in ("train", "test"))
    assert (len(train), len(test)) == (6, 14)
    assert "6 of 20 images, drawn with seed 3" in test.note
    assert len(contents(train) | contents(test)) == 20
    again = open_data(str(source), "train", **drawn)
    other = open_data(str(source), "train", calibration_images=6, seed=4)
    assert contents(again) == contents(train) != contents(other)
    # Never more than half of it calibrates, and nothing if nothing calibrates.
    assert len(open_data(str(source), "test", calibration_images=1000)) == 10
    assert len(open_data(str(source), "test", calibration_images=0)) == 20


def test_what_calibrated_is_left_out_of_the_same_data_only(tmp_path: Path) -> None:
    folder = str(image_folder(tmp_path / "1", 20))
    train = open_data(folder, "train", calibration_images=6, seed=3)
    on = {"images": 6, "seed": 3, "data_sha256": train.sha256(range(6))}
    assert len(open_held_out(folder, "test", on)) == 14
    assert len(open_held_out(folder, "test", None)) == 20
    other = str(image_folder(tmp_path / "2", 22, 21, 31))
    assert len(open_held_out(other, "test", on)) == 22
    assert len(open_held_out("zoo:digits", "test", on)) == 500


def test_grey_images_serve_a_network_of_one_channel(tmp_path: Path) -> None:
    grey = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    data = open_data(str(image_folder(tmp_path, 2)), "test", calibration_images=0)
    ((batch, _),) = data.batches(grey, [0, 1], 2)
    assert batch.shape == (2, 1, 8, 8)


def test_the_digits_are_split_without_overlap() -> None:
    train, test = open_data("zoo:digits", "train"), open_data("zoo:digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.sha256(range(5)) != test.sha256(range(5))


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


def test_arrays_may_name_their_classes(tmp_path: Path) -> None:
    names = np.array(["ape", "bee", "cat"])
    path = write(tmp_path / "a.npz", images=pixels(3), labels=np.arange(3), class_names=names)
    assert open_data(path, "test").class_names == ("ape", "bee", "cat")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": pixels(3)}, "no labels"),
        ({"images": pixels(3).astype(float), "labels": np.arange(3)}, "uint8"),
        ({"images": pixels(3), "labels": np.arange(4)}, "3 integers"),
        ({"images": pixels(0), "labels": np.arange(0)}, "no images"),
        ({"images": np.array([None, 1]), "labels": np.arange(2)}, "damaged"),
        ({"images": pixels(3), "labels": np.arange(3), "class_names": "a"}, "one text per class"),
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
    with pytest.raises(UsageError, match="zoo:digits"):
        open_data("zoo:faces", "test")


def test_unreadable_images_are_named_and_too_many_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "test", 200)
    image_folder(tmp_path / "train", 2)
    (folder / "a" / "0.png").write_bytes(b"junk")
    whole = (folder / "b" / "1.png").read_bytes()
    (folder / "b" / "1.png").write_bytes(whole[:200])
    data = open_data(str(tmp_path), "test")
    batches = list(data.batches(SMALL, range(200), 50))
    assert sum(len(x) for x, _ in batches) == sum(len(y) for _, y in batches) == 198
    assert len(data.unreadable) == 2 and "0.png" in data.unreadable[0]
    (folder / "b" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match="images cannot be read") as raised:
        list(open_data(str(tmp_path), "test").batches(SMALL, range(200), 50))
    assert len(raised.value.problems) == 3


def test_a_picture_of_absurd_size_is_unreadable(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    image_folder(tmp_path / "test", 2)
    image_folder(tmp_path / "train", 2)
    (tmp_path / "test" / "a" / "0.png").write_bytes(bomb)
    with pytest.raises(DataError, match="cannot be read"):
        list(open_data(str(tmp_path), "test").batches(SMALL, range(2), 2))


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    grey = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in ("0.png", "1.tiff"):
            Image.fromarray(ramp).save(tmp_path / split / "a" / name)
    ((found, _),) = open_data(str(tmp_path), "test").batches(grey, range(2), 2)
    assert np.array_equal(found[0, 0].numpy(), ramp // 257)
    assert np.array_equal(found[1, 0].numpy(), ramp // 257)
    Image.fromarray((ramp / 65536).astype(np.float32)).save(tmp_path / "test" / "a" / "1.tiff")
    with pytest.raises(DataError, match="cannot be read") as raised:
        list(open_data(str(tmp_path), "test").batches(grey, range(2), 2))
    assert "1.tiff: its pixels are floats" in raised.value.problems[0]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 4)
    (folder / "a").rename(folder / "train")
    data = open_data(str(folder), "test", calibration_images=0)
    assert data.class_names == ("b", "train") and len(data) == 4


def test_half_of_mnist_is_no_mnist(tmp_path: Path) -> None:
    for name, axes in (("train-images-idx3-ubyte", 3), ("train-labels-idx1-ubyte", 1)):
        head = bytes([0, 0, 8, axes]) + b"".join(n.to_bytes(4, "big") for n in (2, 4, 4)[:axes])
        (tmp_path / name).write_bytes(head + bytes(2 * 16 if axes == 3 else 2))
    assert len(open_data(str(tmp_path), "test", calibration_images=0)) == 2
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        (tmp_path / "train-images-idx3-ubyte").read_bytes()
    )
    with pytest.raises(DataError, match="t10k-images and no t10k-labels"):
        open_data(str(tmp_path), "test")


def test_classes_have_one_number_over_all_splits(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4)
    image_folder(tmp_path / "test", 4)
    (tmp_path / "test" / "a").rename(tmp_path / "test" / "c")
    train, test = open_data(str(tmp_path), "train"), open_data(str(tmp_path), "test")
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1], [1, 1, 2, 2])
    with pytest.raises(DataError, match="there are 3 classes"):
        check_labels(train, 2)
    check_labels(train, 3, ["cat", "dog", "emu"])
    with pytest.raises(DataError, match=r"another order \(class 1 is 'b', the network's is 'c'\)"):
        check_labels(train, 3, ["a", "c", "b"])


def test_images_of_another_size_are_resized_as_timm_does(tmp_path: Path) -> None:
    data = open_data(str(arrays(tmp_path, train=4, test=4)), "test")
    larger = Preprocessing((3, 12, 12), SMALL.mean, SMALL.std, 1.0, "bilinear")
    ((batch, _),) = data.batches(larger, [2], 1)
    transform = create_transform((3, 12, 12), interpolation="bilinear", crop_pct=1.0)
    expected = np.asarray(Image.fromarray(pixels(4)[2]).resize((12, 12), Image.BILINEAR))
    assert transform is not None
    assert np.array_equal(batch[0].numpy().transpose(1, 2, 0), expected)


def test_labels_must_fit_the_network(tmp_path: Path) -> None:
    data = open_data(str(arrays(tmp_path, train=4, test=4)), "test")
    check_labels(data, 3)
    with pytest.raises(DataError, match="from 0 to 2, the network has 2 classes"):
        check_labels(data, 2)
