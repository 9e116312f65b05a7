"""Verification passes what is equal, and catches what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from networks import NETWORKS, converted, images

from snnconv.engine import endpoint
from snnconv.errors import NotEqualError
from snnconv.network import Image, Population
from snnconv.pipeline import Conversion, check_equal
from snnconv.verify import Verification, verify


def verified(conversion: Conversion, timesteps: int = 5) -> Verification:
    pixels = images(3, 7)
    end = endpoint(conversion.network, pixels, timesteps, maps=True)
    return verify(
        conversion.traced,
        conversion.plan,
        conversion.network,
        pixels,
        timesteps,
        end.counts,
        end.charges,
    )


def mutated(
    conversion: Conversion, index: int, change: Callable[[Population], Population]
) -> Conversion:
    nodes = list(conversion.network.nodes)
    target = conversion.network.populations[index]
    nodes[next(i for i, n in enumerate(nodes) if n is target)] = change(target)
    return replace(conversion, network=replace(conversion.network, nodes=tuple(nodes)))


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_conversion_equals_the_traced_network(name: str, seed: int, bits: int) -> None:
    found = verified(converted(name, seed, weight_bits=bits))
    assert found.problems == ()
    assert found.sites > 2


@pytest.mark.parametrize("timesteps", [1, 12])
def test_it_does_so_at_any_t_and_from_an_empty_membrane(timesteps: int) -> None:
    assert verified(converted("residual", 1, initial_membrane="zero"), timesteps).equal


def one_weight(population: Population) -> Population:
    first, *others = population.branches
    weight = first.weight.clone()
    weight[2].view(-1)[0] += 1 if int(weight[2].view(-1)[0]) < 127 else -1
    return replace(population, branches=(replace(first, weight=weight), *others))


def one_padding(population: Population) -> Population:
    first, *others = population.branches
    left, right, top, bottom = first.attributes["padding"]
    moved = first.attributes | {"padding": (left + 1, right - 1, top, bottom)}
    return replace(population, branches=(replace(first, attributes=moved), *others))


def no_shortcut(population: Population) -> Population:
    assert len(population.branches) == 2
    return replace(population, branches=population.branches[:1])


def shortcut_from_elsewhere(population: Population) -> Population:
    first, second = population.branches
    return replace(population, branches=(first, replace(second, source=first.source)))


def one_bias(population: Population) -> Population:
    bias = population.bias.clone()
    bias[3] -= 1
    return replace(population, bias=bias)


def one_threshold(population: Population) -> Population:
    threshold = population.threshold.clone()
    threshold[3] += 1
    return replace(population, threshold=threshold)


def two_sided(population: Population) -> Population:
    return replace(population, two_sided=True)


@pytest.mark.parametrize(
    "change",
    [
        one_weight,
        one_padding,
        no_shortcut,
        shortcut_from_elsewhere,
        one_bias,
        one_threshold,
        two_sided,
    ],
)
def test_a_mutation_is_caught_and_its_layer_named(
    change: Callable[[Population], Population],
) -> None:
    conversion = converted("residual", 0)
    changed = mutated(conversion, 2, change)
    found = verified(changed)
    assert not found.equal
    with pytest.raises(NotEqualError) as raised:
        found.require_equal()
    assert conversion.network.populations[2].path in str(raised.value)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("which", ["stem", "readout", "middle"])
def test_a_changed_weight_is_caught_at_any_bits(which: str, bits: int) -> None:
    conversion = converted("residual", 0, weight_bits=bits)
    network = conversion.network
    target = {"stem": network.populations[0], "readout": network.readouts[0]}.get(
        which, network.populations[2]
    )
    weight = target.branches[0].weight.clone()
    # The largest weight of a row that has one, moved towards zero.
    row = int(weight.flatten(1).long().abs().amax(1).argmax())
    place = int(weight[row].long().abs().argmax())
    value = int(weight[row].view(-1)[place])
    weight[row].view(-1)[place] = value - (1 if value > 0 else -1)
    branch = replace(target.branches[0], weight=weight)
    nodes = tuple(
        replace(n, branches=(branch, *n.branches[1:])) if n is target else n for n in network.nodes
    )
    changed = replace(conversion, network=replace(network, nodes=nodes))
    assert not verified(changed).equal


def test_an_engine_that_computes_something_else_is_caught() -> None:
    conversion = converted("residual", 0)
    pixels = images(3, 7)
    end = endpoint(conversion.network, pixels, 5, maps=True)
    name = conversion.network.populations[3].name
    counts = {**end.counts, name: end.counts[name].clone()}
    counts[name][0, 1, 2, 3] ^= 1
    found = verify(
        conversion.traced, conversion.plan, conversion.network, pixels, 5, counts, end.charges
    )
    assert "1 of" in found.problems[0]
    assert conversion.network.populations[3].path in found.problems[0]


def test_check_equal_states_what_was_compared() -> None:
    found, agreement = check_equal(converted("residual", 0), images(4, 9))
    assert found.equal and found.images == 4
    assert 50 < agreement.counts_percent <= 100


def test_one_more_is_caught_however_large_the_integer() -> None:
    conversion = converted("residual", 0)
    network = conversion.network
    for index, target in enumerate(network.populations):
        largest = int(target.threshold.argmax())
        threshold = target.threshold.clone()
        threshold[largest] += 1
        changed = mutated(
            conversion, index, lambda p, threshold=threshold: replace(p, threshold=threshold)
        )
        assert not verified(changed).equal
    assert max(int(p.threshold.max()) for p in network.populations) > 2**21


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("name", ["pools", "two_outputs"])
def test_another_zero_of_the_image_is_caught(name: str, channel: int) -> None:
    conversion = converted(name, 0)
    image, *others = conversion.network.nodes
    assert isinstance(image, Image)
    zeros = tuple(z + (i == channel) for i, z in enumerate(image.zero_point))
    nodes = (replace(image, zero_point=zeros), *others)
    changed = replace(conversion, network=replace(conversion.network, nodes=nodes))
    found = verified(changed)
    assert any("zero points" in problem for problem in found.problems)
