"""What happens to an image before the first layer: geometry, then pixels to integers.

A network sees every image as 8-bit pixels `[N, C, H, W]`. The ANN normalises them,
`(p/255 - mean)/std`; the spiking network takes the integers `p - round(255 mean)` and has
`1/(255 std)` folded into its first weights (docs/concepts.md, "The integer network").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from snnconv.errors import UsageError, require_one_of

if TYPE_CHECKING:
    from torch import Tensor

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")


@dataclass(frozen=True)
class Preprocessing:
    """Geometry and normalisation of a network's input.

    `input_size` is `(channels, height, width)` in pixels; `mean` and `std` are per channel, for
    pixels scaled to 0..1; `crop_pct` and `interpolation` are timm's.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Refuse values no image could have."""
        for name in ("input_size", "mean", "std"):
            plain = (n.item() if hasattr(n, "item") else n for n in getattr(self, name))
            object.__setattr__(self, name, tuple(plain))
        channels = self.input_size[0]
        if any(n < 1 for n in self.input_size):
            raise UsageError(f"preprocessing: there is no image of size {self.input_size}")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(
                f"preprocessing: crop_pct must be above 0, at most 1, not {self.crop_pct}"
            )
        require_one_of("interpolation", self.interpolation, INTERPOLATIONS)
        if len(self.mean) != channels or len(self.std) != channels:
            raise UsageError(
                f"preprocessing: {len(self.mean)} means and {len(self.std)} standard deviations "
                f"for {channels} input channels; give one of each per channel"
            )
        if not all(0 <= m <= 1 for m in self.mean):
            raise UsageError(
                f"preprocessing: means must be from 0 to 1, as pixels are, not {self.mean}"
            )
        if not all(0 < s < math.inf for s in self.std):
            raise UsageError(f"preprocessing: standard deviations must be positive, not {self.std}")

    @property
    def zero_point(self) -> tuple[int, ...]:
        """Return the pixel value per channel that the spiking network counts as zero."""
        return tuple(int(255 * m + 0.5) for m in self.mean)

    def check(self, pixels: Tensor) -> None:
        """Raise UsageError unless pixels are images uint8 `[N, C, H, W]` of the input size."""
        import torch

        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise UsageError(
                f"images are tensors of uint8 pixels [N, C, H, W], 0 to 255, not {kind}; they are "
                "normalised here"
            )
        if tuple(pixels.shape[1:]) != self.input_size:
            raise UsageError(
                f"the network takes batches of images of {'x'.join(map(str, self.input_size))}, "
                f"not {'x'.join(map(str, pixels.shape[1:]))}"
            )

    def checked(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the batches that have images; raise UsageError for what are none."""
        for pixels in batches:
            self.check(pixels)
            if len(pixels):
                yield pixels

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return `(pixels/255 - mean)/std` of uint8 `[N, C, H, W]`, the ANN's input, float32.

        Pixels in another float type give that type.
        """
        pixels = pixels if pixels.is_floating_point() else pixels.float()
        mean, std = (_per_channel(pixels, v) for v in (self.mean, self.std))
        return (pixels / 255 - mean) / std

    def center(self, pixels: Tensor) -> Tensor:
        """Return `(pixels - zero_point)/(255 std)`, float32: what the spiking network reads.

        It differs from `normalize` by the part of the mean that rounding loses, a constant that
        the spiking network has in its first biases.
        """
        pixels = pixels.float()
        zero, std = (_per_channel(pixels, v) for v in (self.zero_point, self.std))
        return (pixels - zero) / (255 * std)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`; unknown keys are an error."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise UsageError(f"preprocessing: unknown keys {sorted(unknown)}")
        arguments: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**arguments)


def _per_channel(pixels: Tensor, values: tuple[float, ...]) -> Tensor:
    from snnconv.ops import constant

    return constant(values, pixels.dtype, pixels.device).view(-1, 1, 1)


def overridden(known: Preprocessing, **values: Any) -> Preprocessing:
    """Return a preprocessing with some values replaced; None leaves one as it is.

    A single number in `mean` or `std` holds for every channel. Raises UsageError for values no
    image could have.
    """
    changes = {k: v for k, v in values.items() if v is not None}
    if "input_size" in changes:
        changes["input_size"] = tuple(int(n) for n in changes["input_size"])
    channels = changes.get("input_size", known.input_size)[0]
    for key in ("mean", "std"):
        if key in changes:
            given = tuple(float(v) for v in changes[key])
            changes[key] = given * channels if len(given) == 1 else given
    return replace(known, **changes)
