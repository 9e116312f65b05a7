"""`snnconv convert`: from a pretrained network to a verified spiking checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from snnconv.errors import UsageError
from snnconv.files import SUFFIX, require_named
from snnconv.limits import MAX_WEIGHT_BITS, MIN_WEIGHT_BITS
from snnconv.progress import silent

from . import console, evaluation, options
from .retraining import TrainFiles, TrainOptions, retrainer, train_options
from .source import (
    NetworkOptions,
    default_name,
    describe_input,
    fit_to_images,
    network_options,
    source_argument,
)

if TYPE_CHECKING:
    import torch

    from snnconv.data import ImageData
    from snnconv.load import LoadedModel
    from snnconv.network import SpikingNetwork
    from snnconv.pipeline import Conversion

SAMPLE_IMAGES = 16
COMPENSATION_IMAGES = 200
DEFAULT_TIMESTEPS = 7
DEFAULT_WEIGHT_BITS = 8


def parse_drain(text: str) -> int | None:
    """Turn --drain into a number of steps, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--drain must be 'auto' or a number of steps, not {text!r}")
    return int(text)


@options.command(
    "convert",
    example="snnconv convert resnet18.pt --data DIR\n"
    "snnconv convert zoo:digits --data zoo:digits --timesteps 15",
)
@source_argument
@network_options
@options.data_option
@click.option(
    "--calibration",
    type=click.Choice(["reconstruct", "mse", "percentile", "max", "bn"]),
    help="How clips are chosen; reconstruct also fits weights and biases, layer by layer, in place "
    "of training; bn needs no data.  [default: reconstruct with --epochs 0, else mse; "
    "without data bn]",
)
@click.option(
    "--percentile",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="P",
    help="Share of a layer's activations below the clip of --calibration percentile; where so many "
    "are 0, the largest is taken.  "
    "[default: 99.9]",
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
    type=options.TIMESTEPS,
    help="T, the levels of an activation and the steps of input.  [default: the recipe's, else 7]",
)
@click.option(
    "--weight-bits",
    type=click.IntRange(MIN_WEIGHT_BITS, MAX_WEIGHT_BITS),
    help="Bits of the weights; the first layer and the readout have 8.  [default: the recipe's, "
    "else 8]",
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
    help="V0: half a threshold rounds half up, zero rounds down.  [default: half; zero with "
    "--compensation gain]",
)
@click.option(
    "--compensation",
    type=click.Choice(["none", "gain", "bias"]),
    default="none",
    show_default=True,
    help="Without retraining, make up for what neurons lose in T steps: one gain for all weights, "
    "or a bias per channel.",
)
@click.option(
    "--shortcut-normalization/--no-shortcut-normalization",
    default=True,
    show_default=True,
    help="Weigh a spike that takes a shortcut by its own threshold; without, by that of where it "
    "ends, to see the difference.",
)
@options.replace_option
@options.strict_option
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
@train_options
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    show_default=True,
    help="Simulate the result on the test images, as snnconv eval --ann does.",
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
    network: NetworkOptions,
    data: str | None,
    calibration: str | None,
    percentile: float | None,
    calibration_images: int,
    timesteps: int | None,
    weight_bits: int | None,
    neuron: str,
    initial_membrane: str | None,
    compensation: str,
    shortcut_normalization: bool,
    replace_activations: str | None,
    strict: bool,
    schedule: str,
    drain: str,
    training: TrainOptions,
    evaluate: bool,
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
    calibrates and retrains; on the test split the accuracies are measured and stored (--limit N
    takes only N of its images). Data of one part are divided; what calibrates is retrained on if
    --epochs or a recipe asks for it. The result is verified on a sample of images before it is
    written. Then the test images are simulated.
    """
    start = time.perf_counter()
    parsed_drain = parse_drain(drain)
    recipe = network.read_recipe()
    timesteps = timesteps or (recipe and recipe.timesteps) or DEFAULT_TIMESTEPS
    weight_bits = weight_bits or (recipe and recipe.weight_bits) or DEFAULT_WEIGHT_BITS
    asked = calibration is not None
    if calibration is None:
        calibration = "mse" if data else "bn"
    if calibration != "bn":
        options.require_data(data)
    if calibration != "percentile" and _given("percentile"):
        raise UsageError(f"--percentile belongs to --calibration percentile, not {calibration}")
    if compensation == "gain" and initial_membrane == "half" and _given("initial_membrane"):
        raise UsageError(
            "--compensation gain belongs with --initial-membrane zero: with half a threshold the "
            "neurons would fire too much"
        )
    if initial_membrane is None or compensation == "gain":
        initial_membrane = "zero" if compensation == "gain" else "half"
    from snnconv import report
    from snnconv.schedule import Schedule

    Schedule(schedule, timesteps, 1, parsed_drain)
    path = output or default_name(source)
    require_named(path, SUFFIX, "a spiking checkpoint")
    report.require_writable(path, force)
    report_path = report.default_path(path, "convert")
    report.require_writable(report_path, force, {"schema": "snnconv.conversion/1"})
    files = TrainFiles.beside(path)
    settings = training.settings(recipe)

    import torch

    from snnconv import __version__, checkpoint, distributed, memory, replace
    from snnconv.calibrate import DEFAULT_PERCENTILE
    from snnconv.data import choose_indices
    from snnconv.normalize import with_settings
    from snnconv.pipeline import check_equal, convert
    from snnconv.reconstruction import FEWEST_IMAGES

    percentile = percentile or DEFAULT_PERCENTILE
    place = options.resolve_device(device)
    memory.keep_freed()
    loaded = network.load(source)
    train = test = None
    indices: Any = None
    accuracies: dict[str, Any] = {}
    after: dict[str, Any] | None = None
    if data is not None:
        count = 0 if calibration == "bn" else calibration_images
        train, test = _open_splits(data, loaded.num_classes, loaded.class_names, count, seed, quiet)
        loaded = fit_to_images(loaded, train, quiet)
        indices = choose_indices(len(train), calibration_images, seed)
    if train is None or (train.note and not training.epochs_asked(recipe)):
        training.refuse_without_training(
            "no data given: nothing to retrain on"
            if train is None
            else "the data have no training part, and are retrained on with --epochs only"
        )
        settings = None
    elif train.note and settings is not None:
        if calibration == "bn":
            raise UsageError(
                "--calibration bn leaves all images of data in one part to be measured: give "
                "--epochs 0"
            )
        console.note("the images that calibrate retrain, and choose the epoch, too", quiet)
    if settings is not None:
        files.require_free(training.resume, force)
        if calibration == "reconstruct":
            raise UsageError(
                "--calibration reconstruct takes the place of training: give --epochs 0"
            )
    elif not asked and train is not None and compensation == "none" and shortcut_normalization:
        if len(indices) >= FEWEST_IMAGES:
            calibration = "reconstruct"
        else:
            console.note(
                f"{len(indices)} images are too few to fit weights to: only clips are chosen",
                quiet,
            )
    held_out: Any = ()
    if settings is not None and not shortcut_normalization:
        raise UsageError(
            "--no-shortcut-normalization is for networks without training: give --epochs 0"
        )
    if compensation != "none":
        held_out = _held_out(train, settings, compensation, indices, seed)
    described: dict[str, Any] = {
        "name": loaded.name,
        "args": loaded.model_args,
        "channels": loaded.channels,
        "num_classes": loaded.num_classes,
        "class_names": _class_names(loaded, train),
        "weights_sha256": loaded.weights_sha256,
        "ann": None,
    }
    calibrated_on = None
    if train is not None and calibration != "bn":
        calibrated_on = {
            "data_sha256": train.sha256(indices),
            "split": train.split,
            "note": train.note,
            "images": len(indices),
            "seed": seed,
        }
    how_calibrated: dict[str, Any] = {"method": calibration, "on": calibrated_on}
    if calibration == "percentile":
        how_calibrated["percentile"] = percentile
    advice = "start it again with --resume"
    with distributed.group(place, advice), console.progress(quiet) as progress:

        def batches() -> Any:
            return _batches(train, loaded, indices, progress) if train and calibrated_on else None

        model, replaced = loaded.model, dict[str, int]()
        if replace_activations is not None:
            model, replaced = replace.replace_activations(model)
        retrain = None
        if settings is not None and train is not None:
            retrain = retrainer(
                training,
                settings,
                loaded,
                train,
                files,
                timesteps=timesteps,
                weight_bits=weight_bits,
                initial_membrane=initial_membrane,
                images=batches,
                calibration=how_calibrated,
                replaced=replaced,
                seed=seed,
                device=place,
                progress=progress,
                quiet=quiet,
            )
        conversion = convert(
            model,
            loaded.preprocessing,
            batches(),
            timesteps=timesteps,
            calibration=calibration,
            percentile=percentile,
            weight_bits=weight_bits,
            retrain=retrain,
            shortcut_normalization=shortcut_normalization,
            compensation=compensation,
            strict=strict,
            held_out=() if train is None else _batches(train, loaded, held_out, silent),
            progress=progress,
            neuron=neuron,
            initial_membrane=initial_membrane,
            schedule=schedule,
            drain=parsed_drain,
            provenance={
                "version": __version__,
                "epochs": 0 if settings is None else settings.epochs,
                "calibration": how_calibrated,
                "replaced_activations": replaced,
            },
        )
        processes = distributed.size()
        progress("verify", 0, 1)
        verification, agreement = check_equal(conversion, _sample(train, loaded, indices, seed))
        progress("verify", 1, 1)
        if test is not None:
            chosen = choose_indices(len(test), limit, seed)
            described["ann"] = _measure_ann(
                conversion, loaded.model, loaded, test, chosen, place, progress
            )
            if replaced:
                after = _measure_ann(conversion, model, loaded, test, chosen, place, progress)
            if described["ann"] is not None:
                described["ann"]["drawn"] = {"images": len(chosen), "seed": seed}
            if retrain is not None:
                accuracies = _measure_qann(conversion, test, chosen, place, progress)
    spiking = with_settings(conversion.network, model=described)
    if not distributed.is_leader():
        return
    evaluation_path = None
    not_evaluated = ""
    if evaluate and test is not None and described["ann"] is not None:
        timetable = spiking.timetable()
        evaluation_path = evaluation.default_path(path, spiking, timetable, "test", limit)
        not_evaluated = _reason_not_to_evaluate(
            evaluation_path, test, processes, limit, seed, force
        )
        evaluation_path = None if not_evaluated else evaluation_path
    checkpoint.save_network(spiking, path, replace=force)
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
        "data": None if train is None else train.name,
        "calibration": how_calibrated,
        "replaced_activations": {"count": replaced, "ann": after} if replaced else None,
        "shortcut_normalization": shortcut_normalization,
        "reconstruction": spiking.provenance["reconstruction"],
        "compensation": spiking.provenance["compensation"],
        "retraining": files.described(spiking.provenance["retraining"]),
        "qann": accuracies.get("qann"),
        "qann_float": accuracies.get("qann_float"),
        "evaluation": None if evaluation_path is None else evaluation_path.name,
        "preprocessing": loaded.preprocessing.to_dict(),
        "neurons": spiking.neurons,
        "depth": spiking.depth,
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
        "processes": processes,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
    }
    report.write(report_path, contents, console.arguments())
    if settings is not None:
        files.state.unlink(missing_ok=True)
    if as_json:
        console.emit_json(contents)
    else:
        _print(contents, path, report_path)
        if test is None:
            console.note(
                "no data given: nothing was measured, the accuracy is unknown; give --data", quiet
            )
    if not_evaluated:
        console.note(f"not evaluated: {not_evaluated}", quiet)
    if evaluation_path is not None:
        _evaluate(
            evaluation_path,
            spiking,
            test,
            chosen,
            loaded.model,
            checkpoint=path.name,
            command=[
                *("eval", str(path), "--data", str(data), "--ann", source, "--seed", str(seed)),
                *(("--limit", str(limit)) if limit else ()),
                *("--device", device),
            ],
            device=place,
            seed=seed,
            as_json=as_json,
            quiet=quiet,
        )
    for images_of in (train, test):
        if images_of is not None:
            options.note_unreadable(images_of.unreadable, quiet)


def _reason_not_to_evaluate(
    path: Path, test: ImageData, processes: int, limit: int | None, seed: int, force: bool
) -> str:
    """Say why the evaluation at `path` must wait, an empty text if it need not."""
    if processes > 1:
        return "several processes have converted; run snnconv eval"
    try:
        evaluation.require_writable(path, test, seed, limit, page=True, named=False, force=force)
    except UsageError as error:
        return error.message
    return ""


def _evaluate(
    path: Path,
    network: SpikingNetwork,
    test: ImageData | None,
    chosen: Any,
    model: torch.nn.Module,
    *,
    checkpoint: str,
    command: Sequence[str],
    device: str,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Evaluate what was converted on the test images."""
    with console.progress(quiet) as progress:
        found = evaluation.evaluated(
            network,
            test,
            chosen,
            network.timetable(),
            checkpoint=checkpoint,
            model=model,
            engine="auto",
            device=device,
            seed=seed,
            statistics=True,
            progress=progress,
        )
    evaluation.write(path, found, page=True, command=command)
    if not as_json:
        evaluation.show(path, found, page=True, quiet=quiet)


def _given(name: str) -> bool:
    """Return whether the command line has an option, not a recipe or snnconv.toml."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def _open_splits(
    data: str,
    num_classes: int,
    class_names: Sequence[str] | None,
    calibration_images: int,
    seed: int,
    quiet: bool,
) -> tuple[ImageData, ImageData]:
    """Open the training and the test split, whose labels must be the network's."""
    from snnconv.data import check_labels, open_data

    train, test = (
        open_data(data, split, calibration_images=calibration_images, seed=seed)
        for split in ("train", "test")
    )
    for part in (train, test):
        check_labels(part, num_classes, class_names)
    if test.note:
        console.note(test.note, quiet)
    return train, test


def _held_out(
    train: ImageData | None, settings: Any, compensation: str, calibrated: Any, seed: int
) -> Any:
    """Return the indices of the training images that compensate, none of which calibrated."""
    import numpy as np

    from snnconv.data import choose_indices

    if settings is not None:
        raise UsageError(
            f"--compensation {compensation} makes up for the lack of training: give --epochs 0"
        )
    if train is None:
        raise UsageError(f"--compensation {compensation} needs images: give --data")
    count = min(COMPENSATION_IMAGES, len(train) // 2)
    found = np.setdiff1d(choose_indices(len(train), count, seed, others=True), calibrated)
    if not len(found):
        raise UsageError(
            f"--compensation {compensation} needs images that do not calibrate, and all "
            f"{len(train)} do: "
            + ("give data with a training part" if train.note else "lower --calibration-images")
        )
    return found


def _measure_ann(
    conversion: Conversion,
    model: torch.nn.Module,
    loaded: LoadedModel,
    test: ImageData,
    chosen: Any,
    place: str,
    progress: console.Progress,
) -> dict[str, Any] | None:
    """Return the accuracy of an ANN, and on which images; None if it is no classifier."""
    from snnconv.measure import top1_percents

    if conversion.network.logits is None:
        return None
    model, preprocessing = model.to(place), loaded.preprocessing
    measured = top1_percents(
        {"ann": lambda pixels: model(preprocessing.normalize(pixels))},
        test,
        preprocessing,
        chosen,
        device=place,
        progress=progress,
    )
    return {**measured["ann"], "split": test.split, "data_sha256": test.sha256(chosen)}


def _measure_qann(
    conversion: Conversion, test: ImageData, chosen: Any, place: str, progress: console.Progress
) -> dict[str, Any]:
    """Return the accuracies of a retrained network in float, as it was trained, and in integers."""
    from snnconv.engine import prepare
    from snnconv.engine.linear import exact_arithmetic
    from snnconv.measure import top1_percents
    from snnconv.normalize import rounded_qann

    network = conversion.network
    (readout,) = network.readouts
    runner = prepare(network, network.timesteps, device=place)
    qann = rounded_qann(conversion.qann, network).to(place)

    def in_float(pixels: torch.Tensor) -> torch.Tensor:
        with exact_arithmetic():
            images = network.preprocessing.center(pixels)
            return qann(images, network.timesteps, offset=network.rounding_offset)[
                readout.name
            ].flatten(1)

    def in_integers(pixels: torch.Tensor) -> torch.Tensor:
        return runner.endpoint(pixels).logits(network, readout.name).flatten(1)

    forwards = {"qann_float": in_float, "qann": in_integers}
    return top1_percents(
        forwards, test, network.preprocessing, chosen, device=place, progress=progress
    )


def _batches(data: ImageData, loaded: LoadedModel, indices: Any, progress: console.Progress) -> Any:
    done = 0
    for pixels, _ in data.batches(loaded.preprocessing, indices):
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


def _print(contents: dict[str, Any], path: Path, report_path: Path) -> None:
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
