"""How far a network at T is from the quantised ANN it was before it was tuned."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from snnconv.divergence import divergence
from snnconv.engine import prepare
from snnconv.finetune.course import SCHEDULE, divided
from snnconv.finetune.images import Images
from snnconv.network import SpikingNetwork


class Agreement:
    """Compares networks at T with the quantised ANN of one before it was tuned."""

    def __init__(self, images: Images, indices: np.ndarray, batch: int) -> None:
        """Take images of the network before; they are read when first needed."""
        self.network, self.device = images.network, torch.device(images.device).type
        self.images, self.parts = images, divided(indices, batch)
        self.wanted: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, network: SpikingNetwork) -> dict[str, float] | None:
        """Return the mean KL divergence of probabilities and the share of equal arg-maxes.

        None if the network is no classifier.
        """
        readout = network.logits
        if readout is None:
            return None
        timesteps = network.timesteps
        if self.wanted is None:
            before = prepare(self.network, timesteps, device=self.device)
            self.wanted = [
                (pixels, before.endpoint(pixels).logits(self.network, readout.name).flatten(1))
                for pixels in self.images.batches(self.parts)
                if len(pixels)
            ]
        runner = prepare(network, timesteps, device=self.device)
        schedule = network.timetable(name=SCHEDULE)
        total, same, images = 0.0, 0, 0
        for pixels, wanted in self.wanted:
            found = runner.simulate(pixels, schedule).logits(network, readout.name)[-1].flatten(1)
            total += divergence(found, wanted)
            same += int((found.argmax(1) == wanted.argmax(1)).sum())
            images += len(found)
        return {"kl": total / images, "argmax_percent": 100 * same / images}
