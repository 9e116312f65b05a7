"""A model may decide by the sizes of tensors, and by nothing else, while it is traced."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, assert_converts, images
from torch import Tensor, nn

from snnconv.errors import NotConvertibleError
from snnconv.graph import trace
from snnconv.pipeline import convert


class Net(nn.Module):
    """A convolution, a body that decides, a classifier."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.parts = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.body, self.head = body, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, F.relu(self.stem(x)))
        if x.ndim == 4:
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(x)


def aligned(net: Net, x: Tensor) -> Tensor:
    small = net.second(x)
    if small.shape[2:] != x.shape[2:]:
        small = F.interpolate(small, size=x.shape[2:], mode="nearest")
    return F.relu(small + x)


def rows(net: Net, x: Tensor) -> Tensor:
    halves = [x[:, :, i :: x.size(2) // 6] for i in range(x.size(2) // 6)]
    return F.relu(net.second(sum(halves)))


def checked(net: Net, x: Tensor) -> Tensor:
    assert x.shape[1] == 8 and len(x.shape) == 4, "eight channels"
    batch, *rest = x.shape
    return net.second(x.reshape(batch, *rest))


def strided(net: Net, x: Tensor) -> Tensor:
    kernel = int(x.shape[-1] / 4)
    return net.second(F.avg_pool2d(x, kernel, math.ceil(x.shape[-2] / 5)))


def divided(net: Net, x: Tensor) -> Tensor:
    return torch.cat([part(y) for part, y in zip(net.parts, x.chunk(2, 1), strict=True)], 1)


@pytest.mark.parametrize("body", [aligned, rows, checked, strided, divided])
def test_a_model_may_decide_by_sizes(body: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, pixels = Net(body).eval(), images(6, 2)
    assert_converts(model, pixels)


def test_sizes_are_known_of_a_model_without_numbers() -> None:
    with torch.device("meta"):
        model = Net(aligned)
    traced = trace(model, PREPROCESSING.input_size)
    assert any("interpolate" in node.name for node in traced.module.graph.nodes)


def test_a_traced_model_can_be_pickled() -> None:
    traced = trace(timm.create_model("resnet10t").eval(), (3, 64, 64)).module
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(x), traced(x))


def by_value(net: Net, x: Tensor) -> Tensor:
    return x if x.mean() > 0 else net.second(x)


def by_number(net: Net, x: Tensor) -> Tensor:
    return x if x.abs().sum().item() > -1 else net.second(x)


def by_list(net: Net, x: Tensor) -> Tensor:
    return x if len(x.mean((1, 2, 3)).tolist()) > 0 else net.second(x)


def by_how_many_are_large(net: Net, x: Tensor) -> Tensor:
    return x if (x.amax((1, 2, 3)) > 50).nonzero().shape[0] == 0 else net.second(x)


def by_what_is_selected(net: Net, x: Tensor) -> Tensor:
    return x if len(x[x > 50]) == 0 else net.second(x)


def by_batch(net: Net, x: Tensor) -> Tensor:
    return x if x.shape[0] > 1 else net.second(x)


def by_large_batch(net: Net, x: Tensor) -> Tensor:
    return x if x.shape[0] < 100 else net.second(x)


def by_what_fails_for_one(net: Net, x: Tensor) -> Tensor:
    x = F.adaptive_avg_pool2d(x, 1).squeeze()
    return x[:, : int(x.shape[1])]


def image_by_image(net: Net, x: Tensor) -> Tensor:
    return torch.stack([net.second(image[None])[0] for image in x])


def as_often_as_images(net: Net, x: Tensor) -> Tensor:
    for _ in range(len(x)):
        x = F.relu(x + 1)
    return x


@pytest.mark.parametrize(
    "body",
    [
        by_value, by_number, by_list, by_how_many_are_large, by_what_is_selected, by_batch,
        by_large_batch, by_what_fails_for_one, image_by_image, as_often_as_images,
    ],
)  # fmt: skip
def test_a_model_may_not_decide_by_images(body: Callable[[Net, Tensor], Tensor]) -> None:
    with pytest.raises(NotConvertibleError, match="fx cannot trace Net"):
        convert(Net(body).eval(), PREPROCESSING, calibration="bn")
