"""A graph that is rewritten computes what it did, in operations that can be converted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, assert_converts, images
from torch import Tensor, nn

from snnconv import rewrite
from snnconv.engine import endpoint
from snnconv.errors import NotConvertibleError, UsageError
from snnconv.graph import trace
from snnconv.operations import describe
from snnconv.pipeline import check_equal, convert, float_qann
from snnconv.rewrite import AFFINE


class Net(nn.Module):
    """A convolution, a body, a head; the body gets the module itself for its parameters."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.stem, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gain, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("kernel", torch.rand(8, 1, 3, 3))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)
        self.linear, self.over_channels = nn.Linear(8, 8), nn.Conv1d(1, 1, 3, padding=1)
        self.layer_norm, self.group_norm = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.larger = nn.UpsamplingBilinear2d((23, 12))
        self.body, self.head = body, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.body(self, x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def standardised(net: Net, x: Tensor) -> Tensor:
    weight = net.second.weight
    spread, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / (spread + 1e-5), net.second.bias, padding=1)


def normalised_weight(net: Net, x: Tensor) -> Tensor:
    weight = net.second.weight
    flat = F.batch_norm(
        weight.reshape(1, 8, -1), None, None, weight=net.gain, training=True, momentum=0.0
    )
    return F.conv2d(x, flat.reshape_as(weight), None, padding=1)


def split(net: Net, x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    parts = torch.split(net.second(x), [2, 2, 4], 1)
    return torch.cat([parts[-1], first, second[:, 2:], parts[0]], 1)


def blurred(net: Net, x: Tensor) -> Tensor:
    return F.conv2d(net.second(x), net.kernel, stride=2, groups=x.shape[1])


def shaped(net: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(net.second(x), (x.shape[2] // 2, x.size(-1) // 3))


def shuffled(net: Net, x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width)
    return net.second(torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width))


def space_to_depth(net: Net, x: Tensor) -> Tensor:
    x = net.second(x)
    n, c, h, w = x.shape
    x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * 4, h // 2, w // 2)


def channels_last(net: Net, x: Tensor) -> Tensor:
    """Linear layers, calculations and reductions over the last axis, and the channels put back."""
    y = net.second(x).permute(0, 2, 3, 1)
    weight = nn.Parameter(net.second.weight[:, :, 0, 0])
    y = F.relu(F.linear(y, weight, net.mean)) * net.gain + net.variance
    y = torch.cat([y[..., 3:], y[:, :, :, :3]], -1)
    return x + y.permute(0, 3, 1, 2)


def channels_last_and_split(net: Net, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    first, second = net.linear(x).split([3, 5], -1)
    pixels = F.relu(torch.cat([second, first], -1)).mean((1, 2))
    return net.second(F.relu(x).permute(0, 3, 1, 2)) + pixels[:, :, None, None]


def unbound(net: Net, x: Tensor) -> Tensor:
    """Channels in two groups, taken one by one."""
    first, second = net.second(x).view(x.shape[0], 2, 4, x.shape[2], x.shape[3]).unbind(1)
    return torch.cat([second, first], 1)


BODIES: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "standardised": (standardised, 8),
    "normalised weight": (normalised_weight, 8),
    "split": (split, 12),
    "blurred": (blurred, 8),
    "shaped": (shaped, 8),
    "layer scale": (lambda n, x: x + n.second(x) * n.gain.view(1, -1, 1, 1), 8),
    "shift": (lambda n, x: n.shift + n.second(x), 8),
    "one for all": (lambda n, x: n.second(x) * n.scalar / 2 - 0.25, 8),
    "from the right": (lambda n, x: 0.5 - n.second(x), 8),
    "in place": (lambda n, x: n.second(x).mul_(0.5).add_(x), 8),
    "difference": (lambda n, x: n.second(x) - x, 8),
    "difference, scaled": (lambda n, x: x + (n.second(x) - x) * n.gain.view(-1, 1, 1), 8),
    "negative": (lambda n, x: -n.second(x), 8),
    "batch norm": (
        lambda n, x: F.batch_norm(n.second(x), n.mean, n.variance, n.gain, None, False), 8
    ),
    "maximum": (lambda n, x: n.second(x).amax((2, 3), keepdim=True), 8),
    "mean": (lambda n, x: n.second(x).mean(dim=(-1, -2), keepdim=True), 8),
    "reflected": (lambda n, x: n.second(F.pad(x, (1, 2, 0, 1), "reflect")), 8),
    "border of a current": (lambda n, x: F.pad(n.second(x), (1, 1, 1, 1), "replicate"), 8),
    "upsampled": (lambda n, x: n.second(F.interpolate(x, scale_factor=2)), 8),
    "upsampled to a size": (lambda n, x: F.interpolate(n.second(x), (17, 30)), 8),
    "upsampled and added": (
        lambda n, x: x + F.interpolate(F.max_pool2d(n.second(x), 2), scale_factor=2), 8
    ),
    "upsampled by lines": (
        lambda n, x: n.second(F.interpolate(x, scale_factor=2, mode="bilinear")), 8
    ),
    "upsampled by lines, corners aligned": (
        lambda n, x: x + F.interpolate(
            F.max_pool2d(n.second(x), 4), (12, 12), mode="bilinear", align_corners=True
        ), 8
    ),
    "to other sizes by lines": (
        lambda n, x: F.interpolate(n.second(x), (6, 18), None, "bilinear", False), 8
    ),
    "a module that upsamples": (lambda n, x: n.larger(n.second(x)), 8),
    "leaky": (lambda n, x: n.second(F.leaky_relu(n.second(x), 0.2)), 8),
    "leaky before a grouped layer": (
        lambda n, x: F.conv2d(F.leaky_relu(n.second(x), 0.2), n.kernel, n.mean, groups=8), 8
    ),
    "leaky and added": (lambda n, x: F.leaky_relu(n.second(x)) + x, 8),
    "one slope per channel": (lambda n, x: n.second(F.prelu(n.second(x), n.gain)), 8),
    "leaky, then pooled": (
        lambda n, x: n.second(F.max_pool2d(F.leaky_relu(n.second(x), 0.3), 2)), 8
    ),
    "leaky twice": (lambda n, x: F.leaky_relu(F.leaky_relu(n.second(x), 0.3), 0.5), 8),
    "channels shuffled": (shuffled, 8),
    "channels shuffled by torch": (lambda n, x: n.second(F.channel_shuffle(x, 4)), 8),
    "pixels become channels": (lambda n, x: F.pixel_unshuffle(n.second(x), 2), 32),
    "space to depth": (space_to_depth, 32),
    "turned": (lambda n, x: n.second(x.transpose(2, 3)), 8),
    "channels last": (channels_last, 8),
    "channels last and split": (channels_last_and_split, 8),
    "unbound": (unbound, 8),
    "split twice": (
        lambda n, x: torch.cat([n.second(x).chunk(2, 1)[1].split(3, 1)[0], x[:, 3:]], 1), 8
    ),
    "split, stacked": (lambda n, x: torch.stack(n.second(x).unbind(1), 1), 8),
    "split, joined": (lambda n, x: torch.cat(n.second(x).chunk(2, 1), 1), 8),
    "flattened with the channels last": (
        lambda n, x: F.linear(
            F.relu(n.second(x)).permute(0, 2, 3, 1).contiguous().view(x.size(0), -1),
            torch.sin(torch.arange(8 * 1152.0)).view(8, -1) / 30,
        )[:, :, None, None], 8
    ),
    "cast": (lambda n, x: n.second(x.float() * n.gain.view(-1, 1, 1).to(x.dtype)).type_as(x), 8),
    "added to every pixel": (lambda n, x: n.second(x) + x.mean((2, 3), keepdim=True), 8),
    "expanded": (
        lambda n, x: x + F.adaptive_max_pool2d(n.second(x), 1).expand(-1, -1, x.shape[2], 12), 8
    ),
    "channels last, a gate per image": (
        lambda n, x: (
            n.second(x).permute(0, 2, 3, 1) * x.mean((2, 3))[:, None, None, :]
        ).permute(0, 3, 1, 2), 8
    ),
    "counts times a constant": (lambda n, x: n.second(x * n.gain.abs().view(-1, 1, 1)), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_what_is_rewritten_converts_and_is_verified(name: str) -> None:
    torch.manual_seed(0)
    body, channels = BODIES[name]
    model = Net(body, channels).eval()
    pixels = images(6, 2)
    expected = model(PREPROCESSING.normalize(pixels))
    traced = trace(model, PREPROCESSING.input_size)
    torch.testing.assert_close(traced.module(PREPROCESSING.normalize(pixels)), expected)
    conversion = convert(model, PREPROCESSING, [images(8, 1)], timesteps=6)
    assert check_equal(conversion, pixels)[0].equal
    torch.testing.assert_close(
        conversion.qann(PREPROCESSING.normalize(pixels))["logits"], expected, rtol=1e-3, atol=1e-4
    )


class Small(nn.Module):
    """A convolution, pooling by a body, a classifier."""

    def __init__(self, body: Callable[[Tensor], Any], features: int = 8) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), body, nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.stem(x))))


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


VECTORS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "squeezed": (lambda x: pooled(x).squeeze(), 8),
    "squeezed twice": (lambda x: pooled(x).squeeze(-1).squeeze(2), 8),
    "the only pixel": (lambda x: pooled(x)[:, :, 0, 0], 8),
    "the only pixel, last axes": (lambda x: pooled(x)[..., -1, 0], 8),
    "a mean by axes": (lambda x: x.mean(3).mean(2), 8),
    "a mean by axes, from the end": (lambda x: x.mean(-2).mean(-1), 8),
    "a mean by axes that stay": (
        lambda x: torch.mean(x, 2, True).mean(dim=3, keepdim=True).flatten(1), 8
    ),
    "a maximum by axes": (lambda x: torch.amax(x.amax(2), 2), 8),
    "a sum": (lambda x: x.sum((2, 3)), 8),
    "a sum by axes": (lambda x: x.sum(axis=3).sum(2), 8),
    "a mean as NumPy has it": (lambda x: x.mean(axis=(2, 3), keepdims=True).flatten(1), 8),
    "a mean of pixels in a row": (lambda x: x.view(x.size(0), x.size(1), -1).mean(dim=2), 8),
    "a maximum of pixels in a row": (lambda x: x.flatten(2).max(-1)[0], 8),
    "values of maxima": (lambda x: x.max(3).values.max(dim=2).values, 8),
    "a constant matrix": (lambda x: pooled(x).flatten(1) @ torch.eye(8), 8),
    "a mean that names its input": (lambda x: torch.mean(input=x, dim=(2, 3)), 8),
    "lines, then pixels": (lambda x: x[:, :, :2, :3].flatten(2).flatten(1), 48),
    "from tokens": (lambda x: x[:, :, :2, :3].flatten(2)[:, None].reshape(-1, 48), 48),
    "there and back": (lambda x: pooled(x.flatten(2).view(x.shape)[:, :]).flatten(1), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_of_an_image_is_no_function_that_is_computed_apart(name: str) -> None:
    torch.manual_seed(0)
    model = Small(*VECTORS[name]).eval()
    pixels = images(6, 2)
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=5)
    assert check_equal(conversion, pixels)[0].equal
    assert not conversion.network.islands
    matrices = name == "a constant matrix"  # behind which neurons stand, as between any two layers
    assert len(conversion.network.populations) == 1 + matrices
    x = PREPROCESSING.normalize(pixels)
    torch.testing.assert_close(conversion.qann(x)["logits"], model(x), rtol=1e-3, atol=1e-4)


def test_an_average_over_one_axis_alone_is_no_pooling() -> None:
    model = Small(lambda x: x.mean(3).amax(2)).eval()
    network = convert(model, PREPROCESSING, [images(6)]).network
    assert network.islands


def strided(x: Tensor) -> Tensor:
    return x[:, :4, ::2, ::2]


SHORTCUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros of its shape": lambda x: torch.cat([strided(x), torch.zeros_like(strided(x))], 1),
    "zeros of any shape": lambda x: torch.cat(
        [x.new_zeros(x.size(0), 1, 6, 6), strided(x), x.new_zeros(x.size(0), 3, 6, 6)], dim=1
    ),
    "times zero": lambda x: torch.cat([strided(x), strided(x).mul(0)], axis=1),
    "between others": lambda x: torch.cat(
        [strided(x)[:, :2], 0 * strided(x)[:, 1:], strided(x)[:, :3]], 1
    ),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_channels_of_zeros_are_a_border(name: str) -> None:
    torch.manual_seed(0)

    def body(net: Net, x: Tensor) -> Tensor:
        layer = net.second
        return F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1) + SHORTCUTS[name](x)

    model = Net(body).eval()
    pixels = images(6, 2)
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=5)
    assert check_equal(conversion, pixels)[0].equal
    # Channels that stand between others have neurons of their own.
    assert len(conversion.network.populations) == 2 + (name == "between others")


@pytest.mark.parametrize("name", ["add", "sub"])
def test_a_sum_may_weigh_its_second_operand(name: str) -> None:
    torch.manual_seed(0)

    def body(net: Net, x: Tensor) -> Tensor:
        return getattr(torch, name)(x, net.second(x), alpha=0.3)

    model, pixels = Net(body).eval(), images(6, 2)
    assert_converts(model, pixels)


def test_what_is_narrowed_is_a_slice() -> None:
    model = Net(
        lambda n, x: torch.cat(
            [x.narrow(1, -4, 4), x.narrow(dim=-3, start=0, length=4).detach()], 1
        )
    ).eval()
    conversion = convert(model, PREPROCESSING, [images(6)], timesteps=5)
    assert check_equal(conversion, images(6, 2))[0].equal
    assert len(conversion.network.populations) == 1


@pytest.mark.parametrize("last", [nn.LogSoftmax(dim=1), lambda x: F.log_softmax(x, dim=-1)])
def test_a_last_log_softmax_is_left_out(last: Callable[[Tensor], Tensor]) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = Small(lambda x: x.mean((2, 3))), last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(x))

    torch.manual_seed(0)
    model, pixels = Classifier().eval(), images(6, 2)
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=5)
    assert check_equal(conversion, pixels)[0].equal
    assert len(conversion.network.populations) == 1
    x = PREPROCESSING.normalize(pixels)
    logits = conversion.qann(x)["logits"]
    torch.testing.assert_close(logits.log_softmax(1), model(x), rtol=1e-3, atol=1e-4)
    # One over the images of a batch is no shift.
    with pytest.raises(NotConvertibleError, match="cannot be converted"):
        convert(nn.Sequential(Small(lambda x: x.mean((2, 3))), nn.LogSoftmax(0)), PREPROCESSING)


class Twice(nn.Module):
    """One module at two places, where tensors have other shapes."""

    def __init__(self, shared: nn.Module, head: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(head, 16, 3, padding=1)
        self.shared, self.head = shared, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.shared(self.first(x)), 2)
        x = F.max_pool2d(self.shared(self.second(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)[:, :16])


SHARED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "slope": (lambda: nn.LeakyReLU(0.1), 8),
    "learnt slope": (nn.PReLU, 8),
    "shuffle": (lambda: nn.ChannelShuffle(2), 8),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_module_at_two_places_is_two_where_they_differ(name: str) -> None:
    torch.manual_seed(0)
    shared, channels = SHARED[name]
    model = Twice(shared(), channels).eval()
    pixels = images(6, 2)
    assert_converts(model, pixels)


def test_a_layer_behind_two_slopes_reads_each_by_its_own() -> None:
    torch.manual_seed(0)

    def body(net: Net, x: Tensor) -> Tensor:
        return net.second(F.leaky_relu(x - 0.2, 0.1)) + net.second(F.leaky_relu(x - 0.3, 0.5))

    model, pixels = Net(body).eval(), images(6, 2)
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=5)
    assert check_equal(conversion, pixels)[0].equal


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "silu", "leaky_relu", "relu"])
def test_a_function_may_be_told_its_input_by_name(name: str) -> None:
    function: Any = getattr(F, name)
    verdicts = [
        convert(Net(body).eval(), PREPROCESSING, [images(6)], timesteps=3).network
        for body in (lambda n, x: function(n.second(x)), lambda n, x: function(input=n.second(x)))
    ]
    one, two = ([node.name for node in network.nodes] for network in verdicts)
    assert one == two


def test_operands_may_be_told_by_name() -> None:
    def body(net: Net, x: Tensor) -> Tensor:
        return torch.add(torch.mul(net.second(x), other=0.5), other=x)

    conversion = convert(Net(body).eval(), PREPROCESSING, [images(6)], timesteps=3)
    assert check_equal(conversion, images(6, 2))[0].equal
    assert len(conversion.network.populations) == 2


def test_what_is_divided_by_a_sum_is_computed_with_it() -> None:
    model = Net(lambda n, x: x.exp() / x.exp().sum((2, 3), keepdim=True)).eval()
    assert len(convert(model, PREPROCESSING, [images(6)], timesteps=3).network.islands) == 1


@pytest.mark.parametrize("key", ["relu", "add", "x", "stem", "relu_node"])
def test_an_output_may_have_the_name_of_what_is_inside(key: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = torch.add(F.relu(self.stem(x)), self.other(x))
            relu = F.relu(features)
            return {"relu": relu, key: features, "logits": self.head(relu.mean((2, 3)))}

    torch.manual_seed(0)
    model, pixels = Named().eval(), images(6, 2)
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=5)
    assert {r.name for r in conversion.network.readouts} == {key, "relu", "logits"}
    assert check_equal(conversion, pixels)[0].equal
    x = PREPROCESSING.normalize(pixels)
    for name, output in model(x).items():
        torch.testing.assert_close(conversion.qann(x)[name], output, rtol=1e-3, atol=1e-4)


class Joined(nn.Module):
    """Channels that are worth differently, side by side before a layer; as `channels`, or none."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], channels: int | None) -> None:
        super().__init__()
        self.stem, self.join, self.channels = nn.Conv2d(3, 8, 3, padding=1), join, channels
        self.both = nn.Conv2d(channels or 8, 8, 1)
        self.head = nn.Linear(8 if channels else 16, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.join(F.relu(self.stem(pixels)), pixels)
        if self.channels:
            x = F.relu(self.both(x)).mean((2, 3))
        return self.head(x)


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int | None]] = {
    "average over the image": (
        lambda x, _: torch.cat([x, x.mean((2, 3), keepdim=True).expand_as(x)], 1), 16
    ),
    "average and maximum": (
        lambda x, _: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), None
    ),
    "average and maximum, flattened late": (
        lambda x, _: F.dropout(
            torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1),
            0.5, False,
        ), None
    ),
    "averages of two sizes, nested": (
        lambda x, _: torch.cat(
            [torch.cat([F.avg_pool2d(x, 3, 1, 1), x], 1), F.avg_pool2d(x, 7, 1, 3)], 1
        ), 24
    ),
    "averages of two sizes, side by side": (
        lambda x, _: torch.cat([F.avg_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 11, 1, 5)], 1), 16
    ),
    "upsampled by lines": (
        lambda x, _: torch.cat([
            F.interpolate(F.max_pool2d(x, 4), (12, 12), mode="bilinear"), x
        ], 1), 16
    ),
    "pixels": (lambda x, pixels: torch.cat([x, pixels], 1), 11),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_channels_that_are_worth_differently_keep_their_bits(name: str) -> None:
    torch.manual_seed(0)
    model = Joined(*JOINS[name]).eval()
    pixels = images(16, 2) // 3 + torch.randint(0, 170, (16, 3, 1, 1)).byte()
    floats = model(PREPROCESSING.normalize(pixels)).detach()
    conversion = convert(model, PREPROCESSING, [pixels], timesteps=255)
    assert check_equal(conversion, pixels)[0].equal
    found = endpoint(conversion.network, pixels, 255).logits(conversion.network, "logits")
    error = (found - floats).norm() / (floats - floats.mean(0)).norm()
    assert error < 0.05


def test_a_layer_called_twice_keeps_one_set_of_weights_for_each_part() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            for _ in range(2):
                x = F.relu(self.shared(torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1)))
            return x.mean((2, 3))

    traced = trace(Twice().eval(), PREPROCESSING.input_size).module
    layers = [m for m in traced.modules() if isinstance(m, nn.Conv2d)]
    assert [m.in_channels for m in layers] == [3, 4, 4]


class Mixed(nn.Module):
    """An image and an average of it, side by side, and a body that reads them."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), body
        self.first, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.last_axis = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        mixed = torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1)
        return F.relu(self.body(self, x, mixed)).mean((2, 3))


def test_a_layer_that_reads_something_else_too_stays_whole() -> None:
    model = Mixed(lambda n, x, mixed: n.first(mixed) + n.first(torch.cat([x, x], 1))).eval()
    traced = trace(model, PREPROCESSING.input_size).module
    assert isinstance(traced.get_submodule("first"), nn.Conv2d)
    assert check_equal(convert(model, PREPROCESSING, [images(6)]), images(3))[0].equal


def test_layers_that_read_the_same_parts_share_them() -> None:
    model = Mixed(lambda n, x, mixed: n.first(mixed) + n.second(mixed)).eval()
    nodes = trace(model, PREPROCESSING.input_size).module.graph.nodes
    assert not [n for n in nodes if n.target is torch.cat]
    assert len([n for n in nodes if n.name.startswith("avg_pool2d")]) == 1


def test_a_layer_over_another_axis_is_refused_as_before() -> None:
    model = Mixed(lambda n, x, mixed: n.last_axis(mixed)).eval()
    with pytest.raises(NotConvertibleError) as caught:
        convert(model, PREPROCESSING, calibration="bn")
    assert any("a linear layer over" in problem for problem in caught.value.problems)


def test_a_split_is_joined_by_keyword() -> None:
    body = lambda n, x, mixed: n.first(torch.cat(tensors=mixed.chunk(2, 1), dim=1))  # noqa: E731
    conversion = convert(Mixed(body).eval(), PREPROCESSING, [images(6)])
    assert check_equal(conversion, images(3))[0].equal


def test_parts_of_a_layer_are_no_shortcuts() -> None:
    model = Mixed(
        lambda n, x, mixed: n.first(
            torch.cat([F.avg_pool2d(x, 3, 1, 1), F.relu(n.second(mixed))], 1)
        )
    ).eval()
    plain, ablated = (
        convert(model, PREPROCESSING, [images(6)], shortcut_normalization=s) for s in (True, False)
    )
    for a, b in zip(plain.network.weighted, ablated.network.weighted, strict=True):
        assert all(
            torch.equal(x.weight, y.weight) for x, y in zip(a.branches, b.branches, strict=True)
        )


def test_a_checkpoint_from_before_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed(lambda n, x, mixed: n.first(mixed)).eval()
    passes = [change for change in rewrite.CHANGES if change.__name__ != "concats"]
    with monkeypatch.context() as before:
        before.setattr(rewrite, "CHANGES", passes)
        network = convert(model, PREPROCESSING, [images(6)]).network
    with pytest.raises(UsageError, match="convert it again"):
        float_qann(model, network)


def test_a_parameter_that_is_used_as_it_is_stays_the_one_it_is() -> None:
    model = Net(lambda n, x: F.conv2d(x, n.second.weight, n.second.bias, padding=1)).eval()
    traced = trace(model, PREPROCESSING.input_size).module
    modules = [m for m in traced.modules() if isinstance(m, nn.Conv2d)]
    shared = [m for m in modules if m.weight is traced.get_parameter("second.weight")]
    assert len(shared) >= 1


@pytest.mark.parametrize(
    "body",
    [
        lambda n, x: n.second(x.reshape(x.shape[1], -1, 12, 12).transpose(0, 1)),
        lambda n, x: n.second(x - x.mean(0, keepdim=True)),
        lambda n, x: n.second(x.softmax(0)),
        lambda n, x: F.conv2d(x, n.second.weight * x.mean(), n.second.bias, padding=1),
        lambda n, x: x / x.reshape(-1).max(0)[0],
        lambda n, x: torch.where(condition=x > 1, input=x, other=n.second(x)),
    ],
)
def test_images_that_are_mixed_are_refused(body: Callable[[Net, Tensor], Tensor]) -> None:
    model = Net(body).eval()
    with pytest.raises(NotConvertibleError, match="cannot be converted"):
        convert(model, PREPROCESSING, calibration="bn")


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 1.3, "mode": "bilinear"},
        {"size": 7, "mode": "bilinear", "antialias": True},
        {"scale_factor": 2, "mode": "bicubic"},
    ],
)
def test_interpolation_that_is_no_average_is_refused(options: dict[str, Any]) -> None:
    model = Net(lambda n, x: F.interpolate(n.second(x), **options)).eval()
    with pytest.raises(NotConvertibleError, match="cannot be converted") as caught:
        convert(model, PREPROCESSING, calibration="bn")
    assert "by the nearest pixel" in caught.value.problems[0]


def test_what_depends_on_the_batch_is_left() -> None:
    model = Net(lambda n, x: n.second(x) * x.shape[0]).eval()
    traced = trace(model, PREPROCESSING.input_size)
    kinds = [describe(traced, node).kind for node in traced.module.graph.nodes]
    assert "unsupported" in kinds


def test_an_affine_tells_no_statistics() -> None:
    model = Net(BODIES["layer scale"][0]).eval()
    traced = trace(model, PREPROCESSING.input_size)
    assert any(isinstance(m, AFFINE) for m in traced.module.modules())
    conversion = convert(model, PREPROCESSING, None, timesteps=4, calibration="bn")
    branches = [b for layer in conversion.qann.weighted() for b in layer.branches]
    assert all(branch.statistics is None for branch in branches)


def test_modules_are_named_by_where_they_stand() -> None:
    model = nn.Sequential(
        OrderedDict(block=Net(standardised), scale=nn.Identity(), act=nn.ReLU())
    ).eval()
    traced = trace(model, PREPROCESSING.input_size)
    paths = [traced.path(n) for n in traced.module.graph.nodes]
    assert "block.conv2d" in paths
