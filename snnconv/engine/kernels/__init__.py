"""The library of C++ kernels: how it is found and called (`kernels.h` says what it computes).

It is built with the package where there is a compiler, and has a plain C interface, so that one
build serves every version of torch.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Array,
    Structure,
    addressof,
    c_char_p,
    c_int32,
    c_int64,
    c_uint8,
    c_void_p,
    sizeof,
)
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from snnconv.errors import UsageError

# Another library to load, as checks of the native code need.
VARIABLE = "SNNCONV_KERNELS"
# Channels are padded to a multiple of this; no block of output channels has fewer.
CHANNELS = 16
LARGEST_COUNT = 255
MOST_STEPS = 32

Border = tuple[int, int, int, int]  # pixels left, right, above and below


class _Planes(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("step", c_int64),
        ("image", c_int64),
        ("row", c_int64),
        ("pixel", c_int64),
    )


class _Branch(Structure):
    _fields_ = (
        ("source", _Planes),
        ("weight", c_void_p),
        ("depthwise", c_void_p),
        ("scale", c_void_p),
        ("first", c_void_p),
        ("depth", c_int32),
        ("kernel", c_int32 * 2),
        ("stride", c_int32 * 2),
        ("dilation", c_int32 * 2),
        ("padding", c_int32 * 2),
    )


class _Layer(Structure):
    _fields_ = (
        ("branches", POINTER(_Branch)),
        ("out", _Planes),
        ("state", _Planes),
        ("charge", c_void_p),
        ("charge_step", c_int64),
        ("held", c_void_p),
        ("injected", c_void_p),
        ("fires", c_void_p),
        ("threshold", c_void_p),
        ("bias", c_void_p),
        ("start", c_void_p),
        ("fired", c_void_p),
        ("branch_count", c_int32),
        ("images", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("channels", c_int32),
        ("block", c_int32),
        ("steps", c_int32),
        ("high", c_int32),
        ("is_signed", c_int32),
        ("constant", c_int32),
        ("border", c_int32 * 4),
        ("border_value", c_int32),
    )


class _Pool(Structure):
    _fields_ = (
        ("source", _Planes),
        ("out", _Planes),
        ("images", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("channels", c_int32),
        ("steps", c_int32),
        ("source_rows", c_int32),
        ("source_columns", c_int32),
        ("kernel", c_int32 * 2),
        ("stride", c_int32 * 2),
        ("dilation", c_int32 * 2),
        ("padding", c_int32 * 2),
        ("border", c_int32 * 4),
        ("border_value", c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """Load the kernels. Raises UsageError with the reason where there are none."""
    here, named = Path(__file__).parent, os.environ.get(VARIABLE)
    built = [here / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = [Path(named)] if named else [path for path in built if path.is_file()]
    if not found:
        raise UsageError(
            "the native engine was not built, for want of a C++ compiler when snnconv was "
            "installed; install g++ or clang and then snnconv anew"
        )
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise UsageError(f"the native engine cannot be loaded: {error}") from error
    try:
        loaded.snnconv_sizes.restype = c_int64
        alike = loaded.snnconv_sizes() == sum(map(sizeof, (_Layer, _Branch, _Pool)))
    except AttributeError:
        alike = False
    if not alike:
        raise UsageError("the native engine was built from other sources; install snnconv anew")
    loaded.snnconv_level_name.restype = c_char_p
    for name, description in (("fire", _Layer), ("settle", _Layer), ("max_pool", _Pool)):
        function = getattr(loaded, f"snnconv_{name}")
        function.argtypes = [POINTER(description), c_int32, c_int32]
        function.restype = c_int32 if name == "fire" else None
    return loaded


def levels() -> list[str]:
    """Return the instruction sets this processor has kernels for, the fastest last."""
    loaded = library()
    return [loaded.snnconv_level_name(k).decode() for k in range(loaded.snnconv_level() + 1)]


def largest_count(level: int) -> int:
    """Return the largest byte an instruction set multiplies exactly."""
    return int(library().snnconv_highest_count(level))


def block(level: int, channels: int) -> int:
    """Return how many of so many (padded) output channels an instruction set takes at once."""
    return int(library().snnconv_block(level, channels))


def padded(channels: int) -> int:
    """Return the channels that planes of so many have."""
    return -(-channels // CHANNELS) * CHANNELS


def spatial(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return channels, height and width of a shape `(C, H, W)` or `(F,)`."""
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)


@dataclass(frozen=True)
class Planes:
    """Counts of one node over a block of steps.

    `data` is uint8 `[steps, N, H, W, channels]` with a border around the image; channels beyond
    those of `shape` hold anything. One step stands for all where the counts do not change. A count
    c is stored as `c + zero`.
    """

    data: Tensor
    shape: tuple[int, ...]
    border: Border
    zero: int

    @staticmethod
    def size(
        steps: int, images: int, shape: tuple[int, ...], border: Border
    ) -> tuple[int, int, int, int, int]:
        """Return the size of `data`."""
        channels, height, width = spatial(shape)
        left, right, above, below = border
        return steps, images, above + height + below, left + width + right, padded(channels)

    def part(self, steps: int, images: int) -> Planes:
        """Return the first steps of the first images."""
        return Planes(self.data[:steps, :images], self.shape, self.border, self.zero)

    @property
    def image(self) -> Tensor:
        """The bytes without border, `[steps, N, H, W, channels]`."""
        _, height, width = spatial(self.shape)
        left, _, above, _ = self.border
        return self.data[:, :, above : above + height, left : left + width]

    @property
    def bytes(self) -> Tensor:
        """The bytes, `[steps, N, *shape]`."""
        view = self.image[..., : self.shape[0]]
        return view[:, :, 0, 0] if len(self.shape) == 1 else view.permute(0, 1, 4, 2, 3)

    def counts(self) -> Tensor:
        """Return the counts, float32 `[steps, N, *shape]`."""
        return self.bytes.float() - self.zero

    def fill_border_(self) -> None:
        """Write a count of 0 everywhere around the image."""
        _, height, width = spatial(self.shape)
        left, _, above, _ = self.border
        for axis, before, length in ((2, above, height), (3, left, width)):
            self.data.narrow(axis, 0, before).fill_(self.zero)
            after = self.data.shape[axis] - before - length
            self.data.narrow(axis, before + length, after).fill_(self.zero)

    def described(self) -> _Planes:
        """Return what the kernels see."""
        image = self.image
        step, *others = image.stride()[:4]
        return _Planes(image.data_ptr(), step if len(image) > 1 else 0, *others)


@dataclass(frozen=True)
class Branch:
    """A convolution's packed int8 weights and shifts, or (no weights) a shortcut's factors.

    A depthwise convolution has int32 weights `[taps, channels]` and reads channels of the same
    number. `scale` and `first` are int32, per output channel and per block; `geometry` holds
    kernel, stride, dilation and padding `(rows, columns)`.
    """

    scale: Tensor
    weight: Tensor | None = None
    depthwise: Tensor | None = None
    first: Tensor | None = None
    depth: int = 0
    geometry: dict[str, tuple[int, int]] = field(default_factory=dict)

    def described(self, source: Planes) -> _Branch:
        """Return what the kernels see, reading from `source`."""
        branch = _Branch(source.described(), scale=self.scale.data_ptr(), depth=self.depth)
        for name in ("weight", "depthwise", "first"):
            tensor = getattr(self, name)
            setattr(branch, name, None if tensor is None else tensor.data_ptr())
        for name, pair in self.geometry.items():
            getattr(branch, name)[:] = pair
        return branch


@dataclass(frozen=True)
class Cell:
    """A population's branches, and int32 thresholds, biases and starts `[channels]`.

    `block` is the number of output channels of a block of weights, `high` the largest byte.
    """

    branches: tuple[Branch, ...]
    threshold: Tensor
    bias: Tensor
    start: Tensor
    block: int
    high: int


@dataclass(frozen=True)
class Drive:
    """What the populations of one depth get in a block, per step.

    `injected` are the factors of the bias, `held` those of the charge handed in; `fires` says
    whether they may fire, `any` whether they may at all.
    """

    held: Array[c_int32]
    injected: Array[c_int32]
    fires: Array[c_uint8]
    any: bool

    @classmethod
    def of(cls, held: Sequence[int], injected: Sequence[int], fires: Sequence[bool]) -> Drive:
        """Make the arrays."""
        steps = len(fires)
        numbers, flags = c_int32 * steps, c_uint8 * steps
        return cls(numbers(*held), numbers(*injected), flags(*fires), any(fires))


class Call:
    """A population's kernels with all they work on, ready to be called again and again."""

    def __init__(self, cell: Cell, sources: list[Planes], out: Planes, state: Tensor, level: int):
        """Describe the population; `state` is uint8 `[N, H, W, channels]`."""
        branches = [b.described(s) for b, s in zip(cell.branches, sources, strict=True)]
        _, rows, columns = spatial(out.shape)
        self.level, self.sources = level, sources
        self.branches = (_Branch * len(branches))(*branches)
        self.layer = _Layer(
            self.branches,
            out.described(),
            _Planes(state.data_ptr(), 0, *state.stride()[:3]),
            threshold=cell.threshold.data_ptr(),
            bias=cell.bias.data_ptr(),
            start=cell.start.data_ptr(),
            branch_count=len(branches),
            rows=rows,
            columns=columns,
            channels=out.data.shape[4],
            block=cell.block,
            high=cell.high,
            border=out.border,
            border_value=out.zero,
        )
        self.kept = cell, out, state

    def fire(
        self,
        values: list[Planes],
        charge: Tensor | None,
        drive: Drive,
        spikes: Tensor,
        *,
        threads: int,
        signed: bool,
    ) -> bool:
        """Run through a block of steps, and write counts and state; return whether any fired.

        `values` are the parts of the sources that hold this block's counts, `charge` int32 `[steps
        or 1, n, H, W, channels]`. `spikes`, int64 `[steps, n, 2]`, are the positive and negative
        ones and must be 0 before.
        """
        layer = self._ready(values, charge, drive)
        layer.steps, layer.images = spikes.shape[:2]
        if layer.steps > MOST_STEPS:
            raise ValueError(f"a block has {layer.steps} steps, and {MOST_STEPS} at most")
        layer.fires, layer.fired = addressof(drive.fires), spikes.data_ptr()
        layer.is_signed = signed
        return bool(library().snnconv_fire(layer, self.level, threads))

    def settle(
        self, values: list[Planes], charge: Tensor | None, drive: Drive, images: int, threads: int
    ) -> None:
        """Write the counts the population ends at, one step."""
        layer = self._ready(values, charge, drive)
        layer.steps, layer.images = 1, images
        library().snnconv_settle(layer, self.level, threads)

    def _ready(self, values: list[Planes], charge: Tensor | None, drive: Drive) -> _Layer:
        layer = self.layer
        constant = charge is None or len(charge) == 1
        for branch, source, value in zip(self.branches, self.sources, values, strict=True):
            moves = len(value.data) > 1
            branch.source.step = source.data.stride(0) if moves else 0
            constant &= not moves
        layer.constant = constant
        layer.charge = None if charge is None else charge.data_ptr()
        layer.charge_step = 0 if charge is None or len(charge) == 1 else charge.stride(0)
        layer.held, layer.injected = addressof(drive.held), addressof(drive.injected)
        return layer


def max_pool(
    source: Planes, out: Planes, attributes: dict[str, Any], level: int, threads: int
) -> None:
    """Write the largest count of every window at every step, by the attributes of a `max_pool`."""
    left, _, above, _ = attributes["padding"]
    steps, images, _, _, channels = out.data.shape
    _, rows, columns = spatial(out.shape)
    _, source_rows, source_columns = spatial(source.shape)
    pool = _Pool(
        source.described(),
        out.described(),
        images,
        rows,
        columns,
        channels,
        steps,
        source_rows,
        source_columns,
        attributes["kernel"],
        attributes["stride"],
        attributes["dilation"],
        (above, left),
        out.border,
        out.zero,
    )
    library().snnconv_max_pool(pool, level, threads)
