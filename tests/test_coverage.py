"""The sweep over timm: it can fail, it goes on where it was, and families of networks pass it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import coverage
import pytest
from torch import nn

from snnconv.network import Population
from snnconv.pipeline import Conversion, convert

# One small member of each family, whatever its activations.
FAMILIES = (
    "resnet18", "resnet26t", "seresnet18", "resnetv2_18", "resnext26ts", "res2net50_14w_8s",
    "ecaresnet26t", "densenet121", "dla46_c", "dpn48b", "vgg11_bn", "vovnet39a", "ese_vovnet19b_dw",
    "hrnet_w18_small", "inception_v3", "xception41p", "regnetx_002", "regnety_002", "regnetz_005",
    "repvgg_a0", "mobileone_s0", "repghostnet_050", "ghostnet_050", "mobilenetv1_100",
    "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mnasnet_small",
    "fbnetc_100", "semnasnet_075", "spnasnet_100", "lcnet_035", "hardcorenas_a", "tinynet_e",
    "mixnet_s", "efficientnet_lite0", "efficientnet_b0", "rexnet_100", "gernet_s", "selecsls42",
    "cs3darknet_s", "cspresnet50", "darknet17", "nf_regnet_b0", "legacy_seresnet18", "tresnet_m",
)  # fmt: skip


def test_a_network_is_examined_and_verified() -> None:
    found = coverage.row("test_resnet", 60, False)
    assert found["convertible"] and found["analog"] == 0 and found["spiking_percent"] == 100
    tried = found["verified"]
    assert tried["equal"] and tried["layers"] == 12 and tried["sites"] > 12
    assert tried["unsuited_layers"] == [] and tried["trace_difference"] < 1e-5
    assert coverage.settled(found)


def test_a_wrong_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> Conversion:
        conversion = convert(*args, **options)
        nodes = list(conversion.network.nodes)
        place = max(i for i, n in enumerate(nodes) if isinstance(n, Population))
        nodes[place] = replace(nodes[place], threshold=nodes[place].threshold * 2)
        return replace(conversion, network=replace(conversion.network, nodes=tuple(nodes)))

    monkeypatch.setattr(coverage, "convert", wrong)
    found = coverage.row("test_resnet", 60, False)
    assert "does not equal" in found["verified"]["refused"] and not coverage.settled(found)


def test_layers_without_activity_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def silence_(model: nn.Module, *others: Any) -> None:
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, -1)

    monkeypatch.setattr(coverage, "randomise_", silence_)
    tried = coverage.verified("test_resnet")
    assert tried["equal"] and tried["unsuited_layers"] and tried["draws"] == coverage.DRAWS


def test_what_cannot_be_converted_is_told_with_what_replacing_changes() -> None:
    found = coverage.row("test_vit", 60, False)
    assert not found["convertible"] and len(found["problems"]) > 3
    assert len(set(found["problems"])) == len(found["problems"])
    found = coverage.row("test_efficientnet", 60, True)
    assert found["convertible"] and found["analog"] > found["replaced_analog"] > 0
    assert found["replaced"] == {"SiLU": 11} and "verified" not in found


def test_a_sweep_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.jsonl"

    def sweep(*arguments: str) -> int:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["coverage.py", *arguments, "--state", str(state)])
        coverage.main()
        return len(capsys.readouterr().out.splitlines())

    assert sweep("test_resnet", "test_vit", "--examine-only") == 2
    assert sweep("test_resnet", "test_vit", "test_v*t", "--examine-only") == 0
    assert sweep("test_resnet", "--again") == 1
    last = json.loads(state.read_text().splitlines()[-1])
    assert last["name"] == "test_resnet" and last["verified"]["equal"]
    assert sweep("test_resnet", "--again") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_verified(name: str) -> None:
    assert coverage.verified(name)["unsuited_layers"] == []
