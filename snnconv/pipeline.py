"""The main job: from a pretrained model to a verified spiking network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnconv.calibrate import calibrate_
from snnconv.choices import (
    CALIBRATIONS,
    COMPENSATIONS,
    DEFAULT_PERCENTILE,
    DEFAULT_TIMESTEPS,
    DEFAULT_WEIGHT_BITS,
    default_schedule,
)
from snnconv.compensation import compensate
from snnconv.engine import prepare
from snnconv.errors import NotConvertibleError, NotEqualError, UsageError, require_one_of
from snnconv.folding import fold
from snnconv.graph import Traced, differing_output, on_meta, trace
from snnconv.network import Island, SpikingNetwork, check_settings, wiring
from snnconv.neuron import rounding_offset
from snnconv.normalize import integerize, without_shortcut_normalization
from snnconv.plan import ConversionPlan, make_plan
from snnconv.preprocess import Preprocessing
from snnconv.progress import Progress, silent
from snnconv.quant import Qann
from snnconv.reconstruction import (
    Change,
    Reconstruction,
    Reservoir,
    most_images,
    reconstruct_,
)
from snnconv.verify import FloatAgreement, Verification, compare_float, verify

RECONSTRUCT = "reconstruct"

Retrain = Callable[[Traced, ConversionPlan, Qann], dict[str, Any]]


@dataclass(frozen=True)
class Conversion:
    """Everything that came about on the way to the spiking network.

    `uncompensated` is the network as the QANN has it, where compensation, or shortcuts that are not
    normalised, have made another of it. `changes` are what reconstruction added to the ANN's folded
    weights and biases, by layer.
    """

    traced: Traced
    plan: ConversionPlan
    qann: Qann
    network: SpikingNetwork
    uncompensated: SpikingNetwork | None = None
    changes: Mapping[str, Change] | None = None


def convert(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: Iterable[Tensor] | None = None,
    /,
    *,
    timesteps: int = DEFAULT_TIMESTEPS,
    calibration: str = "mse",
    percentile: float = DEFAULT_PERCENTILE,
    weight_bits: int = DEFAULT_WEIGHT_BITS,
    retrain: Retrain | None = None,
    shortcut_normalization: bool = True,
    compensation: str = "none",
    strict: bool = False,
    held_out: Iterable[Tensor] = (),
    progress: Progress = silent,
    **settings: Any,
) -> Conversion:
    """Trace, plan, fold, calibrate and integerise a model; `check_equal` verifies the result.

    `images` are batches of uint8 pixels `[N, C, H, W]` to calibrate on; the calibration `bn` needs
    none, and `percentile` belongs to the calibration of that name. `reconstruct` is `mse`, after
    which every layer is fitted to quantised inputs (`snnconv.reconstruction`), instead of training.
    `retrain` may train the traced
    network and its QANN, in place, before they become integers (`snnconv.train`); what it returns
    goes into the provenance, as does the plan. Without training, `compensation` makes up for what
    neurons lose in T steps (`snnconv.compensation`), on `held_out` images that are not those
    calibrated on, and `shortcut_normalization` can be left out, to see what it is good for.
    Functions that are no sum of spikes become analog islands, unless the conversion is `strict`.
    `settings` are further fields of SpikingNetwork (`schedule`, `neuron`, ...).
    Raises NotConvertibleError, naming every reason, for a model that cannot become spiking,
    UsageError for settings there are none of, images of another kind and a model without weights,
    DataError if there are no images to calibrate on.
    """
    require_one_of("calibration", calibration, CALIBRATIONS)
    require_one_of("compensation", compensation, COMPENSATIONS)
    settings.setdefault("schedule", default_schedule(compensation))
    check_settings(timesteps, weight_bits, **settings)
    if on_meta(model):
        raise UsageError(
            "the model has shapes only (it is on torch's meta device); load its weights, or "
            "`examine` it"
        )
    images = None if images is None else preprocessing.checked(images)
    held_out = preprocessing.checked(held_out)
    progress("trace", 0, 1)
    traced = trace(model, preprocessing.input_size)
    plan = make_plan(traced)
    plan.require_convertible(strict=strict)
    qann = fold(traced, plan)
    check_fold(traced, plan, qann)
    progress("trace", 1, 1)
    reference, changes, reconstruction = qann, None, None
    offset = rounding_offset(settings.get("initial_membrane", "half"))
    if calibration == RECONSTRUCT:
        if retrain is not None:
            raise UsageError("calibration 'reconstruct' takes the place of training: choose one")
        reference = copy.deepcopy(qann)
        found = _reconstruct_(qann, preprocessing, images, timesteps, weight_bits, offset, progress)
        changes, reconstruction = found.changes, found.to_dict()
    else:
        batches = None if images is None else (preprocessing.normalize(p) for p in images)
        calibrate_(qann, batches, timesteps, calibration, percentile, offset=offset)
    provenance = {
        **settings.pop("provenance", {}),
        "plan": plan.to_dict(),
        "reconstruction": reconstruction,
        "retraining": None,
    }
    if retrain is not None:
        provenance["retraining"] = retrain(traced, plan, qann)
    settings["provenance"] = provenance
    network = integerize(qann, preprocessing, timesteps, weight_bits=weight_bits, **settings)
    changed = network
    if not shortcut_normalization:
        ablated = without_shortcut_normalization(qann, preprocessing)
        changed = integerize(ablated, preprocessing, timesteps, weight_bits=weight_bits, **settings)
    provenance["shortcut_normalization"] = shortcut_normalization
    compensated, provenance["compensation"] = compensate(
        changed, compensation, reference, held_out, progress
    )
    uncompensated = None if compensated is network else network
    return Conversion(traced, plan, qann, compensated, uncompensated, changes)


def _reconstruct_(
    qann: Qann,
    preprocessing: Preprocessing,
    images: Iterable[Tensor] | None,
    timesteps: int,
    weight_bits: int,
    offset: float,
    progress: Progress,
) -> Reconstruction:
    """Calibrate a QANN by `mse`, and fit it layer by layer on as many of the images as fit."""
    if images is None:
        raise UsageError("calibration 'reconstruct' needs images; without data use 'bn'")
    kept = Reservoir(most_images(qann))
    batches = (preprocessing.normalize(kept.add(pixels)) for pixels in images)
    calibrate_(qann, batches, timesteps, "mse", offset=offset)
    return reconstruct_(
        qann,
        preprocessing,
        kept.images(),
        timesteps,
        weight_bits=weight_bits,
        offset=offset,
        progress=progress,
    )


def check_fold(traced: Traced, plan: ConversionPlan, qann: Qann) -> None:
    """Raise NotConvertibleError unless the folded network computes what the traced one does.

    Differences come from tensors that are changed in place while others still read them.
    """
    name = differing_output(
        traced.module, qann, traced.example, lambda: fold(traced, plan, torch.float64)
    )
    if name is not None:
        raise NotConvertibleError(
            f"the folded network computes another {name} than the model: a tensor is changed "
            "in place (inplace=True, +=) while another layer still reads it (write it anew), or "
            "a hook changes what a layer gives"
        )


def check_equal(
    conversion: Conversion, pixels: Tensor, timesteps: int | None = None
) -> tuple[Verification, FloatAgreement]:
    """Verify a conversion on images uint8 `[N, C, H, W]`, and compare it with the float QANN.

    The end point is held against the traced graph, without compensation, which no ANN has. A
    simulation that must be exact (`drain`, for unsigned neurons `wait`) is held against the end
    point. Raises NotEqualError with the name of the first layer that differs.
    """
    network = conversion.network
    integers = conversion.uncompensated or network
    timesteps = network.timesteps if timesteps is None else timesteps
    engine = prepare(integers, timesteps, device=pixels.device)
    end = engine.endpoint(pixels, maps=True)
    found = verify(
        conversion.traced,
        conversion.plan,
        integers,
        pixels,
        timesteps,
        end.counts,
        end.charges,
        conversion.changes,
    )
    found.require_equal()
    agreement = compare_float(conversion.qann, integers, pixels, timesteps, end.counts, end.charges)
    if network is not integers:
        engine = prepare(network, timesteps, device=pixels.device)
        end = engine.endpoint(pixels)
    name = "drain" if network.neuron == "signed" else "wait"
    course = engine.simulate(pixels, network.timetable(timesteps, name=name, drain=None))
    for population in network.populations:
        if not torch.equal(course.counts[population.name], end.counts[population.name]):
            raise NotEqualError(
                f"the simulation does not settle at the quantised ANN; first: {population.path}"
            )
    return found, agreement


def float_qann(model: nn.Module, network: SpikingNetwork) -> Qann:
    """Return the float QANN of a model, with the clips of the spiking network made from it.

    Raises UsageError if the network was made from another architecture.
    """
    traced = trace(model, network.preprocessing.input_size)
    qann = fold(traced, make_plan(traced))
    if wiring(network.weighted) != wiring(qann.weighted()):
        raise UsageError(
            "the ANN has other layers than the network the checkpoint was made from, or an older "
            "snnconv took them otherwise: convert it again"
        )
    clips = {p.name: p.clip for p in network.populations}
    for layer in qann.populations():
        layer.clip.copy_(clips[layer.name])
    units = {n.name: n.unit for n in network.nodes if isinstance(n, Island)}
    for island in qann.islands():
        island.unit.copy_(units[island.name])
    return qann
