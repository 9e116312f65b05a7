"""The ResNets for CIFAR of He et al. (arXiv 1512.03385, section 4.2), registered with timm.

Three stages of 16, 32 and 64 channels, `6n + 2` weighted layers. Where the shape changes, the
shortcut is option A (every second pixel, and zero channels on both sides; no parameters) or
option B (a 1x1 convolution). Module names are those of the checkpoints in wide use.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

# The published checkpoints were trained with ImageNet's statistics.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ZeroPadShortcut(nn.Module):
    """Option A: every second row and column, `[N, C, H, W]` to `[N, planes, H/2, W/2]`."""

    def __init__(self, added: int) -> None:
        """Add `added` zero channels, half of them before and half after."""
        super().__init__()
        self.before, self.after = added // 2, added - added // 2

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inplanes: int, planes: int, stride: int, shortcut: str) -> None:
        """Build one block; `shortcut` is A or B."""
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inplanes != planes:
            if shortcut == "A":
                self.shortcut = ZeroPadShortcut(planes - inplanes)
            else:
                projection = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, planes, H/stride, W/stride]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


def _stage(blocks: int, inplanes: int, planes: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(inplanes, planes, stride, shortcut)
    return nn.Sequential(
        first, *(BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1))
    )


class CifarResNet(nn.Module):
    """A residual network for small images, `[N, in_chans, 32, 32]` to logits `[N, num_classes]`.

    Other sizes work too, the pooling at the end is global.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        shortcut: str = "A",
        widths: tuple[int, int, int] = (16, 32, 64),
    ) -> None:
        """Build `blocks` blocks per stage. Raises ValueError for a shortcut other than A or B."""
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be A or B, not {shortcut!r}")
        self.num_classes = num_classes
        self.num_features = widths[2]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(blocks, widths[0], widths[0], 1, shortcut)
        self.layer2 = _stage(blocks, widths[0], widths[1], 2, shortcut)
        self.layer3 = _stage(blocks, widths[1], widths[2], 2, shortcut)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        logits: Tensor = self.linear(torch.flatten(x, 1))
        return logits


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": "conv1",
        "classifier": "linear",
    }


_DEPTHS = (20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}.untrained": _cfg() for depth in _DEPTHS}
)


def _create(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    variant = f"cifar_resnet{depth}"
    model: CifarResNet = build_model_with_cfg(
        CifarResNet, variant, pretrained, blocks=(depth - 2) // 6, **kwargs
    )
    return model


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-20."""
    return _create(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-32."""
    return _create(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-44."""
    return _create(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-56."""
    return _create(56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-110."""
    return _create(110, pretrained, **kwargs)
