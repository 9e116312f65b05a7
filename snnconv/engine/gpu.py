"""What the counts engine has its own kernels for on GPUs: convolutions of bytes, and neurons.

A convolution reads its windows where they are, without writing them out first. Neurons fire through
a block of steps in one pass: every neuron reads its charge of each step once and keeps its count in
a register. All is done in int32, which the caller knows to be enough. Triton comes with torch where
torch has it (CUDA on Linux); `unavailable` says why it does not serve. With TRITON_INTERPRET=1 in
the environment the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snnconv import ops
from snnconv.errors import first_line
from snnconv.neuron import step

BLOCK = 1024
# Positions and output channels that one program convolves; input channels times pixels at once.
POSITIONS, ROWS, INPUTS, WARPS = 128, (16, 128), (32, 64), 4


@cache
def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on a device; None if they can.

    Tries them, once in a process.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"there is no Triton for {device.type}"
    try:
        works = _scans(device) and _convolves(device)
        return None if works else "Triton's kernels compute something else than they should"
    except Exception as error:  # no Triton, no compiler it needs, a GPU too old for it
        return f"Triton does not work here: {first_line(error)}"


def scan(
    charge: Tensor,
    timetable: Tensor,
    rows: Tensor,
    state: Tensor,
    limits: tuple[int, int],
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """Fire through a block; return counts `[steps, N, C, ...]` and how many fired `[steps, N]`.

    All numbers are int32. `charge` is what has arrived at each step without the bias, `[steps or 1,
    N, C, ...]`; `timetable` `[2, steps]` how often the bias has been injected, and 1 where neurons
    may fire; `rows` `[3, C]` are bias, threshold and V0. `state` are the counts before, of any
    integer type, `[N, C, ...]`. The result has its channels last in memory.
    """
    from snnconv.engine.triton_kernels import fire

    images, channels = state.shape[:2]
    steps, size = timetable.shape[1], state[0].numel()
    before = state.movedim(1, -1).contiguous()
    counts = before.new_empty((steps, *before.shape))
    fired = torch.zeros(steps, images, dtype=torch.int32, device=state.device)
    fire[images, -(-size // BLOCK)](
        charge.movedim(2, -1).contiguous(), *timetable, *rows, before, counts, fired, size,
        channels, *limits,
        CHARGES=len(charge), STEPS=steps, SIGNED=signed, BLOCK=BLOCK,
    )  # fmt: skip
    return counts.movedim(-1, 2), fired


class Convolution:
    """A convolution of int8 `[N, C, H, W]`, of one group, times 2^shift, in int32."""

    def __init__(
        self, weight: Tensor, shift: Tensor, attributes: dict[str, Any], device: torch.device
    ) -> None:
        """Lay int8 weights `[O, C, kh, kw]` and shifts `[O]` out.

        `attributes` are stride, padding and dilation.
        """
        self.rows, self.channels, self.high, self.wide = weight.shape
        self.attributes = attributes
        low, high = ROWS
        self.block = min(high, max(low, 1 << (self.rows - 1).bit_length()))
        self.inputs = INPUTS[self.channels >= INPUTS[1]]
        columns = weight.permute(2, 3, 1, 0).flatten(0, 2)
        missing = -self.rows % self.block, -len(columns) % self.inputs
        self.weight = F.pad(columns, (0, missing[0], 0, missing[1])).contiguous().to(device)
        self.factor = torch.exp2(shift.double()).to(device, torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve; the channels of the result are last in memory."""
        from snnconv.engine.triton_kernels import convolve

        x = x.movedim(1, -1).contiguous()
        images, *size, _ = x.shape
        left, right, above, below = self.attributes["padding"]
        stride, dilation = self.attributes["stride"], self.attributes["dilation"]
        padded = size[0] + above + below, size[1] + left + right
        kernel = self.high, self.wide
        outputs = [
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(padded, dilation, kernel, stride, strict=True)
        ]
        positions = images * outputs[0] * outputs[1]
        out = torch.empty(images, *outputs, self.rows, dtype=torch.int32, device=x.device)
        convolve[-(-positions // POSITIONS), -(-self.rows // self.block)](
            x, self.weight, self.factor, out, positions, *size, *outputs, self.rows, *stride, above,
            left, *dilation,
            CHANNELS=self.channels, WIDE=self.wide, TAPS=self.high * self.wide,
            BLOCK_M=POSITIONS, BLOCK_N=self.block, BLOCK_K=self.inputs, num_warps=WARPS,
        )  # fmt: skip
        return out.movedim(-1, 1)


def _convolves(device: torch.device) -> bool:
    """Return whether the convolution is that of `snnconv.ops`, at the largest values there are."""
    attributes: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0, 1, 1), "dilation": (1, 2)}
    for channels, rows in ((3, 20), (64, 16)):
        x = torch.full((2, channels, 9, 8), -128, dtype=torch.int8)
        weight = torch.full((rows, channels, 3, 3), 127, dtype=torch.int8)
        x[:, ::2, ::2], weight[1::2] = 127, -127
        shift = torch.arange(rows) % 3
        found = Convolution(weight, shift, attributes, device)(x.to(device)).cpu()
        truth = ops.convolve(x.long(), weight.long(), **attributes, groups=1)
        if not torch.equal(found.long(), truth << shift.view(-1, 1, 1)):
            return False
    return True


def _scans(device: torch.device) -> bool:
    """Return whether neurons do what `snnconv.neuron` says."""
    draw = torch.Generator().manual_seed(0)
    steps, images, channels, pixels = 3, 2, 5, 300

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw, dtype=torch.int32)

    charge = integers(-2000, 2000, steps, images, pixels, channels).movedim(-1, 2)
    rows = torch.stack([integers(low, 400, channels) for low in (-400, 50, 0)])
    state = integers(-3, 4, images, pixels, channels).to(torch.int8).movedim(-1, 1)
    timetable = torch.tensor([[1, 2, 2], [0, 1, 1]], dtype=torch.int32)
    there = [x.to(device) for x in (charge, timetable, rows, state)]
    found, fired = scan(there[0], there[1], there[2], there[3], (-3, 3), True)
    truth, emitted = state.int(), []
    bias, threshold, start = (row.view(-1, 1) for row in rows)
    for t in range(steps):
        injected, fires = timetable[:, t]
        membrane = start + charge[t] + injected * bias - threshold * truth
        spikes, _, after = step(membrane, truth, threshold, 3, -3, True)
        spikes, truth = (spikes, after) if fires else (spikes * 0, truth)
        emitted.append(spikes.abs().sum((1, 2)))
        if not torch.equal(found[t].cpu().int(), truth):
            return False
    return torch.equal(fired.cpu().long(), torch.stack(emitted).long())
