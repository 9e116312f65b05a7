"""One job on several processes, as `torchrun` starts them; alone, everything here does nothing.

Every process (rank) computes its share of a batch. Numbers that are reported are summed over ranks
as integers or float64, so they do not depend on how many ranks there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from snnconv.errors import SnnconvError, UsageError, first_line
from snnconv.launch import processes

# What gloo and NCCL say when the other end is gone.
LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")

T = TypeVar("T", bound=Any)


def rank() -> int:
    """Return which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group(device: str, advice: str) -> Iterator[None]:
    """Join the job's processes (gloo on CPU, NCCL on GPU), and leave them at the end.

    Raises SnnconvError with `advice` if another process ends before its time, UsageError if there
    are more processes than GPUs.
    """
    if processes() == 1 or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"there are {torch.cuda.device_count()} GPUs here; start at most so many processes"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOST_PEER):
            raise SnnconvError(
                f"another process of the job has ended ({first_line(error)}); {advice}"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def share(items: T) -> T:
    """Return this rank's share of a sequence or array: every so-manieth item."""
    return items[rank() :: size()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if size() > 1:
        values = values.detach().to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order, on every rank."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found
