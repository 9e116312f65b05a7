"""Classic networks for small images, registered with timm.

LeNet for MNIST; VGG-11 and VGG-16, AlexNet and ResNet-18 for 32x32 pixels, as the literature on
spiking networks uses them on CIFAR.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

# Statistics of the training images, of pixels scaled to 0..1.
MNIST = (0.1307,), (0.3081,)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class LeNet(nn.Module):
    """Two convolutions of 5x5 and two linear layers (LeCun et al. 1998), `[N, 1, 28, 28]`.

    Layer names and widths are those of ShrinkBench's MNIST network.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        """Build it."""
        super().__init__()
        self.num_classes, self.num_features = num_classes, 500
        self.conv1 = nn.Conv2d(in_chans, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


VGG_WIDTHS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}


class CifarVGG(nn.Module):
    """VGG with BatchNorm and one linear layer (Simonyan, Zisserman, arXiv 1409.1556)."""

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, pool: str = "max"
    ) -> None:
        """Build depth 11 or 16; `pool` is max or average. Raises ValueError for another."""
        super().__init__()
        if pool not in ("max", "average"):
            raise ValueError(f"pool must be max or average, not {pool!r}")
        self.num_classes, self.num_features = num_classes, 512
        layers: list[nn.Module] = []
        channels = in_chans
        for width in VGG_WIDTHS[depth]:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        return self.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


class CifarAlexNet(nn.Module):
    """AlexNet (Krizhevsky et al. 2012) for 32x32 pixels, with BatchNorm."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.5) -> None:
        """Build it; dropout stands before the two hidden linear layers."""
        super().__init__()
        self.num_classes, self.num_features = num_classes, 1024
        layers: list[nn.Module] = []
        channels = in_chans
        for width, pooled in ((64, True), (192, True), (384, False), (256, False), (256, True)):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Linear(256 * 4 * 4, 1024),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(1024, 1024),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(1024, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        return self.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.hidden(torch.flatten(self.features(x), 1)))
        return logits


def _cfg(
    statistics: tuple[tuple[float, ...], tuple[float, ...]], size: int, first: str, last: str
) -> dict[str, Any]:
    mean, std = statistics
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (len(mean), size, size),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "first_conv": first,
        "classifier": last,
    }


default_cfgs = generate_default_cfgs(
    {
        "mnist_lenet.untrained": _cfg(MNIST, 28, "conv1", "fc2"),
        "cifar_vgg11.untrained": _cfg(CIFAR10, 32, "features.0", "classifier"),
        "cifar_vgg16.untrained": _cfg(CIFAR10, 32, "features.0", "classifier"),
        "cifar_alexnet.untrained": _cfg(CIFAR10, 32, "features.0", "classifier"),
        "cifar_resnet18.untrained": _cfg(CIFAR10, 32, "conv1", "fc"),
    }
)


@register_model
def mnist_lenet(pretrained: bool = False, **kwargs: Any) -> LeNet:
    """Build LeNet for 28x28 grey images."""
    model: LeNet = build_model_with_cfg(LeNet, "mnist_lenet", pretrained, **kwargs)
    return model


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """Build VGG-11 for 32x32 images."""
    model: CifarVGG = build_model_with_cfg(CifarVGG, "cifar_vgg11", pretrained, depth=11, **kwargs)
    return model


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """Build VGG-16 for 32x32 images."""
    model: CifarVGG = build_model_with_cfg(CifarVGG, "cifar_vgg16", pretrained, depth=16, **kwargs)
    return model


@register_model
def cifar_alexnet(pretrained: bool = False, **kwargs: Any) -> CifarAlexNet:
    """Build AlexNet for 32x32 images."""
    model: CifarAlexNet = build_model_with_cfg(CifarAlexNet, "cifar_alexnet", pretrained, **kwargs)
    return model


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build timm's ResNet-18 with a stem for 32x32 images: 3x3, stride 1, no pooling."""
    from timm.models.resnet import BasicBlock, ResNet

    model: nn.Module = build_model_with_cfg(
        ResNet, "cifar_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs
    )
    return _small_stem(model)


def _small_stem(model: Any) -> Any:
    stem = model.conv1
    model.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model
