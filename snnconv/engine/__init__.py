"""Run a spiking network: one interface, several engines, the same bits.

`reference` is the neuron's equations step by step in int64; `counts` goes layer by layer with
torch, on any device; `native` is `counts` in C++ for CPUs. `auto` takes the fastest that can run
the network here. The end point of every exact schedule needs no time at all: `endpoint`, which
measurements take for an engine, too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from snnconv.engine import counts, native, reference
from snnconv.engine.trace import Endpoint, Trace
from snnconv.errors import UsageError, require_one_of
from snnconv.network import SpikingNetwork
from snnconv.schedule import Schedule, check_timesteps

__all__ = [
    "DEFAULT",
    "ENDPOINT",
    "ENGINES",
    "Endpoint",
    "Engine",
    "Trace",
    "endpoint",
    "prepare",
    "simulate",
]

ENGINES = ("auto", "native", "counts", "reference")
ENDPOINT = "endpoint"
DEFAULT = "auto"


class Engine(Protocol):
    """A network ready to run at one T."""

    name: str

    def simulate(self, pixels: Tensor, schedule: Schedule, *, events: bool = False) -> Trace:
        """Simulate uint8 images `[N, C, H, W]` under a schedule, and count `events` if asked to.

        Raises UsageError for a schedule of another T or depth, and for images of another size.
        """

    def endpoint(self, pixels: Tensor, *, maps: bool = False) -> Endpoint:
        """Compute where every exact schedule ends, with `maps` for poolings and the like too.

        Raises UsageError for images of another size than the network's.
        """


def prepare(
    network: SpikingNetwork,
    timesteps: int,
    engine: str = DEFAULT,
    device: torch.device | str = "cpu",
) -> Engine:
    """Make an engine ready, for as many batches as there are.

    Raises UsageError for an unknown engine, or one that cannot run this network here, and for a T
    or a device there is not.
    """
    check_timesteps(timesteps)
    _check_device(device)
    require_one_of("engine", engine, ENGINES)
    if engine in ("auto", "native"):
        refused = native.refusal(network, timesteps, device)
        if refused is None:
            return native.Engine(network, timesteps)
        if engine == "native":
            raise UsageError(f"{refused}; take --engine counts")
    kind = reference.Engine if engine == "reference" else counts.Engine
    return kind(network, timesteps, device)


def _check_device(device: torch.device | str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"there is no kind of device {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; take the device 'cpu'")


def simulate(
    network: SpikingNetwork,
    pixels: Tensor,
    schedule: Schedule,
    engine: str = DEFAULT,
    *,
    events: bool = False,
) -> Trace:
    """Simulate uint8 images `[N, C, H, W]` under a schedule, and count `events` if asked to.

    Raises UsageError for an unknown engine, a schedule of another depth, or images of another
    size than the network's.
    """
    runner = prepare(network, schedule.timesteps, engine, pixels.device)
    return runner.simulate(pixels, schedule, events=events)


def endpoint(
    network: SpikingNetwork,
    pixels: Tensor,
    timesteps: int,
    *,
    maps: bool = False,
    engine: str = DEFAULT,
) -> Endpoint:
    """Compute where every exact schedule ends, in one pass (docs/concepts.md, "Engines").

    `pixels` are uint8 `[N, C, H, W]`. With `maps` the counts of pooling, concatenation and the like
    are kept beside the neurons'. Raises UsageError for images of another size than the network's.
    """
    return prepare(network, timesteps, engine, pixels.device).endpoint(pixels, maps=maps)
