"""Integer charges computed with floating-point convolutions, exactly (docs/concepts.md, "Engines").

Sums of integers are exact in float32 while every partial sum stays below 2^24, in float64 below
2^53, in any order of summation. Each layer gets the narrowest type its bounds allow. Only
algorithms that multiply and add may run: no Winograd, no FFT, no TF32. Where torch multiplies bytes
(oneDNN on CPUs, tensor cores on GPUs), layers whose counts are bytes do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snnconv.engine import gpu
from snnconv.errors import SnnconvError
from snnconv.network import Population, Readout, Synapse, charge_bounds, membrane_bound
from snnconv.ops import per_channel, sum_pool
from snnconv.quant import apply_weight

EXACT_FLOAT32 = 2**24
EXACT_FLOAT64 = 2**53
INT32 = 2**31


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Allow only convolutions that multiply and add in full precision."""
    settings = list(_precisions())
    before = [getattr(place, name) for place, name, _ in settings]
    for place, name, exact in settings:
        setattr(place, name, exact)
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.backends.nnpack.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)


def _precisions() -> Iterator[tuple[Any, str, Any]]:
    """Yield torch's settings of precision: where, their name, and the exact value.

    torch 2.9 has new ones, and refuses to read the old once one of the new has been set.
    """
    mkldnn = torch.backends.mkldnn
    places = [torch.backends.cuda.matmul, *(getattr(mkldnn, n, None) for n in ("conv", "matmul"))]
    new = [place for place in places if hasattr(place, "fp32_precision")]
    if not new:
        yield torch.backends.cuda.matmul, "allow_tf32", False
    for place in new:
        yield place, "fp32_precision", "ieee"


def exact_dtype(bound: int) -> torch.dtype:
    """Return the float type in which integers up to `bound` add exactly.

    Raises SnnconvError beyond float64.
    """
    if bound < EXACT_FLOAT32:
        return torch.float32
    if bound < EXACT_FLOAT64:
        return torch.float64
    raise SnnconvError(
        f"charges up to {bound:.3g} do not add exactly in float64; take a smaller --timesteps"
    )


@cache
def bytes_multiply(device: torch.device) -> bool:
    """Return whether torch multiplies bytes exactly on a device.

    Neither oneDNN's int8 convolutions, which add in 16 bits on processors without VNNI, nor int8
    products of matrices are part of torch's public interface, so they are tried at the largest
    values there are.
    """
    kind = BYTES.get(device.type)
    if kind is None:
        return False
    counts = torch.full((1, 64, 4, 4), kind.highest, dtype=torch.int16)
    weight = torch.full((16, 64, 3, 3), 127, dtype=torch.int8)
    weight[1::2] = -127
    attributes = {"stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1), "groups": 1}
    synapse = Synapse("", (), "conv", weight, torch.zeros(16, dtype=torch.int32), attributes)
    try:
        found = kind(synapse, device)(counts.to(device)).cpu()
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found.double(), _linear(synapse, weight.double(), counts.double()))


class _ByteConvolution:
    """A convolution of counts from 0 to 255 by oneDNN, on the CPU."""

    lowest, highest = 0, 255

    @staticmethod
    def takes(synapse: Synapse) -> bool:
        """Return whether the synapse is a convolution with the same padding on both sides.

        oneDNN (that of torch 2.14) errs where a group has one channel and the strides differ, and
        crashes where a window may lie in the padding alone.
        """
        if synapse.kind != "conv":
            return False
        attributes = synapse.attributes
        left, right, above, below = attributes["padding"]
        high, wide = (
            d * (k - 1)
            for d, k in zip(attributes["dilation"], synapse.weight.shape[2:], strict=True)
        )
        vertical, horizontal = attributes["stride"]
        return (
            (left, above) == (right, below)
            and (vertical == horizontal or synapse.weight.shape[1] > 1)
            and above <= high
            and left <= wide
        )

    shifted = False

    def __init__(self, synapse: Synapse, device: torch.device, shift: bool = False) -> None:
        """Pack the weights; shifting is left to others."""
        attributes, rows = synapse.attributes, len(synapse.weight)
        left, _, above, _ = attributes["padding"]
        self.scales, self.zeros = torch.ones(rows), torch.zeros(rows, dtype=torch.int32)
        self.geometry = (
            list(attributes["stride"]),
            [above, left],
            list(attributes["dilation"]),
            attributes["groups"],
        )
        self.weight = torch.ops.onednn.qconv_prepack(
            synapse.weight.contiguous(), self.scales, 1.0, 0, *self.geometry, None
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]`; the sums are float32, exact below 2^24."""
        x = x.view(torch.uint8) if x.dtype == torch.int8 else x.to(torch.uint8)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            x.contiguous(memory_format=torch.channels_last), 1.0, 0, self.weight, self.scales,
            self.zeros, None, *self.geometry, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result


class _ByteProduct:
    """A linear map of counts from -128 to 127, in int32; on GPUs it runs on tensor cores.

    Where our kernel does not run, a convolution's windows become the rows of a matrix.
    """

    lowest, highest = -128, 127
    # What torch asks of the matrices: more rows than this, and multiples of this.
    ROWS, MULTIPLE = 16, 16

    @staticmethod
    def takes(synapse: Synapse) -> bool:
        """Return whether the synapse is a linear map of all channels at once."""
        return synapse.kind == "linear" or synapse.attributes.get("groups") == 1

    def __init__(self, synapse: Synapse, device: torch.device, shift: bool = False) -> None:
        """Lay the weights out, with zeros up to a multiple of what is asked.

        To `shift` the results on the way is only done by our kernel; `shifted` says whether.
        """
        self.attributes = synapse.attributes
        weight = synapse.weight.to(device)
        self.kernel = tuple(weight.shape[2:])
        weight = weight.movedim(1, -1).flatten(1)
        self.rows, self.columns = weight.shape
        missing = [-n % self.MULTIPLE for n in (self.columns, self.rows)]
        self.weight = F.pad(weight, (0, missing[0], 0, missing[1])).contiguous().t()
        self.convolution, self.shifted = None, False
        if self.kernel and gpu.unavailable(device) is None:
            self.shifted = shift
            shifts = synapse.shift * int(shift)
            self.convolution = gpu.Convolution(synapse.weight, shifts, self.attributes, device)

    def __call__(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` or `[N, F]`; the channels of the result are last in memory."""
        if self.convolution is not None:
            return self.convolution(x.to(torch.int8))
        x = x.to(torch.int8).movedim(1, -1)
        windows = self._windows(x) if self.kernel else x
        lead = windows.shape[: 3 if self.kernel else 1]
        matrix = windows.reshape(-1, self.columns)
        count = len(matrix)
        missing = max(0, self.ROWS + 1 - count), len(self.weight) - self.columns
        if any(missing):
            matrix = F.pad(matrix, (0, missing[1], 0, missing[0]))
        result = torch._int_mm(matrix.contiguous(), self.weight)[:count, : self.rows]
        return result.reshape(*lead, self.rows).movedim(-1, 1)

    def _windows(self, x: Tensor) -> Tensor:
        """Return the windows `[N, H', W', kh, kw, C]` of `[N, H, W, C]`."""
        left, right, above, below = self.attributes["padding"]
        if left or right or above or below:
            x = F.pad(x, (0, 0, left, right, above, below))
        x = x.contiguous()
        spans = [
            (d * (k - 1) + 1, s)
            for d, k, s in zip(
                self.attributes["dilation"], self.kernel, self.attributes["stride"], strict=True
            )
        ]
        outputs = [(n - span) // s + 1 for n, (span, s) in zip(x.shape[1:3], spans, strict=True)]
        image, row, column, channel = x.stride()
        (_, down), (_, across) = spans
        below, aside = self.attributes["dilation"]
        return x.as_strided(
            (len(x), *outputs, *self.kernel, x.shape[-1]),
            (image, row * down, column * across, row * below, column * aside, channel),
        )


BYTES: dict[str, type[_ByteConvolution | _ByteProduct]] = {
    "cpu": _ByteConvolution,
    "cuda": _ByteProduct,
}


class Charge:
    """The linear part of one population or readout, ready to run.

    `limits` are the lowest and highest counts of every node (`SpikingNetwork.count_limits`),
    `steady` the nodes whose counts move by at most one a step. `dtype` is the type of the membrane:
    a float type, or int32 where it is asked for and enough.
    """

    def __init__(
        self,
        node: Population | Readout,
        limits: dict[str, tuple[int, int]],
        timesteps: int,
        device: torch.device,
        int32: bool = False,
        steady: frozenset[str] = frozenset(),
    ) -> None:
        """Convert the weights once."""
        self.node = node
        bound = membrane_bound(node, limits, timesteps)
        self.dtype = torch.int32 if int32 and bound < INT32 else exact_dtype(bound)
        self.bias = node.bias.to(device, self.dtype)
        self.branches = []
        self.in_bytes: list[_ByteConvolution | _ByteProduct | None] = []
        self.whole: list[bool] = []  # whether what a branch reads fits into bytes as it is
        self.far: list[int] = []  # how far counts may move within a block, to add exactly in bytes
        kind = BYTES.get(device.type)
        for synapse in node.branches:
            low, high = limits[synapse.source]
            bound = int(charge_bounds(synapse, low, high).max())
            dtype = self.dtype if synapse.kind == "scale" else exact_dtype(max(bound, -low, high))
            weight = synapse.weight.to(device, dtype)
            suits = kind is not None and kind.takes(synapse) and bytes_multiply(device)
            whole = (
                kind is not None
                and kind.lowest <= low
                and high <= kind.highest
                and bound < EXACT_FLOAT32
            )
            at_once = self.dtype == torch.int32 and not synapse.pools
            far = EXACT_FLOAT32 // (int(charge_bounds(synapse, 0, 1).max()) + 1)
            self.far.append(far if kind is None else min(far, kind.highest))
            taken = suits and (whole or synapse.source in steady)
            in_bytes = kind(synapse, device, at_once) if kind and taken else None
            self.in_bytes.append(in_bytes)
            self.whole.append(whole)
            factor = torch.exp2(synapse.shift.float()).to(device, self.dtype)
            plain = not bool(synapse.shift.any())
            self.branches.append((synapse, weight, None if plain else factor))

    def current(self, index: int, x: Tensor) -> Tensor:
        """Return `(W * x) << m` of one branch; `x` is `[..., C, H, W]` or `[..., F]` counts.

        Leading axes (time and batch) are kept.
        """
        in_bytes = self.in_bytes[index]
        if in_bytes is None or self.whole[index]:
            return self._current(index, x, in_bytes)
        if not 1 < len(x) <= self.far[index]:
            return self._current(index, x, None)
        # By how much counts have moved is a byte, whatever they are.
        least = x.amin(0, keepdim=True)
        return self._current(index, x - least, in_bytes).add_(self._current(index, least, None))

    def _current(
        self, index: int, x: Tensor, in_bytes: _ByteConvolution | _ByteProduct | None
    ) -> Tensor:
        synapse, weight, factor = self.branches[index]
        lead, x = x.shape[:2], x.flatten(0, 1)
        if in_bytes is not None:
            result = _pooled(synapse, in_bytes(x)).to(self.dtype)
        elif synapse.kind == "scale":
            factors = per_channel(weight, x.ndim)
            result = _pooled(synapse, x.to(self.dtype, copy=True).mul_(factors))
        else:
            result = _linear(synapse, weight, x.to(weight.dtype)).to(self.dtype)
        if factor is not None and not (in_bytes is not None and in_bytes.shifted):
            result *= per_channel(factor, result.ndim)
        return result.unflatten(0, lead)

    def bias_charge(self, injected: Tensor, ndim: int) -> Tensor:
        """Return B(t) b for B `[steps]`, as `[steps, 1, C, 1...]` of `ndim` axes."""
        bias = per_channel(self.bias, ndim - 1)
        return injected.to(self.bias).view(-1, *[1] * (ndim - 1)) * bias


def _linear(synapse: Synapse, weight: Tensor, x: Tensor) -> Tensor:
    return _pooled(synapse, apply_weight(synapse.kind, synapse.attributes, weight, x))


def _pooled(synapse: Synapse, result: Tensor) -> Tensor:
    for pool in synapse.pools:
        result = sum_pool(result, pool)
    return result
