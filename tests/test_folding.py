"""The folded network computes what the model does, and the integers what the QANN does."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, PREPROCESSING, build, converted, images
from test_rewrite import Net

from snnconv.calibrate import calibrate_
from snnconv.engine import endpoint
from snnconv.folding import fold
from snnconv.graph import difference, flatten_outputs, trace
from snnconv.normalize import integerize
from snnconv.plan import make_plan
from snnconv.quant import quantize


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_folded_network_computes_what_the_model_does(name: str, seed: int) -> None:
    model = build(name, seed)
    traced = trace(model, PREPROCESSING.input_size)
    x = PREPROCESSING.normalize(images(3))
    with torch.no_grad():
        expected = flatten_outputs(model(x))
        actual = fold(traced, make_plan(traced))(x)
    assert actual.keys() == expected.keys()
    for key in expected:
        assert difference(actual[key], expected[key]) < 1e-5


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "vgg11_bn", "mobilenetv2_100"])
def test_timm_networks_fold(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    traced = trace(model, (3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        folded = fold(traced, make_plan(traced))(x)["logits"]
        assert difference(folded, model(x)) < 1e-4


def test_a_factor_inside_of_an_island_keeps_all_its_digits() -> None:
    """Attention amplifies what is rounded, until a deep network seems to be another one."""
    model = Net(lambda n, x: x * F.softmax(x.flatten(2) * 0.1, -1).reshape(x.shape)).eval()
    traced = trace(model, PREPROCESSING.input_size)
    folded = fold(traced, make_plan(traced), torch.float64)
    x = PREPROCESSING.normalize(images(3)).double()
    with torch.no_grad():
        assert difference(folded(x)["logits"], model.double()(x)) < 1e-12


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_integers_compute_what_the_float_qann_does_but_for_rounding(name: str) -> None:
    conversion = converted(name, timesteps=31)
    pixels = images(6, 5)
    end = endpoint(conversion.network, pixels, 31)
    with torch.no_grad():
        outputs = conversion.qann(PREPROCESSING.normalize(pixels), 31)
    for readout in conversion.network.readouts:
        logits = end.logits(conversion.network, readout.name)
        assert difference(logits, outputs[readout.name]) < 0.1


def test_many_levels_approach_the_float_network() -> None:
    model = build("residual")
    traced = trace(model, PREPROCESSING.input_size)
    x = PREPROCESSING.normalize(images(6, 5))
    errors = []
    for timesteps in (3, 15, 255):
        qann = fold(traced, make_plan(traced))
        calibrate_(qann, [x], timesteps, "max")
        net = integerize(qann, PREPROCESSING, timesteps)
        logits = endpoint(net, images(6, 5), timesteps).logits(net, "logits")
        with torch.no_grad():
            errors.append(difference(logits, model(x)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.03


def test_rounding_is_half_up_at_ties() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 9.0])
    assert quantize(x, torch.tensor(4.0), 4).tolist() == [1, 2, 3, 0, 4]
    assert quantize(-x, torch.tensor(4.0), 4, two_sided=True).tolist() == [0, -1, -2, 1, -4]
