"""How to fine-tune, and on which images."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import numpy as np

from snnconv.data import choose_indices
from snnconv.errors import UsageError, require_types
from snnconv.network import Population, Readout, SpikingNetwork

HELD_OUT_SHARE = 0.1
# How many images teach a layer, if the settings do not say.
LAYER_IMAGES = 10_000
BOUNDS = {
    "epochs_per_layer": (0, 1000),
    "epochs": (0, 1000),
    "lr": (1e-6, 100),
    "batch_size": (1, 10**6),
    "images": (1, 10**9),
    "held_out": (1, 10**9),
}


@dataclass(frozen=True)
class FinetuneSettings:
    """How to tune: `epochs_per_layer` layer by layer, then `epochs` all layers together, by Adam.

    Either may be 0. `lr` is the first rate, in integers a step; it falls to 0 along half a cosine,
    for layers in every one of them. `images` training images teach; None takes 10,000 for each
    layer, and all there are for all layers together. `layers` is a pattern of layers' paths,
    `bias_only` leaves weights as they are. `held_out` images, a tenth of all at most, decide
    whether what has been learnt is kept.
    """

    epochs_per_layer: int = 3
    epochs: int = 0
    lr: float = 0.03
    batch_size: int = 64
    bias_only: bool = False
    layers: str = "*"
    images: int | None = None
    held_out: int = 2_000

    def __post_init__(self) -> None:
        """Refuse values of a wrong type and values that make no sense."""
        require_types("fine-tuning", self)
        for key, (low, high) in BOUNDS.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise UsageError(
                    f"fine-tuning: {key} must be from {low:g} to {high:g}, not {value:g}"
                )
        if not self.epochs_per_layer + self.epochs:
            raise UsageError(
                "fine-tuning: without epochs per layer or of all layers nothing is tuned"
            )


def divide(
    network: SpikingNetwork, total: int, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images that may teach and those that decide, as sorted indices.

    Both come from where the network's own making had them: what was held out of its retraining, or
    of an earlier fine-tuning, teaches nothing here either.
    """
    before = [network.provenance.get(key) or {} for key in ("retraining", "finetuning")]
    count = min(held_out, int(total * HELD_OUT_SHARE))
    most = max(int(made.get("kept_apart", made.get("held_out_images", 0))) for made in before)
    apart = max(count, min(most, total // 2))
    drawn = held_out_seed(network, seed)
    deciding = choose_indices(total, count, drawn, others=True) if count else np.arange(0)
    others = choose_indices(total, apart, drawn, others=True) if apart else np.arange(0)
    return np.setdiff1d(np.arange(total), others), deciding


def held_out_seed(network: SpikingNetwork, seed: int) -> int:
    """Return the seed that draws the images that decide: that of the network's own making."""
    retraining, before = (network.provenance.get(key) or {} for key in ("retraining", "finetuning"))
    for made, key in ((retraining, "seed"), (before, "held_out_seed"), (before, "seed")):
        if key in made:
            return int(made[key])
    return seed


def tunable(network: SpikingNetwork, pattern: str, also: Readout | None = None) -> list[int]:
    """Return the positions of the populations that can be tuned and whose path fits a pattern.

    `also` is a readout that can be, by its name. Raises UsageError if there is none.
    """
    able = {
        position: node
        for position, node in enumerate(network.nodes)
        if isinstance(node, Population)
        and node.depth > 0
        and any(synapse.kind != "scale" for synapse in node.branches)
    }
    found = [k for k, node in able.items() if fnmatch.fnmatchcase(node.path, pattern)]
    if also is not None and fnmatch.fnmatchcase(also.name, pattern):
        found.append(network.nodes.index(also))
    if not found:
        known = ", ".join(node.path for node in able.values()) or "none"
        raise UsageError(
            f"no layer to tune fits {pattern!r}; there are {known} (the first layer and the "
            "readout have nothing to mend)"
        )
    return found
