"""The report of `snnconv convert`: what it says of the network, and the table it is printed as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from snnconv.schemas import CONVERSION

from . import console, options
from .source import describe_input

if TYPE_CHECKING:
    from snnconv.network import SpikingNetwork
    from snnconv.pipeline import Conversion
    from snnconv.verify import FloatAgreement, Verification


def contents(
    conversion: Conversion,
    network: SpikingNetwork,
    verification: Verification,
    agreement: FloatAgreement,
    sample: str,
    accuracies: dict[str, Any],
) -> dict[str, Any]:
    """Return what a report says of the network that a conversion has come to.

    It was verified on `sample`, images of a kind. `accuracies` are those of the ANN
    (`ann_with_relu`, if its activations were replaced) and of the QANN (`qann` in integers,
    `qann_float` as it was trained), as far as they were measured.
    """
    from snnconv import __version__

    made = network.provenance
    replaced = made["replaced_activations"]
    return {
        "schema": CONVERSION,
        "version": __version__,
        "model": network.model,
        **conversion.plan.to_dict(),
        "timesteps": network.timesteps,
        "schedule": network.schedule,
        "drain": network.drain,
        "neuron": network.neuron,
        "initial_membrane": network.initial_membrane,
        "weight_bits": network.weight_bits,
        "calibration": made["calibration"],
        "replaced_activations": (
            {"count": replaced, "ann": accuracies.get("ann_with_relu")} if replaced else None
        ),
        "shortcut_normalization": made["shortcut_normalization"],
        "reconstruction": made["reconstruction"],
        "compensation": made["compensation"],
        "qann": accuracies.get("qann"),
        "qann_float": accuracies.get("qann_float"),
        "preprocessing": network.preprocessing.to_dict(),
        "neurons": network.neurons,
        "depth": network.depth,
        "verification": {
            **verification.to_dict(),
            "sample": sample,
            "float_qann": {
                "counts_percent": agreement.counts_percent,
                "argmax_percent": agreement.argmax_percent,
            },
        },
    }


def show(contents: dict[str, Any], path: Path, report_path: Path) -> None:
    """Print a conversion's report as a table; it is at `report_path`, the checkpoint at `path`."""
    model, checked, trained = contents["model"], contents["verification"], contents["retraining"]
    calibration = contents["calibration"]
    images = calibration["on"]
    source = (
        "BatchNorm statistics, no data"
        if images is None
        else f"{images['images']} {images['split']} images of {contents['data']}, "
        f"seed {images['seed']}" + (f" ({images['note']})" if images["note"] else "")
    )
    clips = [calibration[key] for key in ("method", "percentile") if key in calibration]
    share = contents["mac_share_percent"]
    rows = [
        ("network", f"{model['name']}, {contents['neurons']:,} neurons, depth {contents['depth']}"),
        (
            "spiking",
            f"{share['spiking']:g} % of multiply-accumulates, {share['analog']:g} % analog"
            + console.tallied([n["operation"] for n in contents["nodes"] if n["role"] == "analog"]),
        ),
        (
            "settings",
            f"T {contents['timesteps']}, {contents['schedule']}, {contents['neuron']}, "
            f"{contents['weight_bits']}-bit weights" + ("" if trained else ", no retraining"),
        ),
        ("input", describe_input(contents["preprocessing"], model["channels"])),
        ("clips", f"{' '.join(map(str, clips))}, from {source}"),
    ]
    if contents["reconstruction"] is not None:
        rows.append(("reconstructed", _reconstruction(contents["reconstruction"])))
    if (exchanged := contents["replaced_activations"]) is not None:
        rows += options.replaced_row(exchanged["count"])
    if model["ann"] is not None:
        ann = model["ann"]
        rows.append(("ANN", f"{ann['top1_percent']:.2f} % top-1 of {ann['images']} test images"))
        if exchanged is not None:
            rows.append(("ANN with ReLU", f"{exchanged['ann']['top1_percent']:.2f} % top-1"))
    if trained is not None:
        how = trained["settings"]
        rows.insert(
            -1 if model["ann"] else len(rows),
            (
                "retrained",
                f"{how['epochs']} epochs on {trained['images']} images{_helped(trained)}, epoch "
                f"{trained['chosen_epoch']} chosen by KL {trained['held_out_kl']:.4f} on "
                f"{trained['held_out_images']} more",
            ),
        )
        rows.append(
            (
                "QANN",
                f"{contents['qann']['top1_percent']:.2f} % top-1, in float "
                f"{contents['qann_float']['top1_percent']:.2f} %",
            )
        )
    before = ""
    if not contents["shortcut_normalization"]:
        before = " with normalised shortcuts"
        rows.append(("shortcuts", "not normalised"))
    if contents["compensation"]["kind"] != "none":
        before += " before compensation"
        rows.append(("compensation", _compensation(contents["compensation"])))
    rows += [
        (
            "verified",
            f"equal to its quantised ANN{before}: {checked['sites']} layers and maps, "
            f"{checked['integers']:,} integers, on {checked['images']} {checked['sample']}",
        ),
        (
            "float QANN",
            f"{checked['float_qann']['counts_percent']:.1f} % of counts and "
            f"{checked['float_qann']['argmax_percent']:.1f} % of arg-maxes agree",
        ),
        ("checkpoint", str(path)),
        ("report", str(report_path)),
    ]
    console.print_table(None, ["", "converted"], rows)


def _reconstruction(described: dict[str, Any]) -> str:
    layers = described["layers"]
    judged = f"on {described['held_out_images']} images that taught nothing"
    before, after = described["kl_before"], described["kl_after"]
    outputs = "" if before is None else f", KL {before:.4f} to {after:.4f} from the ANN {judged}"
    if not described["kept"]:
        return f"nothing: it was no gain{outputs}"
    changed = [sum(what in row["kept"] for row in layers) for what in ("weights", "gain", "clip")]
    return (
        f"of {len(layers)} layers the weights of {changed[0]}, gains of {changed[1]}, clips of "
        f"{changed[2]}{outputs or ', judged ' + judged}"
    )


def _compensation(described: dict[str, Any]) -> str:
    images = f"on {described['images']} training images that calibrated nothing"
    if described["kind"] == "bias":
        return f"a bias per channel, {images}"
    return (
        f"gain {described['gain']:.2f}, {images}: KL {described['kl']:.3f} from the ANN, "
        f"{described['kl_without']:.3f} without"
    )


def _helped(retraining: dict[str, Any]) -> str:
    """Name what a retraining had beside the network itself."""
    teacher, start = retraining["teacher"], retraining["started_from"]
    return (f", taught by {teacher['name']}" if teacher else "") + (
        f", started from {start['name']}" if start else ""
    )
