"""`snnconv zoo` lists what the zoo's catalog names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from snnconv.cli.main import run
from snnconv.model_zoo import catalog


@dataclass(frozen=True)
class Entry:
    name: str
    description: str
    reference: str
    weights: str | None


@pytest.fixture
def two_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        Entry("digits", "a small residual network", "scikit-learn digits", "digits.safetensors"),
        Entry("cifar_resnet20", "ResNet-20", "He et al. 2016", None),
    ]
    found = {"digits.digits-t3": Path("digits.digits-t3.snn.safetensors")}
    monkeypatch.setattr(catalog, "entries", lambda: entries)
    monkeypatch.setattr(catalog, "checkpoints", lambda: found)


@pytest.mark.usefixtures("two_entries")
def test_table_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (digits,) = [line for line in lines if line.strip().startswith("digits ")]
    (resnet,) = [line for line in lines if line.strip().startswith("cifar_resnet20 ")]
    assert " yes " in digits
    assert " no " in resnet
    assert "He et al. 2016" in resnet
    assert any(line.strip() == "zoo:digits.digits-t3" for line in lines)
    assert any(line.strip().startswith("cifar_resnet20_t3 ") for line in lines)


@pytest.mark.usefixtures("two_entries")
def test_json_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["zoo", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["schema"] == "snnconv.zoo/1"
    assert found["entries"][1] == {
        "name": "cifar_resnet20",
        "description": "ResNet-20",
        "reference": "He et al. 2016",
        "weights": None,
    }


def test_the_real_zoo_has_the_digits_and_the_cifar_networks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["zoo", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)["entries"]}
    assert "digits" in entries
    assert entries["digits"]["weights"]
    assert any(name.startswith("cifar_resnet20") for name in entries)
