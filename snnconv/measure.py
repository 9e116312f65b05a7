"""Measure a spiking network on a data set: accuracy at every step, agreement, spikes, latency."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snnconv import __version__, distributed
from snnconv.checkpoint import sha256
from snnconv.data import ImageData, check_labels, default_batch
from snnconv.energy import activation_bits, energy
from snnconv.engine import DEFAULT, ENDPOINT, Endpoint, Trace, prepare
from snnconv.engine.counts import total
from snnconv.errors import UsageError
from snnconv.network import Population, Readout, SpikingNetwork
from snnconv.preprocess import Preprocessing
from snnconv.progress import Progress, silent
from snnconv.schedule import Schedule
from snnconv.schemas import EVALUATION
from snnconv.workload import count_operations

BATCH = 256
# What still has its square in a byte.
SMALL = 15
# What percentages that are equal may differ by.
ROUNDING = 1e-9
# Of the images of a batch, how far apart those are that tell how far counts are off.
EVERY = 8
BATCH_NEURONS = 2**26
# What an evaluation has from a simulation alone.
COURSE = (
    "snn_by_count",
    "latency_steps",
    "latency_steps_clocked",
    "drain_steps",
    "agreement",
    "by_step",
    "first_within",
    "spikes",
    "layers",
)


# What it has of statistics.
STATISTICS = ("operations", "energy")


# The baselines every comparison shows: what they are called, the neurons, the schedule.
METHODS = (
    ("unsigned at T", "unsigned", "paper"),
    ("signed at T", "signed", "paper"),
    ("signed, drain", "signed", "drain"),
    ("signed, stagger", "signed", "stagger"),
    ("unsigned, wait", "unsigned", "wait"),
)
TUNED = {
    (True, False): "fine-tuned by layers, at T",
    (False, True): "fine-tuned end to end, at T",
    (True, True): "fine-tuned both ways, at T",
}
# What a row of a comparison has.
COMPARED = (
    "method",
    "checkpoint",
    "timesteps",
    "schedule",
    "neuron",
    "top1_percent",
    "interval95_percent",
    "recovered_percent",
    "latency_steps",
    "latency_steps_clocked",
    "spikes_per_neuron",
    "negative_percent",
    "counts_percent",
)


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share, in percent (Wilson 1927)."""
    z = 1.959963984540054
    share = hits / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 100 / (1 + z * z / total)
    return max(0.0, scale * (center - spread)), min(100.0, scale * (center + spread))


def paired_drop(ann_only: int, snn_only: int, total: int) -> dict[str, Any]:
    """Return how many points of accuracy are lost on the same images, with a 95 % interval.

    `ann_only` images only the ANN gets right, `snn_only` only the spiking network. The interval is
    Wald's for paired shares with half an image added to each of the four cells (Agresti and Min,
    2005).
    """
    z = 1.959963984540054
    n = total + 2
    center = (ann_only - snn_only) / n
    spread = z * math.sqrt(((ann_only + snn_only + 1) / n - center * center) / n)
    return {
        "percent": 100 * (ann_only - snn_only) / total,
        "interval95_percent": [100 * (center - spread), 100 * (center + spread)],
        "ann_only": ann_only,
        "snn_only": snn_only,
    }


def top1_percents(
    forwards: Mapping[str, Callable[[Tensor], Tensor]],
    data: ImageData,
    preprocessing: Preprocessing,
    indices: np.ndarray,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """Return, per name, the top-1 accuracy in percent and the number of images it is of.

    A value of `forwards` maps pixels uint8 `[N, C, H, W]` to logits `[N, classes]`. Images that
    cannot be read do not count. Processes of one job share the batches.
    """
    measured = {}
    for name, forward in forwards.items():
        hits = done = 0
        with torch.no_grad():
            for pixels, labels in _shared_batches(data, preprocessing, indices):
                logits = forward(pixels.to(device))
                hits += int((logits.argmax(1).cpu() == labels).sum())
                done += len(labels)
                progress(name.replace("_", " "), _of_all(done, indices), len(indices))
        hits, done = distributed.sum_over_ranks(torch.tensor([hits, done])).tolist()
        measured[name] = {"top1_percent": 100 * hits / max(done, 1), "images": done}
    return measured


def _of_all(done: int, indices: np.ndarray) -> int:
    """Return how many images are done in all processes, if the others are as far as this one."""
    return min(done * distributed.size(), len(indices))


def _shared_batches(
    data: ImageData,
    preprocessing: Preprocessing,
    indices: np.ndarray,
    batch: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of the batches, the same ones as if it were alone."""
    batch = batch or default_batch(preprocessing)
    starts = distributed.share(range(0, len(indices), batch))
    chosen = np.concatenate([indices[:0], *(indices[start : start + batch] for start in starts)])
    return data.batches(preprocessing, chosen, batch, asked=len(indices))


def spread_images(
    data: ImageData, preprocessing: Preprocessing, indices: np.ndarray, count: int
) -> Tensor:
    """Load at most `count` images, spread evenly over `indices`: uint8 `[N, C, H, W]`.

    So many of them may be unreadable as of all `indices`.
    """
    chosen = indices[:: -(-len(indices) // count)]
    batches = data.batches(preprocessing, chosen, default_batch(preprocessing), asked=len(indices))
    return torch.cat([pixels for pixels, _ in batches])


def most_spikes(counts: Tensor, membranes: Tensor) -> Tensor:
    """Return the class with the most spikes, of those the one with the highest membrane.

    Both are integers `[steps, N, ...]`, the result is `[steps, N]`.
    """
    counts, membranes = counts.flatten(2), membranes.flatten(2)
    lowest = torch.iinfo(membranes.dtype).min
    most = counts == counts.amax(2, keepdim=True)
    return torch.where(most, membranes, lowest).argmax(2)


@dataclass
class _Tally:
    """Sums over batches; everything in it is an integer or a list of them."""

    network: SpikingNetwork
    images: int = 0
    hits: int = 0
    end_hits: int = 0
    ann_hits: int = 0
    ann_only: int = 0
    snn_only: int = 0
    same_argmax: int = 0
    by_step: list[list[int | None]] = field(default_factory=list)
    by_step_counted: list[list[int | None]] = field(default_factory=list)
    drains: list[Tensor] = field(default_factory=list)
    equal: dict[str, int] = field(default_factory=dict)
    spikes: dict[str, Tensor] = field(default_factory=dict)
    minimum: dict[str, int] = field(default_factory=dict)
    # With statistics: of every population the final counts that are at their limit, and 0, the
    # squares of what they are off and of what they should be; of every neuron its events, and the
    # images on which the quantised ANN's integer is not 0.
    saturated: dict[str, int] = field(default_factory=dict)
    zero: dict[str, int] = field(default_factory=dict)
    off: dict[str, int] = field(default_factory=dict)
    squares: dict[str, int] = field(default_factory=dict)
    events: dict[str, Tensor] = field(default_factory=dict)
    nonzero: dict[str, Tensor] = field(default_factory=dict)

    def add_ann(self, ann: Tensor, snn: Tensor, labels: Tensor) -> None:
        """Add the classes a batch was taken for by the ANN and by the spiking network, `[N]`."""
        ann_right, snn_right = ann == labels, snn == labels
        self.ann_hits += int(ann_right.sum())
        self.ann_only += int((ann_right & ~snn_right).sum())
        self.snn_only += int((snn_right & ~ann_right).sum())

    def add(self, course: Trace | None, end: Endpoint, labels: Tensor, readout: str) -> Tensor:
        """Add a batch; return its classes `[N]`. Without a course it ends as exact schedules do."""
        settled = end.logits(self.network, readout).flatten(1).argmax(1).cpu()
        self.images += len(labels)
        self.end_hits += int((settled == labels).sum())
        if course is None:
            self.hits = self.end_hits
            return settled
        logits = course.logits(self.network, readout)
        chosen = logits.flatten(2).argmax(2).cpu()
        defined = ~logits.isnan().flatten(1).any(1).cpu()
        hits = (chosen == labels).sum(1)
        self.by_step.append(
            [int(h) if known else None for h, known in zip(hits, defined, strict=True)]
        )
        counting = course.readout_counts(self.network, readout)
        if counting is not None:
            counted = (most_spikes(*counting).cpu() == labels).sum(1)
            self.by_step_counted.append(
                [int(h) if known else None for h, known in zip(counted, defined, strict=True)]
            )
        final = chosen[-1]
        self.hits += int(hits[-1])
        self.same_argmax += int((final == settled).sum())
        self.drains.append(course.drain_steps.cpu())
        for p in self.network.populations:
            counts, target = course.counts[p.name], end.counts[p.name]
            spikes = course.spikes[p.name].sum(0).cpu()
            # numpy: torch sums small integers an order of magnitude slower on CPUs.
            found, wanted = counts.cpu().numpy(), target.cpu().numpy()
            equal = int(np.count_nonzero(found == wanted))
            least = int((np.abs(wanted) if p.two_sided else wanted).sum(dtype=np.int64))
            self.equal[p.name] = self.equal.get(p.name, 0) + equal
            self.spikes[p.name] = self.spikes.get(p.name, 0) + spikes
            self.minimum[p.name] = self.minimum.get(p.name, 0) + least
            if course.events is not None:
                self._add_counts(p, found, wanted, course.schedule.timesteps, equal)
        if course.events is not None:
            for node in self.network.eventful:
                integers = end.counts[node.name].cpu().numpy()
                for sums, more in (
                    (self.events, course.events[node.name].cpu()),
                    (self.nonzero, total(torch.from_numpy(integers != 0))),
                ):
                    sums[node.name] = sums.get(node.name, 0) + more
        return final

    def _add_counts(
        self, p: Population, found: np.ndarray, wanted: np.ndarray, timesteps: int, equal: int
    ) -> None:
        """Add what a population's final counts `[N, ...]` say beside the integers wanted."""
        largest = np.abs(found) if p.two_sided else found
        saturated = int(np.count_nonzero(largest == timesteps))
        zero = found.size - int(np.count_nonzero(found))
        # A part of the images tells it as well, and costs no time.
        exact, found, wanted = equal == found.size, found[::EVERY], wanted[::EVERY]
        off, squares = 0, _squares(wanted)
        if not exact:
            signed = np.int8 if timesteps <= np.iinfo(np.int8).max // 2 else np.int16
            off = _squares(np.subtract(found, wanted, dtype=signed, casting="unsafe"))
        for sums, more in (
            (self.saturated, saturated),
            (self.zero, zero),
            (self.off, off),
            (self.squares, squares),
        ):
            sums[p.name] = sums.get(p.name, 0) + more

    def absorb(self, other: dict[str, Any]) -> None:
        """Add the sums of another tally, as its `vars`."""
        for key in (
            "images", "hits", "end_hits", "same_argmax", "ann_hits", "ann_only", "snn_only"
        ):  # fmt: skip
            setattr(self, key, getattr(self, key) + other[key])
        for key in ("by_step", "by_step_counted", "drains"):
            getattr(self, key).extend(other[key])
        for key in (
            "equal", "spikes", "minimum", "saturated", "zero", "off", "squares", "events", "nonzero"
        ):  # fmt: skip
            mine = getattr(self, key)
            for name, value in other[key].items():
                mine[name] = mine.get(name, 0) + value

    def steps(self) -> list[dict[str, Any]]:
        """Return the accuracy after each step; images that have ended stay as they are."""
        charged, counted = self._course(self.by_step), self._course(self.by_step_counted)
        counted = counted or [None] * len(charged)
        return [
            {"step": t + 1, "top1_percent": by_charge, "count_top1_percent": by_count}
            for t, (by_charge, by_count) in enumerate(zip(charged, counted, strict=True))
        ]

    def _course(self, batches: list[list[int | None]]) -> list[float | None]:
        course: list[float | None] = []
        for t in range(max(map(len, batches), default=0)):
            hits = [b[min(t, len(b) - 1)] for b in batches]
            known = [h for h in hits if h is not None]
            course.append(100 * sum(known) / self.images if len(known) == len(hits) else None)
        return course


def _squares(x: np.ndarray) -> int:
    """Sum the squares of counts or their differences `[N, ...]`."""
    if x.itemsize == 1 and max(int(x.max(initial=0)), -int(x.min(initial=0))) <= SMALL:
        return int(total(torch.from_numpy(np.square(x.view(np.uint8)))).sum())
    numbers = x.astype(np.float64).ravel()
    return int(numbers @ numbers)


def evaluate(
    network: SpikingNetwork,
    data: ImageData,
    indices: np.ndarray | Sequence[int],
    schedule: Schedule,
    *,
    engine: str = DEFAULT,
    device: str = "cpu",
    seed: int = 0,
    ann: Callable[[Tensor], Tensor] | None = None,
    statistics: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Simulate the images at `indices`, and return an evaluation as plain JSON values.

    Processes of one job share the batches and return the same numbers as one process would.
    The quantised ANN (`qann`) is the network's own end point, computed beside the simulation. With
    the engine `endpoint` nothing is simulated, and what only a simulation tells is None. `ann` maps
    pixels uint8 `[N, C, H, W]` to the ANN's logits; with it `ann` and `drop` tell its accuracy and
    the paired difference. Otherwise they, `qann_float` and `checkpoint` are left None for the
    caller, who knows them. With `statistics` layers tell what their counts are, and operations and
    energy are counted. Raises UsageError if the network is no classifier or, with the engine
    `endpoint`, does not end there under the schedule, or if there are no such images; DataError if
    the data do not fit it.
    """
    readout = classes(network)
    indices = _checked(indices, len(data))
    simulated = engine != ENDPOINT
    if not simulated and not (
        schedule.exact and (network.neuron == "signed" or schedule.name == "wait")
    ):
        raise UsageError(
            f"{network.neuron} neurons under {schedule.name!r} do not end at the end point; take "
            "another --engine, or a schedule that is exact"
        )
    runner = prepare(network, schedule.timesteps, engine if simulated else DEFAULT, device)
    check_labels(data, torch.Size(readout.shape).numel(), network.model.get("class_names"))
    tally = _Tally(network)
    statistics &= simulated
    # What maps like max-pooling end at is asked for only where there are such.
    maps = statistics and len(network.eventful) > len(network.populations)
    seconds = 0.0
    batch = max(1, min(BATCH, BATCH_NEURONS // max(network.neurons, 1)))
    for pixels, labels in _shared_batches(data, network.preprocessing, indices, batch):
        pixels = pixels.to(device)
        start = time.perf_counter()
        course = runner.simulate(pixels, schedule, events=statistics) if simulated else None
        end = runner.endpoint(pixels) if course is None else None
        seconds += time.perf_counter() - start
        found = tally.add(course, end or runner.endpoint(pixels, maps=maps), labels, readout.name)
        if ann is not None:
            with torch.no_grad():
                tally.add_ann(ann(pixels).argmax(1).cpu(), found, labels)
        progress(
            "simulate" if simulated else "end point",
            _of_all(tally.images, indices),
            len(indices),
        )
    parts = distributed.gather({k: v for k, v in vars(tally).items() if k != "network"})
    seconds = max(distributed.gather(seconds))
    for names in distributed.gather(data.unreadable):
        data.unreadable.extend(n for n in names if n not in data.unreadable)
    tally = _Tally(network)
    for part in parts:
        tally.absorb(part)
    return {
        "schema": EVALUATION,
        "version": __version__,
        "model": network.title,
        "checkpoint": None,
        "task": "classification",
        "metric": "top1_percent",
        "split": data.split,
        "images": tally.images,
        "partial": tally.images < len(data),
        "data": data.name,
        "data_note": data.note,
        "data_sha256": data.sha256(indices),
        "unreadable_images": len(data.unreadable),
        "timesteps": schedule.timesteps,
        "trained_timesteps": network.timesteps,
        "schedule": schedule.name,
        "drain": schedule.drain,
        "stagger": schedule.stagger if schedule.name == "stagger" else None,
        "neuron": network.neuron,
        "initial_membrane": network.initial_membrane,
        "weight_bits": network.weight_bits,
        "ann": ann and {"top1_percent": 100 * tally.ann_hits / tally.images, "source": "measured"},
        "drop": ann and paired_drop(tally.ann_only, tally.snn_only, tally.images),
        "qann": {"top1_percent": 100 * tally.end_hits / tally.images},
        "qann_float": None,
        "snn": _accuracy(tally.hits, tally.images),
        **(_course(network, schedule, tally) if simulated else _course_unseen(network, schedule)),
        **(_energy(network, schedule, tally) if statistics else dict.fromkeys(STATISTICS)),
        "errors": None,
        "wall_ms_per_image": 1000 * seconds / tally.images,
        "engine": runner.name if simulated else ENDPOINT,
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def compare(
    networks: Mapping[str, SpikingNetwork],
    data: ImageData,
    indices: np.ndarray,
    *,
    timesteps: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Measure networks by name in every way there is, on the same images; a row for each.

    A network as converted is run by `METHODS`, a fine-tuned one for the T steps it was tuned for.
    Where its parent is there too, its row says how much of what the parent loses at T, against its
    quantised ANN, has been recovered.
    """
    rows: list[dict[str, Any]] = []
    parents: dict[tuple[str, str], tuple[float, float]] = {}
    order = sorted(networks, key=lambda name: "finetuning" in networks[name].provenance)
    for name in order:
        network = networks[name]
        tuning = network.provenance.get("finetuning")
        methods = METHODS if tuning is None else (_tuned(network),)
        for number, (method, neuron, schedule) in enumerate(methods):
            way = replace(network, neuron=neuron)
            found = evaluate(
                way,
                data,
                indices,
                way.timetable(timesteps, name=schedule, drain=None),
                device=device,
                seed=seed,
                progress=lambda stage, done, total, detail="", what=f"{name}: {method}": progress(
                    what, done, total, detail
                ),
            )
            if number == 0:
                settled = {"method": "quantised ANN", "checkpoint": name, **found["qann"]}
                rows.append({**dict.fromkeys(COMPARED), **settled})
            row = {**_compared(found), "method": method, "checkpoint": name}
            if tuning is None and schedule == "paper":
                parents[sha256(network), neuron] = (
                    found["snn"]["top1_percent"],
                    found["qann"]["top1_percent"],
                )
            parent = (tuning or {}).get("parent_sha256", ""), neuron
            if tuning is not None and parent in parents:
                at_t, quantised = parents[parent]
                if quantised > at_t:
                    gained = found["snn"]["top1_percent"] - at_t
                    row["recovered_percent"] = 100 * gained / (quantised - at_t)
            rows.append(row)
    return rows


def _tuned(network: SpikingNetwork) -> tuple[str, str, str]:
    """Return how a fine-tuned network is run, as `METHODS` say it."""
    how = network.provenance["finetuning"]["settings"]
    method = TUNED[how.get("epochs_per_layer", 0) > 0, how.get("epochs", 0) > 0]
    return method, network.neuron, network.schedule


def _compared(found: dict[str, Any]) -> dict[str, Any]:
    """Return of an evaluation what `compare` tells."""
    return {
        **dict.fromkeys(COMPARED),
        **{key: found[key] for key in COMPARED if key in found},
        **found["snn"],
        "spikes_per_neuron": found["spikes"]["per_neuron"],
        "negative_percent": found["spikes"]["negative_percent"],
        "counts_percent": found["agreement"]["counts_percent"],
    }


def first_within(by_step: list[dict[str, Any]], percent: float | None) -> dict[str, Any] | None:
    """Return from which step on accuracy stays within 0.5, 1 and 2 points of another to the end.

    The value is None where it never does.
    """
    if percent is None:
        return None
    reached = [s["top1_percent"] for s in by_step]
    found = {}
    for points in (0.5, 1, 2):
        near = [r is not None and r >= percent - points - ROUNDING for r in reached]
        far = [t for t, is_near in enumerate(near) if not is_near]
        first = far[-1] + 2 if far else 1
        found[str(points)] = first if first <= len(near) else None
    return found


def _accuracy(hits: int, images: int) -> dict[str, Any]:
    return {
        "top1_percent": 100 * hits / images,
        "interval95_percent": list(wilson_interval(hits, images)),
    }


def _course(network: SpikingNetwork, schedule: Schedule, tally: _Tally) -> dict[str, Any]:
    """Return what the simulations told: latency, agreement, accuracy by step, spikes."""
    drains = torch.cat(tally.drains).numpy()
    by_step, settled = tally.steps(), 100 * tally.end_hits / tally.images
    latency = _latency(schedule, tally)
    per_neuron = network.neurons * tally.images
    positive, negative = (sum(int(s[k]) for s in tally.spikes.values()) for k in (0, 1))
    equal = sum(tally.equal.values())
    counted = sum(b[-1] or 0 for b in tally.by_step_counted)
    return {
        "snn_by_count": _accuracy(counted, tally.images) if tally.by_step_counted else None,
        **_latencies(network, latency),
        "drain_steps": {
            "max": int(drains.max()),
            "mean": float(drains.mean()),
            "p99": int(np.percentile(drains, 99, method="higher")),
        },
        "agreement": {
            "argmax_percent": 100 * tally.same_argmax / tally.images,
            "counts_percent": 100 * equal / per_neuron if per_neuron else 100.0,
            "counts_exact": equal == per_neuron,
        },
        "by_step": by_step,
        "first_within": {"ann": None, "qann": first_within(by_step, settled)},
        "spikes": {
            "per_neuron": (positive + negative) / max(per_neuron, 1),
            "per_image": (positive + negative) / tally.images,
            "negative_percent": 100 * negative / max(positive + negative, 1),
            "over_minimum": (positive + negative) / max(sum(tally.minimum.values()), 1),
        },
        "layers": _layers(network, tally, latency),
    }


def _course_unseen(network: SpikingNetwork, schedule: Schedule) -> dict[str, Any]:
    """Return what is known without a simulation: the latency, if it does not depend on images."""
    fixed = {} if schedule.drain is None else _latencies(network, schedule.longest)
    return {**dict.fromkeys(COURSE), **fixed}


def _latencies(network: SpikingNetwork, steps: int) -> dict[str, int]:
    return {"latency_steps": steps, "latency_steps_clocked": steps + network.depth}


def _energy(network: SpikingNetwork, schedule: Schedule, tally: _Tally) -> dict[str, Any]:
    """Return operations per image, and what they cost."""
    steps = _latency(schedule, tally)
    operations = count_operations(
        network, schedule, tally.events, tally.nonzero, tally.images, steps
    )
    cost = energy(
        operations,
        activation_bits=activation_bits(schedule.timesteps),
        weight_bits=network.weight_bits,
        steps=steps,
    )
    return {"operations": operations, "energy": cost}


def _latency(schedule: Schedule, tally: _Tally) -> int:
    """Return the steps of the slowest image."""
    if schedule.drain is not None:
        return schedule.longest
    return schedule.steps_before_drain + max(int(d.max()) for d in tally.drains)


def _checked(indices: np.ndarray | Sequence[int], images: int) -> np.ndarray:
    found = np.asarray(indices)
    if not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise UsageError(f"evaluate takes the numbers of images, not {len(found)} {found.dtype}")
    if found.min() < 0 or found.max() >= images:
        raise UsageError(
            f"images are numbered 0 to {images - 1}, there is none of the number "
            f"{found.min() if found.min() < 0 else found.max()}"
        )
    return found


def classes(network: SpikingNetwork) -> Readout:
    """Return a classifier's one output. Raises UsageError for other networks."""
    if network.logits is None:
        shapes = ", ".join(f"{r.name} {list(r.shape)}" for r in network.readouts)
        raise UsageError(f"the network is no classifier: its outputs are {shapes}")
    return network.logits


def _layers(network: SpikingNetwork, tally: _Tally, steps: int) -> list[dict[str, Any]]:
    """Return agreement and spikes of every population; with statistics, what its counts are."""
    rows = []
    for p in network.populations:
        neurons = torch.Size(p.shape).numel()
        positive, negative = tally.spikes[p.name].tolist()
        rows.append(
            {
                "layer": p.path,
                "neurons": neurons,
                "counts_percent": 100 * tally.equal[p.name] / (neurons * tally.images),
                "spikes_per_neuron": (positive + negative) / (neurons * tally.images),
                "negative_percent": 100 * negative / max(positive + negative, 1),
            }
        )
        if p.name in tally.events:
            every = neurons * tally.images
            rows[-1] |= {
                "rate_percent": 100 * (positive + negative) / (every * steps),
                "saturated_percent": 100 * tally.saturated[p.name] / every,
                "zero_percent": 100 * tally.zero[p.name] / every,
                "dead_percent": 100 * int((tally.events[p.name] == 0).sum()) / neurons,
                "sequential_error": math.sqrt(tally.off[p.name] / max(tally.squares[p.name], 1)),
            }
    return rows
