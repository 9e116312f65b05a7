"""`snnconv check`: verdicts, figures, wildcards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, PREPROCESSING, build, converted
from test_rewrite import Net
from torch import Tensor, nn

from snnconv.cli.main import run
from snnconv.examination import examine
from snnconv.replace import replace_activations


def output(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_check_passes_what_converts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "resnet18", "--json"]) == 0
    found = output(capsys)
    assert found["verdict"] == "convertible"
    assert found["mac_share_percent"]["spiking"] == 100
    assert run(["check", "zoo:digits", "-v"]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out


def test_check_knows_what_tracing_and_folding_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "vit_tiny_patch16_224", "--image-size", "100", "--json"]) == 3
    found = output(capsys)
    assert found["verdict"] == "not convertible" and len(found["problems"]) == 1
    assert found["mac_share_percent"] == {"spiking": 0.0, "analog": 0.0}
    assert run(["check", "convnext_atto", "--json"]) == 0
    assert 99 < output(capsys)["mac_share_percent"]["spiking"] < 100


def counted_macs(model: nn.Module, size: tuple[int, ...]) -> int:
    """Count multiply-accumulates of convolutions and linear layers where they happen."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        total += out[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *size))
    return total


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035", "vgg11"])
def test_the_figures_are_those_of_the_network(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", name, "--image-size", "64", "-T", "5", "--json"]) == 0
    found = output(capsys)
    model = timm.create_model(name).eval()
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["ann_macs"] == counted_macs(model, (3, 64, 64))
    (stem,) = (n for n in found["nodes"] if n["node"] in ("conv1", "conv_stem", "features_0"))
    once, estimate = stem["macs"], found["estimate"]
    assert estimate["timesteps"] == 5
    assert estimate["macs"] == once + 5 * (found["ann_macs"] - once)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert estimate["weights_mib"] == pytest.approx(sum(w.numel() for w in weights) / 2**20, 0.01)


@pytest.mark.parametrize("name", NETWORKS)
def test_neurons_and_depth_are_those_of_the_conversion(name: str) -> None:
    network = converted(name).network
    found = examine(build(name), PREPROCESSING.input_size)
    assert not found.problems and found.weights_known
    assert (found.neurons, found.depth) == (network.neurons, network.depth)


def between_pixels(net: Net, x: Tensor) -> Tensor:
    """Attention of every pixel to every other."""
    flat = x.flatten(2)
    return (flat @ (flat.transpose(1, 2) @ flat).softmax(-1)).reshape(x.shape)


@pytest.mark.parametrize(
    ("body", "largest"),
    [(lambda n, x: F.silu(n.second(x)), 8 * 144), (between_pixels, 144 * 144)],
)
def test_the_memory_of_islands_is_in_the_estimate(body: Any, largest: int) -> None:
    """In float64 while they compute, for all steps at once."""
    sizes = [
        examine(Net(b), PREPROCESSING.input_size, timesteps=5).memory()["image_mib"] * 2**20
        for b in (body, lambda n, x: n.second(x))
    ]
    assert 0 <= sizes[0] - 5 * 8 * largest <= 2 * sizes[1]


def test_a_file_is_planned_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_resnet")
    path = tmp_path / "test_resnet.pt"
    torch.save(model.state_dict(), path)
    assert run(["check", str(path), "--json"]) == 0
    there = output(capsys)
    assert there["weights_known"]
    assert run(["check", "test_resnet", "--json"]) == 0
    shapes = output(capsys)
    assert not shapes["weights_known"] and shapes["neurons"] == there["neurons"]


def test_wildcards_give_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "test_res*", "--json", "-q"]) == 0
    found = output(capsys)
    names = [row["source"] for row in found["models"]]
    assert names == timm.list_models("test_res*") and found["convertible"] == len(names)
    assert run(["check", "test_[rv][ei][st]*"]) == 3
    printed = capsys.readouterr()
    assert "test_vit" in printed.out and "test_resnet" in printed.out
    assert f"{len(names)} of" in printed.err
    assert run(["check", "nothing*"]) == 2
    assert "no architecture" in capsys.readouterr().err


def test_a_file_with_brackets_is_no_wildcard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_resnet").state_dict(), "x[1].pth")
    assert run(["check", "x[1].pth", "--arch", "test_resnet", "--json"]) == 0
    assert output(capsys)["model"]["name"] == "test_resnet"


def test_strict_says_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "test_efficientnet", "--strict"]) == 3
    assert "which --strict refuses" in capsys.readouterr().out


def test_a_constructor_that_asks_for_numbers_gets_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = timm.create_model

    def asking(name: str, **options: object) -> nn.Module:
        assert float(torch.ones(1)) == 1
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", asking)
    assert run(["check", "test_resnet", "--json"]) == 0
    assert output(capsys)["weights_known"]


def test_the_tables_have_classes_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "resnet18"]) == 0
    printed = capsys.readouterr().out
    assert "17 ReLU" in printed and "20 Conv2d, 1 Linear" in printed and "11,689,512" in printed
    assert run(["check", "test_vit"]) == 3
    printed = capsys.readouterr().out
    assert "what to do" in printed and "choose a network of convolutions" in printed


def test_replaced_activations_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "test_efficientnet", "--replace-activations", "relu", "--json"]) == 0
    found = output(capsys)
    assert (
        found["replaced_activations"]
        == replace_activations(timm.create_model("test_efficientnet"))[1]
    )
