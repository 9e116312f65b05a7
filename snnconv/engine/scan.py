"""Neurons firing through a block of steps, in one pass: the counts engine on GPUs.

Every neuron reads its charge of each step once and keeps its count in a register. All is done in
int32, which the caller knows to be enough. Triton comes with torch where torch has it (CUDA on
Linux); `unavailable` says why it does not serve. With TRITON_INTERPRET=1 in the environment the
kernel runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from snnconv.errors import first_line
from snnconv.neuron import step

BLOCK = 1024


@cache
def unavailable(device: torch.device) -> str | None:
    """Say why the kernel cannot run on a device; None if it can. Tries it, once in a process."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"there is no Triton for {device.type}"
    try:
        return None if _works(device) else "Triton's kernel computes something else than it should"
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


def _works(device: torch.device) -> bool:
    """Return whether the kernel does what `snnconv.neuron` says."""
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
