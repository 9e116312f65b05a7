"""Evaluate a spiking network, write the report and its page, and print what it says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from snnconv.errors import SnnconvError, first_line
from snnconv.files import require_named
from snnconv.schemas import EVALUATION

from . import console
from .ann import diagnosed, forwards_of, measure_forwards, stored_ann

SHOWN_STEPS = 12


def evaluated(
    network: Any,
    images: Any,
    indices: Any,
    timetable: Any,
    *,
    checkpoint: str,
    model: Any,
    engine: str,
    device: str,
    seed: int,
    statistics: bool,
    progress: console.Progress,
) -> dict[str, Any]:
    """Measure a network, and the ANN `model` it was made from, if it is given.

    Raises what `snnconv.evaluate` raises.
    """
    from snnconv.measure import evaluate, first_within

    forwards = {}
    if model is not None:
        forwards = forwards_of(model, network, timetable.timesteps, device)
    evaluation = evaluate(
        network,
        images,
        indices,
        timetable,
        engine=engine,
        device=device,
        seed=seed,
        ann=forwards.pop("ann", None),
        statistics=statistics,
        progress=progress,
    )
    evaluation["checkpoint"] = checkpoint
    if model is None:
        evaluation["ann"] = stored_ann(network, images)
    if evaluation["by_step"] is not None and evaluation["ann"] is not None:
        wanted = evaluation["ann"]["top1_percent"]
        evaluation["first_within"]["ann"] = first_within(evaluation["by_step"], wanted)
    if statistics and evaluation["by_step"] is not None:
        try:
            evaluation["errors"] = diagnosed(
                network, images, indices, timetable, model, device, progress
            )
        except (SnnconvError, RuntimeError, MemoryError) as error:
            # What the simulation has found is not lost for that.
            console.note(f"the evaluation goes without a diagnosis: {first_line(error)}")
    return evaluation | measure_forwards(forwards, network, images, indices, device, progress)


def default_path(
    checkpoint: Path,
    network: Any,
    timetable: Any,
    split: str,
    limit: int | None,
    *,
    simulated: bool = True,
) -> Path:
    """Name the report of an evaluation beside its checkpoint."""
    from snnconv import report

    settings = _settings(network, timetable, split, limit)
    settings += [] if simulated else ["endpoint"]
    return report.default_path(checkpoint, "eval", settings)


def require_writable(
    path: Path,
    images: Any,
    indices: Any,
    seed: int,
    limit: int | None,
    *,
    page: bool,
    named: bool,
    force: bool,
) -> None:
    """Raise UsageError if the report at `path`, or its page, would take the place of another.

    An earlier one of the same data, drawn alike, is replaced, unless the user has `named` the path.
    """
    from snnconv import report
    from snnconv.report import html

    drawn = {"seed": seed} if limit else {}
    own = {"schema": EVALUATION, "data": images.name, **drawn}
    require_named(path, ".json", "a report")
    if path.is_file() and not named:  # else there is nothing to tell apart
        own["data_sha256"] = images.sha256(indices)
    report.require_writable(path, force, None if named else own)
    if page:
        beside = path.with_suffix(".html")
        report.require_writable(beside, force or html.is_own(beside))


def ann_of(path: Path) -> str | None:
    """Return the --ann of the command that made the evaluation at `path`, if there is one."""
    try:
        words = shlex.split(json.loads(path.read_text(encoding="utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((value for name, value in pairwise(words) if name == "--ann"), None)


def write(path: Path, evaluation: dict[str, Any], *, page: bool, command: Sequence[str]) -> None:
    """Write an evaluation with the `command` it came from, and its page beside it."""
    from snnconv import report
    from snnconv.report import comparison, html, reading

    report.write(path, evaluation, command)
    beside = path.with_suffix(".html")
    if page:
        document = comparison.document([reading.read(path)])
        report.write_text(beside, html.render(document))
    elif html.is_own(beside):
        beside.unlink()  # it would show the report that this one has replaced


def show(path: Path, evaluation: dict[str, Any], *, page: bool, quiet: bool) -> None:
    """Print what an evaluation says, and where it is."""
    _print(evaluation)
    written = f"{path}, {path.with_suffix('.html')}" if page else f"{path}"
    console.note(f"report: {written}", quiet)


def _settings(network: Any, timetable: Any, split: str, limit: int | None) -> list[str]:
    """Name what tells one evaluation of a checkpoint from another."""
    schedule = timetable.name
    if schedule == "stagger" and timetable.stagger != 1:
        schedule += str(timetable.stagger)
    if timetable.name in ("drain", "stagger") and timetable.drain is not None:
        schedule += f"-{timetable.drain}"
    parts = [f"T{timetable.timesteps}", schedule, network.neuron]
    parts += ["zero"] if network.initial_membrane == "zero" else []
    parts += [split] if split != "test" else []
    return parts + ([f"limit{limit}"] if limit else [])


def _print(e: dict[str, Any]) -> None:
    low, high = e["snn"]["interval95_percent"]
    some = f"{e['images']} {e['split']} images" + (" (a part of them)" if e["partial"] else "")
    rows = []
    if e["ann"] is not None:
        of = f", stored, {e['ann']['images']} images" if e["ann"]["source"] == "stored" else ""
        rows.append(("ANN top-1", f"{e['ann']['top1_percent']:.2f} %{of}"))
    if e["drop"] is not None:
        least, most = e["drop"]["interval95_percent"]
        lost = (
            f"{e['drop']['percent']:.2f} points, {least:.2f} to {most:.2f} at 95 %, image by image"
        )
        rows.append(("drop from the ANN", lost))
    if e["qann_float"] is not None:
        rows.append(("float QANN top-1", f"{e['qann_float']['top1_percent']:.2f} %"))
    rows += [
        ("quantised ANN top-1", f"{e['qann']['top1_percent']:.2f} %"),
        ("SNN top-1", f"{e['snn']['top1_percent']:.2f} % ({low:.2f} to {high:.2f} at 95 %)"),
    ]
    if e["snn_by_count"] is not None:
        by_count = e["snn_by_count"]["top1_percent"]
        rows.append(("  by spike count", f"{by_count:.2f} %, as neurons in the readout would fire"))
    if e["by_step"] is not None:
        rows += _course(e)
    elif e["latency_steps"] is not None:
        rows.append(("latency", _latency(e)))
    rows += _verdicts(e)
    rows.append(
        ("time", f"{e['wall_ms_per_image']:.1f} ms per image, {e['engine']}, {e['device']}")
    )
    title = f"{e['model']}, T {e['timesteps']}, {e['schedule']}, {e['neuron']}: {some}"
    console.print_table(title, ["", "measured"], rows)
    if e["by_step"] is not None:
        steps = _thinned(e["by_step"])
        reached = ["–" if s["top1_percent"] is None else f"{s['top1_percent']:.2f}" for s in steps]
        columns = ["step", *(str(s["step"]) for s in steps)]
        console.print_table(None, columns, [("top-1 %", *reached)])


def _verdicts(e: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of what it costs, and what to mend."""
    from snnconv.report.document import joules

    rows = []
    if (cost := e["energy"]) is not None:
        ours, matched = cost["snn_nj"]["total"], cost["qann_nj"]
        rows.append(
            (
                "energy",
                f"{joules(ours)} per image, {ours / matched:.2f} of the quantised ANN of the "
                f"same bits, {ours / cost['qann_skipping_zeros_nj']:.2f} of one that skips zeros "
                "(arithmetic)",
            )
        )
    if e["errors"] is not None and (mend := e["errors"]["mend"]) is not None:
        rows.append(("mend first", f"{mend['layer']}, {mend['cause']}. {mend['suggestion']}"))
    return rows


def _course(e: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of what the simulation told."""
    from snnconv.report.document import nearly_all

    drain, spikes, agreement = e["drain_steps"], e["spikes"], e["agreement"]
    return [
        (
            "agreement",
            f"{agreement['argmax_percent']:.2f} % of arg-maxes, "
            f"{nearly_all(agreement['counts_percent'])} % of counts"
            + (", exact" if agreement["counts_exact"] else ""),
        ),
        (
            "latency",
            f"{_latency(e)}; drain {drain['max']} at most, {drain['mean']:.1f} on average",
        ),
        (
            "spikes",
            f"{spikes['per_neuron']:.3f} per neuron, {spikes['negative_percent']:.1f} % negative, "
            f"{spikes['over_minimum']:.2f}x the minimum",
        ),
    ]


def _latency(e: dict[str, Any]) -> str:
    from snnconv.report.document import in_steps

    return f"{in_steps(e['latency_steps'])} ({e['latency_steps_clocked']} with one step per layer)"


def _thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep a dozen steps, the first and the last among them."""
    if len(steps) <= SHOWN_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
