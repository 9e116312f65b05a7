"""`snnconv finetune`: tune a spiking checkpoint layer by layer."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.errors import UsageError

from . import console, options

if TYPE_CHECKING:
    from snnconv.finetune import LayerResult, LayerwiseTuning
    from snnconv.network import SpikingNetwork

HASHED_IMAGES = 1000


@options.command(
    "finetune",
    example="snnconv finetune --layerwise\n"
    "snnconv finetune resnet20.snn.safetensors --layerwise --data DIR --epochs-per-layer 4",
)
@options.checkpoint_argument
@click.option(
    "--layerwise",
    is_flag=True,
    help="Tune one layer after the other, front to back (Fast-SNN); there is no other way yet.",
)
@options.data_option
@click.option(
    "--layers",
    metavar="GLOB",
    default="*",
    show_default=True,
    help="Only layers whose path fits, like 'layer3.*'; see snnconv inspect.",
)
@click.option(
    "--epochs-per-layer",
    type=click.IntRange(1, 1000),
    help="Passes over the images for every layer.  [default: 3]",
)
@click.option(
    "--lr",
    type=click.FloatRange(1e-6, 100),
    help="First learning rate, in integers a step.  [default: 0.05]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Images per step.  [default: 64]")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="N",
    help="Training images to learn from, drawn with --seed.  [default: 10000]",
)
@click.option("--bias-only", is_flag=True, help="Tune biases and leave the weights as they are.")
@click.option("--resume", is_flag=True, help="Go on with the fine-tuning that was interrupted.")
@options.output_option("Spiking checkpoint.  [default: NAME.tuned.snn.safetensors]")
@options.force_option
@options.seed_option
@options.device_option
@options.json_option
@options.verbosity_options
def command(
    checkpoint: str | None,
    layerwise: bool,
    data: str | None,
    layers: str,
    epochs_per_layer: int | None,
    lr: float | None,
    batch_size: int | None,
    images: int | None,
    bias_only: bool,
    resume: bool,
    output: Path | None,
    force: bool,
    seed: int,
    device: str,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Tune a spiking checkpoint, by default the newest here, for the end of its T steps.

    After T steps some charge is still on its way, and counts miss those of the quantised ANN. Every
    layer learns on training images to make up for it; what does not help on held-out images is
    taken back. The new checkpoint runs under the schedule paper. Under an exact schedule there is
    nothing to mend.
    """
    start = time.perf_counter()
    if not layerwise:
        raise UsageError(
            "there is one way to fine-tune a spiking network, layer by layer: give --layerwise; to "
            "train all layers together, before they spike, see snnconv convert --epochs"
        )
    path, named = options.spiking_checkpoint(checkpoint, quiet)
    where = options.require_data(data)

    from snnconv import __version__, report
    from snnconv.checkpoint import SUFFIX, load_network, save_network, sha256
    from snnconv.data import open_held_out
    from snnconv.finetune import FinetuneSettings, LayerwiseTuning

    stem = named.name.removesuffix(SUFFIX)
    target = output or named.with_name(f"{stem}.tuned{SUFFIX}")
    if not target.name.endswith(SUFFIX):
        raise UsageError(f"--output {target}: a spiking checkpoint is named *{SUFFIX}")
    report.require_writable(target, force)
    report_path = report.default_path(target, "finetune")
    report.require_writable(report_path, force, {"schema": "snnconv.finetuning/1"})
    state = target.with_name(target.name.removesuffix(SUFFIX) + ".finetune.part")
    options.require_free(state, "fine-tuning", resume, force)

    network = load_network(path)
    given: dict[str, Any] = {
        "epochs_per_layer": epochs_per_layer,
        "lr": lr,
        "batch_size": batch_size,
        "images": images,
    }
    settings = FinetuneSettings(
        layers=layers, bias_only=bias_only, **{k: v for k, v in given.items() if v is not None}
    )
    place = options.resolve_device(device)
    calibrated_on = network.provenance.get("calibration", {}).get("on")
    train = open_held_out(where, "train", calibrated_on)
    if train.note:
        console.note(train.note, quiet)
    with console.progress(quiet) as progress:
        tuning = LayerwiseTuning(
            network, train, settings, seed=seed, device=place, progress=progress
        )
        identity = {
            "version": __version__,
            "parent_sha256": sha256(network),
            "settings": asdict(settings),
            "seed": seed,
            "data_sha256": train.sha256(tuning.taught[:HASHED_IMAGES]),
        }
        if resume:
            _resume(tuning, state, identity)
        before = tuning.agreement(network)
        try:
            for layer in tuning.run():
                save_network(_described(tuning, identity), state)
                console.note(_line(layer), quiet)
        except KeyboardInterrupt:
            if state.is_file():
                console.note("the same command with --resume goes on after the last layer", quiet)
            raise
        after = tuning.agreement(tuning.tuned)
    result = {"before": before, "after": after}
    tuned = _described(tuning, identity, result)
    save_network(tuned, target, replace=force)
    contents = {
        "schema": "snnconv.finetuning/1",
        "version": __version__,
        "parent": path.name,
        "checkpoint": target.name,
        "model": network.model.get("name"),
        "timesteps": network.timesteps,
        "neuron": network.neuron,
        "data": train.name,
        **tuned.provenance["finetuning"],
        "device": place,
        "seconds": time.perf_counter() - start,
    }
    report.write(report_path, contents, console.arguments())
    state.unlink(missing_ok=True)
    if as_json:
        console.emit_json(contents)
    else:
        _print(contents, target, report_path)
    options.note_unreadable(train.unreadable, quiet)


def _described(
    tuning: LayerwiseTuning, identity: dict[str, Any], result: dict[str, Any] | None = None
) -> SpikingNetwork:
    """Return the network as it is now, with all that was done to it in its provenance."""
    told = {**identity, **tuning.described(), "held_out": result}
    tuned = tuning.tuned
    return replace(tuned, provenance={**tuned.provenance, "finetuning": told})


def _resume(tuning: LayerwiseTuning, state: Path, identity: dict[str, Any]) -> None:
    """Go on with an interrupted tuning. Raises UsageError if it is another."""
    from snnconv.checkpoint import load_network
    from snnconv.finetune import LayerResult

    found = load_network(state)
    told = found.provenance["finetuning"]
    other = [key for key, value in identity.items() if told.get(key) != value]
    if other:
        raise UsageError(
            f"{state} is of another fine-tuning ({', '.join(other)} differ); give the same "
            "options, or --force to begin anew"
        )
    tuning.resume(found, [LayerResult(**layer) for layer in told["layers"]])


def _line(layer: LayerResult) -> str:
    """Say what became of a layer."""
    error = f"error {100 * layer.error_before:.2f} % to {100 * layer.error_after:.2f} %"
    divergence = ""
    if layer.kl_before is not None:
        divergence = f", KL {layer.kl_before:.4f} to {layer.kl_after:.4f}"
    return f"{layer.layer}: {error}{divergence}, {'kept' if layer.accepted else 'taken back'}"


def _print(contents: dict[str, Any], path: Path, report_path: Path) -> None:
    rows = [
        (
            layer["layer"],
            *(f"{100 * layer[key]:.2f} %" for key in ("error_before", "error_after")),
            *(
                "–" if layer[key] is None else f"{layer[key]:.4f}"
                for key in ("kl_before", "kl_after")
            ),
            "yes" if layer["accepted"] else "no",
        )
        for layer in contents["layers"]
    ]
    title = (
        f"{contents['model']}, T {contents['timesteps']}, tuned on {contents['images']} images, "
        f"judged on {contents['held_out_images']} others"
    )
    columns = ["layer", "error before", "after", "KL before", "after", "kept"]
    console.print_table(title, columns, rows)
    before, after = contents["held_out"]["before"], contents["held_out"]["after"]
    rows = []
    if before is not None:
        rows = [
            (
                "arg-max at T as the quantised ANN",
                f"{before['argmax_percent']:.2f} % before, {after['argmax_percent']:.2f} % now",
            )
        ]
    rows += [("checkpoint", str(path)), ("report", str(report_path))]
    console.print_table(None, ["", "fine-tuned"], rows)
