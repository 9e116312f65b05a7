"""Image sets that come as arrays: npz files, and the original files of CIFAR and MNIST."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from snnconv.data.images import ArrayImages, ImageData
from snnconv.errors import DataError

SPLITS = ("train", "test")
# An npz file may unpack to this much, and to no more than so many times its own size.
LARGEST_UNPACKED = 2**36
LARGEST_RATIO = 1100


def find_arrays(folder: Path) -> dict[str, ImageData] | None:
    """Read every split of a known set of array files in a folder; None if there is none."""
    for find in (_npz_files, _cifar, _mnist):
        found = find(folder)
        if found:
            return found
    return None


def from_arrays(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...] | None = None,
) -> ImageData:
    """Take images uint8 `[N, H, W, C]` or `[N, H, W]` and integer labels `[N]` for a split.

    `name` is what reports call the data. Raises DataError for other arrays.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    _check(name, images, labels)
    images = images.reshape(*images.shape[:3], -1)
    return ImageData(
        name, split, ArrayImages(name, images), labels.astype(np.int64), class_names or None
    )


def _check(where: Path | str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raise DataError unless arrays are images and their labels; `where` they are from."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{where}: images must be uint8 [N, H, W, C] or [N, H, W], not {images.dtype} "
            f"{list(images.shape)}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{where}: labels must be {len(images)} integers, not {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if not images.size:
        raise DataError(f"{where}: holds no images")


def _npz_files(folder: Path) -> dict[str, ImageData]:
    files = {s: folder / f"{s}.npz" for s in SPLITS}
    return {s: read_npz(f, folder.name, s) for s, f in files.items() if f.exists()}


def read_npz(path: Path, name: str, split: str) -> ImageData:
    """Read `images` uint8 `[N, H, W, C]` or `[N, H, W]` and integer `labels` `[N]`.

    `class_names` are optional. Raises DataError for anything else.
    """
    try:
        _refuse_bomb(path)
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path}: has no {' and no '.join(sorted(missing))}")
            images, labels = file["images"], file["labels"]
            names = file.get("class_names")
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged or no .npz file ({error})") from error
    if names is not None and names.ndim != 1:
        raise DataError(f"{path}: class_names must be one text per class")
    _check(path, images, labels)
    class_names = None if names is None else tuple(map(str, names))
    return from_arrays(name, split, images, labels, class_names)


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        unpacked = sum(info.file_size for info in file.infolist())
    if unpacked > LARGEST_UNPACKED or unpacked > LARGEST_RATIO * path.stat().st_size:
        raise DataError(f"{path}: would unpack to {unpacked:,} bytes; that is no set of images")


def _cifar(folder: Path) -> dict[str, ImageData]:
    """Read CIFAR-10 or CIFAR-100, as Python batches or binary, in the folder or one below."""
    for inside in ("", "cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin",
                   "cifar-100-binary"):  # fmt: skip
        root = folder / inside
        if (root / "data_batch_1").is_file():
            train = [root / f"data_batch_{k}" for k in range(1, 6)]
            return _cifar_python(folder, train, root / "test_batch", "labels", root)
        if (root / "data_batch_1.bin").is_file():
            train = [root / f"data_batch_{k}.bin" for k in range(1, 6)]
            return _cifar_binary(folder, train, root / "test_batch.bin", root, 1)
        if (root / "train.bin").is_file():
            return _cifar_binary(folder, [root / "train.bin"], root / "test.bin", root, 2)
        if (root / "meta").is_file() and (root / "train").is_file():
            return _cifar_python(folder, [root / "train"], root / "test", "fine_labels", root)
    return {}


def _present(train: list[Path], test: Path) -> dict[str, list[Path]]:
    files = {"train": [f for f in train if f.is_file()], "test": [test] if test.is_file() else []}
    if len(files["train"]) not in (0, len(train)):
        missing = ", ".join(f.name for f in train if not f.is_file())
        raise DataError(f"{train[0].parent}: incomplete, there is no {missing}")
    return {split: paths for split, paths in files.items() if paths}


def _cifar_python(
    folder: Path, train: list[Path], test: Path, key: str, root: Path
) -> dict[str, ImageData]:
    names = None
    for meta, entry in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        if (root / meta).is_file():
            names = tuple(map(str, _unpickle(root / meta).get(entry, ())))
    found = {}
    for split, files in _present(train, test).items():
        parts = [_unpickle(file) for file in files]
        try:
            rows = np.concatenate([np.asarray(p["data"], dtype=np.uint8) for p in parts])
            labels = np.concatenate([np.asarray(p[key], dtype=np.int64) for p in parts])
            images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{files[0]}: no batch of CIFAR images ({error})") from error
        found[split] = _checked(folder, split, images, labels, names)
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, texts, numbers and numpy arrays; calls nothing else."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        contents = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises anything
        raise DataError(f"{path}: damaged or no batch of CIFAR images ({error})") from error
    if not isinstance(contents, dict):
        raise DataError(f"{path}: no batch of CIFAR images")
    return {_text(k): _texts(v) for k, v in contents.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _texts(value: Any) -> Any:
    return [_text(v) for v in value] if isinstance(value, list) else value


def _cifar_binary(
    folder: Path, train: list[Path], test: Path, root: Path, label_bytes: int
) -> dict[str, ImageData]:
    """Read records of `label_bytes` labels, the last of them the class, and 3,072 pixels."""
    names = None
    for meta in ("batches.meta.txt", "fine_label_names.txt"):
        if (root / meta).is_file():
            names = tuple((root / meta).read_text(encoding="utf-8", errors="replace").split())
    found = {}
    for split, files in _present(train, test).items():
        raw = np.concatenate([np.fromfile(file, dtype=np.uint8) for file in files])
        size = label_bytes + 3072
        if not len(raw) or len(raw) % size:
            raise DataError(f"{files[0]}: not a whole number of records of {size} bytes")
        rows = raw.reshape(-1, size)
        images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        found[split] = _checked(folder, split, images, rows[:, label_bytes - 1], names)
    return found


def _checked(
    folder: Path, split: str, images: np.ndarray, labels: np.ndarray, names: Any
) -> ImageData:
    if len(images) != len(labels) or not len(images):
        raise DataError(f"{folder}: {len(images)} images and {len(labels)} labels in {split}")
    return from_arrays(folder.name, split, images, labels, names)


def _mnist(folder: Path) -> dict[str, ImageData]:
    """Read MNIST or Fashion-MNIST: idx files, plain or gzipped, in the folder or one below."""
    for inside in ("", "raw", "MNIST/raw", "FashionMNIST/raw"):
        found = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = _idx_file(folder / inside, f"{prefix}-images", "idx3-ubyte")
            labels = _idx_file(folder / inside, f"{prefix}-labels", "idx1-ubyte")
            if images is None and labels is None:
                continue
            if images is None or labels is None:
                there, missing = ("labels", "images") if images is None else ("images", "labels")
                raise DataError(
                    f"{folder / inside}: incomplete, there are {prefix}-{there} and no "
                    f"{prefix}-{missing}"
                )
            pixels = _read_idx(images, 3)
            found[split] = _checked(folder, split, pixels[..., None], _read_idx(labels, 1), None)
        if found:
            return found
    return {}


def _idx_file(root: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz"))
    return next((root / n for n in names if (root / n).is_file()), None)


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Read unsigned bytes in Yann LeCun's idx format."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            if head[:4] != bytes([0, 0, 8, axes]) or len(head) != 4 + 4 * axes:
                raise DataError(f"{path}: no idx file of unsigned bytes with {axes} axes")
            shape = [int(n) for n in np.frombuffer(head, ">u4", offset=4)]
            size = int(np.prod(shape, dtype=np.float64))
            if size > LARGEST_UNPACKED:
                raise DataError(f"{path}: its head promises {size:,} bytes")
            contents = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if len(contents) != size:
        raise DataError(f"{path}: its head promises {size:,} bytes, it has {len(contents):,}")
    return np.frombuffer(contents, np.uint8).reshape(shape)
