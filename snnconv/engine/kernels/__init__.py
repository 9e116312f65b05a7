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
    Structure,
    addressof,
    c_char_p,
    c_int32,
    c_int64,
    c_void_p,
    sizeof,
)
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from snnconv.errors import UsageError

# Another library to load, as checks of the native code need.
VARIABLE = "SNNCONV_KERNELS"
# Channels are padded to a multiple of this; no block of output channels has fewer.
CHANNELS = 16
MOST_STEPS = 32

Border = tuple[int, int, int, int]  # pixels left, right, above and below


class _Planes(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("step", c_int64),
        ("image", c_int64),
        ("row", c_int64),
        ("pixel", c_int64),
        ("moves", c_void_p),
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
        ("base", c_void_p),
        ("held", c_void_p),
        ("injected", c_void_p),
        ("fires", c_void_p),
        ("falls", c_void_p),
        ("threshold", c_void_p),
        ("bias", c_void_p),
        ("start", c_void_p),
        ("sums", c_void_p),
        ("branch_count", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("channels", c_int32),
        ("block", c_int32),
        ("high", c_int32),
        ("is_signed", c_int32),
        ("border", c_int32 * 4),
        ("border_value", c_int32),
        ("fired", c_void_p),
        ("images", c_int32),
        ("steps", c_int32),
        ("constant", c_int32),
    )


class _Pool(Structure):
    _fields_ = (
        ("source", _Planes),
        ("out", _Planes),
        ("rows", c_int32),
        ("columns", c_int32),
        ("channels", c_int32),
        ("source_rows", c_int32),
        ("source_columns", c_int32),
        ("kernel", c_int32 * 2),
        ("stride", c_int32 * 2),
        ("dilation", c_int32 * 2),
        ("padding", c_int32 * 2),
        ("border", c_int32 * 4),
        ("border_value", c_int32),
        ("images", c_int32),
        ("steps", c_int32),
    )


class _Task(Structure):
    _fields_ = (("work", c_void_p), ("kind", c_int32), ("population", c_int32))


class _Block(Structure):
    _fields_ = (
        ("fired", c_void_p),
        ("images", c_int32),
        ("steps", c_int32),
        ("level", c_int32),
        ("threads", c_int32),
    )


class Kind(IntEnum):
    """What a task does with its layer, or that it pools."""

    FIRE = 0
    SETTLE = 1
    SUM = 2
    MAX_POOL = 3


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
        ours = (_Layer, _Branch, _Pool, _Task, _Block)
        alike = loaded.snnconv_sizes() == sum(map(sizeof, ours))
    except AttributeError:
        alike = False
    if not alike:
        raise UsageError("the native engine was built from other sources; install snnconv anew")
    loaded.snnconv_level_name.restype = c_char_p
    loaded.snnconv_run.argtypes = [c_void_p, c_int32, POINTER(_Block)]
    loaded.snnconv_run.restype = None
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
    those of `shape` hold anything. A count c is stored as `c + zero`, less its `base` `[N, *shape]`
    where there is one. `moves`, int32 `[1]`, says whether there is more than the first step, which
    stands for all else.
    """

    data: Tensor
    shape: tuple[int, ...]
    border: Border
    zero: int
    moves: Tensor
    base: Tensor | None = None

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
        return replace(self, data=self.data[:steps, :images])

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
        counts = self.bytes.float() - self.zero
        return counts if self.base is None else counts.add_(self.base)

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
        return _Planes(image.data_ptr(), *image.stride()[:4], self.moves.data_ptr())


@dataclass(frozen=True)
class Branch:
    """A convolution's packed int8 weights and shifts, or (no weights) a shortcut's factors.

    A depthwise convolution has int32 weights `[taps, channels]` and reads channels of the same
    number. `scale` and `first` are int32, per output channel and per block; `geometry` holds
    kernel, stride, dilation and padding `(rows, columns)`. A shortcut reads the channels `channel`
    further on.
    """

    scale: Tensor
    weight: Tensor | None = None
    depthwise: Tensor | None = None
    first: Tensor | None = None
    depth: int = 0
    geometry: dict[str, tuple[int, int]] = field(default_factory=dict)
    channel: int = 0

    def described(self, source: Planes) -> _Branch:
        """Return what the kernels see, reading from `source`."""
        planes = source.described()
        planes.data += self.channel
        branch = _Branch(planes, scale=self.scale.data_ptr(), depth=self.depth)
        for name in ("weight", "depthwise", "first"):
            tensor = getattr(self, name)
            setattr(branch, name, None if tensor is None else tensor.data_ptr())
        for name, pair in self.geometry.items():
            getattr(branch, name)[:] = pair
        return branch


@dataclass(frozen=True)
class Cell:
    """What a node sums: branches, and int32 thresholds, biases and starts `[channels]`.

    `block` is the number of output channels of a block of weights, `high` the largest byte.
    """

    branches: tuple[Branch, ...]
    threshold: Tensor
    bias: Tensor
    start: Tensor
    block: int
    high: int


class Program:
    """Tasks in order, described once and run again and again, all or a few at a time."""

    def __init__(self, level: int) -> None:
        """Begin without tasks, for an instruction set."""
        self.level = level
        self.works: list[_Layer | _Pool] = []
        self.tasks = (_Task * 0)()
        self.kept: list[Any] = []

    def layer(
        self,
        kind: Kind,
        cell: Cell,
        sources: Sequence[Planes],
        out: Planes,
        *,
        state: Tensor | None = None,
        timetable: Tensor | None = None,
        held: Tensor | None = None,
        charge: Tensor | None = None,
        base: Tensor | None = None,
        sums: Tensor | None = None,
        signed: bool = False,
        population: int = 0,
    ) -> int:
        """Add a layer that fires, settles or sums; return its number.

        `state` is uint8 `[N, H, W, channels]`, `timetable` int32 `[2, steps]` how often the bias
        has been injected and whether neurons may fire, `held` int32 `[steps]` the factors of the
        `charge`, int32 `[steps or 1, N, H, W, channels]`, `base` of one step what every step begins
        with, and `sums` of the same kind what a sum is written to. Of the `out` of a sum only shape
        and `moves` count.
        """
        branches = [b.described(s) for b, s in zip(cell.branches, sources, strict=True)]
        array = (_Branch * len(branches))(*branches)
        _, rows, columns = spatial(out.shape)
        layer = _Layer(
            array,
            out.described(),
            threshold=cell.threshold.data_ptr(),
            bias=cell.bias.data_ptr(),
            start=cell.start.data_ptr(),
            branch_count=len(branches),
            rows=rows,
            columns=columns,
            channels=len(cell.bias),
            block=cell.block,
            high=cell.high,
            is_signed=signed,
            border=out.border,
            border_value=out.zero,
        )
        if state is not None:
            layer.state = _Planes(state.data_ptr(), 0, *state.stride()[:3])
        if timetable is not None:
            layer.injected, layer.fires = (row.data_ptr() for row in timetable)
        layer.held = None if held is None else held.data_ptr()
        layer.base = None if base is None else base.data_ptr()
        layer.sums = None if sums is None else sums.data_ptr()
        self.kept += [cell, array, out, state, timetable, held, base, sums]
        number = self._add(kind, layer, population)
        if charge is not None:
            self.give(number, charge)
        return number

    def max_pool(self, source: Planes, out: Planes, attributes: dict[str, Any]) -> int:
        """Add a pooling by the attributes of a `max_pool`; return its number."""
        left, _, above, _ = attributes["padding"]
        _, rows, columns = spatial(out.shape)
        _, source_rows, source_columns = spatial(source.shape)
        pool = _Pool(
            source.described(),
            out.described(),
            rows,
            columns,
            out.data.shape[4],
            source_rows,
            source_columns,
            attributes["kernel"],
            attributes["stride"],
            attributes["dilation"],
            (above, left),
            out.border,
            out.zero,
        )
        self.kept += [source, out]
        return self._add(Kind.MAX_POOL, pool, 0)

    def _add(self, kind: Kind, work: _Layer | _Pool, population: int) -> int:
        self.works.append(work)
        task = _Task(addressof(work), kind, population)
        self.tasks = (_Task * len(self.works))(*self.tasks, task)
        return len(self.works) - 1

    def give(self, number: int, charge: Tensor) -> None:
        """Hand a layer a charge, int32 `[steps or 1, n, H, W, channels]`; callers keep it."""
        layer = self.works[number]
        assert isinstance(layer, _Layer)
        layer.charge = charge.data_ptr()
        layer.charge_step = charge.stride(0) if len(charge) > 1 else 0

    def watch(self, number: int, falls: Tensor | None) -> None:
        """Have a layer add its negative spikes to uint8 `[N, H, W, channels]`; callers keep it."""
        layer = self.works[number]
        assert isinstance(layer, _Layer)
        layer.falls = None if falls is None else falls.data_ptr()

    def run(
        self, first: int, end: int, spikes: Tensor, steps: int, images: int, threads: int
    ) -> None:
        """Do the tasks first..end for a block of steps.

        `spikes`, int64 `[populations, steps, n, 2]`, are the positive and negative ones and must
        be 0 before.
        """
        if steps > MOST_STEPS:
            raise ValueError(f"a block has {steps} steps, and {MOST_STEPS} at most")
        block = _Block(spikes.data_ptr(), images, steps, self.level, threads)
        library().snnconv_run(addressof(self.tasks) + first * sizeof(_Task), end - first, block)
