"""Write model_zoo/RESULTS.md and README's table from stored reports; --check: are they stale?"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stored import write

from snnconv.schedule import SCHEDULES

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "model_zoo" / "results"
RESULTS = ROOT / "model_zoo" / "RESULTS.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"

HEAD = """# Results

Written by `make docs` from the reports in [results](results); do not edit.

Every row is one report. All were measured with snnconv on the images named, none was tuned on
them. *Latency* is in time steps and assumes that spikes travel without delay within a step; in
brackets, for clocked hardware with one step per hop. *Counts* is the share of spike counts that
equal the quantised ANN's integers at the end of the run. *Drop* is what is lost from the ANN on the
same images, with its paired 95 % interval; rows without counts are end points of exact schedules,
computed without simulation. *Epochs* are those of retraining, of one
after another where a checkpoint started from a retrained one; 0 is training-free conversion, by the
calibration named.
*Bits* are those of the weights; the first and the last layer have 8.
Intervals are Wilson's at 95 %. Times were taken on a machine that did
other work besides: no figures to compare by. `imagenet_sample` is one image per class, probably of
ImageNet's training set: good for differences, not for levels. All float networks are published ones
but VGG-11, which [train_float.py](results/train_float.py) trained on 45,000 images, 30 epochs, and
ResNet-110, which [grow_resnet110.py](results/grow_resnet110.py) grew out of ResNet-56.
"""


def main(args: list[str]) -> int:
    """Write the files, or with --check compare them; return the exit code."""
    evaluations = _load("*.eval.json")
    conversions = {c["checkpoint"]: c for c in _load("*.convert.json")}
    for evaluation in evaluations:
        conversion = conversions[evaluation["checkpoint"]]
        evaluation["epochs"] = _epochs(conversion, conversions)
        evaluation["weight_bits"] = conversion["weight_bits"]
        evaluation["calibration"] = conversion["calibration"]["method"]
        evaluation["converted_for"] = conversion["timesteps"]
        evaluation["shortcuts"] = conversion.get("shortcut_normalization", True)
        evaluation["compensation"] = conversion.get("compensation")
    evaluations.sort(key=_order)
    spiking_resnet = [e for e in evaluations if _is_spiking_resnet(conversions[e["checkpoint"]])]
    evaluations = [e for e in evaluations if e not in spiking_resnet]
    readme = README.read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    table = _table(_NETWORK_COLUMNS, _networks(evaluations))
    comparisons = [
        {**json.loads(path.read_text(encoding="utf-8")), "report": path.name}
        for path in sorted(REPORTS.glob("*.baselines.json"))
    ]
    parts = [_results(evaluations, conversions)]
    if spiking_resnet:
        parts.append(_spiking_resnet(spiking_resnet, conversions))
    whole = "\n".join([*parts, *map(_methods, comparisons)])
    texts = {
        RESULTS: whole,
        README: f"{before}{BEGIN}\n{table}{END}{after}",
    }
    return write(texts, args)


def _networks(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return README's rows: the ends of exact schedules, and as `at_t` those of `paper`.

    Of training-free networks for the same T the reconstructed one stands for all. Retrained ones
    have the accuracies of the same training with other seeds, too.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    by_training: dict[str, list[float]] = {}
    for e in sorted(evaluations, key=lambda e: e["calibration"] == "reconstruct"):
        if e["neuron"] != "signed" or e["partial"] or e["timesteps"] != e["converted_for"]:
            continue
        network = (e["model"], e["timesteps"], e["weight_bits"], *e["epochs"])
        ends = found.setdefault(network, {})
        exact = (e["schedule"] == "drain" and e["drain"] is None) or e["engine"] == "endpoint"
        if exact:
            by_training.setdefault(_training(e), []).append(e["snn"]["top1_percent"])
        if _training(e) != e["checkpoint"]:
            continue  # another seed
        if e["schedule"] == "paper":
            ends["paper"] = e
        elif exact:
            ends["exact"] = e
    rows = []
    for ends in found.values():
        exact, paper = ends["exact"], ends.get("paper")
        same = paper is not None and paper["checkpoint"] == exact["checkpoint"]
        seeds = by_training[exact["checkpoint"]]
        rows.append({**exact, "at_t": paper if same else None, "seeds": seeds})
    return sorted(rows, key=_order)


def _training(e: dict[str, Any]) -> str:
    """Return the checkpoint of the same training with seed 0."""
    return re.sub(r"-seed\d+", "", e["checkpoint"])


def _of_seeds(e: dict[str, Any]) -> str:
    """Return an accuracy, with the mean and the spread over seeds where there are several."""
    if len(e["seeds"]) == 1:
        return _percent(e["snn"])
    mean, spread = statistics.mean(e["seeds"]), statistics.stdev(e["seeds"])
    return f"{_percent(e['snn'])}; {mean:.2f} ± {spread:.2f} of {len(e['seeds'])} seeds"


def _load(pattern: str) -> list[dict[str, Any]]:
    return sorted(map(_read, REPORTS.glob(pattern)), key=_order)


def _read(path: Path) -> dict[str, Any]:
    """Read a report; its command is that of a run in one piece."""
    report = json.loads(path.read_text(encoding="utf-8"))
    return {**report, "command": report["command"].replace(" --resume", ""), "report": path.name}


def _order(report: dict[str, Any]) -> tuple[Any, ...]:
    model = report["model"]["name"] if isinstance(report["model"], dict) else report["model"]
    return (
        len(model), model, report["timesteps"],
        -report.get("weight_bits", 8), sum(report.get("epochs", ())),
        SCHEDULES.index(report["schedule"]), report["neuron"], report["report"],
    )  # fmt: skip


def _epochs(conversion: dict[str, Any], conversions: dict[str, dict[str, Any]]) -> list[int]:
    """Return the epochs of every retraining a checkpoint has gone through, in order."""
    retraining = conversion.get("retraining")
    if retraining is None:
        return []
    start = retraining.get("started_from")
    before = [] if start is None else _epochs(conversions[start["name"]], conversions)
    return [*before, retraining["settings"]["epochs"]]


def _percent(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{value['top1_percent']:.2f}"


def _drop(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    least, most = value["interval95_percent"]
    return f"{value['percent']:.2f} ({least:.2f} to {most:.2f})"


def _latency(e: dict[str, Any]) -> str:
    steps = e["latency_steps"]
    return "" if steps is None else f"{steps} ({e['latency_steps_clocked']})"


def _simulated(cell: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """Leave a cell empty where only the end point was computed."""
    return lambda e: "" if e["agreement"] is None else cell(e)


def _epochs_told(e: dict[str, Any]) -> str:
    return " + ".join(map(str, e["epochs"])) or "0"


_COLUMNS = {
    "model": lambda e: e["model"],
    "T": lambda e: e["timesteps"],
    "bits": lambda e: e["weight_bits"],
    "epochs": lambda e: _epochs_told(e) if e["epochs"] else f"0, {e['calibration']}",
    "schedule": lambda e: e["schedule"],
    "neuron": lambda e: e["neuron"],
    "ANN %": lambda e: _percent(e["ann"]),
    "QANN %": lambda e: _percent(e["qann"]),
    "SNN %": lambda e: _percent(e["snn"]),
    "interval": lambda e: "{:.2f} to {:.2f}".format(*e["snn"]["interval95_percent"]),
    "drop": lambda e: _drop(e.get("drop")),
    "counts %": _simulated(lambda e: f"{e['agreement']['counts_percent']:.4g}"),
    "latency, steps": _latency,
    "spikes per neuron": _simulated(lambda e: f"{e['spikes']['per_neuron']:.2f}"),
    "negative %": _simulated(lambda e: f"{e['spikes']['negative_percent']:.1f}"),
    "images": lambda e: f"{e['images']:,}",
    "ms per image": lambda e: f"{e['wall_ms_per_image']:.1f}",
    "report": lambda e: f"[json](results/{e['report']})",
}

# README's columns.
_NETWORK_COLUMNS = {
    **{
        name: _COLUMNS[name]
        for name in (
            "model", "T", "bits", "epochs", "ANN %", "SNN %", "drop", "latency, steps",
            "spikes per neuron",
        )
    },
    "epochs": _epochs_told,
    "SNN %": _of_seeds,
    "SNN at T %": lambda e: "" if e["at_t"] is None else _percent(e["at_t"]["snn"]),
}  # fmt: skip


def _table(columns: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(cell(row)) for cell in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _results(evaluations: list[dict[str, Any]], conversions: dict[str, dict[str, Any]]) -> str:
    parts = [HEAD]
    for model in dict.fromkeys(e["model"] for e in evaluations):
        rows = [e for e in evaluations if e["model"] == model]
        made = dict.fromkeys(e["checkpoint"] for e in rows)
        parts.append(f"## {model}\n\n{_table(_COLUMNS, rows)}")
        parts += [_conversion(conversions[name]) for name in made]
        parts.append(f"{_images(rows)}\n")
        reports = [*(conversions[name] for name in made), *rows]
        commands = "\n".join(r["command"] for r in reports)
        parts.append(f"```sh\n# in model_zoo/results\n{commands}\n```\n")
    return "\n".join(parts)


_SPIKING_RESNET = {
    "model": lambda e: e["model"],
    "T": lambda e: e["timesteps"],
    "shortcuts": lambda e: "normalised" if e["shortcuts"] else "not",
    "V0": lambda e: {"half": "θ/2", "zero": "0"}[e["initial_membrane"]],
    "compensation": lambda e: _compensation(e["compensation"]),
    "ANN %": lambda e: _percent(e["ann"]),
    "QANN %": lambda e: _percent(e["qann"]),
    "SNN %": lambda e: _percent(e["snn"]),
    "interval": lambda e: "{:.2f} to {:.2f}".format(*e["snn"]["interval95_percent"]),
    "by spike count %": lambda e: _percent(e["snn_by_count"]),
    "spikes per neuron": lambda e: f"{e['spikes']['per_neuron']:.2f}",
    "images": lambda e: f"{e['images']:,}",
    "report": lambda e: f"[json](results/{e['report']})",
}
SPIKING_RESNET = """## Spiking ResNet

Without training, plain unsigned neurons under the schedule `paper`, clips by the 99.9 percentile of
1,000 training images: the recipe `spiking_resnet`, with and without shortcut normalisation and
compensation. A gain belongs to neurons that start at V0 = 0. The QANN is the network's own end
point: that of a compensated network is not its ANN's.
"""


def _is_spiking_resnet(conversion: dict[str, Any]) -> bool:
    return conversion["calibration"]["method"] == "percentile"


def _spiking_resnet(
    evaluations: list[dict[str, Any]], conversions: dict[str, dict[str, Any]]
) -> str:
    def order(e: dict[str, Any]) -> tuple[Any, ...]:
        kinds = ("none", "gain", "bias")
        kind = kinds.index(e["compensation"]["kind"])
        v0 = e["initial_membrane"] == "zero"
        return len(e["model"]), e["model"], e["timesteps"], not e["shortcuts"], v0, kind

    rows = sorted(evaluations, key=order)
    reports = [r for e in rows for r in (conversions[e["checkpoint"]], e)]
    commands = "\n".join(r["command"] for r in reports)
    table = _table(_SPIKING_RESNET, rows)
    return (
        f"{SPIKING_RESNET}\n{table}\n{_images(rows)}\n\n"
        f"```sh\n# in model_zoo/results\n{commands}\n```\n"
    )


def _compensation(described: dict[str, Any]) -> str:
    kind: str = described["kind"]
    return f"gain {described['gain']:.2f}" if kind == "gain" else kind


_COMPARED = {
    "method": lambda r: r["method"],
    "checkpoint": lambda r: f"`{r['checkpoint'].removesuffix('.snn.safetensors')}`",
    "top-1 %": lambda r: f"{r['top1_percent']:.2f}",
    "interval": lambda r: _cell(r["interval95_percent"], lambda v: "{:.2f} to {:.2f}".format(*v)),
    "recovered %": lambda r: _cell(r["recovered_percent"], "{:.0f}".format),
    "latency, steps": lambda r: _cell(
        r["latency_steps"], lambda v: f"{v} ({r['latency_steps_clocked']})"
    ),
    "spikes per neuron": lambda r: _cell(r["spikes_per_neuron"], "{:.2f}".format),
    "negative %": lambda r: _cell(r["negative_percent"], "{:.1f}".format),
    "counts %": lambda r: _cell(r["counts_percent"], "{:.4g}".format),
}


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return "–" if value is None else form(value)


def _methods(report: dict[str, Any]) -> str:
    """Return a comparison of methods, and how its fine-tuned checkpoints came about."""
    ann = "" if report["ann"] is None else f", the ANN has {_percent(report['ann'])} %"
    some = f"{report['images']:,} {report['split']} images of {report['data']}{ann}"
    parts = [f"## Methods on {report['model']}, {report['report'].split('.baselines')[0]}\n"]
    parts.append(f"{some}.\n\n{_table(_COMPARED, report['rows'])}")
    commands = []
    for row in report["rows"]:
        path = REPORTS / row["checkpoint"].replace(".snn.safetensors", ".finetune.json")
        if row["method"].startswith("fine-tuned"):
            tuned = _read(path)
            parts.append(_tuning(tuned))
            commands.append(tuned["command"])
    lines = "\n".join([*commands, report["command"]])
    parts.append(f"```sh\n# in model_zoo/results\n{lines}\n```\n")
    return "\n".join(parts)


def _tuning(report: dict[str, Any]) -> str:
    settings, held_out = report["settings"], report["held_out"]
    done, images, layers = [], report["images"], report["layers"]
    if layers:
        kept = sum(layer["accepted"] for layer in layers)
        done.append(
            f"{settings['epochs_per_layer']} epochs a layer on {images['layers']:,} training "
            f"images ({kept} of {len(layers)} layers kept their change)"
        )
    if report["epochs"]:
        done.append(
            f"{settings['epochs']} epochs of all layers together on {images['together']:,} "
            "training images"
        )
    return (
        f"`{report['checkpoint']}`: {', then '.join(done)}, seed {report['seed']}; on "
        f"{report['held_out_images']:,} other "
        f"training images the divergence from the quantised ANN before went from "
        f"{held_out['before']['kl']:.3f} to {held_out['after']['kl']:.3f}; {_time(report)}.\n"
    )


def _conversion(report: dict[str, Any]) -> str:
    calibration, checked = report["calibration"], report["verification"]
    on = calibration["on"]
    images = "no data" if on is None else f"{on['images']} {on['split']} images of {report['data']}"
    method = calibration["method"]
    if method == "reconstruct":
        method = _reconstructed(report["reconstruction"])
    if "percentile" in calibration:
        method = f"percentile {calibration['percentile']:g}"
    return (
        f"`{report['checkpoint']}`: clips by {method} from {images}, seed "
        f"{report['seed']}, {report['weight_bits']}-bit weights, {_retraining(report)}"
        f"{_compensated(report)}; "
        f"{checked['integers']:,} integers and {checked['sites']} layers and maps verified; "
        f"{_time(report)}.\n"
    )


def _reconstructed(told: dict[str, Any]) -> str:
    """Say what reconstruction kept, and what it gained."""
    if not told["kept"]:
        return f"mse (reconstruction was no gain and is not in it{_divergences(told)})"
    kept = [sum(what in row["kept"] for row in told["layers"]) for what in ("weights", "gain")]
    return (
        f"reconstruction (weights of {kept[0]} and gains of {kept[1]} of {len(told['layers'])} "
        f"layers kept{_divergences(told)})"
    )


def _divergences(told: dict[str, Any]) -> str:
    """Say how far the outputs were from the ANN's before reconstruction and after it."""
    if told["kl_before"] is None:
        return ""
    return (
        f"; KL {told['kl_before']:.3f} to {told['kl_after']:.3f} on "
        f"{told['held_out_images']} held-out images"
    )


def _compensated(report: dict[str, Any]) -> str:
    """Say what was done against the losses of T steps, or left out."""
    told = "" if report.get("shortcut_normalization", True) else ", shortcuts not normalised"
    compensation = report.get("compensation") or {"kind": "none"}
    if compensation["kind"] == "none":
        return told
    how = (
        "biases per channel"
        if compensation["kind"] == "bias"
        else f"a gain of {compensation['gain']:.2f}"
    )
    return f"{told}, compensated by {how} from {compensation['images']} other training images"


def _retraining(report: dict[str, Any]) -> str:
    retraining = report.get("retraining")
    if retraining is None:
        return "no retraining"
    how = retraining["settings"]
    places = " and ".join(dict.fromkeys(e.get("device", "cpu") for e in retraining["epochs"][1:]))
    teacher = (retraining.get("teacher") or {}).get("name", "the ANN")
    start = (retraining.get("started_from") or {}).get("name", "")
    return (
        f"{how['epochs']} epochs of {retraining['images']:,} images on {places}"
        f"{f', started from `{start}`' if start else ''} "
        f"({how['optimizer']}, rate {how['lr']:g}, batch {how['batch_size']}, distillation "
        f"{how['distill']:g}), epoch "
        f"{retraining['chosen_epoch']} chosen by the divergence from {teacher} on "
        f"{retraining['held_out_images']:,} other training images; on "
        f"{report['model']['ann']['images']:,} test images "
        f"{_percent(report['qann_float'])} % in float and {_percent(report['qann'])} % in integers"
    )


def _time(report: dict[str, Any]) -> str:
    """Return what a conversion took; one that was interrupted has its steps from the metrics."""
    retraining = report.get("retraining")
    seconds = max(report["seconds"], retraining["epochs"][-1]["seconds"] if retraining else 0)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _images(rows: list[dict[str, Any]]) -> str:
    """Say which images, and on what machine, the rows were measured."""
    sets = sorted({f"{e['split']} images of {e['data']}" for e in rows})
    places = sorted({f"{e['device']}, {e['threads']} threads, {e['engine']} engine" for e in rows})
    return f"Measured on {'; '.join(sets)} ({'; '.join(places)})."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
