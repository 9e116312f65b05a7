"""Fine-tuning of a spiking network for the end of its T steps (docs/concepts.md, "Fine-tuning").

`layerwise` is Fast-SNN's (arXiv 2305.19868), `end_to_end` tunes all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from snnconv.data import ImageData, check_labels, choose_indices
from snnconv.errors import DataError
from snnconv.finetune.agreement import Agreement
from snnconv.finetune.course import CACHE_BYTES, SCHEDULE, Course
from snnconv.finetune.end_to_end import EndToEndTuning, EpochResult
from snnconv.finetune.images import Images
from snnconv.finetune.layerwise import LayerResult, LayerwiseTuning
from snnconv.finetune.settings import LAYER_IMAGES, FinetuneSettings, divide, held_out_seed
from snnconv.network import SpikingNetwork
from snnconv.progress import Progress, silent

__all__ = [
    "SCHEDULE",
    "Agreement",
    "Course",
    "EndToEndTuning",
    "EpochResult",
    "FinetuneSettings",
    "Finetuning",
    "LayerResult",
    "LayerwiseTuning",
    "tune",
]


class Finetuning:
    """The fine-tuning of one network: layer by layer, all layers together, or one after the other.

    `data` is a training split. Raises DataError for too few images, UsageError if no layer is left
    to be tuned.
    """

    def __init__(
        self,
        network: SpikingNetwork,
        data: ImageData,
        settings: FinetuneSettings,
        *,
        seed: int = 0,
        device: str = "cpu",
        memory: int = CACHE_BYTES,
        progress: Progress = silent,
    ) -> None:
        """Choose images and layers."""
        self.network, self.settings, self.seed = network, settings, seed
        pool, self.held_out = divide(network, len(data), settings.held_out, seed)
        self.kept_apart = len(data) - len(pool)
        if not len(self.held_out):
            raise DataError(f"{data.name}: {len(data)} training images are too few to tune on")
        images = Images(network, data, seed, device)
        self.augmentation = images.augmentation
        self.agreement = Agreement(images, self.held_out, settings.batch_size)
        self.layerwise: LayerwiseTuning | None = None
        self.end_to_end: EndToEndTuning | None = None
        if settings.epochs_per_layer:
            self.taught = _drawn(pool, settings.images or LAYER_IMAGES, seed)
            self.layerwise = LayerwiseTuning(
                images,
                settings,
                self.taught,
                self.held_out,
                self.agreement,
                memory=memory,
                progress=progress,
            )
        if settings.epochs:
            self.taught = _drawn(pool, settings.images, seed)
            self.end_to_end = EndToEndTuning(
                images, settings, self.taught, self.agreement, progress=progress
            )

    def run(self) -> Iterator[LayerResult | EpochResult]:
        """Go on with what is left; yield what became of each layer, then of each epoch."""
        if self.layerwise is not None:
            yield from self.layerwise.run()
        if self.end_to_end is not None:
            if self.layerwise is not None and not self.end_to_end.done:
                self.end_to_end.begin(self.layerwise.tuned)
            yield from self.end_to_end.run()

    @property
    def tuned(self) -> SpikingNetwork:
        """The network as it is now, with what was done to it in its provenance."""
        found = self.network
        if self.layerwise is not None:
            found = self.layerwise.tuned
        if self.end_to_end is not None and self.end_to_end.done:
            found = self.end_to_end.tuned
        told = {**found.provenance, "finetuning": self.described()}
        return replace(found, schedule=SCHEDULE, drain=None, provenance=told)

    def described(self) -> dict[str, Any]:
        """Return settings and results as plain JSON values."""
        layers = self.layerwise.done if self.layerwise is not None else []
        epochs = self.end_to_end.done if self.end_to_end is not None else []
        return {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "images": {
                "layers": 0 if self.layerwise is None else len(self.layerwise.taught),
                "together": 0 if self.end_to_end is None else len(self.end_to_end.taught),
            },
            "held_out_images": len(self.held_out),
            "kept_apart": self.kept_apart,
            "held_out_seed": held_out_seed(self.network, self.seed),
            "augmentation": self.augmentation and asdict(self.augmentation),
            "layers": [asdict(layer) for layer in layers],
            "epochs": [asdict(epoch) for epoch in epochs],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what has been done so far, tensors and plain values, to go on from."""
        parts = {"layerwise": self.layerwise, "end_to_end": self.end_to_end}
        return {
            name: part.state_dict()
            for name, part in parts.items()
            if part is not None and part.done
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after what a state has."""
        if self.layerwise is not None and "layerwise" in state:
            self.layerwise.load_state_dict(state["layerwise"])
        if self.end_to_end is not None and "end_to_end" in state:
            self.end_to_end.load_state_dict(state["end_to_end"])


def tune(
    network: SpikingNetwork,
    data: ImageData,
    settings: FinetuneSettings | None = None,
    **options: Any,
) -> SpikingNetwork:
    """Fine-tune a network for the end of its T steps.

    `data` is a training split; `options` are those of `Finetuning`. Returns the tuned network,
    which runs under `paper`; what became of each layer stands in its provenance, `finetuning`.
    Raises UsageError for settings that do not go together, DataError for data that do not fit.
    """
    if (logits := network.logits) is not None:
        check_labels(data, logits.shape[0], network.model.get("class_names"))
    with torch.enable_grad():
        tuning = Finetuning(network, data, settings or FinetuneSettings(), **options)
        for _ in tuning.run():
            pass
    return tuning.tuned


def _drawn(pool: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Draw so many of the images that may teach, or take all."""
    return pool[choose_indices(len(pool), count, seed)]
