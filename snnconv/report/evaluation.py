"""What one evaluation says: headline numbers, verdicts, how it was measured, what is missing."""

from __future__ import annotations

from typing import Any

from snnconv.energy import times
from snnconv.report import causes, costs, course
from snnconv.report.document import (
    Document,
    Fact,
    Section,
    amount,
    in_steps,
    joules,
    nearly_all,
    percent,
)


def document(e: dict[str, Any], file: str) -> Document:
    """Say everything an evaluation holds; what it does not hold is named at the end."""
    sections = [
        course.over_time(e),
        causes.section(e),
        course.over_layers(e),
        *costs.sections(e),
        _measured(e, file),
        _missing(e),
    ]
    return Document(
        title=f"{e['model']}, T {e['timesteps']}",
        subtitle=f"{settings(e)}; {images(e)}",
        marks=marks(e),
        facts=facts(e),
        verdicts=verdicts(e),
        sections=[s for s in sections if s is not None],
    )


def settings(e: dict[str, Any]) -> str:
    """Name how a network was run: schedule, drain, neuron."""
    parts = [f"schedule {e['schedule']}"]
    if e.get("stagger"):
        parts.append(f"{e['stagger']} {'step' if e['stagger'] == 1 else 'steps'} between layers")
    if e["schedule"] in ("drain", "stagger"):
        drain = e.get("drain")
        parts.append("until quiet" if drain is None else f"{drain} steps of drain")
    parts.append(f"{e['neuron']} neurons")
    return ", ".join(parts)


def images(e: dict[str, Any]) -> str:
    """Name the images measured."""
    part = f" (a part of {e['split']})" if e["partial"] else ""
    return f"{e['images']:,} images of {e['data']} {e['split']}{part}"


def marks(e: dict[str, Any]) -> list[str]:
    """Warn of numbers that are partial or second-hand."""
    found = []
    if e["partial"]:
        found.append(f"Partial: {e['images']:,} images, not all of {e['split']}")
    ann = e.get("ann")
    if ann and ann.get("source") == "stored":
        found.append("ANN second-hand: stored at conversion, not measured in this run")
    if e.get("engine") == "endpoint":
        found.append("End point alone: nothing was simulated")
    return found


def facts(e: dict[str, Any]) -> list[Fact]:
    """Return the headline numbers an evaluation holds."""
    found = [_snn(e)]
    if (ann := e.get("ann")) is not None:
        note = "on the same images"
        if ann.get("source") == "stored":
            note = "stored at conversion" + (
                f", {ann['images']:,} images" if "images" in ann else ""
            )
        found.append(_percent_fact("ann.top1_percent", "ANN", ann["top1_percent"], note))
    if (qann := e.get("qann")) is not None:
        note = "integers, on the same images"
        if (real := e.get("qann_float")) is not None:
            note += f"; in floats {percent(real['top1_percent'])}"
        found.append(
            _percent_fact("qann.top1_percent", "Quantised ANN", qann["top1_percent"], note)
        )
    if (latency := e.get("latency_steps")) is not None:
        clocked = e.get("latency_steps_clocked")
        note = "" if clocked is None else f"{clocked:,} with one step per layer"
        found.append(Fact("latency_steps", "Latency", in_steps(latency), latency, note))
    if (agreement := e.get("agreement")) is not None:
        exact, counts = agreement.get("counts_exact"), agreement.get("counts_percent")
        note = "of arg-maxes; " + (
            "every count equals the quantised ANN's"
            if exact
            else f"{nearly_all(counts)} % of counts"
        )
        same = agreement["argmax_percent"]
        found.append(_percent_fact("agreement.argmax_percent", "Agreement", same, note))
    if (spikes := e.get("spikes")) is not None:
        per_neuron = spikes["per_neuron"]
        note = f"{percent(spikes['negative_percent'], 1)} of them negative"
        found.append(
            Fact("spikes.per_neuron", "Spikes per neuron", f"{per_neuron:.3f}", per_neuron, note)
        )
    if (energy := e.get("energy")) is not None:
        total = energy["snn_nj"]["total"]
        note = f"{times(total, energy['qann_nj'])} the quantised ANN's, an estimate"
        found.append(Fact("energy.snn_nj.total", "Energy per image", joules(total), total, note))
    return found


def _snn(e: dict[str, Any]) -> Fact:
    top1 = e["snn"]["top1_percent"]
    low, high = e["snn"]["interval95_percent"]
    return _percent_fact(
        "snn.top1_percent", "SNN top-1", top1, f"{low:.2f} to {high:.2f} at 95 % (Wilson)"
    )


def _percent_fact(key: str, label: str, value: float, note: str) -> Fact:
    return Fact(key, label, percent(value), value, note)


def verdicts(e: dict[str, Any]) -> list[str]:
    """Conclude in sentences: what is lost, whether it is exact, energy, what to mend."""
    found = []
    drop, ann, snn = e.get("drop"), e.get("ann"), e["snn"]["top1_percent"]
    if drop is not None:
        low, high = drop["interval95_percent"]
        found.append(
            f"{_lost('ANN', drop['percent'])} (a loss of {low:.2f} to {high:.2f} points at 95 %, "
            "image by image)."
        )
    elif ann is not None:
        which = "ANN's stored accuracy" if ann.get("source") == "stored" else "ANN"
        found.append(f"{_lost(which, ann['top1_percent'] - snn)}.")
    agreement, qann = e.get("agreement"), e.get("qann")
    if agreement is not None and agreement.get("counts_exact"):
        found.append("The spiking network ends exactly at its quantised ANN.")
    elif agreement is not None and qann is not None:
        found.append(
            f"{_lost('quantised ANN', qann['top1_percent'] - snn)}; "
            f"{amount(100 - agreement['counts_percent'])} % of counts differ from its integers."
        )
    if verdict := (e.get("energy") or {}).get("verdict"):
        found.append(verdict)
    if mend := causes.mend_sentence(e):
        found.append(mend)
    return found


def _lost(reference: str, points: float) -> str:
    if round(points, 2) == 0:
        return f"Against the {reference} no accuracy is lost"
    return f"Against the {reference} {abs(points):.2f} points are {'lost' if points > 0 else 'won'}"


def _measured(e: dict[str, Any], file: str) -> Section:
    data = images(e)
    if e.get("data_note"):
        data += f"; {e['data_note']}"
    if e.get("unreadable_images"):
        data += f"; {e['unreadable_images']:,} cannot be read and were left out"
    run = settings(e)
    if e.get("initial_membrane"):
        run += f", V0 {'half a threshold' if e['initial_membrane'] == 'half' else 'zero'}"
    if e.get("weight_bits"):
        run += f", {e['weight_bits']}-bit weights"
    trained = e.get("trained_timesteps")
    steps = str(e["timesteps"])
    if trained is not None and trained != e["timesteps"]:
        steps += f" (the network was made for T {trained})"
    machine = [f"engine {e['engine']}"] if e.get("engine") else []
    machine += [e["device"]] if e.get("device") else []
    if threads := e.get("threads"):
        machine.append("1 thread" if threads == 1 else f"{threads} threads")
    took = e.get("wall_ms_per_image")
    timed = "one pass" if e.get("engine") == "endpoint" else "the simulation alone"
    pairs = [
        ("network", e["model"]),
        ("checkpoint", e.get("checkpoint")),
        ("images", data),
        ("hash of the images", e.get("data_sha256")),
        ("T", steps),
        ("run", run),
        ("seed", None if e.get("seed") is None else str(e["seed"])),
        ("machine", ", ".join(machine)),
        ("time", None if took is None else f"{took:.1f} ms per image, {timed}"),
        ("made", _made(e)),
        ("command", e.get("command")),
        ("report", file),
    ]
    return Section("How it was measured", pairs=[(k, v) for k, v in pairs if v])


def _made(e: dict[str, Any]) -> str:
    day = str(e.get("created") or "").replace("T", " ").replace("+00:00", " UTC")
    version = f"snnconv {e['version']}" if e.get("version") else ""
    return ", ".join(part for part in (day, version) if part)


def _missing(e: dict[str, Any]) -> Section | None:
    """Name what the report does not hold."""
    if e.get("engine") == "endpoint":
        lacking = [
            "Nothing was simulated: the accuracy is that of the end point, where the schedule ends "
            "exactly. There is no agreement, no course over time, no spikes, and no latency but "
            "under the schedule wait."
        ]
    else:
        parts = {
            "the course over time": "by_step",
            "spikes by layer": "layers",
            "operations": "operations",
            "energy": "energy",
            "errors by cause": "errors",
            "the first step near the ANN": "first_within",
        }
        absent = [name for name, key in parts.items() if not e.get(key)]
        lacking = [f"This evaluation did not measure: {', '.join(absent)}."] if absent else []
    if e.get("ann") is None:
        lacking.append("The ANN was not measured.")
    return Section("Not measured", texts=lacking) if lacking else None
