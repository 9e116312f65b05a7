"""Whole conversions: what stands between the image and the first layer, odd outputs, aliasing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, converted, images
from timm.layers import AvgPool2dSame, Linear
from torch import Tensor, nn

from snnconv.checkpoint import load_network, save_network
from snnconv.engine import endpoint, simulate
from snnconv.errors import NotConvertibleError, NotEqualError
from snnconv.graph import TRACE_TOLERANCE, difference, differing_output
from snnconv.model_zoo.cifar_resnet import CifarResNet
from snnconv.pipeline import check_equal, convert
from snnconv.preprocess import Preprocessing


class Small(nn.Module):
    """One convolution, with something before it and a body behind."""

    def __init__(self, before: object = None, body: object = None, channels: int = 3) -> None:
        super().__init__()
        before, body = before or nn.Identity(), body or nn.ReLU()
        self.parts = nn.ModuleList(p for p in (before, body) if isinstance(p, nn.Module))
        self.__dict__.update(before=before, body=body)
        self.conv, self.head = nn.Conv2d(channels, 6, 3, padding=1), Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, features: bool = False) -> Tensor:
        y = self.body(self.conv(self.before(x)))
        return y if features else self.head(sum([y[:].mean((2, 3))]))


def norm() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.running_mean[:] = torch.tensor([0.1, 0.4, -0.3])
    layer.weight.data[1] = -0.7
    return layer


@pytest.mark.parametrize(
    ("before", "channels"),
    [
        (nn.ZeroPad2d((1, 2, 0, 1)), 3),
        (lambda x: F.pad(x, (0, 0, 1, 1)), 3),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), 4),
        (lambda x: x[:, 1:, ::2], 2),
        (nn.Dropout(), 3),
        (norm(), 3),
        (nn.AvgPool2d(3, 2, 1), 3),
        (nn.MaxPool2d(2), 3),
        (nn.ReLU(), 3),
        (lambda x: torch.cat([x, x[:, :1]], 1), 4),
    ],
)
def test_what_stands_before_the_first_layer_is_verified(before: object, channels: int) -> None:
    torch.manual_seed(0)
    conversion = convert(Small(before, None, channels), PREPROCESSING, [images(6)])
    found, agreement = check_equal(conversion, images(4, 2))
    assert found.equal and agreement.counts_percent > 95


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3 * 12 * 12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))


class Reshaped(Flat):
    """The pixels in a row, by the size of the batch; of several channels they lie strewn about."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        flat = getattr(x, self.method)(x.size(0), -1)
        return self.second(F.relu(self.first(flat)))


class PooledView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.conv(x)), 2)
        return self.head(x.view(x.size(0), -1))


class Dead(nn.Module):
    """A branch that is silent, with the clip of such a one, beside one of almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.silent, self.faint = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        nn.init.zeros_(self.silent.weight), nn.init.zeros_(self.silent.bias)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.relu(self.silent(x)) + F.relu(self.faint(x)) * 1e-9)
        return self.head(x.mean((2, 3)))


class Cancelled(nn.Module):
    """A sum that is nothing but rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((y - F.adaptive_avg_pool2d(y, 1)).mean((2, 3)))


class Divided(nn.Module):
    """An average of pixels by another number than how many they are."""

    def __init__(self, divisor: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, divisor_override=divisor)
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(self.pool(x))).mean((2, 3)))


class Placed(nn.Module):
    """A value of each place of its own is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.places = nn.Parameter(torch.randn(1, 4, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)) + self.places.expand(x.shape[0], -1, -1, -1)
        return self.head(x.mean((2, 3)))


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x) + x).mean((2, 3)))


class FlatMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)).flatten(1)


@pytest.mark.parametrize(
    "model",
    [
        Flat,
        Shifted,
        FlatMap,
        lambda: Reshaped("view"),
        lambda: Reshaped("reshape"),
        PooledView,
        Divided,
        nn.ReLU,
    ],
)
def test_networks_that_read_or_return_something_unusual(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    found, agreement = check_equal(convert(model(), PREPROCESSING, [images(6)]), images(4, 2))
    assert found.equal and agreement.counts_percent > 95


@pytest.mark.parametrize("model", [Dead, Cancelled])
def test_weights_beyond_all_proportion_are_stored_and_read(
    model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    conversion = convert(model(), PREPROCESSING, [images(6)])
    assert check_equal(conversion, images(4, 2))[0].equal
    path = tmp_path / "a.snn.safetensors"
    save_network(conversion.network, path)
    assert torch.equal(
        endpoint(load_network(path), images(4, 2), 7).charges["logits"],
        endpoint(conversion.network, images(4, 2), 7).charges["logits"],
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Divided(-2), "divisor_override=-2"),
        (Placed, "a tensor of the model's own"),
    ],
)
def test_what_cannot_be_converted_is_refused(model: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(NotConvertibleError) as caught:
        convert(model(), PREPROCESSING, calibration="bn")
    assert reason in " ".join([caught.value.message, *caught.value.problems])


def test_timm_pooling_with_same_padding_counts_its_border() -> None:
    body = nn.Sequential(nn.ReLU(), AvgPool2dSame(3, 2, count_include_pad=False))
    assert check_equal(convert(Small(None, body), PREPROCESSING, [images(6)]), images(3))[0].equal


class Aliased(nn.Module):
    """The sum reads a tensor after it has been changed in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.inplace, self.head = inplace, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(F.relu(y, inplace=self.inplace))
        z += y
        return self.head(F.relu(z).mean((2, 3)))


def test_a_tensor_changed_under_its_readers_is_read_as_changed() -> None:
    torch.manual_seed(0)
    model = Aliased(True).eval()
    conversion = convert(model, PREPROCESSING, [images(6)])
    assert check_equal(conversion, images(4, 2))[0].equal
    pixels = PREPROCESSING.normalize(images(4, 2))
    torch.testing.assert_close(conversion.qann(pixels)["logits"], model(pixels))


def test_a_part_of_a_tensor_changed_in_place_is_refused() -> None:
    def body(x: Tensor) -> Tensor:
        x[:, 2:].mul_(2)
        return F.relu(x)

    with pytest.raises(NotConvertibleError, match="computes another logits"):
        convert(Small(None, body), PREPROCESSING, calibration="bn")


def test_a_reshape_that_mixes_images_is_refused() -> None:
    def body(x: Tensor) -> Tensor:
        return F.relu(x).view(-1, 6)[:, :, None, None]

    with pytest.raises(NotConvertibleError, match="cannot be converted"):
        convert(Small(None, body), PREPROCESSING, calibration="bn")


def test_autocast_around_it_changes_nothing() -> None:
    network = converted("residual").network
    expected = endpoint(network, images(3), 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = endpoint(network, images(3), 5)
    for name in expected.counts:
        assert torch.equal(found.counts[name], expected.counts[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "vgg11", "vgg11_bn", "mobilenetv1_100", "mobilenetv2_100", "densenet121",
     "regnetx_002", "mobilenetv4_conv_small", "mobileone_s0", "inception_v3", "dla34",
     "cifar_vgg16", "cifar_alexnet", "cifar_resnet18", "squeezenet1_1"],
)  # fmt: skip
def test_networks_of_timm_and_the_zoo_convert_and_verify(name: str) -> None:
    from snnconv.model_zoo import register

    register()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    size = 75 if name == "inception_v3" else 64 if "cifar" not in name else 32
    preprocessing = Preprocessing((3, size, size), (0.4, 0.5, 0.45), (0.25, 0.2, 0.3))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    found, _ = check_equal(convert(model, preprocessing, [pixels], timesteps=3), pixels[:2])
    assert found.equal


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_152_layers_are_as_exact_as_one(shortcut: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(25, shortcut=shortcut, widths=(4, 6, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, -0.5, 0.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    model(PREPROCESSING.normalize(images(64, 3)))
    conversion = convert(model.eval(), PREPROCESSING, [images(16, 1)], timesteps=5)
    network = conversion.network
    assert network.depth == 151
    assert len(network.populations) == 151
    found, _ = check_equal(conversion, images(4, 2))
    assert found.equal
    end = endpoint(network, images(4, 4), 5)
    course = simulate(network, images(4, 4), network.timetable())
    assert all(len(counts.unique()) > 1 for counts in course.counts.values())
    assert all(torch.equal(course.counts[name], end.counts[name]) for name in end.counts)
    wrong = network.populations[-1].bias
    wrong += network.populations[-1].threshold
    with pytest.raises(NotEqualError):
        check_equal(conversion, images(4, 2))


def test_max_pooling_comes_nearer_to_the_ann_the_more_steps_there_are() -> None:
    """A max-pool of spikes, one step at a time, would not: its rates add up."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    pixels = images(32, 3)
    with torch.no_grad():
        wanted = model(PREPROCESSING.normalize(pixels)).double()
    errors = []
    for timesteps in (4, 16, 64, 256):
        network = convert(
            model, PREPROCESSING, [images(32, 1)], timesteps=timesteps, calibration="max"
        ).network
        course = simulate(network, pixels, network.timetable(name="drain"))
        found = course.logits(network, "logits")[-1].flatten(1)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert all(more > 1.5 * less for more, less in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.02


def test_rounding_that_a_deep_network_amplifies_is_no_difference() -> None:
    """Each layer multiplies and bends: what is rounded grows a hundred thousand times."""

    class Chaotic(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = 1 - self.weight * x * x
            return x.flatten(1)

    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model, rounded, other = Chaotic(1.9), Chaotic(1.9 + 1.2e-7), Chaotic(1.9 + 1e-3)
    assert difference(rounded(x), model(x)) > TRACE_TOLERANCE
    assert differing_output(model, rounded, x) == "logits"
    assert differing_output(model, rounded, x, lambda: copy.deepcopy(model).double()) is None
    assert differing_output(model, other, x, lambda: copy.deepcopy(other).double()) == "logits"
