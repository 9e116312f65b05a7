"""The options of quantized retraining, and what `snnconv convert` does with them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snnconv.choices import DEFAULT_PERCENTILE
from snnconv.errors import UsageError
from snnconv.files import SUFFIX

from . import console, options
from .source import complete_source, fit_to_images

if TYPE_CHECKING:
    from snnconv.data import ImageData
    from snnconv.load import LoadedModel
    from snnconv.network import SpikingNetwork
    from snnconv.pipeline import Retrain
    from snnconv.progress import Progress
    from snnconv.recipe import Recipe
    from snnconv.train import TrainSettings

LARGEST_WORKERS = 8
# Images of so many are hashed to tell one training set from another.
HASHED_IMAGES = 1000


@dataclass(frozen=True)
class TrainOptions:
    """What the options say about retraining; None where they say nothing."""

    epochs: int | None
    lr: float | None
    batch_size: int | None
    distill: bool | None
    teacher: str | None
    start_from: str | None
    workers: int | None
    resume: bool

    def settings(self, recipe: Recipe | None) -> TrainSettings | None:
        """Return the recipe's settings, or the defaults, with the options put in.

        None for no epochs. Raises UsageError for values that make no sense.
        """
        from snnconv.train import TrainSettings

        values = dict(recipe.train) if recipe else {}
        if (values.get("epochs") if self.epochs is None else self.epochs) == 0:
            self.refuse_without_training("--epochs 0 retrains nothing")
            return None
        given = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        values |= {key: value for key, value in given.items() if value is not None}
        if self.distill is not None:
            usual = values.get("distill") or TrainSettings.distill
            values["distill"] = usual if self.distill else 0.0
        settings = TrainSettings.from_dict(recipe.name if recipe else "training", values)
        if self.teacher and not settings.distill:
            raise UsageError("without distillation a --teacher would teach nothing")
        return settings

    def epochs_asked(self, recipe: Recipe | None) -> bool:
        """Return whether the options or the recipe name a number of epochs."""
        return self.epochs is not None or bool(recipe and "epochs" in recipe.train)

    def refuse_without_training(self, why: str) -> None:
        """Raise UsageError if the command line has an option that only retraining heeds."""
        heeded = [f.name for f in fields(self) if not (f.name == "epochs" and self.epochs == 0)]
        useless = options.given(*heeded)
        if useless:
            raise UsageError(f"{why}; {', '.join(useless)} would do nothing")


_OPTIONS = (
    click.option(
        "--epochs",
        type=click.IntRange(min=0),
        help="Epochs of quantized retraining; 0 converts without training.  [default: the "
        "recipe's, else 12; without a training split 0]",
    ),
    click.option(
        "--lr",
        type=click.FloatRange(0, 10, min_open=True),
        help="Highest learning rate.  [default: the recipe's, else 0.0007]",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Images per step, over all processes.  [default: the recipe's, else 128]",
    ),
    click.option(
        "--distill/--no-distill",
        default=None,
        help="Learn from a teacher's outputs, or from the labels only.  [default: distill]",
    ),
    click.option(
        "--teacher",
        metavar="CHECKPOINT|NAME|zoo:NAME",
        shell_complete=complete_source,
        help="Learn from the outputs of this network for the same classes, such as a larger one, "
        "not from those of the one that is converted.",
    ),
    click.option(
        "--start-from",
        metavar="CHECKPOINT|zoo:NAME",
        shell_complete=options.complete_checkpoint,
        help="Begin with the weights of a spiking checkpoint of the same network, such as one of "
        "more time steps or weight bits.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        help="Processes that read training images.  [default: 0 for images in memory, else one "
        f"per processor, {LARGEST_WORKERS} at most]",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the retraining that was interrupted here; --force begins anew.",
    ),
)


# Adds the options of retraining; they arrive as `training: TrainOptions`.
train_options = options.gathered("training", TrainOptions, _OPTIONS)


@dataclass(frozen=True)
class TrainFiles:
    """What a retraining writes by the way, beside the checkpoint it is for."""

    state: Path
    metrics: Path

    @classmethod
    def beside(cls, checkpoint: Path) -> TrainFiles:
        """Name the files of a checkpoint."""
        stem = checkpoint.name.removesuffix(SUFFIX)
        return cls(
            checkpoint.with_name(f"{stem}.train.pt"), checkpoint.with_name(f"{stem}.metrics.jsonl")
        )

    def described(self, retraining: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return what is known of a retraining with a line per epoch, for the report."""
        if retraining is None:
            return None
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return {**retraining, "epochs": [json.loads(line) for line in lines]}

    def require_free(self, resume: bool, force: bool, quiet: bool) -> None:
        """Raise UsageError if an interrupted training would be lost, or there is none to resume."""
        options.require_free(self.state, "retraining", resume, force, quiet)


def retrainer(
    training: TrainOptions,
    settings: TrainSettings,
    loaded: LoadedModel,
    data: ImageData,
    files: TrainFiles,
    *,
    timesteps: int,
    weight_bits: int,
    initial_membrane: str,
    images: Callable[[], Iterable[Any] | None],
    calibration: dict[str, Any],
    replaced: dict[str, int],
    seed: int,
    device: str,
    progress: Progress,
    quiet: bool,
) -> Retrain:
    """Return the function that retrains a calibrated network in place.

    `images` gives the pixels to calibrate on, `calibration` says how, as plain JSON values;
    `replaced` are the activations that have become ReLU.
    """
    from snnconv import __version__
    from snnconv.checkpoint import load_network, sha256
    from snnconv.data import choose_indices
    from snnconv.load import load_model
    from snnconv.train import retrain, teacher_for

    teacher, taught_by = loaded.model, None
    if training.teacher is not None:
        other = fit_to_images(load_model(training.teacher), data, quiet)
        teacher = teacher_for(other, loaded)
        taught_by = {"name": other.name, "weights_sha256": other.weights_sha256}
    start, started_from = None, None
    if training.start_from is not None:
        path, _ = options.spiking_checkpoint(training.start_from, quiet)
        start = load_network(path)
        started_from = {"name": path.name, "sha256": sha256(start)}
        _note_other_draw(start, path, seed, quiet)
    workers = training.workers
    if workers is None:
        in_memory = data.images.size is not None
        workers = 0 if in_memory else min(os.cpu_count() or 1, LARGEST_WORKERS)
    shared: dict[str, Any] = {
        "timesteps": timesteps,
        "weight_bits": weight_bits,
        "initial_membrane": initial_membrane,
    }
    identity = {
        **shared,
        "network": loaded.name,
        "model_args": loaded.model_args,
        "weights_sha256": loaded.weights_sha256,
        "preprocessing": loaded.preprocessing.to_dict(),
        "version": __version__,
        "images": len(data),
        "labels_sha256": hashlib.sha256(data.labels.tobytes()).hexdigest(),
        "data_sha256": data.sha256(choose_indices(len(data), HASHED_IMAGES, seed)),
        "calibration": calibration,
        "replaced_activations": replaced,
        "teacher": taught_by,
        "started_from": started_from,
    }
    return functools.partial(
        retrain,
        teacher=teacher,
        taught_by=taught_by,
        start=start,
        started_from=started_from,
        data=data,
        preprocessing=loaded.preprocessing,
        settings=settings,
        calibration=calibration["method"],
        percentile=calibration.get("percentile", DEFAULT_PERCENTILE),
        images=images,
        resume=training.resume,
        seed=seed,
        device=device,
        workers=workers,
        identity=identity,
        state=files.state,
        metrics=files.metrics,
        progress=progress,
        announce=lambda text: console.note(text, quiet),
        **shared,
    )


def _note_other_draw(start: SpikingNetwork, path: Path, seed: int, quiet: bool) -> None:
    """Say so if the images that choose the epoch have taught the network to start from."""
    from snnconv.finetune.settings import held_out_seed

    if start.provenance.get("retraining") and (theirs := held_out_seed(start, seed)) != seed:
        console.note(
            f"hint: {path.name} was trained with --seed {theirs}, and most of the images that "
            f"choose the epoch here have taught it; with --seed {theirs} they are those it held "
            "out",
            quiet,
        )
