"""Run a spiking network: one interface, several engines, the same bits.

`reference` is the neuron's equations step by step in int64; `counts` goes layer by layer. The
end point of every exact schedule needs no time at all: `endpoint`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from snnconv.engine import counts, reference
from snnconv.engine.counts import endpoint
from snnconv.engine.trace import Endpoint, Trace, check_size
from snnconv.errors import UsageError
from snnconv.network import SpikingNetwork
from snnconv.schedule import Schedule

__all__ = ["DEFAULT", "ENGINES", "Endpoint", "Trace", "endpoint", "simulate"]

ENGINES: dict[str, Callable[[SpikingNetwork, Tensor, Schedule], Trace]] = {
    "counts": counts.run,
    "reference": reference.run,
}
DEFAULT = "counts"


def simulate(
    network: SpikingNetwork, pixels: Tensor, schedule: Schedule, engine: str = DEFAULT
) -> Trace:
    """Simulate uint8 images `[N, C, H, W]` under a schedule.

    Raises UsageError for an unknown engine, a schedule of another depth, or images of another
    size than the network's.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")
    if schedule.depth != network.depth:
        raise UsageError(
            f"the schedule is for depth {schedule.depth}, the network has {network.depth}"
        )
    check_size(network, pixels)
    return ENGINES[engine](network, pixels, schedule)
