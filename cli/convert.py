"""`snnconv convert`: from a pretrained network to a verified spiking checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.errors import UsageError
from snnconv.files import SUFFIX, require_named
from snnconv.launch import is_leader
from snnconv.progress import silent
from snnconv.schemas import CONVERSION

from . import console, converted, evaluation, options
from .conversion import ConversionOptions, Method, conversion_options
from .retraining import TrainFiles, TrainOptions, retrainer, train_options
from .source import (
    NetworkOptions,
    default_name,
    fit_to_images,
    network_options,
    source_argument,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from snnconv.data import ImageData
    from snnconv.load import LoadedModel
    from snnconv.network import SpikingNetwork
    from snnconv.pipeline import Conversion
    from snnconv.recipe import Recipe
    from snnconv.train import TrainSettings

SAMPLE_IMAGES = 16
COMPENSATION_IMAGES = 200


@options.command(
    "convert",
    example="snnconv convert resnet18.pt --data DIR\n"
    "snnconv convert zoo:digits --data zoo:digits --timesteps 15",
)
@source_argument
@network_options
@options.data_option
@conversion_options
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
    chosen: ConversionOptions,
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
    recipe = network.read_recipe()
    method = chosen.method(recipe, data)

    from snnconv import report

    path = output or default_name(source)
    require_named(path, SUFFIX, "a spiking checkpoint")
    report.require_writable(path, force)
    report_path = report.default_path(path, "convert")
    report.require_writable(report_path, force, {"schema": CONVERSION})
    files = TrainFiles.beside(path)
    settings = training.settings(recipe)

    import torch

    from snnconv import __version__, checkpoint, distributed, memory
    from snnconv.normalize import with_settings
    from snnconv.pipeline import check_equal, convert
    from snnconv.replace import replace_activations

    place = options.resolve_device(device)
    memory.keep_freed()
    loaded = network.load(source)
    images = None
    if data is not None:
        images = _Images.opened(data, loaded, method, chosen.calibration_images, limit, seed, quiet)
        loaded = fit_to_images(loaded, images.train, quiet)
    settings = _retraining(settings, training, recipe, method, images, quiet)
    if settings is not None:
        files.require_free(training.resume, force, quiet)
    elif chosen.calibration is None and images is not None:
        method = _without_training(method, images, quiet)
    held_out = _held_out(method, images, seed)
    calibration = _calibration(method, images, seed)
    with (
        distributed.group(place, "start it again with --resume"),
        console.progress(quiet) as progress,
    ):

        def batches() -> Iterator[torch.Tensor] | None:
            if images is None or calibration["on"] is None:
                return None
            return _batches(images.train, loaded, images.calibrating, progress)

        model, replaced = loaded.model, dict[str, int]()
        if chosen.replace_activations is not None:
            model, replaced = replace_activations(model)
        retrain = None
        if settings is not None and images is not None:
            retrain = retrainer(
                training,
                settings,
                loaded,
                images.train,
                files,
                timesteps=method.timesteps,
                weight_bits=method.weight_bits,
                initial_membrane=method.initial_membrane,
                images=batches,
                calibration=calibration,
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
            **asdict(method),
            retrain=retrain,
            held_out=() if images is None else _batches(images.train, loaded, held_out, silent),
            progress=progress,
            provenance={
                "version": __version__,
                "epochs": 0 if settings is None else settings.epochs,
                "calibration": calibration,
                "replaced_activations": replaced,
            },
        )
        processes = distributed.size()
        progress("verify", 0, 1)
        verification, agreement = check_equal(conversion, _sample(images, loaded, seed))
        progress("verify", 1, 1)
        accuracies: dict[str, Any] = {}
        if images is not None:
            accuracies = _measured(
                conversion, loaded, model if replaced else None, images, seed, place, progress
            )
    if not is_leader():
        return
    spiking = with_settings(
        conversion.network, model=_described(loaded, images, accuracies.get("ann"))
    )
    evaluation_path, not_evaluated = None, ""
    if evaluate and images is not None and spiking.logits is not None:
        evaluation_path = evaluation.default_path(path, spiking, spiking.timetable(), "test", limit)
        not_evaluated = _reason_not_to_evaluate(
            evaluation_path, images, processes, limit, seed, force
        )
        evaluation_path = None if not_evaluated else evaluation_path
    checkpoint.save_network(spiking, path, replace=force)
    contents = {
        **converted.contents(
            conversion,
            spiking,
            verification,
            agreement,
            "random images" if images is None else "training images",
            accuracies,
        ),
        "source": source,
        "checkpoint": path.name,
        "data": None if images is None else images.train.name,
        "retraining": files.described(spiking.provenance["retraining"]),
        "evaluation": None if evaluation_path is None else evaluation_path.name,
        "seed": seed,
        "device": place,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
    }
    report.write(report_path, contents, options.arguments())
    if settings is not None:
        files.state.unlink(missing_ok=True)
    if as_json:
        console.emit_json(contents)
    else:
        converted.show(contents, path, report_path)
        if images is None:
            console.note(
                "no data given: nothing was measured, the accuracy is unknown; give --data", quiet
            )
    if not_evaluated:
        console.note(f"not evaluated: {not_evaluated}", quiet)
    if images is None:
        return
    if evaluation_path is not None:
        _evaluate(
            evaluation_path,
            spiking,
            images,
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
    for part in (images.train, images.test):
        options.note_unreadable(part.unreadable, quiet)


@dataclass(frozen=True)
class _Images:
    """The images of a conversion: which of the training split calibrate, which of the test count.

    `calibrating` and `measured` are indices into the two splits.
    """

    train: ImageData
    calibrating: np.ndarray
    test: ImageData
    measured: np.ndarray

    @classmethod
    def opened(
        cls,
        data: str,
        loaded: LoadedModel,
        method: Method,
        calibration_images: int,
        limit: int | None,
        seed: int,
        quiet: bool,
    ) -> _Images:
        """Open both splits, whose labels must be the network's."""
        from snnconv.data import check_labels, choose_indices, open_data

        # Data of one part are divided by what calibrates: `bn` needs none of them.
        count = 0 if method.calibration == "bn" else calibration_images
        train, test = (
            open_data(data, split, calibration_images=count, seed=seed)
            for split in ("train", "test")
        )
        for part in (train, test):
            check_labels(part, loaded.num_classes, loaded.class_names)
        if test.note:
            console.note(test.note, quiet)
        return cls(
            train,
            choose_indices(len(train), calibration_images, seed),
            test,
            choose_indices(len(test), limit, seed),
        )


def _retraining(
    settings: TrainSettings | None,
    training: TrainOptions,
    recipe: Recipe | None,
    method: Method,
    images: _Images | None,
    quiet: bool,
) -> TrainSettings | None:
    """Return how to retrain, None for not at all, if images and method allow it.

    Raises UsageError for options that only retraining heeds, where there is none, and for those
    that go without it, where there is.
    """
    if images is None or (images.train.note and not training.epochs_asked(recipe)):
        training.refuse_without_training(
            "no data given: nothing to retrain on"
            if images is None
            else "the data have no training part, and are retrained on with --epochs only"
        )
        return None
    if settings is None:
        return None
    if method.calibration == "reconstruct":
        raise UsageError("--calibration reconstruct takes the place of training: give --epochs 0")
    if not method.shortcut_normalization:
        raise UsageError(
            "--no-shortcut-normalization is for networks without training: give --epochs 0"
        )
    if method.compensation != "none":
        raise UsageError(
            f"--compensation {method.compensation} makes up for the lack of training: give "
            "--epochs 0"
        )
    if images.train.note:
        if method.calibration == "bn":
            raise UsageError(
                "--calibration bn leaves all images of data in one part to be measured: give "
                "--epochs 0"
            )
        console.note("the images that calibrate retrain, and choose the epoch, too", quiet)
    return settings


def _without_training(method: Method, images: _Images, quiet: bool) -> Method:
    """Return the method for a network that is not retrained: it is reconstructed, if it can be."""
    from snnconv.reconstruction import FEWEST_IMAGES

    if method.compensation != "none" or not method.shortcut_normalization:
        return method
    if len(images.calibrating) >= FEWEST_IMAGES:
        return replace(method, calibration="reconstruct")
    console.note(
        f"{len(images.calibrating)} images are too few to fit weights to: only clips are chosen",
        quiet,
    )
    return method


def _calibration(method: Method, images: _Images | None, seed: int) -> dict[str, Any]:
    """Describe what calibrates, and on which images, as plain JSON values."""
    described: dict[str, Any] = {"method": method.calibration, "on": None}
    if images is not None and method.calibration != "bn":
        described["on"] = {
            "data_sha256": images.train.sha256(images.calibrating),
            "split": images.train.split,
            "note": images.train.note,
            "images": len(images.calibrating),
            "seed": seed,
        }
    if method.calibration == "percentile":
        described["percentile"] = method.percentile
    return described


def _held_out(method: Method, images: _Images | None, seed: int) -> np.ndarray:
    """Return the indices of the training images that compensate, if any; none calibrates."""
    import numpy as np

    from snnconv.data import choose_indices

    if method.compensation == "none":
        return np.empty(0, int)
    wanted = f"--compensation {method.compensation} needs images"
    if images is None:
        raise UsageError(f"{wanted}: give --data")
    train = images.train
    count = min(COMPENSATION_IMAGES, len(train) // 2)
    found = np.setdiff1d(choose_indices(len(train), count, seed, others=True), images.calibrating)
    if not len(found):
        raise UsageError(
            f"{wanted} that do not calibrate, and all {len(train)} do: "
            + ("give data with a training part" if train.note else "lower --calibration-images")
        )
    return found


def _batches(
    data: ImageData, loaded: LoadedModel, indices: np.ndarray, progress: console.Progress
) -> Iterator[torch.Tensor]:
    """Yield the pixels of some images in batches, and tell how far calibration is."""
    done = 0
    for pixels, _ in data.batches(loaded.preprocessing, indices):
        yield pixels
        done += len(pixels)
        progress("calibrate", done, len(indices))


def _sample(images: _Images | None, loaded: LoadedModel, seed: int) -> torch.Tensor:
    """Return the images to verify on: some of those that calibrate, else noise."""
    import torch

    from snnconv.measure import spread_images

    if images is not None:
        return spread_images(images.train, loaded.preprocessing, images.calibrating, SAMPLE_IMAGES)
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLE_IMAGES, *loaded.preprocessing.input_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _measured(
    conversion: Conversion,
    loaded: LoadedModel,
    with_relu: torch.nn.Module | None,
    images: _Images,
    seed: int,
    device: str,
    progress: console.Progress,
) -> dict[str, Any]:
    """Return the accuracies of a classifier on the test images, by what was measured.

    `ann` is the network as it came, `ann_with_relu` the one `with_relu` in place of other
    activations. A retrained network is measured as it was trained, in float (`qann_float`), and in
    integers (`qann`).
    """
    from snnconv.measure import top1_percents

    network = conversion.network
    if network.logits is None:
        return {}
    forwards = {"ann": _forward(loaded.model, loaded, device)}
    if with_relu is not None:
        forwards["ann_with_relu"] = _forward(with_relu, loaded, device)
    if network.provenance["retraining"] is not None:
        forwards |= _quantised_forwards(conversion, device)
    found = top1_percents(
        forwards,
        images.test,
        network.preprocessing,
        images.measured,
        device=device,
        progress=progress,
    )
    on = {"split": images.test.split, "data_sha256": images.test.sha256(images.measured)}
    drawn = {"drawn": {"images": len(images.measured), "seed": seed}}
    found["ann"] |= {**on, **drawn}
    if with_relu is not None:
        found["ann_with_relu"] |= on
    return found


def _forward(
    model: torch.nn.Module, loaded: LoadedModel, device: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from pixels to the logits of an ANN."""
    model = model.to(device)
    return lambda pixels: model(loaded.preprocessing.normalize(pixels))


def _quantised_forwards(
    conversion: Conversion, device: str
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the functions from pixels to the logits of the QANN, in float and in integers."""
    from snnconv.engine import prepare
    from snnconv.engine.linear import exact_arithmetic
    from snnconv.normalize import rounded_qann

    network = conversion.network
    (readout,) = network.readouts
    runner = prepare(network, network.timesteps, device=device)
    qann = rounded_qann(conversion.qann, network).to(device)

    def in_float(pixels: torch.Tensor) -> torch.Tensor:
        with exact_arithmetic():
            outputs = qann(
                network.preprocessing.center(pixels),
                network.timesteps,
                offset=network.rounding_offset,
            )
        return outputs[readout.name].flatten(1)

    def in_integers(pixels: torch.Tensor) -> torch.Tensor:
        return runner.endpoint(pixels).logits(network, readout.name).flatten(1)

    return {"qann_float": in_float, "qann": in_integers}


def _described(
    loaded: LoadedModel, images: _Images | None, ann: dict[str, Any] | None
) -> dict[str, Any]:
    """Describe the ANN a spiking network came from, and how accurate it is, if that is known."""
    names = loaded.class_names
    if names is None and images is not None:
        own = images.train.class_names
        names = own if own is not None and len(own) == loaded.num_classes else None
    return {
        "name": loaded.name,
        "args": loaded.model_args,
        "channels": loaded.channels,
        "num_classes": loaded.num_classes,
        "class_names": None if names is None else list(names),
        "weights_sha256": loaded.weights_sha256,
        "ann": ann,
    }


def _reason_not_to_evaluate(
    path: Path, images: _Images, processes: int, limit: int | None, seed: int, force: bool
) -> str:
    """Say why the evaluation at `path` must wait, an empty text if it need not."""
    if processes > 1:
        return "several processes have converted; run snnconv eval"
    try:
        evaluation.require_writable(
            path,
            images.test,
            images.measured,
            seed,
            limit,
            page=True,
            named=False,
            force=force,
        )
    except UsageError as error:
        return error.message
    return ""


def _evaluate(
    path: Path,
    network: SpikingNetwork,
    images: _Images,
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
            images.test,
            images.measured,
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
