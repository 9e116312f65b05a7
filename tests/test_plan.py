"""What becomes of every node, and why some networks are refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, TwoOutputs, build
from timm.layers import BatchNormAct2d, CondConv2d
from torch import Tensor, nn

from snnconv.errors import NotConvertibleError
from snnconv.graph import trace
from snnconv.pipeline import convert
from snnconv.plan import ROLES, ConversionPlan, Neurons, Output, make_plan

SIZE = PREPROCESSING.input_size


class Calls(nn.Module):
    """A body that is called between two convolutions."""

    def __init__(self, body: object, channels: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2, 1)
        if isinstance(body, nn.Module):
            self.body = body
        else:
            self.__dict__["body"] = body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class Mixing(nn.Module):
    """A convolution whose weights are mixed for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.routing, self.conv = nn.Linear(4, 2), CondConv2d(4, 4, num_experts=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, torch.sigmoid(self.routing(x.mean((2, 3)))))


def summed(tokens: Tensor) -> Tensor:
    """Sum over a sequence, as far as each token."""
    return tokens.cumsum(2).reshape(-1, 4, 12, 12)


def plan_of(model: nn.Module) -> ConversionPlan:
    return make_plan(trace(model, SIZE))


@pytest.mark.parametrize(
    ("activation", "cap"),
    [
        (nn.ReLU(), None),
        (F.relu, None),
        (torch.relu, None),
        (lambda x: x.relu(), None),
        (lambda x: F.relu(x, inplace=True), None),
        (nn.ReLU6(), 6),
        (F.relu6, 6),
        (lambda x: x.clamp(0, 3), 3),
        (lambda x: torch.clamp(x, min=0), None),
        (nn.Hardtanh(0, 2), 2),
    ],
)
def test_every_spelling_of_an_activation_is_a_neuron(activation: object, cap: float) -> None:
    (neurons,) = [n for n in plan_of(Calls(activation)).nodes if isinstance(n, Neurons)]
    assert neurons.cap == cap
    assert not neurons.two_sided


def test_a_module_called_twice_is_two_populations() -> None:
    plan = plan_of(TwoOutputs())
    neurons = [n for n in plan.nodes if isinstance(n, Neurons)]
    assert len(neurons) == 2
    assert sorted(n.name for n in plan.nodes if isinstance(n, Output)) == ["label", "mask"]


def test_a_batch_norm_with_two_names_is_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.conv = (
                nn.Conv2d(3, 4, 1),
                BatchNormAct2d(4),
                nn.Conv2d(4, 4, 1),
            )
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.conv(self.first(self.stem(x))))

    plan = plan_of(Shared())
    assert not plan.problems
    assert sum(isinstance(n, Neurons) for n in plan.nodes) == 2


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenetv2_100"])
def test_there_is_one_neuron_per_activation_call(name: str) -> None:
    model = timm.create_model(name).eval()
    calls = []
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    plan = make_plan(trace(timm.create_model(name), (3, 64, 64)))
    neurons = [n for n in plan.nodes if isinstance(n, Neurons) and not n.two_sided]
    assert len(neurons) == len(calls)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (nn.LocalResponseNorm(2), "LocalResponseNorm"),
        (nn.Hardshrink(), "Hardshrink"),
        (lambda x: x.sin(), "sin"),
        (lambda x: x.sin() * x, "sin"),
        (lambda x: x.clamp(-1, 2), "clamp"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "attention over tokens"),
        (lambda x: x.softmax(0), "softmax"),
        (lambda x: summed(x.flatten(2)), "pixels become a sequence of tokens; attention over"),
        (lambda x: summed(x.reshape(-1, 4, 144)), "pixels become a sequence of tokens"),
        (Mixing(), "choose the network with plain convolutions"),
    ],
)
def test_what_cannot_spike_is_refused_with_reason_and_remedy(body: object, reason: str) -> None:
    plan = plan_of(Calls(body))
    assert not plan.convertible
    assert any(reason in problem for problem in plan.problems)
    for entry in plan.entries:
        if entry.role == "unsupported":
            assert entry.reason and entry.remedy and entry.path


def test_all_reasons_are_given_at_once() -> None:
    body = nn.Sequential(
        nn.Hardshrink(), nn.Conv2d(4, 4, 1), nn.LogSigmoid(), nn.Conv2d(4, 4, 1), nn.Softmax2d()
    )
    with pytest.raises(NotConvertibleError) as raised:
        convert(Calls(body), PREPROCESSING, calibration="bn")
    assert len(raised.value.problems) == 3
    assert raised.value.exit_code == 3


def test_control_flow_on_data_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() if x.sum() > 0 else x

    with pytest.raises(NotConvertibleError, match="cannot trace Branching"):
        trace(Branching(), SIZE)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        size = tuple(int(n) for n in torch.zeros(2, 3, 144).shape)
        return F.relu(x.reshape(size)).reshape(2, 3, 12, 12)


def test_a_network_for_one_size_of_the_batch_is_refused_by_name() -> None:
    with pytest.raises(NotConvertibleError, match="one size of the batch"):
        trace(Fixed(), SIZE)


def test_a_wrong_input_size_is_refused() -> None:
    with pytest.raises(NotConvertibleError, match="1x12x12"):
        trace(build("residual"), (1, 12, 12))


def test_the_plan_is_plain_json_and_counts_every_multiplication() -> None:
    plan = plan_of(build("residual"))
    values = plan.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["verdict"] == "convertible"
    assert values["mac_share_percent"] == {"spiking": 100.0, "analog": 0.0}
    assert {n["role"] for n in values["nodes"]} <= set(ROLES)
    by_path = {n["path"]: n["macs"] for n in values["nodes"]}
    assert by_path["stem.0"] == 6 * 3 * 9 * 12 * 12
    assert by_path["head"] == 12 * 5


def test_an_analog_function_of_the_pixels_is_refused() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.max_pool2d(x, 2).tanh())

    (problem,) = plan_of(First()).problems
    assert "an analog function of the pixels" in problem and "before the network" in problem


@pytest.mark.parametrize("image_first", [True, False])
def test_pixels_beside_counts_are_still_pixels(image_first: bool) -> None:
    class Beside(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(5, 2, 3)
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            parts = [x, F.relu(self.stem(x))]
            return self.conv(self.function(torch.cat(parts if image_first else parts[::-1], 1)))

    (problem,) = plan_of(Beside(F.silu)).problems
    assert "an analog function of the pixels" in problem
    assert sum(isinstance(n, Neurons) for n in plan_of(Beside(F.relu)).nodes) == 2
