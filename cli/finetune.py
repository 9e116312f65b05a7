"""`snnconv finetune`: tune a spiking checkpoint for the end of its T steps."""

from __future__ import annotations

import io
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.errors import UsageError, first_line
from snnconv.files import SUFFIX, require_named, write_atomically
from snnconv.launch import processes
from snnconv.schemas import FINETUNING

from . import console, options
from .retraining import HASHED_IMAGES

if TYPE_CHECKING:
    from snnconv.data import ImageData
    from snnconv.finetune import EpochResult, Finetuning, LayerResult

DEFAULT_EPOCHS = 1


@options.command(
    "finetune",
    example="snnconv finetune --layerwise\n"
    "snnconv finetune resnet20.snn.safetensors --layerwise --data DIR --epochs-per-layer 4",
)
@options.checkpoint_argument
@click.option(
    "--layerwise",
    is_flag=True,
    help="Tune one layer after the other, front to back (Fast-SNN).",
)
@click.option(
    "--end-to-end",
    is_flag=True,
    help="Tune all layers together, by the outputs; after --layerwise, if both are given.",
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
    help="With --layerwise, passes over the images for every layer.  [default: 3]",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 1000),
    help="With --end-to-end, passes over the images.  [default: 1]",
)
@click.option(
    "--lr",
    type=click.FloatRange(1e-6, 100),
    help="First learning rate, in integers a step.  [default: 0.03]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Images per step.  [default: 64]")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="N",
    help="Training images to learn from, drawn with --seed.  [default: 10000 for each layer, all "
    "for all layers together]",
)
@click.option("--bias-only", is_flag=True, help="Tune biases and leave the weights as they are.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the fine-tuning that was interrupted; --force begins anew.",
)
@options.output_option("Spiking checkpoint.  [default: NAME.tuned.snn.safetensors]")
@options.force_option
@options.seed_option
@options.device_option
@options.json_option
@options.verbosity_options
def command(
    checkpoint: str | None,
    layerwise: bool,
    end_to_end: bool,
    data: str | None,
    layers: str,
    epochs_per_layer: int | None,
    epochs: int | None,
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

    After T steps some charge is still on its way, and counts miss those of the quantised ANN.
    Layers learn on training images to make up for it; what does not help on held-out images is
    taken back. The new checkpoint runs under the schedule paper. Under an exact schedule there is
    nothing to mend.
    """
    start = time.perf_counter()
    if not layerwise and not end_to_end:
        raise UsageError(
            "say how to fine-tune: --layerwise, --end-to-end, or both; to train the network before "
            "it spikes, see snnconv convert --epochs"
        )
    for option, value, needs, given in (
        ("--epochs-per-layer", epochs_per_layer, "--layerwise", layerwise),
        ("--epochs", epochs, "--end-to-end", end_to_end),
    ):
        if value is not None and not given:
            raise UsageError(f"{option} belongs to {needs}")
    if processes() > 1:
        raise UsageError("fine-tuning is done by one process: start it without torchrun")
    path, named = options.spiking_checkpoint(checkpoint, quiet)
    where = options.require_data(data)

    from snnconv import __version__, memory, report
    from snnconv.checkpoint import load_network, save_network, sha256
    from snnconv.data import check_labels
    from snnconv.finetune import FinetuneSettings, Finetuning
    from snnconv.normalize import with_settings

    stem = named.name.removesuffix(SUFFIX)
    target = output or named.with_name(f"{stem}.tuned{SUFFIX}")
    require_named(target, SUFFIX, "a spiking checkpoint")
    report.require_writable(target, force)
    report_path = report.default_path(target, "finetune")
    report.require_writable(report_path, force, {"schema": FINETUNING})
    state = target.with_name(target.name.removesuffix(SUFFIX) + ".finetune.part")
    options.require_free(state, "fine-tuning", resume, force, quiet)

    network = load_network(path)
    chosen: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "images": images}
    per_layer = epochs_per_layer or FinetuneSettings.epochs_per_layer
    settings = FinetuneSettings(
        epochs_per_layer=per_layer if layerwise else 0,
        epochs=(epochs or DEFAULT_EPOCHS) if end_to_end else 0,
        layers=layers,
        bias_only=bias_only,
        **{k: v for k, v in chosen.items() if v is not None},
    )
    place = options.resolve_device(device)
    memory.keep_freed()
    train = options.open_for(network, where, "train", quiet=True)
    if (logits := network.logits) is not None:
        check_labels(train, logits.shape[0], network.model.get("class_names"))
    if train.note:
        _refuse_to_learn_the_test(train, options.open_for(network, where, "test", quiet=True))
        console.note(train.note, quiet)
    with console.progress(quiet) as progress:
        tuning = Finetuning(network, train, settings, seed=seed, device=place, progress=progress)
        identity = {
            "version": __version__,
            "parent_sha256": sha256(network),
            "settings": asdict(settings),
            "seed": seed,
            "data_sha256": train.sha256(tuning.taught[:HASHED_IMAGES]),
            "augmentation": tuning.described()["augmentation"],
        }
        if resume:
            _resume(tuning, state, identity)
        else:
            state.unlink(missing_ok=True)  # of another run, which --force gives up
        before = tuning.agreement(network)
        try:
            for result in tuning.run():
                _save(tuning, state, identity)
                console.note(_line(result), quiet)
        except KeyboardInterrupt:
            if state.is_file():
                console.note("the same command with --resume goes on from there", quiet)
            raise
        tuned = tuning.tuned
        agreement = {"before": before, "after": tuning.agreement(tuned)}
    told = {**identity, **tuning.described(), "held_out": agreement}
    tuned = with_settings(tuned, provenance={**tuned.provenance, "finetuning": told})
    save_network(tuned, target, replace=force)
    contents = {
        "schema": FINETUNING,
        "version": __version__,
        "parent": path.name,
        "checkpoint": target.name,
        "model": network.title,
        "timesteps": network.timesteps,
        "neuron": network.neuron,
        "data": train.name,
        **told,
        "device": place,
        "seconds": time.perf_counter() - start,
    }
    report.write(report_path, contents, options.arguments(None if checkpoint else path))
    state.unlink(missing_ok=True)
    if as_json:
        console.emit_json(contents)
    else:
        _print(contents, target, report_path)
    options.note_unreadable(train.unreadable, quiet)


def _refuse_to_learn_the_test(train: ImageData, test: ImageData) -> None:
    """Raise UsageError if data in one part are the same images for both."""
    some = range(min(len(train), HASHED_IMAGES))
    if len(train) == len(test) and train.sha256(some) == test.sha256(some):
        raise UsageError(
            f"{train.name}: {train.note}; a network tuned on images that are measured later would "
            "be flattered: give data with a training and a test part"
        )


def _save(tuning: Finetuning, state: Path, identity: dict[str, Any]) -> None:
    """Write what has been done so far."""
    import torch

    buffer = io.BytesIO()
    torch.save({"identity": identity, **tuning.state_dict()}, buffer)
    write_atomically(state, buffer.getvalue())


def _resume(tuning: Finetuning, state: Path, identity: dict[str, Any]) -> None:
    """Go on with an interrupted tuning. Raises UsageError if it is another, or damaged."""
    import torch

    try:
        found = torch.load(state, map_location="cpu", weights_only=True)
        told = found.pop("identity")
        other = [key for key, value in identity.items() if told.get(key) != value]
        if not other:
            tuning.load_state_dict(found)
    except Exception as error:  # a file may be wrong in any way there is
        raise UsageError(
            f"--resume: {state} is damaged ({first_line(error)}); start anew with --force"
        ) from error
    if other:
        raise UsageError(
            f"{state} is of another fine-tuning ({', '.join(other)} differ); give the same "
            "options, or --force to begin anew"
        )


def _line(result: LayerResult | EpochResult) -> str:
    """Say what became of a layer, or of an epoch."""
    from snnconv.finetune import EpochResult

    if isinstance(result, EpochResult):
        return (
            f"epoch {result.epoch}: KL {result.kl:.4f}, arg-max at T as the quantised ANN "
            f"{result.argmax_percent:.2f} %"
        )
    error = f"error {100 * result.error_before:.2f} % to {100 * result.error_after:.2f} %"
    divergence = ""
    if result.kl_before is not None:
        divergence = f", KL {result.kl_before:.4f} to {result.kl_after:.4f}"
    became = "kept" if result.accepted else "taken back"
    if _unchanged(asdict(result)):
        became = "unchanged"
    return f"{result.layer}: {error}{divergence}, {became}"


def _unchanged(layer: dict[str, Any]) -> bool:
    """Return whether tuning has moved no integer of a layer, as far as its spikes tell."""
    same = layer["error_before"] == layer["error_after"]
    return same and bool(layer["kl_before"] == layer["kl_after"])


def _print(contents: dict[str, Any], path: Path, report_path: Path) -> None:
    rows = [
        (
            layer["layer"],
            *(f"{100 * layer[key]:.2f} %" for key in ("error_before", "error_after")),
            *(
                "–" if layer[key] is None else f"{layer[key]:.4f}"
                for key in ("kl_before", "kl_after")
            ),
            "unchanged" if _unchanged(layer) else "yes" if layer["accepted"] else "no",
        )
        for layer in contents["layers"]
    ]
    images, judges = contents["images"], contents["held_out_images"]
    what = f"{contents['model']}, T {contents['timesteps']}"
    if rows:
        title = f"{what}, tuned on {images['layers']} images, judged on {judges} others"
        columns = ["layer", "error before", "after", "KL before", "after", "kept"]
        console.print_table(title, columns, rows)
    if contents["epochs"]:
        title = f"{what}, all layers on {images['together']} images, judged on {judges} others"
        lines = [
            (
                str(e["epoch"]),
                "–" if e["loss"] is None else f"{e['loss']:.4f}",
                f"{e['kl']:.4f}",
                f"{e['argmax_percent']:.2f}",
            )
            for e in contents["epochs"]
        ]
        columns = ["epoch", "loss", "KL", "arg-max as the quantised ANN, %"]
        console.print_table(title, columns, lines)
    before, after = contents["held_out"]["before"], contents["held_out"]["after"]
    rows = []
    if before is not None:
        rows = [
            (
                "arg-max at T as the quantised ANN",
                f"{before['argmax_percent']:.2f} % before, {after['argmax_percent']:.2f} % now",
            )
        ]
    if contents["layers"] and not any(row["error_before"] for row in contents["layers"]):
        rows.append(("nothing to mend", "at T every count is the quantised ANN's already"))
    elif contents["layers"] and all(map(_unchanged, contents["layers"])):
        rows.append(
            (
                "nothing was learnt",
                f"{images['layers']} images are too few steps to move an integer: give more "
                "--images, --epochs-per-layer, or a larger --lr",
            )
        )
    rows += [("checkpoint", str(path)), ("report", str(report_path))]
    console.print_table(None, ["", "fine-tuned"], rows)
