"""The library in the hands of a user: odd arguments are refused, models stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import PREPROCESSING, build, converted, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import snnconv
from snnconv.errors import DataError, NotConvertibleError, UsageError


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda p: [p.float() / 255], "uint8"),
        (lambda p: [PREPROCESSING.normalize(p)], "uint8"),
        (lambda p: [p.long()], "uint8"),
        (lambda p: [p.numpy()], "uint8"),
        (lambda p: [(p, torch.zeros(len(p)))], "not tuple"),
        (lambda p: p, "images of 3x12x12, not 12x12"),
        (lambda p: [p[:, :1]], "not 1x12x12"),
        (lambda p: [F.pad(p, (4, 4, 4, 4))], "not 3x20x20"),
        (lambda p: [p.permute(0, 2, 3, 1)], "not 12x12x3"),
    ],
)
def test_what_are_no_images_calibrates_nothing(given: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        snnconv.convert(build("residual"), PREPROCESSING, given(images(6)))


def test_empty_batches_are_passed_over() -> None:
    whole = snnconv.convert(build("residual"), PREPROCESSING, [images(6)])
    parts = [images(6)[:0], images(6), images(6)[:0]]
    odd = snnconv.convert(build("residual"), PREPROCESSING, parts)
    for a, b in zip(whole.network.populations, odd.network.populations, strict=True):
        assert torch.equal(a.threshold, b.threshold)
    with pytest.raises(DataError, match="no images"):
        snnconv.convert(build("residual"), PREPROCESSING, [images(6)[:0]])


@pytest.mark.parametrize(
    "settings",
    [
        {"neuron": "sigend"},
        {"schedule": "now"},
        {"initial_membrane": "full"},
        {"drain": -1},
        {"stagger": 0},
        {"weight_bits": 2.5},
        {"weight_bits": 9},
        {"timesteps": 0},
        {"timesteps": 4096},
        {"timesteps": 3.0},
        {"calibration": "guess"},
    ],
)
def test_settings_there_are_none_of_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        snnconv.convert(build("residual"), PREPROCESSING, [images(6)], **settings)


def test_a_model_stays_in_the_mode_it_is_in() -> None:
    model = build("residual").train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes = {name: m.training for name, m in model.named_modules()}
    snnconv.examine(model, PREPROCESSING.input_size)
    snnconv.convert(model, PREPROCESSING, [images(6)])
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert not frozen.training and model.training


def test_random_numbers_are_left_alone() -> None:
    from timm.layers import Linear

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), Linear(400, 4)).eval()
    before = torch.get_rng_state()
    snnconv.trace(model, PREPROCESSING.input_size)
    assert torch.equal(torch.get_rng_state(), before)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def weight_normed(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(layer)


def spectral_normed(layer: nn.Module) -> None:
    torch.nn.utils.spectral_norm(layer)


@pytest.mark.parametrize(
    "change",
    [
        pruned,
        weight_normed,
        spectral_normed,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
    ],
)
def test_weights_that_are_computed_in_every_pass(change: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    middle = nn.Conv2d(8, 8, 3, padding=1)
    change(middle)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    names = set(model.state_dict())
    conversion = snnconv.convert(model, PREPROCESSING, [images(6)], timesteps=15)
    assert snnconv.check_equal(conversion, images(4, 2))[0].equal
    assert set(model.state_dict()) == names


class Returning(nn.Module):
    """Returns something made of its image and its logits."""

    def __init__(self, what: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.what = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), what

    def forward(self, x: Tensor) -> Any:
        return self.what(x, self.head(F.relu(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda _, y: (y, None), "output1, a NoneType"),
        (lambda _, y: {"a": y, "b": [y]}, "b, a list"),
        (lambda _, y: y * float("nan"), "no finite numbers"),
    ],
)
def test_outputs_that_are_no_tensors_are_a_problem(what: Any, reason: str) -> None:
    found = snnconv.examine(Returning(what).eval(), PREPROCESSING.input_size)
    assert any(reason in problem for problem in found.problems)
    with pytest.raises(NotConvertibleError, match=reason):
        snnconv.convert(Returning(what).eval(), PREPROCESSING, [images(6)])


def test_a_pruned_model_of_doubles() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4)).double()
    pruned(model[0])
    assert not snnconv.examine(model, PREPROCESSING.input_size).problems


def test_tensors_are_made_where_the_parameters_are() -> None:
    from snnconv.folding import Folder

    traced = snnconv.trace(build("residual"), PREPROCESSING.input_size)
    folder = Folder(traced, snnconv.make_plan(traced), torch.float32)
    traced.module.to("meta")
    for weights, bias in folder.tensors():
        assert all(tensor.is_meta for tensor in (*weights, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_float_types(dtype: torch.dtype) -> None:
    model = build("residual").to(dtype)
    conversion = snnconv.convert(model, PREPROCESSING, [images(6)])
    assert snnconv.check_equal(conversion, images(4, 2))[0].equal
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_default_of_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert not snnconv.examine(build("residual").float(), PREPROCESSING.input_size).problems
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_without_weights_is_only_examined() -> None:
    model = build("residual").to("meta")
    assert not snnconv.examine(model, PREPROCESSING.input_size).problems
    with pytest.raises(UsageError, match="shapes only"):
        snnconv.convert(model, PREPROCESSING, [images(6)])


@pytest.mark.parametrize("timesteps", [0, -3, 10**6, 7.0])
def test_time_steps_out_of_range(timesteps: Any) -> None:
    conversion = converted("residual")
    for run in (
        lambda: snnconv.endpoint(conversion.network, images(2), timesteps),
        lambda: snnconv.prepare(conversion.network, timesteps),
        lambda: snnconv.check_equal(conversion, images(2), timesteps),
        lambda: snnconv.examine(build("residual"), (3, 12, 12), timesteps=timesteps),
        lambda: snnconv.calibrate_(conversion.qann, [images(2).float()], timesteps),
    ):
        with pytest.raises(UsageError, match="--timesteps must be"):
            run()


def test_devices_there_are_none_of() -> None:
    network = converted("residual").network
    with pytest.raises(UsageError, match="no kind of device 'tape'"):
        snnconv.prepare(network, 5, device="tape")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            snnconv.prepare(network, 5, device="cuda")


def test_paths_are_texts_or_paths(tmp_path: Path) -> None:
    network = converted("residual").network
    file = tmp_path / "a.snn.safetensors"
    snnconv.save_network(network, str(file))
    assert snnconv.load_network(str(file)).depth == snnconv.load_network(file).depth
    np.savez(tmp_path / "test.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.zeros(3, int))
    for path in (tmp_path / "test.npz", str(tmp_path / "test.npz")):
        assert len(snnconv.open_data(path, "test", calibration_images=0)) == 3


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ([], "not 0"),
        (np.zeros(6, bool), "bool"),
        ([0, 6], "numbered 0 to 5, there is none of the number 6"),
        ([-1], "number -1"),
    ],
)
def test_images_that_are_not_there_are_not_evaluated(indices: Any, reason: str) -> None:
    network = converted("residual").network
    pixels = images(6).permute(0, 2, 3, 1).numpy()
    data = snnconv.from_arrays("noise", "test", pixels, np.zeros(6, int))
    with pytest.raises(UsageError, match=reason):
        snnconv.evaluate(network, data, indices, network.timetable())


def test_a_diagnosis_needs_images_and_one_output() -> None:
    conversion = converted("two_outputs")
    network = conversion.network
    engine = snnconv.prepare(network, network.timesteps)
    with pytest.raises(UsageError, match="of one output, the network has mask, label"):
        snnconv.diagnose(network, engine, images(2), network.timetable())
    with pytest.raises(UsageError, match="at least one image"):
        snnconv.diagnose(network, engine, images(2)[:0], network.timetable())
    with pytest.raises(UsageError, match="no output 'logits'; the network has mask, label"):
        snnconv.endpoint(network, images(2), 5).logits(network, "logits")


def test_an_ann_of_other_classes_is_no_reference() -> None:
    network = converted("residual").network
    other = build("residual")
    other.head = nn.Linear(12, 9)
    engine = snnconv.prepare(network, network.timesteps)
    with pytest.raises(UsageError, match="other layers"):
        snnconv.diagnose(network, engine, images(2), network.timetable(), other)


@pytest.mark.parametrize(
    ("pixels", "labels", "reason"),
    [
        (np.zeros((3, 4, 4), np.float32), np.zeros(3, int), "must be uint8"),
        (np.zeros((3, 4), np.uint8), np.zeros(3, int), r"not uint8 \[3, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), np.zeros(2, int), "must be 3 integers"),
        (np.zeros((3, 4, 4), np.uint8), np.zeros(3), "not float64"),
        (np.zeros((0, 4, 4), np.uint8), np.zeros(0, int), "holds no images"),
    ],
)
def test_arrays_that_are_no_data(pixels: Any, labels: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        snnconv.from_arrays("mine", "test", pixels, labels)
