"""`snnconv convert`: from a pretrained network to a verified spiking checkpoint."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.errors import UsageError

from . import console, options

if TYPE_CHECKING:
    import torch

    from snnconv.data import ImageData
    from snnconv.load import LoadedModel

SAMPLE_IMAGES = 16
BATCH = 100


source_argument = click.argument("source", metavar="CHECKPOINT|NAME|zoo:NAME")


def model_options(function: options.F) -> options.F:
    """Add --arch and -m/--model-arg, which say how to build a checkpoint's network."""
    function = click.option(
        "-m",
        "--model-arg",
        "model_args",
        multiple=True,
        metavar="K=V",
        help="Argument for the network's constructor, for example num_classes=7. Repeatable.",
    )(function)
    return click.option(
        "--arch",
        metavar="NAME",
        help="timm architecture of a checkpoint file. Else what the file says, else its name.",
    )(function)


def parse_model_args(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Turn K=V pairs into a table; values are Python literals, else text."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-arg {pair!r} is not K=V")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def parse_drain(text: str) -> int | None:
    """Turn --drain into a number of steps, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--drain must be 'auto' or a number of steps, not {text!r}")
    return int(text)


def default_name(source: str) -> str:
    """Name the spiking checkpoint of a source."""
    name = source.rpartition("/")[2].removeprefix("zoo:").rpartition(":")[2]
    for suffix in (".safetensors", ".tar", ".pth", ".pt", ".th", ".ckpt", ".bin"):
        name = name.removesuffix(suffix)
    return f"{name}.snn.safetensors"


@options.command(
    "convert",
    example="snnconv convert resnet18.pt --data DIR\n"
    "snnconv convert zoo:digits --data zoo:digits --timesteps 15",
)
@source_argument
@model_options
@options.data_option
@click.option(
    "--calibration",
    type=click.Choice(["mse", "percentile", "max", "bn"]),
    help="How clips are chosen; bn needs no data.  [default: mse with data, bn without]",
)
@click.option(
    "--calibration-images",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="Training images to calibrate on, drawn with --seed.",
)
@click.option(
    "-T",
    "--timesteps",
    type=click.IntRange(1, 4095),
    default=7,
    show_default=True,
    help="T, the levels of an activation and the steps of input.",
)
@click.option(
    "--weight-bits",
    type=click.IntRange(2, 8),
    default=8,
    show_default=True,
    help="Bits of the weights; the first layer and the readout have 8.",
)
@click.option(
    "--neuron",
    type=click.Choice(["signed", "unsigned"]),
    default="signed",
    show_default=True,
    help="Whether neurons may emit negative spikes.",
)
@click.option(
    "--initial-membrane",
    type=click.Choice(["half", "zero"]),
    default="half",
    show_default=True,
    help="V0: half a threshold rounds half up, zero rounds down.",
)
@click.option(
    "--schedule",
    type=click.Choice(["paper", "drain", "stagger", "wait"]),
    default="drain",
    show_default=True,
    help="When layers start and stop; eval can choose another.",
)
@click.option(
    "--drain",
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Steps after the last input: until nothing fires, or N.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Epochs of quantised retraining. Only 0, training-free, is there yet.",
)
@options.output_option("Spiking checkpoint.  [default: NAME.snn.safetensors here]")
@options.force_option
@options.limit_option
@options.seed_option
@options.device_option
@options.json_option
@options.verbosity_options
def command(
    source: str,
    arch: str | None,
    model_args: tuple[str, ...],
    data: str | None,
    calibration: str | None,
    calibration_images: int,
    timesteps: int,
    weight_bits: int,
    neuron: str,
    initial_membrane: str,
    schedule: str,
    drain: str,
    epochs: int,
    output: Path | None,
    force: bool,
    limit: int | None,
    seed: int,
    device: str,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Turn a pretrained network into a spiking one that equals its quantised ANN.

    CHECKPOINT is a file (.pt .pth .th .tar .safetensors), NAME a timm name, also with a tag or as
    hf-hub:REPO or local-dir:DIR, and zoo:NAME a network of the zoo. The training split of the data
    calibrates; on the test split the ANN's accuracy is measured and stored (--limit N takes only N
    of its images). The result is verified on a sample of images before it is written.
    """
    start = time.perf_counter()
    if epochs:
        raise UsageError("--epochs: retraining is not available yet; take --epochs 0")
    parsed_drain = parse_drain(drain)
    where = options.resolve_data(data)
    if calibration is None:
        calibration = "mse" if where else "bn"
    if calibration != "bn" and where is None:
        options.require_data(data)
    from snnconv import report
    from snnconv.schedule import Schedule

    Schedule(schedule, timesteps, 1, parsed_drain)
    path = output or Path(default_name(source))
    if not path.name.endswith(".snn.safetensors"):
        raise UsageError(f"--output {path}: a spiking checkpoint is named *.snn.safetensors")
    report.require_writable(path, force)
    report_path = report.default_path(path)
    report.require_writable(report_path, force, "snnconv.conversion/1")

    from snnconv import __version__, checkpoint
    from snnconv.data import choose_indices, open_data
    from snnconv.load import load_model
    from snnconv.measure import top1_percent
    from snnconv.pipeline import check_equal, convert

    place = options.resolve_device(device)
    loaded = load_model(source, arch=arch, model_args=parse_model_args(model_args))
    train = open_data(where, "train") if where else None
    test = open_data(where, "test") if where else None
    with console.progress(quiet) as progress:
        images = indices = None
        if train is not None:
            indices = choose_indices(len(train), calibration_images, seed)
            if calibration != "bn":
                images = _batches(train, loaded, indices, progress)
        ann = None
        if test is not None:
            chosen = choose_indices(len(test), limit, seed)
            model = loaded.model.to(place)
            top1 = top1_percent(
                model, test, loaded.preprocessing, chosen, device=place, progress=progress
            )
            model.cpu()
            ann = {
                "top1_percent": top1,
                "images": len(chosen),
                "split": test.split,
                "data_sha256": test.sha256,
            }
        described = {
            "name": loaded.name,
            "args": loaded.model_args,
            "num_classes": loaded.num_classes,
            "class_names": _class_names(loaded, train),
            "weights_sha256": loaded.weights_sha256,
            "ann": ann,
        }
        calibrated_on = None
        if train is not None and indices is not None and calibration != "bn":
            calibrated_on = {
                "data": train.name,
                "data_sha256": train.sha256,
                "split": train.split,
                "note": train.note,
                "images": len(indices),
                "seed": seed,
            }
        provenance = {
            "version": __version__,
            "epochs": 0,
            "calibration": {"method": calibration, "on": calibrated_on},
        }
        conversion = convert(
            loaded.model,
            loaded.preprocessing,
            images,
            timesteps=timesteps,
            calibration=calibration,
            weight_bits=weight_bits,
            progress=progress,
            neuron=neuron,
            initial_membrane=initial_membrane,
            schedule=schedule,
            drain=parsed_drain,
            model=described,
            provenance=provenance,
        )
        progress("verify", 0, 1)
        sample = _sample(train, loaded, indices, seed)
        verification, agreement = check_equal(conversion, sample)
        progress("verify", 1, 1)
    checkpoint.save_network(conversion.network, path)
    network = conversion.network
    contents = {
        "schema": "snnconv.conversion/1",
        "version": __version__,
        "source": source,
        "checkpoint": path.name,
        "model": described,
        **conversion.plan.to_dict(),
        "timesteps": timesteps,
        "schedule": schedule,
        "drain": parsed_drain,
        "neuron": neuron,
        "initial_membrane": initial_membrane,
        "weight_bits": weight_bits,
        "calibration": provenance["calibration"],
        "neurons": network.neurons,
        "depth": network.depth,
        "verification": {
            **verification.to_dict(),
            "sample": "training images" if train is not None else "random images",
            "float_qann": {
                "counts_percent": agreement.counts_percent,
                "argmax_percent": agreement.argmax_percent,
            },
        },
        "seed": seed,
        "device": place,
        "seconds": time.perf_counter() - start,
    }
    report.write(report_path, contents, console.arguments())
    if as_json:
        console.emit_json(contents)
        return
    _print(contents, path, report_path, test is not None)


def _batches(data: ImageData, loaded: LoadedModel, indices: Any, progress: console.Progress) -> Any:
    done = 0
    for pixels, _ in data.batches(loaded.preprocessing, indices, BATCH):
        yield pixels
        done += len(pixels)
        progress("calibrate", done, len(indices))


def _sample(data: ImageData | None, loaded: LoadedModel, indices: Any, seed: int) -> torch.Tensor:
    """Return the images to verify on: some of the calibration images, else noise."""
    import torch

    if data is not None:
        (pixels, _), *_ = data.batches(loaded.preprocessing, indices[:SAMPLE_IMAGES], SAMPLE_IMAGES)
        return pixels
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLE_IMAGES, *loaded.preprocessing.input_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _class_names(loaded: LoadedModel, data: ImageData | None) -> list[str] | None:
    names = loaded.class_names
    if names is None and data is not None and data.class_names is not None:
        names = data.class_names if len(data.class_names) == loaded.num_classes else None
    return None if names is None else list(names)


def _print(contents: dict[str, Any], path: Path, report_path: Path, measured: bool) -> None:
    model, checked = contents["model"], contents["verification"]
    calibration = contents["calibration"]
    images = calibration["on"]
    source = (
        "BatchNorm statistics, no data"
        if images is None
        else f"{images['images']} {images['split']} images of {images['data']}, "
        f"seed {images['seed']}" + (f" ({images['note']})" if images["note"] else "")
    )
    share = contents["mac_share_percent"]
    rows = [
        ("network", f"{model['name']}, {contents['neurons']:,} neurons, depth {contents['depth']}"),
        (
            "spiking",
            f"{share['spiking']:g} % of multiply-accumulates, {share['analog']:g} % analog",
        ),
        (
            "settings",
            f"T {contents['timesteps']}, {contents['schedule']}, {contents['neuron']}, "
            f"{contents['weight_bits']}-bit weights, no retraining",
        ),
        ("clips", f"{calibration['method']}, from {source}"),
    ]
    if model["ann"] is not None:
        ann = model["ann"]
        rows.append(("ANN", f"{ann['top1_percent']:.2f} % top-1 of {ann['images']} test images"))
    rows += [
        (
            "verified",
            f"equal to its quantised ANN: {checked['sites']} layers and maps, "
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
    if not measured:
        console.note("no data given: nothing was measured, the accuracy is unknown; give --data")
