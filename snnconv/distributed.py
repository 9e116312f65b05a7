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

from snnconv.errors import SnnconvError, first_line

T = TypeVar("T", bound=Any)


def is_leader() -> bool:
    """Return whether this is the process that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def rank() -> int:
    """Return which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group(device: str) -> Iterator[None]:
    """Join the job's processes (gloo on CPU, NCCL on GPU), and leave them at the end.

    Raises SnnconvError if another process ends before its time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or _lost_peer(error):
            raise SnnconvError(
                f"another process of the job has ended ({first_line(error)}); start the job again "
                "with --resume"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _lost_peer(error: BaseException) -> bool:
    text = str(error)
    return any(
        sign in text for sign in ("Connection closed by peer", "gloo", "NCCL", "Broken pipe")
    )


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
