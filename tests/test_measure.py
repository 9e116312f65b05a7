"""Evaluations say what the simulation did."""

from __future__ import annotations

import math
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from networks import PREPROCESSING, build, converted, images
from torch import Tensor, nn
from torch.nn import functional as F

from snnconv.checkpoint import sha256
from snnconv.cli.ann import forwards_of
from snnconv.cli.eval import command as eval_command
from snnconv.data import ImageData
from snnconv.data.arrays import from_arrays
from snnconv.data.images import UnreadableImage
from snnconv.diagnosis import diagnose
from snnconv.engine import ENDPOINT, ENGINES, endpoint, prepare, simulate
from snnconv.errors import DataError, UsageError
from snnconv.measure import (
    COMPARED,
    COURSE,
    EVERY,
    METHODS,
    _squares,
    compare,
    evaluate,
    first_within,
    paired_drop,
    spread_images,
    top1_percents,
    wilson_interval,
)
from snnconv.pipeline import convert
from snnconv.preprocess import Preprocessing
from snnconv.workload import fan_out

COUNT = 24


def data(labels: np.ndarray | None = None) -> ImageData:
    pixels = images(COUNT, 4).numpy()
    if labels is None:
        labels = np.arange(COUNT) % 5

    return from_arrays("noise", "test", pixels.transpose(0, 2, 3, 1), labels)


def settled_labels() -> np.ndarray:
    network = converted("residual").network
    return endpoint(network, images(COUNT, 4), 5).charges["logits"].argmax(1).numpy()


def test_accuracy_counts_what_the_simulation_says() -> None:
    network = converted("residual").network
    labels = settled_labels()
    labels[:6] = (labels[:6] + 1) % 5
    found = evaluate(network, data(labels), np.arange(COUNT), network.timetable())
    assert found["snn"]["top1_percent"] == found["qann"]["top1_percent"] == 75
    assert found["agreement"] == {
        "argmax_percent": 100,
        "counts_percent": 100,
        "counts_exact": True,
    }
    assert found["by_step"][-1]["top1_percent"] == 75
    assert found["latency_steps"] == 5 + found["drain_steps"]["max"]
    assert len(found["by_step"]) == found["latency_steps"]


@pytest.mark.parametrize("neuron", ["signed", "unsigned"])
def test_the_readout_may_be_neurons_that_count(neuron: str) -> None:
    network = replace(converted("residual", calibration="max").network, neuron=neuron)
    readout = network.logits
    assert readout is not None and readout.threshold is not None
    largest = converted("residual", calibration="max").qann(PREPROCESSING.normalize(images(8, 1)))
    assert readout.threshold * readout.unit == pytest.approx(
        float(largest["logits"].detach().max()), rel=0.01
    )
    schedule = network.timetable(name="paper")
    course = simulate(network, images(COUNT, 4), schedule)
    charges = course.charges["logits"].numpy()
    hits = [0] * len(charges)
    labels = settled_labels()
    for image in range(COUNT):
        membrane = np.full(5, readout.threshold // 2, dtype=np.int64)
        spikes, before = np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64)
        for at, charge in enumerate(charges[:, image]):
            membrane += charge - before
            before = charge
            for k in range(5):
                if membrane[k] >= readout.threshold and spikes[k] < network.timesteps:
                    spikes[k] += 1
                    membrane[k] -= readout.threshold
                elif neuron == "signed" and membrane[k] < 0 and spikes[k] > 0:
                    spikes[k] -= 1
                    membrane[k] += readout.threshold
            best = max(range(5), key=lambda k: (spikes[k], membrane[k], -k))
            hits[at] += best == labels[image]
    found = evaluate(network, data(labels), np.arange(COUNT), schedule)
    assert [round(row["count_top1_percent"] * COUNT / 100) for row in found["by_step"]] == hits
    assert found["snn_by_count"]["top1_percent"] == pytest.approx(100 * hits[-1] / COUNT)
    unknown = replace(network, nodes=(*network.nodes[:-1], replace(readout, threshold=None)))
    assert evaluate(unknown, data(labels), np.arange(COUNT), schedule)["snn_by_count"] is None


def test_the_end_point_alone_gives_the_same_accuracy() -> None:
    network, labels = converted("residual").network, settled_labels()
    labels[:6] = (labels[:6] + 1) % 5
    whole, end = (
        evaluate(network, data(labels), np.arange(COUNT), network.timetable(), engine=engine)
        for engine in ("reference", "endpoint")
    )
    assert whole.keys() == end.keys()
    told = {key for key in whole if whole[key] is not None and end[key] is None}
    assert told == set(COURSE) - {"snn_by_count"}  # which only the schedule paper has
    assert end["snn"] == whole["snn"]
    assert end["engine"] == "endpoint"
    with pytest.raises(UsageError, match="signed neurons under 'paper' do not end"):
        evaluate(
            network, data(labels), np.arange(COUNT), network.timetable(name="paper"),
            engine="endpoint",
        )  # fmt: skip


def test_the_latency_of_an_end_point_is_known_where_images_do_not_decide_it() -> None:
    network = converted("residual").network
    keys = "latency_steps", "latency_steps_clocked"
    for schedule, known in (("wait", True), ("drain", False), ("stagger", False)):
        whole, end = (
            evaluate(
                network, data(settled_labels()), np.arange(COUNT),
                network.timetable(name=schedule), engine=engine,
            )
            for engine in ("reference", "endpoint")
        )  # fmt: skip
        assert [end[key] for key in keys] == [whole[key] if known else None for key in keys]


def test_every_step_is_the_accuracy_of_that_step() -> None:
    network = converted("residual").network
    labels = settled_labels()
    found = evaluate(network, data(labels), np.arange(COUNT), network.timetable(name="paper"))
    course = simulate(network, images(COUNT, 4), network.timetable(name="paper"))
    for row, logits in zip(found["by_step"], course.logits(network, "logits"), strict=True):
        expected = 100 * float((logits.argmax(1).numpy() == labels).mean())
        assert row["top1_percent"] == pytest.approx(expected)
    assert not found["agreement"]["counts_exact"]
    assert found["agreement"]["counts_percent"] < 100


def test_spikes_add_up() -> None:
    network = converted("residual").network
    found = evaluate(network, data(), np.arange(COUNT), network.timetable())
    course = simulate(network, images(COUNT, 4), network.timetable())
    positive, negative = sum(s.sum(0) for s in course.spikes.values()).tolist()
    spikes = found["spikes"]
    assert spikes["per_image"] == pytest.approx((positive + negative) / COUNT)
    assert spikes["per_neuron"] == pytest.approx(spikes["per_image"] / network.neurons)
    assert spikes["negative_percent"] == pytest.approx(100 * negative / (positive + negative))
    # What is emitted and taken back again: positive - negative is the minimum.
    minimum = positive - negative
    assert spikes["over_minimum"] == pytest.approx((positive + negative) / minimum)
    by_layer = sum(row["spikes_per_neuron"] * row["neurons"] for row in found["layers"])
    assert by_layer == pytest.approx(spikes["per_image"])


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = converted("residual").network
    timings = {"wall_ms_per_image"}
    whole = evaluate(network, data(), np.arange(COUNT), network.timetable())
    monkeypatch.setattr("snnconv.measure.BATCH", 5)
    parts = evaluate(network, data(), np.arange(COUNT), network.timetable())
    assert {k: v for k, v in whole.items() if k not in timings} == {
        k: v for k, v in parts.items() if k not in timings
    }


def test_steps_before_the_readout_is_active_are_null() -> None:
    network = converted("residual").network
    found = evaluate(network, data(), np.arange(4), network.timetable(name="wait"))
    values = [row["top1_percent"] for row in found["by_step"]]
    active = network.depth * network.timesteps
    assert values[: active - 1] == [None] * (active - 1)
    assert None not in values[active - 1 :]
    assert found["partial"]
    assert found["latency_steps"] == (network.depth + 1) * network.timesteps


def test_what_does_not_fit_is_refused() -> None:
    network = converted("residual").network
    with pytest.raises(DataError, match="5 classes"):
        evaluate(network, data(np.full(COUNT, 5)), np.arange(4), network.timetable())
    two = converted("two_outputs").network
    with pytest.raises(UsageError, match="no classifier"):
        evaluate(two, data(), np.arange(4), two.timetable())
    with pytest.raises(UsageError, match="no classifier"):
        forwards_of(nn.Identity(), two, 3, "cpu")


@pytest.mark.parametrize(
    "told",
    [
        {"finetuning": {"seed": 0}},
        {"compensation": {"kind": "bias"}},
        {"shortcut_normalization": False},
        {"retraining": {"seed": 0}},
    ],
)
def test_a_network_with_other_weights_has_no_float_qann(told: dict[str, object]) -> None:
    network, model = converted("residual").network, build("residual")
    assert set(forwards_of(model, network, 3, "cpu")) == {"ann", "qann_float"}
    other = replace(network, provenance={**network.provenance, **told})
    assert set(forwards_of(model, other, 3, "cpu")) == {"ann"}


def test_a_comparison_has_what_single_evaluations_have() -> None:
    network = converted("residual", timesteps=2).network
    tuning = {"parent_sha256": sha256(network), "settings": {"epochs_per_layer": 3, "epochs": 0}}
    told = {**network.provenance, "finetuning": tuning}
    tuned = replace(network, schedule="paper", provenance=told)
    ends = endpoint(network, images(COUNT, 4), 2)
    labels = ends.charges["logits"].argmax(1).numpy()  # the quantised ANN is always right
    rows = compare({"tuned": tuned, "plain": network}, data(labels), np.arange(COUNT))
    assert [(row["checkpoint"], row["method"]) for row in rows] == [
        ("plain", "quantised ANN"),
        *(("plain", method) for method, _, _ in METHODS),
        ("tuned", "quantised ANN"),
        ("tuned", "fine-tuned by layers, at T"),
    ]
    assert all(set(row) == set(COMPARED) for row in rows)
    by_method = {row["method"]: row for row in rows if row["checkpoint"] == "plain"}
    assert by_method["quantised ANN"]["top1_percent"] == 100
    assert by_method["quantised ANN"]["latency_steps"] is None
    for method, neuron, schedule in METHODS:
        way = replace(network, neuron=neuron)
        timetable = way.timetable(name=schedule, drain=None)
        found = evaluate(way, data(labels), np.arange(COUNT), timetable)
        row = by_method[method]
        assert row["top1_percent"] == found["snn"]["top1_percent"]
        assert row["spikes_per_neuron"] == found["spikes"]["per_neuron"]
        assert row["latency_steps"] == found["latency_steps"]
        if schedule != "paper":
            assert row["counts_percent"] == row["top1_percent"] == 100
    # It is the parent in all but name, whichever neurons it has.
    assert rows[-1]["top1_percent"] == by_method["signed at T"]["top1_percent"] < 100
    assert rows[-1]["recovered_percent"] == 0
    plain = replace(network, neuron="unsigned")
    tuning["parent_sha256"] = sha256(plain)
    both = {"plain": plain, "tuned": replace(tuned, neuron="unsigned")}
    assert compare(both, data(labels), np.arange(COUNT))[-1]["recovered_percent"] == 0


def test_interval_and_top1() -> None:
    low, high = wilson_interval(90, 100)
    # Wilson 1927; worked by hand with z = 1.96.
    assert (round(low, 2), round(high, 2)) == (82.56, 94.48)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == pytest.approx(100)
    labels = np.arange(COUNT) % 5

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(5)[torch.zeros(len(x), dtype=torch.int64)]

    found = top1_percents({"zero": forward}, data(labels), PREPROCESSING, np.arange(COUNT))["zero"]
    assert found["images"] == COUNT
    assert found["top1_percent"] == pytest.approx(100 * float((labels == 0).mean()))


def test_the_command_line_offers_every_engine() -> None:
    (option,) = (p for p in eval_command.params if p.name == "engine")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == [*ENGINES, ENDPOINT]


def test_the_drop_is_counted_image_by_image() -> None:
    network = converted("residual").network
    labels = np.random.default_rng(0).integers(0, 5, COUNT)

    def ann(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.double().flatten(1)[:, :5]

    found = evaluate(network, data(labels), np.arange(COUNT), network.timetable(), ann=ann)
    snn = settled_labels() == labels
    own = ann(images(COUNT, 4)).argmax(1).numpy() == labels
    drop = found["drop"]
    assert found["ann"]["top1_percent"] == pytest.approx(100 * own.mean())
    assert drop["ann_only"] == (own & ~snn).sum() and drop["snn_only"] == (snn & ~own).sum()
    assert drop["percent"] == pytest.approx(100 * (own.mean() - snn.mean()))


def test_the_interval_of_a_drop_is_that_of_resampled_images() -> None:
    generator = np.random.default_rng(1)
    lost = np.repeat([1, -1, 0], [60, 25, 715])
    means = [100 * generator.choice(lost, 800).mean() for _ in range(4000)]
    drop = paired_drop(60, 25, 800)
    assert drop["percent"] == pytest.approx(100 * lost.mean())
    assert drop["interval95_percent"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.25)
    least, most = paired_drop(0, 0, 800)["interval95_percent"]
    assert least < 0 < most


@pytest.mark.parametrize("schedule", ["paper", "drain"])
def test_statistics_are_those_of_the_reference(schedule: str) -> None:
    network = converted("residual", timesteps=3).network
    timetable = network.timetable(name=schedule)
    found = evaluate(network, data(), np.arange(COUNT), timetable, statistics=True)
    course = simulate(network, images(COUNT, 4), timetable, "reference", events=True)
    end = endpoint(network, images(COUNT, 4), 3)
    for row, p in zip(found["layers"], network.populations, strict=True):
        counts, wanted = course.counts[p.name].numpy(), end.counts[p.name].numpy().astype(int)
        events = course.events[p.name].numpy()
        assert row["rate_percent"] == pytest.approx(
            100 * events.sum() / (counts.size * found["latency_steps"])
        )
        assert row["saturated_percent"] == pytest.approx(100 * (counts == 3).mean())
        assert row["zero_percent"] == pytest.approx(100 * (counts == 0).mean())
        assert row["dead_percent"] == pytest.approx(100 * (events == 0).mean())
        off, size = (counts - wanted)[::EVERY], wanted[::EVERY]
        if row["counts_percent"] < 100:
            error = np.sqrt((off**2).sum() / (size**2).sum())
            assert row["sequential_error"] == pytest.approx(error)
        else:
            assert row["sequential_error"] == 0
    operations = found["operations"]
    assert operations["total"]["resets"] == pytest.approx(found["spikes"]["per_image"])
    assert found["energy"]["snn_nj"]["total"] > 0
    without = evaluate(network, data(), np.arange(COUNT), timetable)
    assert without["operations"] is without["energy"] is None
    assert "rate_percent" not in without["layers"][0]


def test_sequential_errors_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    network = converted("residual", timesteps=3).network
    monkeypatch.setattr("snnconv.measure.EVERY", 1)
    # Every image of one color: on some of them, layers end where the quantised ANN does.
    colors = np.broadcast_to(
        np.arange(COUNT, dtype=np.uint8)[:, None, None, None], (COUNT, 8, 8, 3)
    )
    plain = from_arrays("plain", "test", 11 * colors, np.zeros(COUNT, dtype=np.int64))
    errors = []
    for size in (COUNT, 1):
        monkeypatch.setattr("snnconv.measure.BATCH", size)
        timetable = network.timetable(name="paper")
        found = evaluate(network, plain, np.arange(COUNT), timetable, statistics=True)
        errors.append([row["sequential_error"] for row in found["layers"]])
    assert errors[0] == errors[1] and any(errors[0])


@pytest.mark.parametrize("value", [1, 15, 16, 127, -16, -128])
def test_squares_of_bytes_are_summed(value: int) -> None:
    assert _squares(np.full((3, 5), value, dtype=np.int8)) == 15 * value**2


def test_a_network_without_neurons_is_evaluated() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(PREPROCESSING.input_size), 5)).eval()
    network = convert(model, PREPROCESSING, [images(8, 1)], timesteps=3).network
    timetable = network.timetable()
    found = evaluate(network, data(), np.arange(COUNT), timetable, statistics=True)
    assert found["agreement"]["counts_exact"] and found["layers"] == []
    assert found["energy"]["break_even"] is None
    runner = prepare(network, 3)
    assert diagnose(network, runner, images(8, 4), timetable, model)["mend"] is None


def test_as_many_of_spread_images_may_be_unreadable_as_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = from_arrays("black", "test", np.zeros((400, 12, 12, 3), np.uint8), np.zeros(400, int))
    whole = many.images.pixels

    def pixels(index: int, preprocessing: Preprocessing) -> np.ndarray:
        if index in (0, 4, 8):
            raise UnreadableImage(f"{index}.png")
        return whole(index, preprocessing)

    monkeypatch.setattr(many.images, "pixels", pixels)
    assert len(spread_images(many, PREPROCESSING, np.arange(400), 200)) == 197


def test_operations_behind_a_max_pool_are_those_of_its_own_events() -> None:
    network = converted("pools").network
    labelled = data(np.arange(COUNT) % 3)
    found = evaluate(network, labelled, np.arange(COUNT), network.timetable(), statistics=True)
    course = simulate(network, images(COUNT, 4), network.timetable(), "reference", events=True)
    rows = {row["layer"]: row["synaptic_operations"] for row in found["operations"]["layers"]}
    shapes = {n.name: n.shape for n in network.nodes}
    pools = {n.name for n in network.eventful if n not in network.populations}
    read: set[str] = set()
    for p in network.populations:
        if all(s.source in course.events for s in p.branches):
            reached = sum(
                float((course.events[s.source] * fan_out(s, shapes[s.source])).sum())
                for s in p.branches
            )
            assert rows[p.path] == pytest.approx(reached / COUNT)
            read |= {s.source for s in p.branches}
    assert read & pools


def test_the_first_step_from_which_accuracy_stays() -> None:
    steps = [{"top1_percent": x} for x in (None, 90.0, 80.0, 88.1, 89.4, 89.6)]
    assert first_within(steps, 90) == {"0.5": 6, "1": 5, "2": 4}
    assert first_within(steps, 95) == {"0.5": None, "1": None, "2": None}
    assert first_within(steps, 50) == {"0.5": 2, "1": 2, "2": 2}
    assert first_within(steps, None) is None


class Pooled(nn.Module):
    """A max-pool over what neurons and an average pool give side by side; a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(8 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = torch.cat([self.relu(self.second(x)), F.avg_pool2d(x, 3, 1, 1)], 1)
        found: Tensor = self.head(F.max_pool2d(x, 2).flatten(1))
        return found


def test_a_max_pool_over_sums_has_its_own_events() -> None:
    torch.manual_seed(0)
    network = convert(Pooled().eval(), PREPROCESSING, [images(8, 1)], timesteps=5).network
    assert [p.path for p in network.populations] == ["relu", "relu#2"]
    (pool,) = (n for n in network.eventful if n not in network.populations)
    courses = [
        simulate(network, images(COUNT, 4), network.timetable(), engine, events=True)
        for engine in ("reference", "counts", "native")
    ]
    assert all(torch.equal(c.events[pool.name], courses[0].events[pool.name]) for c in courses)
    labelled = data(np.arange(COUNT) % 3)
    found = evaluate(network, labelled, np.arange(COUNT), network.timetable(), statistics=True)
    *_, readout = found["operations"]["layers"]
    events = float(courses[0].events[pool.name].sum())
    assert readout["synaptic_operations"] == pytest.approx(3 * events / COUNT)
