"""How far a network at T is from the quantised ANN it was before it was tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from snnconv.engine import prepare
from snnconv.finetune.course import SCHEDULE
from snnconv.network import SpikingNetwork


def divergence(logits: Tensor, wanted: Tensor) -> float:
    """Return the KL divergence of class probabilities from those of `wanted`, summed over images.

    Both are logits, float64 `[N, classes]`.
    """
    logs = logits.log_softmax(1), wanted.log_softmax(1)
    return float(F.kl_div(*logs, log_target=True, reduction="sum"))


class Agreement:
    """Compares networks at T with the quantised ANN of one before it was tuned."""

    def __init__(
        self,
        network: SpikingNetwork,
        pixels: Callable[[], Iterable[Tensor]],
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the network and batches of images uint8 `[N, C, H, W]`, read when first needed."""
        self.network, self.pixels, self.device = network, pixels, torch.device(device).type
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
                for pixels in self.pixels()
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
