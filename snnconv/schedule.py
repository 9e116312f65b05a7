"""When layers receive their bias and may fire: one equation for all schedules.

A layer at depth d has the offset o_d = 0 (`paper`, `drain`), k d (`stagger`) or d T (`wait`). By
step t its bias has been injected B(t) = clip(t - o_d, 0, T) times, under `wait` all T at once.
It fires only at t > o_d, under `wait` only up to t = o_d + T. A readout counts as a layer one
deeper than the neurons it reads. Steps are numbered from 1. See docs/concepts.md, "Schedules".
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from snnconv.choices import MAX_TIMESTEPS, MIN_TIMESTEPS
from snnconv.errors import UsageError, require_one_of

SCHEDULES = ("paper", "drain", "stagger", "wait")


@dataclass(frozen=True)
class Schedule:
    """A schedule for networks of one depth.

    `depth` is the readout's depth: the number of neuron layers on the longest path. `drain` is
    the number of steps after the last bias; None runs every image until nothing fires.
    `stagger` is k. Raises UsageError for values that make no sense.
    """

    name: str
    timesteps: int
    depth: int
    drain: int | None = None
    stagger: int = 1

    def __post_init__(self) -> None:
        """Check the values, and settle D = 0 where the schedule has no drain."""
        check_timesteps(self.timesteps)
        require_one_of("schedule", self.name, SCHEDULES)
        if self.drain is not None and not (isinstance(self.drain, Integral) and self.drain >= 0):
            raise UsageError(f"--drain must be 'auto' or at least 0, not {self.drain}")
        if not (isinstance(self.stagger, Integral) and self.stagger >= 1):
            raise UsageError(f"--stagger must be at least 1, not {self.stagger}")
        if self.name in ("paper", "wait"):
            if self.drain:
                raise UsageError(f"schedule {self.name!r} has no drain; use 'drain' or 'stagger'")
            object.__setattr__(self, "drain", 0)

    @property
    def exact(self) -> bool:
        """Return whether signed neurons always end at the QANN's counts."""
        return self.name == "wait" or self.drain is None

    @property
    def steps_before_drain(self) -> int:
        """Return the step at which the readout has had its whole bias."""
        return self.offset(self.depth) + self.timesteps

    @property
    def longest(self) -> int:
        """Return the step after which nothing can happen.

        What a layer reads is settled, it needs T steps more, or 2T from one end of two-sided
        counts to the other.
        """
        if self.drain is not None:
            return self.steps_before_drain + self.drain
        return self.steps_before_drain + 2 * self.timesteps * (self.depth + 1)

    def offset(self, depth: int) -> int:
        """Return o_d, the step after which a layer at `depth` starts."""
        if self.name == "stagger":
            return self.stagger * depth
        return depth * self.timesteps if self.name == "wait" else 0

    def bias_steps(self, t: int, depth: int) -> int:
        """Return B(t), how many times the bias of a layer has been injected by step t."""
        past = t - self.offset(depth)
        if self.name == "wait":
            return self.timesteps if past >= 0 else 0
        return min(max(past, 0), self.timesteps)

    def fires(self, t: int, depth: int) -> bool:
        """Return whether a layer may fire at step t."""
        past = t - self.offset(depth)
        return past > 0 and (self.name != "wait" or past <= self.timesteps)


def check_timesteps(timesteps: int) -> None:
    """Raise UsageError unless T is within what a count can hold."""
    if not (isinstance(timesteps, Integral) and MIN_TIMESTEPS <= timesteps <= MAX_TIMESTEPS):
        raise UsageError(
            f"--timesteps must be between {MIN_TIMESTEPS} and {MAX_TIMESTEPS}, not {timesteps}"
        )
