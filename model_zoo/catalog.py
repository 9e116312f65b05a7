"""What the zoo holds, readable without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snnconv.files import SUFFIX

WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class ZooEntry:
    """A network of the zoo.

    `arch` is the name timm knows it by; `weights` a file in the package, or None where the user
    brings the checkpoint.
    """

    name: str
    arch: str
    description: str
    reference: str
    weights: str | None = None

    @property
    def path(self) -> Path | None:
        """Return where the weights lie."""
        return None if self.weights is None else WEIGHTS / self.weights


def entries() -> list[ZooEntry]:
    """List every network of the zoo."""
    digits = ZooEntry(
        "digits",
        "digits_resnet",
        "residual network on scikit-learn's 8x8 digits, trained by model_zoo/train_digits.py",
        "UCI Optical Recognition of Handwritten Digits, by way of scikit-learn",
        "digits_resnet.safetensors",
    )
    resnets = [
        ZooEntry(
            f"cifar_resnet{depth}",
            f"cifar_resnet{depth}",
            f"ResNet-{depth} for 32x32 images, shortcuts of option A or B (-m shortcut=B)",
            "He et al., arXiv 1512.03385, section 4.2",
        )
        for depth in (20, 32, 44, 56, 110)
    ]
    small = [
        ZooEntry(
            "mnist_lenet",
            "mnist_lenet",
            "LeNet for 28x28 grey images, layers as in ShrinkBench",
            "LeCun et al., Proc. IEEE 86(11), 1998",
        ),
        ZooEntry(
            "cifar_alexnet",
            "cifar_alexnet",
            "AlexNet with BatchNorm for 32x32 images",
            "Krizhevsky et al., NeurIPS 2012",
        ),
        *(
            ZooEntry(
                f"cifar_vgg{depth}",
                f"cifar_vgg{depth}",
                f"VGG-{depth} with BatchNorm for 32x32 images, -m pool=average to pool so",
                "Simonyan, Zisserman, arXiv 1409.1556",
            )
            for depth in (11, 16)
        ),
        ZooEntry(
            "cifar_resnet18",
            "cifar_resnet18",
            "timm's ResNet-18 with a 3x3 stem for 32x32 images",
            "He et al., arXiv 1512.03385",
        ),
        *(
            ZooEntry(
                f"squeezenet1_{minor}",
                f"squeezenet1_{minor}",
                f"SqueezeNet 1.{minor} with torchvision's layer names",
                "Iandola et al., arXiv 1602.07360",
            )
            for minor in (0, 1)
        ),
    ]
    return [digits, *resnets, *small]


def checkpoints() -> dict[str, Path]:
    """Return the spiking checkpoints of the package by name, `ARCHITECTURE.DATA-tT`."""
    files = sorted(CHECKPOINTS.glob(f"*{SUFFIX}"))
    return {file.name.removesuffix(SUFFIX): file for file in files}
