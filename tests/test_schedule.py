"""Schedules: when layers start, what they receive, how long it takes."""

from __future__ import annotations

import pytest

from snnconv.errors import UsageError
from snnconv.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "latency"),
    [
        (Schedule("paper", 3, 5), 3),
        (Schedule("drain", 3, 5), 3),
        (Schedule("stagger", 3, 5), 8),
        (Schedule("stagger", 3, 5, stagger=2), 13),
        # (depth + 2) T with the readout, the deepest neurons having depth 4.
        (Schedule("wait", 3, 5), 18),
    ],
)
def test_steps_before_drain(schedule: Schedule, latency: int) -> None:
    assert schedule.steps_before_drain == latency


def test_a_fixed_drain_is_the_whole_latency() -> None:
    assert Schedule("drain", 3, 5, drain=4).longest == 7
    assert Schedule("paper", 3, 5).longest == 3


@pytest.mark.parametrize("name", ["paper", "drain", "stagger", "wait"])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_every_layer_receives_its_bias_t_times(name: str, depth: int) -> None:
    schedule = Schedule(name, 3, 5)
    received = [schedule.bias_steps(t, depth) for t in range(schedule.steps_before_drain + 1)]
    assert received == sorted(received)
    assert received[-1] == 3


def test_wait_fires_one_layer_at_a_time() -> None:
    schedule = Schedule("wait", 3, 4)
    for t in range(1, schedule.longest + 1):
        assert sum(schedule.fires(t, depth) for depth in range(5)) == 1


def test_bias_comes_at_once_under_wait() -> None:
    schedule = Schedule("wait", 3, 4)
    assert [schedule.bias_steps(t, 1) for t in range(5)] == [0, 0, 0, 3, 3]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "drain", "timesteps": 0},
        {"name": "drain", "timesteps": 4096},
        {"name": "eager", "timesteps": 3},
        {"name": "drain", "timesteps": 3, "drain": -1},
        {"name": "paper", "timesteps": 3, "drain": 2},
        {"name": "drain", "timesteps": 2.5},
        {"name": "drain", "timesteps": 3, "drain": "auto"},
        {"name": "stagger", "timesteps": 3, "stagger": 0},
    ],
)
def test_senseless_values_are_refused(arguments: dict) -> None:
    with pytest.raises(UsageError):
        Schedule(depth=3, **arguments)
