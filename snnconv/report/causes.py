"""Where the error comes from: layer by layer and cause by cause, and what to mend first."""

from __future__ import annotations

from typing import Any

from snnconv.report.document import Column, Section, Stacks, Table, amount, columns_in_use, percent

MEANINGS = {
    "clipping": "values above the clip are cut off",
    "levels": "values are rounded to T levels",
    "integers": "weights and thresholds become integers",
    "new weights and clips": "weights that were learnt or mended, as integers, and their clips",
    "time": "spikes come one after the other, and the run ends before all have arrived",
}
AGAINST = {"ann": "the ANN", "qann": "the quantised ANN"}
# Colors of causes: classes of the style sheet.
COLORS = ("cause1", "cause2", "cause3", "cause4", "cause5")


def mend_sentence(e: dict[str, Any]) -> str:
    """Say which layer to mend first; an empty text if the report does not tell."""
    mend = (e.get("errors") or {}).get("mend")
    if not mend:
        return ""
    share = mend.get("share_percent")
    much = "" if share is None else f" ({percent(share, 0)} of the loss)"
    return (
        f"Mend first: {mend['layer']}, {mend['cause']}{much}. {mend.get('suggestion', '')}".strip()
    )


def section(e: dict[str, Any]) -> Section | None:
    """Return errors by cause, or None if they were not measured."""
    errors = e.get("errors")
    if not errors or not errors.get("layers"):
        return None
    stages, layers = errors["stages"], errors["layers"]
    against = AGAINST.get(errors["against"], errors["against"])
    texts = [
        f"How far activations are from those of {against}, as the relative squared error "
        f"‖a−b‖²\u2060/\u2060‖b‖², on {errors['images']:,} images. Causes are switched on one "
        "after the other, and each bar is what its cause adds; below zero it makes up for an "
        "earlier one."
    ]
    names = [row["layer"] for row in layers]
    mend = errors.get("mend")
    marked = names.index(mend["layer"]) if mend and mend["layer"] in names else None
    series = [
        (stage, COLORS[i % len(COLORS)], [row["by_cause"].get(stage, 0.0) for row in layers])
        for i, stage in enumerate(stages)
    ]
    last = [row["cumulative"].get(stages[-1], 0.0) for row in layers]
    worst = last.index(max(last))
    largest = (
        f"The error is largest in layer {worst + 1}, {names[worst]}: {amount(last[worst])}."
        if last[worst]
        else "No layer has any."
    )
    figure = Stacks(
        "Error over layers, by cause",
        largest
        + (f" To mend first: layer {marked + 1}, {names[marked]}." if marked is not None else ""),
        "layer",
        "relative squared error",
        names,
        series,
        marked,
        "mend first",
    )
    tables = [_layers(errors, stages, last)]
    if (output := errors.get("output")) is not None:
        tables.append(_output(output, stages, against))
    return Section(
        "Error by cause",
        strong=mend_sentence(e),
        texts=texts,
        pairs=[(stage, MEANINGS[stage]) for stage in stages if stage in MEANINGS],
        figures=[figure],
        tables=tables,
    )


def _layers(errors: dict[str, Any], stages: list[str], last: list[float]) -> Table:
    alone_in_float = errors.get("restored") or {"images": 0, "layers": []}
    restored = {row["layer"]: row["kl"] for row in alone_in_float["layers"]}
    columns = [
        Column("", "Number in the figures."),
        Column("layer", "Module path of the activation.", number=False),
        *(Column(stage, f"What it adds: {MEANINGS.get(stage, stage)}.") for stage in stages),
        Column("sum", "The error with all causes switched on."),
        Column("SQNR, dB", "Signal to quantisation noise: -10 log10 of the sum."),
        *(
            Column(f"{stage} alone", "The error with this one cause switched on.")
            for stage in stages
        ),
        Column(
            "KL if restored",
            "How far the quantised ANN's outputs are from the ANN's (KL, nats) when this layer "
            "alone is left unquantised: the lower, the more it costs. With none left so: "
            f"{amount(alone_in_float.get('kl', 0.0))}; on {alone_in_float['images']:,} images.",
        ),
    ]
    rows = []
    for i, row in enumerate(errors["layers"]):
        alone = row.get("isolated") or {}
        sqnr = row.get("sqnr_db")
        rows.append(
            [
                str(i + 1),
                row["layer"],
                *(_amount(row["by_cause"].get(stage)) for stage in stages),
                amount(last[i]),
                "" if sqnr is None else f"{sqnr:.1f}",
                *(_amount(alone.get(stage)) for stage in stages),
                _amount(restored.get(row["layer"])),
            ]
        )
    used = columns_in_use(columns, rows)
    return Table("Error of every layer", *used, folded=len(rows) > 12)


def _output(output: dict[str, Any], stages: list[str], against: str) -> Table:
    kl, same = output.get("kl") or {}, output.get("agreement_percent") or {}
    columns = [
        Column("after", "Causes up to this one are switched on.", number=False),
        Column("KL, nats", f"From the outputs of {against}, after softmax, on average."),
        Column("same class %", f"Images of which the class is that of {against}."),
    ]
    rows = [
        [stage, _amount(kl.get(stage)), "" if stage not in same else f"{same[stage]:.2f}"]
        for stage in stages
    ]
    return Table("Error of the outputs", *columns_in_use(columns, rows))


def _amount(value: float | None) -> str:
    return "" if value is None else amount(value)
