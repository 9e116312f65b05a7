"""The signed IF neuron, held against its equations on integer grids."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from snnconv.neuron import initial_membrane, step

THRESHOLD = st.integers(1, 40)
LEVELS = st.integers(1, 12)
CURRENTS = st.lists(st.integers(-60, 60), min_size=1, max_size=30)


def simulate(
    currents: list[int],
    theta: int,
    levels: int,
    low: int = 0,
    signed: bool = True,
    start: str = "half",
) -> tuple[list[int], int, int]:
    """Return the spikes, the last membrane and the last count of one neuron."""
    threshold = torch.tensor(theta)
    membrane = initial_membrane(threshold, start)
    counts = torch.tensor(0)
    spikes = []
    for current in currents:
        spike, membrane, counts = step(membrane + current, counts, threshold, levels, low, signed)
        spikes.append(int(spike))
    return spikes, int(membrane), int(counts)


def test_a_train_worked_by_hand() -> None:
    # theta 10, V0 5, T 3. V before firing: 12 -> fires; 2-9=-7 -> negative; 3+26=29 -> fires;
    # 19 -> fires; 9+1=10 -> a tie fires; 0+40=40, but S is T; 40-50=-10 -> negative; 0 -> quiet.
    spikes, membrane, counts = simulate([7, -9, 26, 0, 1, 40, -50, 0], theta=10, levels=3)
    assert spikes == [1, -1, 1, 1, 1, 0, -1, 0]
    assert (membrane, counts) == (0, 2)


def test_a_neuron_without_spikes_may_be_negative() -> None:
    spikes, membrane, counts = simulate([-20, 4], theta=10, levels=3)
    assert (spikes, membrane, counts) == ([0, 0], -11, 0)


@given(CURRENTS, THRESHOLD, LEVELS, st.booleans(), st.booleans())
def test_charge_is_conserved(
    currents: list[int], theta: int, levels: int, signed: bool, two_sided: bool
) -> None:
    low = -levels if two_sided else 0
    spikes, membrane, counts = simulate(currents, theta, levels, low, signed)
    assert sum(spikes) == counts
    assert membrane + theta * counts == theta // 2 + sum(currents)


@given(CURRENTS, THRESHOLD, LEVELS, st.booleans())
def test_counts_stay_within_their_range(
    currents: list[int], theta: int, levels: int, two_sided: bool
) -> None:
    low = -levels if two_sided else 0
    for end in range(1, len(currents) + 1):
        _, _, counts = simulate(currents[:end], theta, levels, low)
        assert low <= counts <= levels


@given(CURRENTS, THRESHOLD, LEVELS)
def test_the_past_does_not_depend_on_the_future(
    currents: list[int], theta: int, levels: int
) -> None:
    whole, _, _ = simulate(currents, theta, levels)
    for end in range(1, len(currents)):
        part, _, _ = simulate(currents[:end], theta, levels)
        assert part == whole[:end]


@given(CURRENTS, THRESHOLD, LEVELS, st.booleans(), st.sampled_from(["half", "zero"]))
def test_a_signed_neuron_settles_at_the_quantiser_whatever_the_order(
    currents: list[int], theta: int, levels: int, two_sided: bool, start: str
) -> None:
    low = -levels if two_sided else 0
    quiet = [0] * (2 * levels + len(currents))
    _, _, counts = simulate(currents + quiet, theta, levels, low, start=start)
    v0 = theta // 2 if start == "half" else 0
    assert counts == min(max((sum(currents) + v0) // theta, low), levels)


@given(st.integers(-60, 60), THRESHOLD, LEVELS)
def test_constant_current_gives_the_quantiser_in_t_steps(
    current: int, theta: int, levels: int
) -> None:
    _, _, counts = simulate([current] * levels, theta, levels)
    assert counts == min(max((levels * current + theta // 2) // theta, 0), levels)


@given(CURRENTS, THRESHOLD, LEVELS)
def test_unsigned_neurons_emit_no_negative_spike(
    currents: list[int], theta: int, levels: int
) -> None:
    spikes, _, _ = simulate(currents, theta, levels, signed=False)
    assert min(spikes) >= 0
