"""Quantization-aware training of a traced network (arXiv 2305.19868).

What is trained are the network's own parameters, with BatchNorm as in inference (at first by
batches, if asked), and the clips.
Every forward pass folds them, rounds them to the integers the spiking network would hold, and
quantises every activation to T levels; gradients pass the roundings straight. So the network that
is trained is the one that is stored. See docs/concepts.md, "Retraining".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from snnconv.calibrate import calibrate_
from snnconv.choices import DEFAULT_PERCENTILE, DEFAULT_WEIGHT_BITS
from snnconv.data import ImageData, check_labels
from snnconv.errors import UsageError
from snnconv.graph import Traced, evaluating
from snnconv.network import SpikingNetwork
from snnconv.neuron import rounding_offset
from snnconv.plan import ConversionPlan
from snnconv.preprocess import Preprocessing
from snnconv.quant import Qann, only_logits
from snnconv.train.loop import Training
from snnconv.train.settings import TrainSettings
from snnconv.train.student import Student
from snnconv.train.teacher import teacher_for
from snnconv.train.warm_start import warm_start_

__all__ = ["Student", "TrainSettings", "Training", "retrain", "teacher_for"]


def retrain(
    traced: Traced,
    plan: ConversionPlan,
    qann: Qann,
    *,
    teacher: nn.Module,
    taught_by: dict[str, Any] | None = None,
    data: ImageData,
    preprocessing: Preprocessing,
    timesteps: int,
    weight_bits: int = DEFAULT_WEIGHT_BITS,
    initial_membrane: str = "half",
    settings: TrainSettings | None = None,
    calibration: str = "mse",
    percentile: float = DEFAULT_PERCENTILE,
    images: Callable[[], Iterable[Tensor] | None] = lambda: None,
    start: SpikingNetwork | None = None,
    started_from: dict[str, Any] | None = None,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Retrain a calibrated network in place: the traced one's parameters, and its QANN.

    `teacher` is the float network to learn from, on normalised images; `taught_by` names it in the
    provenance if it is another than the one traced. `data` is a training split. `images` gives
    batches of pixels uint8 `[N, C, H, W]` to calibrate the first stage on, by the method
    `calibration` and its `percentile`, where the settings name stages. `start` is a spiking network
    of the same ANN to begin with, clips and all (`snnconv.train.warm_start`), which `images` are
    for, too; `started_from` names it. `options` are those of `Training`. Returns settings and what
    was chosen, as plain JSON values, for the provenance. With `functools.partial` this is the
    `retrain` of `snnconv.convert`. Raises UsageError for settings that do not go together,
    DataError for data that do not fit the network, and what `Training.run` raises.
    """

    settings = settings or TrainSettings()
    if (logits := only_logits(qann.readouts())) is not None:
        check_labels(data, math.prod(logits.shape))
    if start is not None:
        pixels = images()
        if pixels is None:
            raise UsageError("training: a network to start from needs images to calibrate on")
        warm_start_(traced, plan, qann, preprocessing, initial_membrane, start, pixels)
    elif settings.stages:
        if calibration == "bn":
            raise UsageError("training: stages need images to calibrate on, not --calibration bn")
        batches = (preprocessing.normalize(p) for p in images() or ())
        offset = rounding_offset(initial_membrane)
        calibrate_(qann, batches, settings.stages[0], calibration, percentile, offset=offset)
    with torch.enable_grad(), evaluating(teacher):
        student = Student(
            traced, plan, qann, preprocessing, timesteps, weight_bits, initial_membrane
        )
        training = Training(student, teacher, data, settings, **options)
        return {**training.run(resume), "teacher": taught_by, "started_from": started_from}
