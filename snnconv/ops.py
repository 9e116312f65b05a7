"""The linear maps and count maps of a network, on tensors of any number type.

The same few functions serve the float QANN and the integer network. Tensors are `[N, C, H, W]`
or `[N, F]`; a leading axis may hold batch times time. On integer dtypes every result is exact;
on float dtypes it is exact as long as all partial sums stay below 2^24 (float32) or 2^53
(float64), which the caller guarantees (docs/concepts.md, "Engines").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int, int]  # first row, one past the last row, rows to divide by


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector that nobody may change, made once: a copy to a GPU would wait for it.

    It is kept for good, for a recorded CUDA graph may read it.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@cache
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device=device)


def gather_pixels(x: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Take rows and columns of `[N, C, H, W]` by their numbers: nearest upsampling, reflection."""
    picked = x.index_select(-2, _index(tuple(rows), x.device))
    return picked.index_select(-1, _index(tuple(columns), x.device))


def rearrange(x: Tensor, steps: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
    """Reshape images, and permute their axes; that of the batch, 0, stays."""
    for step, numbers in steps:
        x = x.reshape(len(x), *numbers) if step == "reshape" else x.permute(0, *numbers)
    return x


def rearranged_channels(
    vector: Tensor, shape: Sequence[int], steps: Sequence[tuple[str, Sequence[int]]]
) -> Tensor:
    """Return what a vector per channel, `[C]`, is per channel of images that were rearranged.

    The images had a `shape` `(C, H, W)`, and every channel has numbers of one channel only.
    """
    images = vector.view(1, -1, 1, 1).expand(1, *shape)
    return rearrange(images, steps)[0].flatten(1)[:, 0]


@dataclass(frozen=True)
class Pool:
    """An average pooling with explicit windows: one list per axis.

    The average at `(i, j)` is the sum over rows `h[i][0]..h[i][1]` and columns `w[j][0]..w[j][1]`
    divided by `h[i][2] * w[j][2]`.
    """

    h: tuple[Window, ...]
    w: tuple[Window, ...]

    @property
    def lcm(self) -> int:
        """Return the least common multiple of all divisors."""
        return math.lcm(*{a[2] * b[2] for a in self.h for b in self.w})

    @property
    def preserves_constants(self) -> bool:
        """Return whether the average of a constant is that constant, at borders too."""
        return all(end - start == size for start, end, size in self.h + self.w)

    @property
    def largest_sum(self) -> int:
        """Return the largest value `sum_pool` gives on an input of ones."""
        return max(
            self.lcm // (a[2] * b[2]) * (a[1] - a[0]) * (b[1] - b[0])
            for a in self.h
            for b in self.w
        )

    def factors(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the integer factor `lcm / divisor` of every position, `[H, W]`."""
        lcm = self.lcm
        factors = tuple(lcm // (a[2] * b[2]) for a in self.h for b in self.w)
        return constant(factors, dtype, device).view(len(self.h), len(self.w))


def pool_windows(
    length: int,
    kernel: int,
    stride: int,
    padding: tuple[int, int],
    *,
    ceil_mode: bool = False,
    include_padding: bool = True,
) -> tuple[Window, ...]:
    """Return the windows of `avg_pool2d` along one axis of `length` pixels."""
    before, after = padding
    span = length + before + after - kernel
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= length + before:
        count -= 1
    windows = []
    for i in range(count):
        start = i * stride - before
        end = min(start + kernel, length + after)
        inside = max(start, 0), min(end, length)
        windows.append((*inside, end - start if include_padding else inside[1] - inside[0]))
    return tuple(windows)


def adaptive_windows(length: int, output: int) -> tuple[Window, ...]:
    """Return the windows of `adaptive_avg_pool2d` along one axis."""
    bounds = [(i * length // output, -(-(i + 1) * length // output)) for i in range(output)]
    return tuple((start, end, end - start) for start, end in bounds)


def window_sum(x: Tensor, pool: Pool) -> Tensor:
    """Sum every window of `[N, C, H, W]`, in the tensor's own number type.

    No partial sum reaches beyond its window, so that the bound of a window holds for all of them.
    """
    if len(pool.h) == len(pool.w) == 1:
        (top, bottom, _), (left, right, _) = pool.h[0], pool.w[0]
        # At once: one axis after the other takes many times as long if channels are last.
        return x[:, :, top:bottom, left:right].sum((2, 3), keepdim=True, dtype=x.dtype)
    for axis, windows in ((2, pool.h), (3, pool.w)):
        if len(windows) == 1:
            start, end, _ = windows[0]
            x = x.narrow(axis, start, end - start).sum(axis, keepdim=True, dtype=x.dtype)
            continue
        total: Tensor | None = None
        for offset in range(max(end - start for start, end, _ in windows)):
            inside = [start + offset < end for start, end, _ in windows]
            index = [start + offset * i for (start, _, _), i in zip(windows, inside, strict=True)]
            part = x.index_select(axis, constant(tuple(index), torch.int64, x.device))
            if not all(inside):
                mask = constant(tuple(inside), x.dtype, x.device)
                part = part * (mask[:, None] if axis == 2 else mask)
            total = part if total is None else total + part
        assert total is not None
        x = total
    return x


def sum_pool(x: Tensor, pool: Pool) -> Tensor:
    """Return `lcm` times the average of every window: an integer for integer inputs."""
    return window_sum(x, pool) * pool.factors(x.dtype, x.device)


def average_pool(x: Tensor, pool: Pool) -> Tensor:
    """Return the average of every window of a float tensor."""
    return sum_pool(x, pool) / pool.lcm


def pad_border(x: Tensor, padding: Sequence[int], value: int = 0) -> Tensor:
    """Pad `[N, C, H, W]` by `(left, right, top, bottom)`."""
    return F.pad(x, list(padding), value=value) if any(padding) else x


def padded_channels(vector: Tensor, padding: Sequence[int]) -> Tensor:
    """Pad one value per channel, `[C]`, with zeros, as `(left, right, top, bottom, ...)` says."""
    return F.pad(vector, list(padding[4:6])) if any(padding[4:]) else vector


def convolve(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolve with zero padding `(left, right, top, bottom)`, for float and integer tensors.

    `x` is `[N, C, H, W]`, `weight` `[O, C/groups, kh, kw]`.
    """
    left, right, top, bottom = padding
    if x.is_floating_point():
        if left == right and top == bottom:
            return F.conv2d(x, weight, None, stride, (top, left), dilation, groups)
        return F.conv2d(pad_border(x, padding), weight, None, stride, 0, dilation, groups)
    x = pad_border(x, padding)
    n, c, height, width = x.shape
    o, _, kh, kw = weight.shape
    out_h = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    total = x.new_zeros(n, groups, o // groups, out_h, out_w)
    xg = x.view(n, groups, c // groups, height, width)
    wg = weight.view(groups, o // groups, c // groups, kh, kw)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + (out_h - 1) * stride[0] + 1, stride[0])
            columns = slice(
                j * dilation[1], j * dilation[1] + (out_w - 1) * stride[1] + 1, stride[1]
            )
            window = xg[:, :, :, rows, columns]
            total += torch.einsum("ngchw,goc->ngohw", window, wg[..., i, j])
    return total.view(n, o, out_h, out_w)


def max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    lowest: int,
) -> Tensor:
    """Take the largest count of every window; the border is padded with the `lowest` count."""
    left, right, top, bottom = padding
    if (left, top) != (right, bottom) or 2 * top > kernel[0] or 2 * left > kernel[1]:
        x, padding = pad_border(x, padding, lowest), (0, 0, 0, 0)
    small = x.dtype if x.is_floating_point() else torch.int32 if x.itemsize < 4 else x.dtype
    pooled = F.max_pool2d(
        x.to(small), kernel, stride, (padding[2], padding[0]), dilation, ceil_mode
    )
    return pooled.to(x.dtype)


def per_channel(vector: Tensor, ndim: int) -> Tensor:
    """View a vector `[C]` so that it broadcasts over axis 1 of a tensor of `ndim` axes."""
    return vector.view(-1, *[1] * (ndim - 2))
