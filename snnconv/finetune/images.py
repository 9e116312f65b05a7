"""The images of fine-tuning: as retraining saw them, but never the same ones.

A network knows the images of its training as they are, and may know them as they were augmented,
so fine-tuning draws anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from snnconv.data import ImageData
from snnconv.data.augment import Augmentation, training_batches
from snnconv.network import SpikingNetwork

# Epochs of retraining are counted from 0: these are none of them.
FIRST_EPOCH = 2**30
AUGMENTED_CHANNELS = (1, 3)


@dataclass(frozen=True)
class Images:
    """Training images for one network."""

    network: SpikingNetwork
    data: ImageData
    seed: int
    device: torch.device | str = "cpu"

    @property
    def augmentation(self) -> Augmentation | None:
        """What is done to them: as in retraining, if there was any; None for odd channels."""
        if self.network.preprocessing.input_size[0] not in AUGMENTED_CHANNELS:
            return None
        retraining = self.network.provenance.get("retraining") or {}
        return Augmentation(**retraining.get("settings", {}).get("augmentation", {}))

    def batches(self, parts: Sequence[np.ndarray], epoch: int = 0) -> Iterator[Tensor]:
        """Yield the pixels of each part, uint8 `[N, C, H, W]`; N is 0 if none can be read.

        In one epoch an image is always augmented alike.
        """
        augmentation = self.augmentation
        if augmentation is None:
            for part in parts:
                read = self.data.batches(
                    self.network.preprocessing, part, len(part), asked=len(self.data)
                )
                nothing = torch.zeros(0, *self.network.preprocessing.input_size, dtype=torch.uint8)
                yield next((pixels for pixels, _ in read), nothing).to(self.device)
            return
        for pixels, _ in training_batches(
            self.data,
            self.network.preprocessing,
            augmentation,
            ((FIRST_EPOCH + epoch, part) for part in parts),
            seed=self.seed,
        ):
            yield pixels.to(self.device)
