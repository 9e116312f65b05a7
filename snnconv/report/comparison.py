"""Several evaluations side by side, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from snnconv.files import SUFFIX
from snnconv.report import baselines, evaluation
from snnconv.report.document import (
    Column,
    Document,
    Point,
    Points,
    Section,
    Table,
    columns_in_use,
    joules,
    number,
    unit_of,
)
from snnconv.report.reading import Report

# The costs accuracy is shown against: name in the JSON, its axis, and where a report has it.
COSTS: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "energy": (
        "energy per image",
        lambda e: e["energy"]["snn_nj"]["total"] if e.get("energy") else None,
    ),
    "latency": ("latency, time steps", lambda e: e.get("latency_steps")),
}


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell for points `(cost, accuracy)` whether no other is as good in both and better in one."""
    return [
        not any(
            cost <= own_cost and accuracy >= own and (cost, accuracy) != (own_cost, own)
            for cost, accuracy in points
        )
        for own_cost, own in points
    ]


def labels(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Name evaluations by schedule and T, and by what else tells them apart."""
    names = [
        f"{e['schedule']}{_between(e)} T {e['timesteps']}"
        + (
            f" drain {e['drain']}"
            if e["schedule"] in ("drain", "stagger") and e.get("drain") is not None
            else ""
        )
        + (" V0 0" if e.get("initial_membrane") == "zero" else "")
        for e in evaluations
    ]
    if len({e["neuron"] for e in evaluations}) > 1:
        names = [
            name + (" unsigned" if e["neuron"] == "unsigned" else "")
            for name, e in zip(names, evaluations, strict=True)
        ]
    models = {e["model"] for e in evaluations}
    if len(models) > 1:
        names = [f"{e['model']} {name}" for name, e in zip(names, evaluations, strict=True)]
    return names


def _between(e: dict[str, Any]) -> str:
    """Name the steps between layers, if there are more than one."""
    return f" {e['stagger']}" if e.get("stagger") not in (None, 1) else ""


def rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Return the numbers of a comparison, and which reports stand on the fronts.

    Where the reports are not of the same images, no front is drawn and the marks are None.
    """
    evaluations = [r.contents for r in reports]
    compared: list[dict[str, Any]] = []
    for report, label in zip(reports, labels(evaluations), strict=True):
        e = report.contents
        energy = e.get("energy") or {}
        compared.append(
            {
                "report": report.path.name,
                "label": label,
                "model": e["model"],
                "timesteps": e["timesteps"],
                "schedule": e["schedule"],
                "neuron": e["neuron"],
                "images": e["images"],
                "top1_percent": e["snn"]["top1_percent"],
                "interval95_percent": e["snn"]["interval95_percent"],
                "ann_percent": (e.get("ann") or {}).get("top1_percent"),
                "qann_percent": (e.get("qann") or {}).get("top1_percent"),
                "latency_steps": e.get("latency_steps"),
                "latency_steps_clocked": e.get("latency_steps_clocked"),
                "spikes_per_neuron": (e.get("spikes") or {}).get("per_neuron"),
                "snn_nj": energy["snn_nj"]["total"] if energy else None,
                "qann_nj": energy.get("qann_nj"),
            }
        )
    same = same_images(evaluations)
    for name, (_, cost) in COSTS.items():
        costs = [cost(e) for e in evaluations]
        known = [i for i, c in enumerate(costs) if c is not None]
        points = [(costs[i] or 0.0, compared[i]["top1_percent"]) for i in known]
        on_front = dict(zip(known, pareto(points), strict=True)) if same else {}
        for i, row in enumerate(compared):
            row[f"on_{name}_front"] = on_front.get(i)
    return compared


def same_images(evaluations: Sequence[dict[str, Any]]) -> bool:
    """Tell whether all were measured on the same images."""
    return (
        len({(e["data"], e["split"], e["images"], e.get("data_sha256")) for e in evaluations}) == 1
    )


def document(reports: Sequence[Report]) -> Document:
    """Say what one report or several hold, on one page."""
    parts = [
        evaluation.document(r.contents, r.path.name) if r.is_evaluation else baselines.document(r)
        for r in reports
    ]
    if len(parts) == 1:
        return parts[0]
    evaluations = [r for r in reports if r.is_evaluation]
    models = sorted({r.contents["model"] for r in reports})
    return Document(
        title=", ".join(models),
        subtitle=f"{len(reports)} reports side by side",
        sections=_compared(evaluations) if len(evaluations) > 1 else [],
        parts=parts,
    )


def _compared(reports: Sequence[Report]) -> list[Section]:
    compared = rows(reports)
    same = same_images([r.contents for r in reports])
    texts = [] if same else ["The reports are of different images, so no front is drawn."]
    if assumed := _different_assumptions(reports):
        texts.append(assumed)
    best = max(compared, key=lambda row: row["top1_percent"])
    sections = [
        Section(
            "Side by side",
            strong=f"The most accurate is {best['label']} with {best['top1_percent']:.2f} %."
            if same
            else "",
            texts=texts,
            tables=[_table(reports, compared)],
        )
    ]
    figures = [f for name in COSTS if same and (f := _plane(name, compared)) is not None]
    if figures:
        sections.append(
            Section(
                "What accuracy costs",
                texts=[
                    "Filled and joined: the Pareto front. No other report is as cheap and as "
                    "accurate, and better in one of both. Bars are 95 % intervals."
                ],
                figures=figures,
            )
        )
    return sections


def _different_assumptions(reports: Sequence[Report]) -> str:
    found = [(r.contents.get("energy") or {}).get("assumptions") for r in reports]
    stated = [a for a in found if a is not None]
    if all(a == stated[0] for a in stated):
        return ""
    return "The energies rest on different assumptions and do not compare."


def _table(reports: Sequence[Report], compared: Sequence[dict[str, Any]]) -> Table:
    unit = unit_of([row[k] for row in compared for k in ("snn_nj", "qann_nj") if row[k]])
    columns = [
        Column("run", "Schedule and T; neurons where they differ.", number=False),
        Column("checkpoint", "Which network.", number=False),
        Column("SNN %", "Accuracy at the end."),
        Column("at 95 %", "Its Wilson interval."),
        Column("ANN %", "Of the ANN; * second-hand, stored at conversion."),
        Column("QANN %", "Of the quantised ANN, in integers."),
        Column("steps", "Latency in time steps."),
        Column("clocked", "Latency with one step per layer."),
        Column("spikes", "Per neuron and image."),
        Column(f"SNN, {unit[1]}", "Energy per image."),
        Column(f"QANN, {unit[1]}", "Energy of the bit-matched quantised ANN."),
        Column("images", "How many were measured; * a part of the split."),
        Column("front", "Not beaten: in energy (E), in latency (L).", number=False),
    ]
    cells = []
    # Of one network for every T the run tells which.
    networks = {(r.contents["timesteps"], r.contents.get("checkpoint")) for r in reports}
    several = len(networks) > len({timesteps for timesteps, _ in networks})
    for report, row in zip(reports, compared, strict=True):
        low, high = row["interval95_percent"]
        stored = (report.contents.get("ann") or {}).get("source") == "stored"
        front = "".join(name[0].upper() for name in COSTS if row[f"on_{name}_front"])
        cells.append(
            [
                row["label"],
                _network(report) if several else "",
                f"{row['top1_percent']:.2f}",
                f"{low:.2f} to {high:.2f}",
                number(row["ann_percent"], ".2f") + ("*" if stored else ""),
                number(row["qann_percent"], ".2f"),
                number(row["latency_steps"], ",d"),
                number(row["latency_steps_clocked"], ",d"),
                number(row["spikes_per_neuron"], ".3f"),
                "" if row["snn_nj"] is None else joules(row["snn_nj"], unit),
                "" if row["qann_nj"] is None else joules(row["qann_nj"], unit),
                f"{row['images']:,}" + ("*" if report.contents["partial"] else ""),
                front,
            ]
        )
    return Table("Reports", *columns_in_use(columns, cells))


def _network(report: Report) -> str:
    """Name the checkpoint of a report as short as possible."""
    return str(report.contents.get("checkpoint") or report.path.name).removesuffix(SUFFIX)


def _plane(name: str, compared: Sequence[dict[str, Any]]) -> Points | None:
    key = {"energy": "snn_nj", "latency": "latency_steps"}[name]
    known = [row for row in compared if row[key] is not None]
    if len(known) < 2:
        return None
    scale, unit = unit_of([row[key] for row in known]) if name == "energy" else (1.0, "")
    points = [
        Point(
            row["label"],
            row["schedule"],
            row[key] / scale,
            row["top1_percent"],
            row["interval95_percent"][0],
            row["interval95_percent"][1],
            bool(row[f"on_{name}_front"]),
        )
        for row in known
    ]
    best = ", ".join(p.label for p in sorted(points, key=lambda p: p.x) if p.front)
    axis = COSTS[name][0] + (f", {unit}" if unit else "")
    return Points(
        f"Accuracy against {name}",
        f"Top-1 accuracy against {axis}. On the Pareto front: {best}.",
        axis,
        "top-1 %",
        points,
    )
