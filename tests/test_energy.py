"""Operations are counted one by one here, in Python and NumPy, and energies by hand."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, PREPROCESSING, build, conv_bn, converted, images
from torch import Tensor, nn

from snnconv import workload
from snnconv.energy import ASSUMPTIONS, activation_bits, energy
from snnconv.engine import endpoint, simulate
from snnconv.errors import UsageError
from snnconv.network import Image, Island, Population, SpikingNetwork, Synapse
from snnconv.pipeline import convert
from snnconv.plan import Relay
from snnconv.schedule import Schedule
from snnconv.workload import KEYS, count_operations, fan_out

COUNT = 3
Events = dict[str, Tensor]


def course(
    network: SpikingNetwork, pixels: Tensor, schedule: Schedule
) -> tuple[Events, Events, int]:
    """Return what `count_operations` wants to know of a simulation, and the steps it took."""
    found = simulate(network, pixels, schedule, engine="reference", events=True)
    assert found.events is not None
    end = endpoint(network, pixels, schedule.timesteps, maps=True)
    nonzero = {name: (end.counts[name] != 0).sum(0) for name in found.events}
    return found.events, nonzero, found.steps


def operations_of(
    network: SpikingNetwork, schedule: Schedule, count: int = COUNT
) -> tuple[dict[str, Any], Events, int]:
    """Simulate random images, and return their operations, the events and the steps."""
    events, nonzero, steps = course(network, images(count, 3), schedule)
    return count_operations(network, schedule, events, nonzero, count, steps), events, steps


def synapses(
    synapse: Synapse, shape: tuple[int, ...], *, pooled: bool = True
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Yield source neuron, target and weight of every single synapse."""
    weight, a = synapse.weight.tolist(), synapse.attributes

    def targets(o: int, y: int, x: int) -> Iterator[tuple[int, ...]]:
        pools = synapse.pools if pooled else ()
        if not pools:
            yield o, y, x
            return
        (pool,) = pools
        for (i, rows), (j, columns) in itertools.product(enumerate(pool.h), enumerate(pool.w)):
            if rows[0] <= y < rows[1] and columns[0] <= x < columns[1]:
                yield o, i, j

    if synapse.kind == "linear":
        for o, row in enumerate(weight):
            for i, w in enumerate(row):
                yield (i,), (o,), w
    elif synapse.kind == "scale":
        for place in np.ndindex(*shape):
            for target in targets(*place) if len(place) == 3 else [place]:
                yield place, target, weight[place[0]]
    else:
        left, right, top, bottom = a["padding"]
        inputs, kh, kw = synapse.weight.shape[1:]
        per_group = len(weight) // a["groups"]
        high, wide = (
            (n + around - dilation * (k - 1) - 1) // stride + 1
            for n, around, dilation, k, stride in zip(
                shape[1:], (top + bottom, left + right), a["dilation"], (kh, kw), a["stride"],
                strict=True,
            )
        )  # fmt: skip
        places = (range(n) for n in (len(weight), inputs, kh, kw, high, wide))
        for o, c, ky, kx, y, x in itertools.product(*places):
            row = y * a["stride"][0] - top + ky * a["dilation"][0]
            column = x * a["stride"][1] - left + kx * a["dilation"][1]
            if 0 <= row < shape[1] and 0 <= column < shape[2]:
                for target in targets(o, y, x):
                    yield (o // per_group * inputs + c, row, column), target, weight[o][c][ky][kx]


def passed_on(node: Relay, inputs: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return the events behind a linear map, and those that entered windows."""
    x, a = inputs[0], node.attributes
    if node.op == "concat":
        return np.concatenate(inputs), 0
    if node.op == "slice":
        return x[tuple(slice(*s) for s in a["slices"])], 0
    if node.op == "flatten":
        return x.reshape(-1), 0
    if node.op == "pad":
        left, right, top, bottom, *channels = a["padding"]
        return np.pad(x, [tuple(channels or (0, 0)), (top, bottom), (left, right)]), 0
    assert node.op == "sum_pool"
    pool = a["pool"]
    sums = [[x[:, r[0] : r[1], c[0] : c[1]].sum((1, 2)) for c in pool.w] for r in pool.h]
    summed = np.array(sums).transpose(2, 0, 1)
    return summed, int(summed.sum())


def counted_one_by_one(
    network: SpikingNetwork, schedule: Schedule, events: Events, steps: int
) -> list[dict[str, float]]:
    """Count what `count_operations` tells of synapses and neurons, over all images."""
    arrived: dict[str, np.ndarray] = {}
    rows, pooling = [], 0
    for node in network.nodes:
        if isinstance(node, Image):
            arrived[node.name] = np.zeros(node.shape, dtype=int)
        elif isinstance(node, Relay) and node.op == "max_pool":
            arrived[node.name] = events[node.name].numpy()
            size, stride, before, apart = (
                node.attributes[k] for k in ("kernel", "stride", "padding", "dilation")
            )
            x = arrived[node.inputs[0]]
            for c, i, j in np.ndindex(*node.shape):
                for ky, kx in np.ndindex(*size):
                    row = i * stride[0] - before[2] + ky * apart[0]
                    column = j * stride[1] - before[0] + kx * apart[1]
                    if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                        pooling += int(x[c, row, column])
        elif isinstance(node, Relay):
            arrived[node.name], entered = passed_on(node, [arrived[i] for i in node.inputs])
            pooling += entered
        else:
            row = dict.fromkeys(
                ("synaptic_operations", "effective_operations", "image_macs", "bias_additions",
                 "membrane_updates", "resets"), 0,
            )  # fmt: skip
            sees_image = set()
            for synapse in node.branches:
                source = arrived[synapse.source]
                for place, target, weight in synapses(synapse, source.shape):
                    row["synaptic_operations"] += int(source[place])
                    row["effective_operations"] += int(source[place]) if weight else 0
                    if synapse.source == "x":
                        row["image_macs"] += 1
                        if weight:
                            sees_image.add(target)
            per_row = int(np.prod(node.shape)) // len(node.bias)
            for t in range(1, steps + 1):
                now, image = (
                    schedule.bias_steps(t, d) > (schedule.bias_steps(t - 1, d) if t > 1 else 0)
                    for d in (node.depth, 0)
                )
                for channel, b in enumerate(node.bias.tolist()):
                    seeing = sum(target[0] == channel for target in sees_image) if image else 0
                    row["bias_additions"] += per_row if now and b else seeing
            if isinstance(node, Population):
                arrived[node.name] = events[node.name].numpy()
                row["resets"] = int(arrived[node.name].sum())
                fires = sum(schedule.fires(t, node.depth) for t in range(1, steps + 1))
                row["membrane_updates"] = arrived[node.name].size * fires
            rows.append(row)
    return [*rows, {"pooling": pooling}]


def agree(network: SpikingNetwork, schedule: Schedule) -> bool:
    found, events, steps = operations_of(network, schedule)
    *rows, apart = counted_one_by_one(network, schedule, events, steps)
    per_inference = ("image_macs", "bias_additions", "membrane_updates")
    same = [
        row[key] * (1 if key in per_inference else COUNT) == pytest.approx(value, rel=1e-12)
        for row, wanted in zip(found["layers"], rows, strict=True)
        for key, value in wanted.items()
    ]
    return all(same) and found["pooling"] * COUNT == pytest.approx(apart["pooling"], rel=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_those_counted_one_by_one(name: str) -> None:
    network = converted(name, seed=1).network
    assert agree(network, network.timetable())


@pytest.mark.parametrize("schedule", ["paper", "stagger", "wait"])
def test_operations_under_other_schedules(schedule: str) -> None:
    network = converted("preactivation").network
    assert agree(network, network.timetable(name=schedule))


def test_operations_of_a_dilated_max_pool() -> None:
    class Dilated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = conv_bn(3, 4), nn.Linear(100, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv(x)), 3, 2, 1, dilation=2)
            return self.head(x.flatten(1))

    torch.manual_seed(0)
    network = convert(Dilated().eval(), PREPROCESSING, [images(8)], timesteps=3).network
    assert agree(network, network.timetable())


@pytest.mark.parametrize("mistake", ["padding", "stride", "groups", "dilation"])
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = workload.convolve

    def wrong(x: Tensor, weight: Tensor, **how: Any) -> Tensor:
        if mistake == "groups":
            return 2 * correct(x, weight, **how)
        nothing = {"padding": (1, 1, 1, 1), "stride": (1, 1), "dilation": (1, 1)}[mistake]
        return correct(x, weight, **how | {mistake: nothing})

    monkeypatch.setattr(workload, "convolve", wrong)
    network = converted({"stride": "residual"}.get(mistake, "depthwise")).network
    assert not agree(network, network.timetable())


def test_fan_out_at_borders_by_hand() -> None:
    attributes = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
    weight = torch.ones(2, 1, 3, 3, dtype=torch.int8)
    weight[1, 0, 1, 1] = 0
    synapse = Synapse("x", ("conv",), "conv", weight, torch.zeros(2), attributes)
    assert fan_out(synapse, (1, 3, 3)).tolist() == [[[8, 12, 8], [12, 18, 12], [8, 12, 8]]]
    effective = fan_out(synapse, (1, 3, 3), effective=True)
    assert effective.tolist() == [[[7, 11, 7], [11, 17, 11], [7, 11, 7]]]


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_those_of_the_model(name: str) -> None:
    """The original modules say so, called on ones with weights of ones, each once."""
    model, macs = build(name), 0

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        alike = copy.deepcopy(module)
        nn.init.ones_(alike.weight)
        alike.bias = None
        macs += int(alike._conv_forward(torch.ones_like(inputs[0]), alike.weight, None).sum()) if (
            isinstance(alike, nn.Conv2d)
        ) else output[0].numel() * inputs[0][0].numel()  # fmt: skip

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    model(PREPROCESSING.normalize(images(1)))
    network = converted(name).network
    shapes = {n.name: n.shape for n in network.nodes}
    # A BatchNorm alone, or an identity shortcut, is a product per number.
    scales = {
        (s.source, s.key[0]): int(np.prod(shapes[s.source]))
        for node in (*network.populations, *network.readouts)
        for s in node.branches
        if s.kind == "scale"
    }
    found, _, _ = operations_of(network, network.timetable(), 1)
    assert found["total"]["macs"] == macs + sum(scales.values())
    if name == "preactivation":  # three layers read the stem
        assert found["total"]["image_macs"] == 3 * found["total"]["wide_macs"]
    else:
        assert found["total"]["image_macs"] == found["total"]["wide_macs"]


def test_sums_are_totals_and_zeros_are_skipped() -> None:
    network = converted("pools", seed=1).network
    found, events, _ = operations_of(network, network.timetable())
    for key in KEYS:
        assert found["total"][key] == sum(row[key] for row in found["layers"])
    assert found["total"]["neurons"] == network.neurons
    assert json.loads(json.dumps(found)) == found
    total = found["total"]
    assert 0 < total["effective_operations"] < total["synaptic_operations"]
    assert total["wide_macs"] < total["qann_nonzero_macs"] < total["macs"]
    # All neurons are on in every image: nothing is skipped.
    everywhere = {name: torch.full_like(e, COUNT) for name, e in events.items()}
    full = count_operations(network, network.timetable(), events, everywhere, COUNT, 9)
    assert full["total"]["qann_nonzero_macs"] == total["macs"]
    # Every neuron spikes once per image: every synapse is used once.
    once = count_operations(network, network.timetable(), everywhere, everywhere, COUNT, 9)
    by_layer = {row["layer"]: row for row in once["layers"]}
    first, *_ = by_layer.values()
    assert first["synaptic_operations"] == 0
    assert first["macs"] == first["image_macs"] > 0
    with pytest.raises(ValueError, match="events of max1@relu are missing"):
        count_operations(
            network, network.timetable(), {"relu": events["relu"]}, everywhere, COUNT, 9
        )


class Smooth(nn.Module):
    """A smooth activation and a softmax, which are no sums of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second = conv_bn(3, 4), conv_bn(4, 6, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = F.relu(self.second(x)).flatten(2)
        return self.head((x @ x.transpose(1, 2)).softmax(2).mean(2))


def test_islands_are_counted_apart() -> None:
    torch.manual_seed(0)
    network = convert(Smooth().eval(), PREPROCESSING, [images(8, 1)], timesteps=3).network
    assert any(isinstance(n, Island) for n in network.nodes)
    found, _, steps = operations_of(network, network.timetable())
    rows = {row["layer"]: row for row in found["layers"]}
    assert [row["layer"] for row in rows.values() if row["island_macs"]] == [
        "silu_neurons",
        "mean_analog_neurons",
    ]
    # SiLU on 4 x 12 x 12; products of 6 x 36 with 36 x 6, softmax and mean of 36 numbers.
    assert found["analog_macs"] == 4 * 144 + 6 * 6 * 36 + 36 + 36
    for row in rows.values():
        if row["island_macs"]:
            assert row["island_macs"] == row["wide_macs"] == row["macs"]
            assert row["synaptic_operations"] == 0
    priced = energy(found, activation_bits=2, weight_bits=8, steps=steps)
    per_step = (0.3 * found["total"]["island_macs"] + 4.6 * found["analog_macs"]) / 1000
    assert priced["snn_nj"]["analog"] == pytest.approx(steps * per_step)
    assert priced["ann_fp32_nj"] == pytest.approx(
        4.6 * (found["total"]["macs"] + found["analog_macs"]) / 1000
    )


ROW = {
    "neurons": 100,
    "macs": 6000,
    "wide_macs": 1000,
    "image_macs": 1000,
    "island_macs": 0,
    "synaptic_operations": 4000.0,
    "effective_operations": 3900.0,
    "qann_nonzero_macs": 3000.0,
    "bias_additions": 300.0,
    "membrane_updates": 400.0,
    "resets": 50.0,
}
BY_HAND = {
    "images": 1,
    "layers": [{"layer": "relu", "kind": "neurons", **ROW}],
    "pooling": 10.0,
    "analog_macs": 0,
    "total": {**ROW, "pooling": 10.0, "analog_macs": 0},
}


def test_energy_by_hand() -> None:
    found = energy(BY_HAND, activation_bits=2, weight_bits=8, steps=4)
    wanted = {
        "image": 0.3, "synapses": 0.4, "bias": 0.03, "membrane": 0.04, "resets": 0.005,
        "pooling": 0.001, "analog": 0, "total": 0.776,
    }  # fmt: skip
    assert found["snn_nj"] == pytest.approx(wanted)
    assert found["ann_fp32_nj"] == pytest.approx(27.6)
    assert found["ann_int8_nj"] == pytest.approx(1.8)
    # 1,000 MACs of pixels at 0.3 pJ; the others at 0.2 x 16/64 + 0.1 = 0.15 pJ.
    assert found["qann_nj"] == pytest.approx(0.3 + 5000 * 0.15 / 1000)
    assert found["qann_skipping_zeros_nj"] == pytest.approx(0.3 + 2000 * 0.15 / 1000)
    assert found["layers"] == [
        {"layer": "relu", "snn_nj": pytest.approx(0.775), "qann_nj": pytest.approx(1.05)}
    ]
    # 1.05 - 0.37 nJ are left for what 0.5 spikes per neuron take 0.406 nJ for.
    spikes = 0.5 * 0.68 / 0.406
    assert found["break_even"] == pytest.approx(
        {"spikes_per_neuron": spikes, "rate_percent": 25 * spikes}
    )
    assert "less energy than that of the quantised ANN of the same bits" in found["verdict"]
    assert "0.776 against 1.05 nJ" in found["verdict"]
    assert "memory traffic is in none" in found["verdict"]
    assert json.loads(json.dumps(found)) == found


def test_a_network_of_eight_bits_costs_what_an_int8_network_does() -> None:
    costs = [energy(BY_HAND, activation_bits=bits, weight_bits=8, steps=4) for bits in range(1, 10)]
    assert costs[7]["qann_nj"] == pytest.approx(costs[7]["ann_int8_nj"])
    assert all(found["qann_nj"] < found["ann_int8_nj"] for found in costs[:7])
    assert costs[8]["qann_nj"] > costs[8]["ann_int8_nj"]


def test_assumptions_can_be_changed_and_are_checked() -> None:
    settings = {"activation_bits": 2, "weight_bits": 8, "steps": 4}
    usual = energy(BY_HAND, **settings)
    assert usual["assumptions"] == ASSUMPTIONS
    for name in ASSUMPTIONS:
        changed = energy(
            {**BY_HAND, "total": {**BY_HAND["total"], "analog_macs": 5}},
            {name: 9.5},
            **settings,
        )
        assert changed["assumptions"] == {**ASSUMPTIONS, name: 9.5}
        assert changed["snn_nj"] != usual["snn_nj"] or changed["qann_nj"] != usual["qann_nj"]
    with pytest.raises(UsageError, match=r"add_int32; did you mean add_int32_pj"):
        energy(BY_HAND, {"add_int32": 1}, **settings)
    for price in (-1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(UsageError, match="must be picojoules"):
            energy(BY_HAND, {"add_int32_pj": price}, **settings)  # type: ignore[dict-item]


def scaled(operations: dict[str, Any], factor: float) -> dict[str, Any]:
    by_spikes = ("synaptic_operations", "effective_operations", "resets", "pooling")
    total = {k: v * factor if k in by_spikes else v for k, v in operations["total"].items()}
    return {**operations, "total": total}


@pytest.mark.parametrize("name", ["residual", "pools"])
def test_energies_meet_at_break_even(name: str) -> None:
    network = converted(name, timesteps=3).network
    found, _, steps = operations_of(network, network.timetable())
    settings = {"activation_bits": activation_bits(3), "weight_bits": 8, "steps": steps}
    usual = energy(found, **settings)
    per_neuron = found["total"]["resets"] / found["total"]["neurons"]
    meets = usual["break_even"]["spikes_per_neuron"]
    assert usual["break_even"]["rate_percent"] == pytest.approx(100 * meets / steps)
    there = energy(scaled(found, meets / per_neuron), **settings)
    assert there["snn_nj"]["total"] == pytest.approx(there["qann_nj"], rel=1e-12)
    assert there["break_even"]["spikes_per_neuron"] == pytest.approx(meets)
    assert "the same energy as" in there["verdict"]
    above = energy(scaled(found, 1.1 * meets / per_neuron), **settings)
    assert "more energy than that of the quantised ANN" in above["verdict"]


def test_there_may_be_no_break_even() -> None:
    settings = {"activation_bits": 2, "weight_bits": 8, "steps": 4}
    found = energy(BY_HAND, {"add_int32_pj": 0.1, "multiply_int8_pj": 0.0}, **settings)
    assert found["break_even"] is not None
    heavy = {**BY_HAND, "total": {**BY_HAND["total"], "membrane_updates": 1e5}}
    found = energy(heavy, **settings)
    assert found["break_even"] is None
    assert "what it takes without any spike is more already" in found["verdict"]
    assert energy(scaled(BY_HAND, 0), **settings)["break_even"] is None


def test_bits_of_activations() -> None:
    assert [activation_bits(t) for t in (1, 2, 3, 4, 7, 8, 255)] == [1, 2, 2, 3, 3, 4, 8]
