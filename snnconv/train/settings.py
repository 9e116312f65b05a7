"""What a retraining can be told; the `[train]` table of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from snnconv.data.augment import Augmentation
from snnconv.errors import UsageError, refuse_unknown, require_types

# Lowest and highest value of each number.
BOUNDS = {
    "epochs": (1, 10**6),
    "lr": (1e-12, 10),
    "batch_size": (1, 10**6),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 1),
    "clip_lr": (0, 100),
    "warmup": (0, 1),
    "distill": (0, 1),
    "temperature": (0.1, 100),
    "ema": (0, 0.9999),
    "held_out": (1, 10**9),
    "batch_statistics": (0, 1),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to retrain; the `[train]` table of a recipe has the same keys.

    `lr` is the highest rate of the weights, `clip_lr` that of the clips' logarithms as a multiple
    of it, `optimizer` one of timm's names, `warmup` a share of all steps before the cosine.
    `distill` is the weight of the divergence from the teacher at `temperature`; the cross
    entropy of the labels has the rest. `ema` is the decay of an exponential moving average of the
    parameters, 0 for none. `stages` are larger T to go through first, each for an equal share of
    the epochs (Fast-SNN trains 32, 4, 3, 2 bits, each from the one before). In the first
    `batch_statistics` of the epochs, a share, BatchNorm takes the mean and variance of each batch;
    in the others those it has gathered, as the spiking network does. `held_out` training
    images, a tenth of all at most, are kept apart to choose the epoch by. `amp` is bfloat16, on
    GPUs and on CPUs that have instructions for it, but for the last quarter of the epochs.
    """

    epochs: int = 12
    lr: float = 0.0007
    batch_size: int = 128
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_lr: float = 1.0
    warmup: float = 0.1
    distill: float = 0.9
    temperature: float = 2.0
    ema: float = 0.0
    amp: bool = True
    stages: tuple[int, ...] = ()
    batch_statistics: float = 0.0
    held_out: int = 5000
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        """Refuse values of a wrong type and values that make no sense."""
        require_types("training", self)
        for key, (low, high) in BOUNDS.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise UsageError(f"training: {key} must be from {low:g} to {high:g}, not {value:g}")
        if self.augmentation.mix and not self.distill:
            raise UsageError(
                "training: only a teacher can say what mixed images show; take distill > 0"
            )
        if any(t < 1 for t in self.stages):
            raise UsageError(f"training: stages must be positive T, not {list(self.stages)}")
        if self.epochs <= len(self.stages):
            raise UsageError(
                f"training: {self.epochs} epochs are too few for {len(self.stages)} stages and the "
                "final T"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "stages": list(self.stages)}

    @classmethod
    def from_dict(cls, where: str, values: dict[str, Any]) -> TrainSettings:
        """Build settings from the `[train]` table of `where`.

        Raises UsageError for unknown keys, wrong types and values that make no sense.
        """
        known = {**values}
        refuse_unknown(f"{where}: [train]", known, [f.name for f in fields(cls)])
        augmentation = known.pop("augmentation", {})
        if not isinstance(augmentation, dict):
            raise UsageError(f"{where}: [train] augmentation must be a table")
        names = [f.name for f in fields(Augmentation)]
        refuse_unknown(f"{where}: [train.augmentation]", augmentation, names)
        if isinstance(known.get("stages"), list):
            known["stages"] = tuple(known["stages"])
        return cls(**known, augmentation=Augmentation(**augmentation))
