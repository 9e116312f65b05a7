"""Small networks for tests, each with something that is easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnconv.pipeline import Conversion, check_equal, convert
from snnconv.preprocess import Preprocessing

PREPROCESSING = Preprocessing((3, 12, 12), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    padding = options.pop("padding", kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options),
        nn.BatchNorm2d(outputs),
    )


class Residual(nn.Module):
    """Identity, projection and option A shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.a1, self.a2 = conv_bn(6, 6), conv_bn(6, 6)
        self.b1, self.b2, self.project = (
            conv_bn(6, 8, stride=2),
            conv_bn(8, 8),
            conv_bn(6, 8, 1, stride=2),
        )
        self.c1, self.c2 = conv_bn(8, 12, stride=2), conv_bn(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = (self.a2(F.relu(self.a1(x))) + x).relu()
        x = F.relu(self.project(x) + self.b2(F.relu(self.b1(x))))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.c2(F.relu(self.c1(x))) + short)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    """Dense connections: one tensor read by several layers, a BatchNorm on counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.conv1(F.relu(self.norm1(x))))], 1)
        x = torch.cat([x, F.relu(self.conv2(F.relu(self.norm2(x))))], 1)
        return self.head(x.mean((2, 3)))


class Pools(nn.Module):
    """All kinds of pooling, before and after activations, with borders that count or not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn(3, 5), conv_bn(5, 6), conv_bn(6, 7, 2)
        self.max1 = nn.MaxPool2d(3, 2, 1)
        self.average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.ceil = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.head = nn.Linear(7 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.max1(self.conv1(x)))
        x = self.average(x)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2, 1)
        x = F.relu(self.ceil(self.conv3(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (2, 2)), 1))


class Depthwise(nn.Module):
    """Groups, dilation, uneven strides, ReLU6, clamp, and a linear bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.wide = conv_bn(6, 12, 1)
        self.depthwise = conv_bn(12, 12, 3, groups=12, dilation=2, padding=2)
        self.narrow = conv_bn(12, 6, 1)
        self.grouped = conv_bn(6, 8, 3, groups=2)
        self.six = nn.ReLU6()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.six(self.stem(x))
        y = self.six(self.depthwise(self.six(self.wide(x))))
        x = x + self.narrow(y)
        x = self.grouped(x).clamp(0, 1)
        return self.head(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class Preactivation(nn.Module):
    """BatchNorm and ReLU before the convolutions; the residual stream has no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x)))
        x = x + self.conv2(F.relu(self.norm2(x)))
        return self.head(F.relu(self.norm3(x)).mean((2, 3)))


class TwoOutputs(nn.Module):
    """One backbone, two readouts, one of them a map; a ReLU module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(3, 5, stride=2), conv_bn(5, 5)
        self.act = nn.ReLU()
        self.mask, self.label = nn.Conv2d(5, 2, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.conv1(x))
        x = self.act(self.conv2(x))
        return {"mask": self.mask(x), "label": self.label(x.mean((2, 3)))}


class Pyramid(nn.Module):
    """Averages beside what they are averages of, before a BatchNorm and before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both, self.head = conv_bn(3, 4), conv_bn(8, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.both(torch.cat([F.avg_pool2d(x, 3, 1, 1), x], 1)))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "concat": Concat,
    "pools": Pools,
    "depthwise": Depthwise,
    "preactivation": Preactivation,
    "two_outputs": TwoOutputs,
    "pyramid": Pyramid,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a network with random weights, negative and zero gains, and rows that are all zero."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.normal_(module.weight, 0.8, 0.6)
            nn.init.normal_(module.bias, 0.1, 0.3)
            module.weight.data[0] = 0
            module.weight.data[1] = -module.weight.data[1].abs()
        elif isinstance(module, nn.Conv2d) and seed % 2:
            module.weight.data[-1] = 0
    return model


def images(count: int, seed: int = 0) -> Tensor:
    """Return random images, uint8 `[count, 3, 12, 12]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)


def converted(name: str, seed: int = 0, timesteps: int = 5, **settings: object) -> Conversion:
    """Convert a network of `build`, calibrated on eight random images."""
    return convert(
        build(name, seed), PREPROCESSING, [images(8, 1)], timesteps=timesteps, **settings
    )


def assert_converts(model: nn.Module, pixels: Tensor) -> None:
    """Assert that a model converts, is equal in integers, and the same in float."""
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=5)
    assert check_equal(conversion, pixels)[0].equal
    x = PREPROCESSING.normalize(pixels)
    torch.testing.assert_close(conversion.qann(x)["logits"], model(x), rtol=1e-3, atol=1e-4)
