"""How a simulation goes: accuracy over time steps, spikes over layers."""

from __future__ import annotations

from typing import Any

from snnconv.report.document import (
    Column,
    Curves,
    Line,
    Section,
    Stacks,
    Table,
    amount,
    columns_in_use,
    in_steps,
    percent,
)

REFERENCES = {"ann": "ANN", "qann": "quantised ANN"}
LAYER_COLUMNS = (
    Column("", "Number in the figures, in the order of the network."),
    Column("layer", "Module path of the activation that became neurons.", number=False),
    Column("neurons", "Neurons of the layer."),
    Column("spikes", "Spikes per neuron and image, positive and negative ones."),
    Column("rate %", "Spikes per neuron and step of the latency."),
    Column("negative %", "Share of the spikes that are negative: they take back earlier ones."),
    Column("zero %", "Final counts that are 0."),
    Column("saturated %", "Final counts that are T, the highest; of two-sided neurons also -T."),
    Column("dead %", "Neurons that fired on no image."),
    Column("equal %", "Final counts that equal the quantised ANN's integers."),
    Column(
        "sequential error",
        "How far the final counts S are from the quantised ANN's integers N: ‖S−N‖/‖N‖, on every "
        "eighth image. 0 where all of these are equal.",
    ),
)


def over_time(e: dict[str, Any]) -> Section | None:
    """Return the accuracy after every step, and latency; None without a simulation."""
    steps = e.get("by_step")
    if not steps:
        return None
    ways = {"top1_percent": ("SNN", "snn"), "count_top1_percent": ("SNN by spike count", "other")}
    lines = []
    for key, (name, color) in ways.items():
        course = [(s["step"], s[key]) for s in steps if s.get(key) is not None]
        if course:
            lines.append(Line(name, color, course, dashed=color == "other"))
    low, high = e["snn"]["interval95_percent"]
    top1 = e["snn"]["top1_percent"]
    last = steps[-1]["step"]
    levels = [
        (f"{name} {percent(e[key]['top1_percent'])}", key, e[key]["top1_percent"])
        for key, name in REFERENCES.items()
        if e.get(key) is not None
    ]
    texts = [f"{_latency(e)} The bar at the end is the 95 % interval."]
    by_count = any(s.get("count_top1_percent") is not None for s in steps)
    if by_count:
        texts.append(
            "By spike count: the class whose readout neuron has fired most, where neurons stand in "
            "the readout; otherwise the highest membrane decides."
        )
    rows = [[str(s["step"]), *(_cell(s.get(key), ".2f") for key in ways)] for s in steps]
    columns = [
        Column("step", "Time step after which the class is read."),
        Column("top-1 %", "Accuracy if the class is read after this step."),
        Column("by spike count %", "The same by spike count."),
    ]
    tables = [] if (within := _within(e)) is None else [within]
    used = columns_in_use(columns, rows)
    tables.append(Table("Accuracy after every step", *used, folded=True))
    (first, start), (_, end) = lines[0].points[0], lines[0].points[-1]
    figure = Curves(
        "Accuracy over time steps",
        f"Top-1 accuracy goes from {percent(start)} after step {first} to {percent(end)} after "
        f"step {last}.",
        "time step",
        "top-1 %",
        lines,
        levels,
        (top1, low, high),
    )
    return Section("Accuracy over time", texts=texts, figures=[figure], tables=tables)


def _latency(e: dict[str, Any]) -> str:
    text = f"The slowest image has ended after {in_steps(e['latency_steps'])}"
    if (drain := e.get("drain_steps")) is not None and drain["max"]:
        text += (
            f", {drain['max']:,} after the last bias ({drain['mean']:.1f} on average, "
            f"at most {drain['p99']:,} for 99 % of images)"
        )
    text += "; spikes travel without delay within a step."
    if (clocked := e.get("latency_steps_clocked")) is not None:
        text += f" Hardware with one step per layer takes {clocked:,}."
    return text


def _within(e: dict[str, Any]) -> Table | None:
    """Return from which step on accuracy stays near the ANN's and the quantised ANN's."""
    within = {k: v for k, v in (e.get("first_within") or {}).items() if v}
    if not within:
        return None
    points = sorted({p for steps in within.values() for p in steps}, key=float)
    rows = [
        [
            REFERENCES.get(key, key),
            *("never" if steps.get(p) is None else str(steps[p]) for p in points),
        ]
        for key, steps in within.items()
    ]
    columns = [Column("near the", "What the accuracy is compared with.", number=False)]
    columns += [
        Column(
            f"within {p} {'point' if p == '1' else 'points'}",
            "First step from which on it stays so near to the end.",
        )
        for p in points
    ]
    return Table("First step near", columns, rows)


def over_layers(e: dict[str, Any]) -> Section | None:
    """Return spikes and counts of every layer; None without a simulation."""
    layers = e.get("layers")
    if not layers:
        return None
    rows = [
        [
            str(i),
            row["layer"],
            f"{row['neurons']:,}",
            _cell(row.get("spikes_per_neuron"), ".3f"),
            _cell(row.get("rate_percent"), ".2f"),
            *(
                _cell(row.get(f"{key}_percent"), ".1f")
                for key in ("negative", "zero", "saturated", "dead")
            ),
            _significant(row.get("counts_percent"), 4),
            _significant(row.get("sequential_error"), 3),
        ]
        for i, row in enumerate(layers, 1)
    ]
    spikes, agreement = e.get("spikes") or {}, e.get("agreement") or {}
    total = [""] * len(LAYER_COLUMNS)
    total[1], total[2] = "all", f"{sum(row['neurons'] for row in layers):,}"
    total[3] = _cell(spikes.get("per_neuron"), ".3f")
    total[5] = _cell(spikes.get("negative_percent"), ".1f")
    total[9] = _significant(agreement.get("counts_percent"), 4)
    columns, cells = columns_in_use(LAYER_COLUMNS, [*rows, total])
    table = Table("Layers", columns, cells, totals=True)
    fired = [row["spikes_per_neuron"] for row in layers]
    negative = [n * row["negative_percent"] / 100 for n, row in zip(fired, layers, strict=True)]
    most = fired.index(max(fired))
    figure = Stacks(
        "Spikes over layers",
        f"Spikes per neuron and image; most in layer {most + 1}, {layers[most]['layer']}: "
        f"{fired[most]:.3f}.",
        "layer",
        "spikes per neuron",
        [row["layer"] for row in layers],
        [
            ("positive", "snn", [a - b for a, b in zip(fired, negative, strict=True)]),
            ("negative", "qann", negative),
        ],
    )
    texts = []
    if spikes:
        texts.append(
            f"An image takes {spikes['per_image']:,.0f} spikes, {spikes['per_neuron']:.3f} per "
            f"neuron: {spikes['over_minimum']:.2f} times the fewest that could carry the quantised "
            "ANN's integers."
        )
    return Section("Spikes and layers", texts=texts, figures=[figure], tables=[table])


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _significant(value: float | None, digits: int) -> str:
    return "" if value is None else amount(value, digits)
