"""SqueezeNet (Iandola et al., arXiv 1602.07360) with torchvision's layer names, for timm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class Fire(nn.Module):
    """A 1x1 convolution that squeezes, and two beside each other that expand."""

    def __init__(self, inplanes: int, squeeze: int, expand: int) -> None:
        """Build it; the output has `2 * expand` channels."""
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, 2 * expand, H, W]`."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


# (squeeze, expand) of every fire module, and None for a max-pool.
_BODIES: dict[str, tuple[tuple[int, int] | None, ...]] = {
    "1_0": (
        None, (16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256),
        None, (64, 256),
    ),
    "1_1": (
        None, (16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192),
        (64, 256), (64, 256),
    ),
}  # fmt: skip


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 or 1.1, `[N, in_chans, H, W]` to logits `[N, num_classes]`."""

    def __init__(
        self,
        version: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        final_relu: bool = True,
    ) -> None:
        """Build `version` 1_0 or 1_1; the last convolution's ReLU can be left out."""
        super().__init__()
        self.num_classes, self.num_features = num_classes, 512
        channels, kernel = (96, 7) if version == "1_0" else (64, 3)
        layers: list[nn.Module] = [nn.Conv2d(in_chans, channels, kernel, 2), nn.ReLU()]
        for part in _BODIES[version]:
            if part is None:
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            else:
                layers.append(Fire(channels, *part))
                channels = 2 * part[1]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Conv2d(512, num_classes, 1),
            nn.ReLU() if final_relu else nn.Identity(),
            nn.AdaptiveAvgPool2d(1),
        )

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        last: nn.Module = self.classifier[1]
        return last

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return torch.flatten(self.classifier(self.features(x)), 1)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "features.0",
        "classifier": "classifier.1",
    }


default_cfgs = generate_default_cfgs(
    {"squeezenet1_0.untrained": _cfg(), "squeezenet1_1.untrained": _cfg()}
)


@register_model
def squeezenet1_0(pretrained: bool = False, **kwargs: Any) -> SqueezeNet:
    """Build SqueezeNet 1.0."""
    model: SqueezeNet = build_model_with_cfg(
        SqueezeNet, "squeezenet1_0", pretrained, version="1_0", **kwargs
    )
    return model


@register_model
def squeezenet1_1(pretrained: bool = False, **kwargs: Any) -> SqueezeNet:
    """Build SqueezeNet 1.1."""
    model: SqueezeNet = build_model_with_cfg(
        SqueezeNet, "squeezenet1_1", pretrained, version="1_1", **kwargs
    )
    return model
