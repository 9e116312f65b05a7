"""The accuracy of the ANN a spiking checkpoint was made from, stored or measured anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from snnconv.errors import CheckpointError, UsageError
from snnconv.launch import is_leader

from . import console

if TYPE_CHECKING:
    import numpy as np


def stored_ann(network: Any, images: Any) -> dict[str, Any] | None:
    """Return the ANN's accuracy as stored at conversion, if it is of these data."""
    if drawn_for_ann(network, images) is None:
        return None
    stored = network.model["ann"]
    return {"top1_percent": stored["top1_percent"], "images": stored["images"], "source": "stored"}


def drawn_for_ann(network: Any, images: Any) -> np.ndarray | None:
    """Return the images the ANN was measured on at conversion, if it was on some of these."""
    from snnconv.data import choose_indices

    stored = network.model.get("ann")
    if stored is None or stored["split"] != images.split:
        return None
    drawn = choose_indices(len(images), stored["drawn"]["images"], stored["drawn"]["seed"])
    return drawn if images.sha256(drawn) == stored["data_sha256"] else None


def load_ann(source: str, network: Any) -> Any:
    """Load the model a network was made from. Raises UsageError if it is another."""
    from snnconv.load import load_model

    if not network.model:
        raise UsageError("--ann: the checkpoint does not say which network it was made from")
    name = network.model["name"]
    try:
        loaded = load_model(
            source,
            arch=name,
            model_args=network.model.get("args", {}),
            channels=network.model.get("channels"),
        )
    except CheckpointError as error:
        if not error.problems:
            raise
        what = f"--ann {source}: no weights of the {name} that the checkpoint was made from"
        raise UsageError(what, error.problems) from error
    if loaded.weights_sha256 != network.model["weights_sha256"]:
        raise UsageError(f"--ann {source}: the checkpoint was made from other weights")
    return loaded.model


def forwards_of(
    model: Any, network: Any, timesteps: int, device: str
) -> dict[str, Callable[[Any], Any]]:
    """Return what maps pixels to the logits of the ANN, `ann`, and of its QANN, `qann_float`.

    The latter only if no other weights became of the ANN's. Raises UsageError if the network is no
    classifier.
    """
    from snnconv.diagnosis import has_other_weights
    from snnconv.measure import classes
    from snnconv.pipeline import float_qann
    from snnconv.replace import replace_activations

    normalize = network.preprocessing.normalize
    model = model.to(device)
    readout = classes(network)
    forwards: dict[str, Callable[[Any], Any]] = {"ann": lambda pixels: model(normalize(pixels))}
    if not has_other_weights(network):
        qann_of = model
        if network.provenance.get("replaced_activations"):
            qann_of, _ = replace_activations(qann_of)
        qann = float_qann(qann_of, network).to(device)

        def quantised(pixels: Any) -> Any:
            outputs = qann(normalize(pixels), timesteps, offset=network.rounding_offset)
            return outputs[readout.name].flatten(1)

        forwards["qann_float"] = quantised
    return forwards


def measure_forwards(
    forwards: dict[str, Callable[[Any], Any]],
    network: Any,
    images: Any,
    indices: Any,
    device: str,
    progress: console.Progress,
) -> dict[str, Any]:
    """Measure what `forwards_of` gave on the same images."""
    from snnconv.measure import top1_percents

    measured = top1_percents(
        forwards, images, network.preprocessing, indices, device=device, progress=progress
    )
    return {
        name: {"top1_percent": found["top1_percent"], "source": "measured"}
        for name, found in measured.items()
    }


def diagnosed(
    network: Any,
    images: Any,
    indices: Any,
    timetable: Any,
    model: Any,
    device: str,
    progress: console.Progress,
) -> dict[str, Any] | None:
    """Return which layer loses what by which cause, on some of the images."""
    from snnconv.diagnosis import diagnose, images_wanted
    from snnconv.engine import prepare
    from snnconv.measure import spread_images

    if not is_leader():
        return None
    pixels = spread_images(images, network.preprocessing, indices, images_wanted(network))
    pixels = pixels.to(device)
    runner = prepare(network, timetable.timesteps, device=device)
    return diagnose(network, runner, pixels, timetable, model, progress)
