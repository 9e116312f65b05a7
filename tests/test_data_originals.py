"""The original files of CIFAR and MNIST, written here byte by byte."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from snnconv.data import open_data
from snnconv.errors import DataError
from snnconv.preprocess import Preprocessing

COLOR = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
GREY = Preprocessing((1, 28, 28), (0.5,), (0.5,))


def planes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def labels(count: int, classes: int) -> np.ndarray:
    return np.arange(count) * 7 % classes


def python_batches(folder: Path, hundred: bool) -> None:
    folder.mkdir(parents=True)
    key = b"fine_labels" if hundred else b"labels"
    names = ["train"] if hundred else [f"data_batch_{k}" for k in range(1, 6)]
    for seed, name in enumerate([*names, "test" if hundred else "test_batch"]):
        rows = planes(4, seed).reshape(4, 3072)
        batch = {b"data": rows, key: labels(4, 10).tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {(b"fine_label_names" if hundred else b"label_names"): [b"cat", b"dog"]}
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))


def binary_batches(folder: Path, hundred: bool) -> None:
    folder.mkdir(parents=True)
    names = ["train.bin"] if hundred else [f"data_batch_{k}.bin" for k in range(1, 6)]
    for seed, name in enumerate([*names, "test.bin" if hundred else "test_batch.bin"]):
        records = b""
        for image, label in zip(planes(4, seed), labels(4, 10), strict=True):
            records += bytes([9, label] if hundred else [label]) + image.tobytes()
        (folder / name).write_bytes(records)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar(kind: str, hundred: bool, inside: bool, tmp_path: Path) -> None:
    if kind == "python":
        name = "cifar-100-python" if hundred else "cifar-10-batches-py"
        python_batches(tmp_path / name, hundred)
    else:
        name = "cifar-100-binary" if hundred else "cifar-10-batches-bin"
        binary_batches(tmp_path / name, hundred)
    source = str(tmp_path / name if inside else tmp_path)
    train, test = open_data(source, "train"), open_data(source, "test")
    batches = 1 if hundred else 5
    assert (len(train), len(test), test.note) == (4 * batches, 4, "")
    ((x, y),) = test.batches(COLOR, range(4), 4)
    assert torch.equal(x, torch.from_numpy(planes(4, batches)))
    assert y.tolist() == labels(4, 10).tolist()
    if kind == "python":
        assert test.class_names == ("cat", "dog")


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


def mnist(folder: Path, zipped: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for seed, prefix in enumerate(("train", "t10k")):
        images[prefix] = np.random.default_rng(seed).integers(0, 256, (5, 28, 28))
        for name, values in (
            (f"{prefix}-images-idx3-ubyte", images[prefix]),
            (f"{prefix}-labels-idx1-ubyte", labels(5, 10)),
        ):
            contents = idx(values)
            file = folder / (f"{name}.gz" if zipped else name)
            file.write_bytes(gzip.compress(contents) if zipped else contents)
    return images


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inside", ["", "MNIST/raw"])
def test_mnist(inside: str, zipped: bool, tmp_path: Path) -> None:
    images = mnist(tmp_path / inside, zipped)
    test = open_data(str(tmp_path), "test")
    ((x, y),) = test.batches(GREY, range(5), 5)
    assert np.array_equal(x[:, 0].numpy(), images["t10k"])
    assert y.tolist() == labels(5, 10).tolist()


def test_a_pickle_that_wants_to_run_something_does_not(tmp_path: Path) -> None:
    python_batches(tmp_path / "c", False)

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="it wants to run"):
        open_data(str(tmp_path / "c"), "test")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "data_batch_3").unlink(), "no data_batch_3"),
        (lambda f: (f / "data_batch_3").write_bytes(b"x"), "damaged"),
        (lambda f: (f / "data_batch_3").write_bytes(pickle.dumps({b"data": b""})), "no batch"),
        (lambda f: (f / "data_batch_3").write_bytes(pickle.dumps([1])), "no batch"),
    ],
)
def test_damaged_batches_are_named(damage: object, message: str, tmp_path: Path) -> None:
    python_batches(tmp_path / "c", False)
    damage(tmp_path / "c")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path / "c"), "train")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "no idx file"),
        (b"\0\0\x08\x01\0\0\0\5", "no idx file"),
        (idx(np.zeros((5, 28, 28)))[:-1], "promises"),
        (idx(np.zeros((5, 28, 28))) + b"x", "promises"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "promises"),
        (idx(np.zeros((4, 28, 28))), "4 images and 5 labels"),
    ],
)
def test_damaged_idx_files_are_named(contents: bytes, message: str, tmp_path: Path) -> None:
    mnist(tmp_path, False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(contents)
    with pytest.raises(DataError, match=message):
        open_data(str(tmp_path), "test")


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    mnist(tmp_path, True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged"):
        open_data(str(tmp_path), "test")


def test_an_npz_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        inner = bytes(10_000_000)
        for k in range(3):
            file.writestr(f"{k}.npy", inner)
    import snnconv.data.arrays as arrays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "LARGEST_RATIO", 100)
        with pytest.raises(DataError, match="would unpack to"):
            open_data(str(path), "test")


def test_timm_sets_are_opened_without_downloading(tmp_path: Path) -> None:
    binary = tmp_path / "t"
    python_batches(binary / "cifar-10-batches-py", False)
    with pytest.raises(DataError, match="timm cannot open it") as raised:
        open_data(f"torch/cifar10@{binary}", "test")
    # torchvision knows that these are not the original files, and nothing is fetched.
    assert "download" in str(raised.value)


def test_a_folder_by_its_timm_name(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "validation"):
        for k in range(4):
            folder = tmp_path / split / "ab"[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 40 * k, np.uint8)).save(folder / f"{k}.png")
    for name in ("torch/image_folder", "torch/Folder"):
        one, two = (open_data(f"{name}@{tmp_path / 'train'}", s) for s in ("train", "test"))
        assert len(one) + len(two) == 4 and one.note
        assert one.sha256(range(2)) != two.sha256(range(2))
    data = open_data(f"torch/image_folder@{tmp_path}", "test")
    ((x, y),) = data.batches(COLOR, range(4), 4)
    assert y.tolist() == [0, 0, 1, 1]
    assert x[:, 0, 0, 0].tolist() == [0, 80, 40, 120]
    assert data.sha256(range(4)) != data.sha256(range(3))


@pytest.mark.parametrize("name", ["tfds/mnist", "wds/mnist@here", "hfids/mnist"])
def test_streams_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(DataError, match=r"stream.*train\.npz"):
        open_data(name, "train")
