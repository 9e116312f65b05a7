"""Checkpoints of every kind load, and every mistake gets a clear answer."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from snnconv.errors import CheckpointError, SnnconvError, UsageError
from snnconv.load import hash_weights, load_model
from snnconv.preprocess import Preprocessing
from snnconv.recipe import read_recipe

ARCH = "test_resnet"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=7).eval()


def same(found: nn.Module, expected: nn.Module) -> bool:
    return hash_weights(found.state_dict()) == hash_weights(expected.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "arch": ARCH},
        lambda s: {"state_dict": {"junk": torch.ones(1)}, "state_dict_ema": s},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": s, "args": argparse.Namespace(model=ARCH, lr=0.1)},
    ],
)
def test_containers_and_prefixes_are_seen_through(
    wrap: object, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "test_resnet-0123abcd.pth"
    torch.save(wrap(model.state_dict()), path)  # type: ignore[operator]
    loaded = load_model(str(path))
    assert same(loaded.model, model)
    assert loaded.name == ARCH
    assert loaded.num_classes == 7
    assert not loaded.model.training


def test_the_architecture_comes_from_flag_then_file_then_name(
    model: nn.Module, tmp_path: Path
) -> None:
    state = model.state_dict()
    inside = tmp_path / "resnet18.pt"
    torch.save({"state_dict": state, "arch": ARCH}, inside)
    assert load_model(str(inside)).name == ARCH
    stated = tmp_path / "weights.safetensors"
    save_file(state, stated, {"architecture": ARCH})
    assert load_model(str(stated)).name == ARCH
    bare = tmp_path / "weights.pt"
    torch.save(state, bare)
    with pytest.raises(UsageError, match="--arch"):
        load_model(str(bare))
    assert load_model(str(bare), arch=ARCH).name == ARCH


def test_a_file_that_does_not_fit_names_every_key(model: nn.Module, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    removed = state.pop("conv1.0.weight") if "conv1.0.weight" in state else None
    first = next(k for k in state if k.endswith("weight") and k != "fc.weight")
    gone = first if removed is None else "conv1.0.weight"
    if removed is None:
        del state[first]
    state["extra"] = torch.ones(2)
    state["fc.bias"] = torch.ones(3)
    path = tmp_path / "a.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as raised:
        load_model(str(path), arch=ARCH)
    problems = "\n".join(raised.value.problems)
    assert f"missing: {gone}" in problems
    assert "unexpected: extra" in problems
    assert "fc.bias: [3] in the file, [7] in the model" in problems


def test_undefined_weights_are_named(model: nn.Module, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["fc.weight"][0, 0] = float("nan")
    path = tmp_path / "a.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="undefined") as raised:
        load_model(str(path), arch=ARCH)
    assert raised.value.problems == ["fc.weight"]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="not executed; save model"):
        load_model(str(path), arch=ARCH)


def _file(name: str, contents: bytes) -> object:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(contents)
        return str(folder / name)

    return make


def _saved(name: str, contents: object) -> object:
    def make(folder: Path) -> str:
        torch.save(contents, folder / name)
        return str(folder / name)

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (_file("a.pt", b""), CheckpointError, "is empty"),
        (_file("a.pt", b"hello" * 100), CheckpointError, "damaged or not a PyTorch"),
        (_file("a.safetensors", b"hello" * 100), CheckpointError, "not a safetensors file"),
        (_file("a.snn.safetensors", b""), CheckpointError, "spiking checkpoint already"),
        (_saved("a.pt", {"epoch": 3}), CheckpointError, "no weights, but epoch"),
        (_saved("a.pt", [1, 2]), CheckpointError, "holds a list"),
        (lambda folder: str(folder), CheckpointError, "is a folder"),
        (lambda folder: str(folder / "b.pt"), CheckpointError, "no such file"),
        (lambda folder: "resnet81", UsageError, "did you mean resnet18"),
        (lambda folder: "zoo:nothing", UsageError, "with weights it has digits"),
        (lambda folder: "zoo:cifar_resnet20", UsageError, "without weights"),
        (lambda folder: "cifar_resnet20", UsageError, "no pretrained weights"),
    ],
)
def test_mistakes_get_a_clear_answer(
    make: object, error: type[SnnconvError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_model(make(tmp_path))  # type: ignore[operator]


def test_a_wrong_arch_or_argument_is_a_usage_error(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UsageError, match="did you mean test_resnet"):
        load_model(str(path), arch="test_resnett")
    with pytest.raises(UsageError, match="wings=3"):
        load_model(str(path), arch=ARCH, model_args={"wings": 3})


def test_what_timms_trainer_saves_is_taken(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    said = {"model": ARCH, "interpolation": "", "gp": "max", "bn_eps": None, "img_size": None}
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(**said)}, path)
    loaded = load_model(str(path))
    usual = load_model(ARCH, pretrained=False).preprocessing
    assert loaded.preprocessing.interpolation == usual.interpolation
    pool: Any = loaded.model.global_pool
    assert pool.pool_type == "max" and loaded.model_args["global_pool"] == "max"


def test_other_input_channels_are_read_off_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "test_resnet.pt"
    grey = timm.create_model(ARCH, in_chans=1, num_classes=7)
    torch.save(grey.state_dict(), path)
    for loaded in (
        load_model(str(path)),
        load_model(ARCH, model_args={"in_chans": 1}, pretrained=False),
    ):
        preprocessing = loaded.preprocessing
        assert preprocessing.input_size[0] == len(preprocessing.mean) == len(preprocessing.std) == 1
        color = load_model(ARCH, pretrained=False).preprocessing
        assert preprocessing.mean[0] == pytest.approx(sum(color.mean) / 3)


@pytest.mark.parametrize("source", ["zoo:digits", ARCH])
def test_an_architecture_is_given_for_files_only(source: str) -> None:
    with pytest.raises(UsageError, match="--arch belongs to a checkpoint file"):
        load_model(source, arch="resnet18", pretrained=False)
    assert load_model("zoo:digits", arch="digits_resnet").name == "digits_resnet"


def test_a_recipe_is_for_its_own_architecture() -> None:
    with pytest.raises(UsageError, match="is for cifar_resnet20, and zoo:digits is digits_resnet"):
        load_model("zoo:digits", recipe=read_recipe("cifar_resnet20_t3"))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("timesteps = 0", "whole number from 1 to 4095"),
        ("weight_bits = 16", "whole number from 2 to 8"),
        ("[preprocessing]\ninput_size = 224", "input_size must be"),
        ("[preprocessing]\nscale = 0", "scale must be a number above 0"),
        ("[preprocessing]\ncrop_pct = '0.9'", "crop_pct must be a number"),
        ("[preprocessing]\nstd = ['a']", "std must be a number, or one per channel"),
        ("[preprocessing]\ninterpolation = 3", "interpolation must be a name"),
    ],
)
def test_values_of_recipes_are_checked(line: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(line, encoding="utf-8")
    with pytest.raises(UsageError, match=match):
        read_recipe(str(tmp_path / "a.toml"))


def test_one_mean_holds_for_every_channel(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[preprocessing]\nmean = 128\nstd = [64]\nscale = 256\n")
    found = load_model(ARCH, pretrained=False, recipe=read_recipe(str(tmp_path / "a.toml")))
    assert found.preprocessing.mean == (0.5,) * 3 and found.preprocessing.std == (0.25,) * 3


@pytest.mark.parametrize(
    ("mean", "std"), [(-0.1, 1), (1.2, 1), (math.nan, 1), (0, 0), (0, math.nan), (0, math.inf)]
)
def test_pixels_have_no_such_mean_or_deviation(mean: float, std: float) -> None:
    with pytest.raises(UsageError, match=r"means|deviations"):
        Preprocessing((1, 8, 8), (mean,), (std,))


def test_a_timm_name_can_be_built_without_fetching() -> None:
    loaded = load_model("test_resnet", pretrained=False)
    assert loaded.name == "test_resnet"
    assert loaded.preprocessing.input_size[0] == 3


@pytest.mark.data
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_published_cifar_resnets_load(depth: int, shared_data: Path) -> None:
    (path,) = (shared_data / "cifar10_resnet_akamaster").glob(f"resnet{depth}-*.th")
    loaded = load_model(str(path))
    assert loaded.name == f"cifar_resnet{depth}"
    assert loaded.preprocessing.input_size == (3, 32, 32)
    with torch.no_grad():
        assert loaded.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.data
def test_a_truncated_checkpoint_is_refused(shared_data: Path, tmp_path: Path) -> None:
    (path,) = (shared_data / "cifar10_resnet_akamaster").glob("resnet20-*.th")
    short = tmp_path / path.name
    short.write_bytes(path.read_bytes()[:300_000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(str(short))
