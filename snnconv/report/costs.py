"""What an image costs: energies under stated assumptions, and the operations they come from."""

from __future__ import annotations

from typing import Any

from snnconv.energy import times
from snnconv.report.document import (
    Bars,
    Column,
    Section,
    Table,
    amount,
    columns_in_use,
    joules,
    percent,
    unit_of,
)

# Parts of the spiking network's energy: what they are called, and what they pay for.
PARTS = {
    "image": ("image", "multiply-accumulates of the image, once per inference"),
    "synapses": ("synapses", "an addition per spike and synapse"),
    "bias": ("bias", "biases and held image currents, injected step by step"),
    "membrane": ("membrane", "a comparison with the threshold per neuron and step"),
    "resets": ("resets", "a subtraction of the threshold per spike"),
    "pooling": ("pooling", "pooling on counts"),
    "analog": ("analog", "analog islands, and layers that read them, in every step"),
}
BASELINES = {
    "ann_fp32_nj": ("ANN, float32", "ann"),
    "ann_int8_nj": ("ANN, int8", "ann8"),
    "qann_nj": ("quantised ANN, bit-matched", "qann"),
    "qann_skipping_zeros_nj": ("quantised ANN, skipping zeros", "qann0"),
}
PAID = {"qann_skipping_zeros_nj": "multiply-accumulates of activations that are not 0"}
ASSUMPTIONS = {
    "mac_fp32_pj": "multiply-accumulate, float32",
    "mac_int8_pj": "multiply-accumulate, int8",
    "multiply_int8_pj": "multiplication, int8",
    "add_int32_pj": "addition, int32",
    "analog_mac_pj": "multiply-accumulate in an analog island",
}
OPERATIONS = {
    "macs": ("MACs", "Multiply-accumulates of the ANN, all inputs, borders counted exactly."),
    "image_macs": ("of the image", "Those that read the image: computed once per inference."),
    "synaptic_operations": (
        "synaptic operations",
        "Additions of the SNN: every spike, positive or negative, times the synapses it reaches.",
    ),
    "effective_operations": ("effective", "The same without synapses of weight 0 (NeuroBench)."),
    "qann_nonzero_macs": (
        "QANN nonzero MACs",
        "MACs of the quantised ANN if activations that are 0 are skipped.",
    ),
    "bias_additions": (
        "bias additions",
        "One per neuron with a bias or a held image current, and step in which it is injected.",
    ),
    "membrane_updates": (
        "membrane updates",
        "Comparisons with the threshold: one per neuron and step it is awake.",
    ),
    "resets": ("resets", "Subtractions of the threshold: one per spike."),
}


def sections(e: dict[str, Any]) -> list[Section | None]:
    """Return energy and operations, as far as the report has them."""
    return [_energy(e), _operations(e)]


def _energy(e: dict[str, Any]) -> Section | None:
    energy = e.get("energy")
    if not energy:
        return None
    snn = energy["snn_nj"]
    shown = {key: name for key, (name, _) in PARTS.items() if snn.get(key)}
    stacked = [(name, f"part-{key}", snn[key]) for key, name in shown.items()]
    bars = [("SNN", joules(snn["total"]), stacked)]
    bars += [
        (name, joules(energy[key]), [(name, color, energy[key])])
        for key, (name, color) in BASELINES.items()
        if energy.get(key) is not None
    ]
    most = max(stacked, key=lambda part: part[2], default=("", "", 0.0))
    figure = Bars(
        "Energy of an image",
        f"The SNN takes {joules(snn['total'])}, most of it for {most[0]}; "
        + "; ".join(f"{label} {text}" for label, text, _ in bars[1:])
        + ".",
        bars,
    )
    texts = [
        f"Estimated from operations, not measured on hardware. {_sentence(energy.get('source'))}"
        f" The bit-matched quantised ANN has {energy['activation_bits']}-bit activations and "
        f"{energy['weight_bits']}-bit weights."
    ]
    even = energy.get("break_even")
    if even is not None:
        rate = even.get("rate_percent")
        texts.append(
            f"Break-even with the quantised ANN: {amount(even['spikes_per_neuron'])} spikes per "
            "neuron" + ("" if rate is None else f", a rate of {percent(rate, 1)} per step") + "."
        )
    elif "break_even" in energy:
        texts.append("No rate of spikes would bring the SNN below the quantised ANN.")
    return Section(
        "Energy",
        strong=f"The SNN takes {times(snn['total'], energy['qann_nj'])} the energy of the "
        "bit-matched quantised ANN.",
        texts=texts,
        figures=[figure],
        tables=[_parts(energy), _assumptions(energy)],
    )


def _sentence(text: str | None) -> str:
    return "" if not text else text if text.endswith(".") else f"{text}."


def _parts(energy: dict[str, Any]) -> Table:
    snn, qann = energy["snn_nj"], energy["qann_nj"]
    names = {f"SNN: {name}": (snn[k], why) for k, (name, why) in PARTS.items() if snn.get(k)}
    names["SNN, all"] = (snn["total"], "the sum")
    for key, (name, _) in BASELINES.items():
        if energy.get(key) is not None:
            names[name] = (energy[key], PAID.get(key, "all multiply-accumulates"))
    unit = unit_of([value for value, _ in names.values()])
    rows = [
        [name, joules(value, unit), f"{value / qann:.2f}" if qann else "", why]
        for name, (value, why) in names.items()
    ]
    columns = [
        Column("", number=False),
        Column(unit[1], "Energy per image."),
        Column("of the quantised ANN", "The same over the bit-matched quantised ANN's."),
        Column("for", "What is paid for.", number=False),
    ]
    return Table("Energy in parts", *columns_in_use(columns, rows), folded=True)


def _assumptions(energy: dict[str, Any]) -> Table:
    rows = [
        [ASSUMPTIONS.get(name, name), f"{value:g}", name]
        for name, value in energy["assumptions"].items()
    ]
    columns = [
        Column("operation", "What is done.", number=False),
        Column("pJ", "Energy of one."),
        Column("name", "Change it with snnconv report --energy NAME=PJ.", number=False),
    ]
    return Table("Assumptions", columns, rows)


def _operations(e: dict[str, Any]) -> Section | None:
    operations = e.get("operations")
    if not operations or not operations.get("layers"):
        return None
    energies = {row["layer"]: row for row in (e.get("energy") or {}).get("layers") or []}
    unit = unit_of([row[k] for row in energies.values() for k in ("snn_nj", "qann_nj")])
    columns = [
        Column("layer", "Where the operations end: neurons, or a readout.", number=False),
        *(Column(name, meaning) for name, meaning in OPERATIONS.values()),
        Column(f"SNN, {unit[1]}", "Energy of the SNN in this layer, without pooling and islands."),
        Column(f"QANN, {unit[1]}", "Energy of the bit-matched quantised ANN in this layer."),
    ]
    rows = []
    for row in operations["layers"]:
        own = energies.get(row["layer"], {})
        name = row["layer"] + (" (readout)" if row.get("kind") == "readout" else "")
        cells = [_whole(row.get(key)) for key in OPERATIONS]
        cells += ["" if k not in own else joules(own[k], unit) for k in ("snn_nj", "qann_nj")]
        rows.append([name, *cells])
    total = operations["total"]
    sums = [
        joules(sum(row[k] for row in energies.values()), unit) if energies else ""
        for k in ("snn_nj", "qann_nj")
    ]
    rows.append(["all", *(_whole(total.get(key)) for key in OPERATIONS), *sums])
    texts = [f"Per image, on average over {operations['images']:,} images."]
    if total.get("pooling"):
        texts.append(
            f"Pooling on counts takes {total['pooling']:,.0f} additions or comparisons besides."
        )
    if total.get("analog_macs"):
        texts.append(
            f"Analog islands take {total['analog_macs']:,.0f} multiply-accumulates in every step "
            "in which they are computed."
        )
    used = columns_in_use(columns, rows)
    table = Table("Operations by layer", *used, totals=True, folded=len(rows) > 12)
    return Section("Operations", texts=texts, tables=[table])


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
