"""What `eval --baselines` says: all ways to run a network, in one table."""

from __future__ import annotations

from snnconv.report.document import (
    Column,
    Document,
    Section,
    Table,
    columns_in_use,
    nearly_all,
    number,
)
from snnconv.report.reading import Report


def document(report: Report) -> Document:
    """Show `eval --baselines` as its table."""
    b = report.contents
    columns = [
        Column("method", "How the checkpoint was run.", number=False),
        Column("checkpoint", "Which network.", number=False),
        Column("top-1 %", "Accuracy at the end."),
        Column("at 95 %", "Its Wilson interval."),
        Column("steps", "Latency in time steps."),
        Column("clocked", "Latency with one step per layer."),
        Column("spikes", "Per neuron and image."),
        Column("negative %", "Share of negative spikes."),
        Column("counts %", "Final counts that equal the quantised ANN's integers."),
        Column("won back %", "Of what the parent loses at T, what fine-tuning gains."),
    ]
    ann = b.get("ann")
    cells = []
    if ann is not None:
        stored = ", stored" if ann.get("source") == "stored" else ""
        cells.append([f"ANN{stored}", "", f"{ann['top1_percent']:.2f}", *[""] * 7])
    for row in b["rows"]:
        interval = row.get("interval95_percent")
        counts = row.get("counts_percent")
        cells.append(
            [
                row["method"],
                row.get("checkpoint") or "",
                number(row.get("top1_percent"), ".2f"),
                "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
                number(row.get("latency_steps"), ",d"),
                number(row.get("latency_steps_clocked"), ",d"),
                number(row.get("spikes_per_neuron"), ".3f"),
                number(row.get("negative_percent"), ".1f"),
                "" if counts is None else nearly_all(counts),
                number(row.get("recovered_percent"), ".0f"),
            ]
        )
    if len({row.get("checkpoint") for row in b["rows"]}) == 1:
        columns, cells = [columns[0], *columns[2:]], [[c[0], *c[2:]] for c in cells]
    part = f" (a part of {b.get('split', 'the split')})" if b["partial"] else ""
    images = f"{b['images']:,} images of {b.get('data', '')} {b.get('split', '')}{part}"
    marks = [f"Partial: {b['images']:,} images"] if b["partial"] else []
    if ann is not None and ann.get("source") == "stored":
        marks.append("ANN second-hand: stored at conversion, not measured in this run")
    pairs = [("images", images), ("seed", b.get("seed")), ("machine", b.get("device"))]
    pairs += [("command", b.get("command")), ("report", report.path.name)]
    return Document(
        title=f"{b['model']}: ways to run it",
        subtitle=images,
        marks=marks,
        sections=[
            Section("Baselines", tables=[Table("Methods", *columns_in_use(columns, cells))]),
            Section("How it was measured", pairs=[(k, str(v)) for k, v in pairs if v is not None]),
        ],
    )
