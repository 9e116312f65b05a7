"""`snnconv zoo` lists what the zoo's catalog names."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from snnconv.cli.main import run


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
    catalog = SimpleNamespace(entries=lambda: entries)
    monkeypatch.setitem(sys.modules, "snnconv.model_zoo", SimpleNamespace(catalog=catalog))
    monkeypatch.setitem(sys.modules, "snnconv.model_zoo.catalog", catalog)


@pytest.mark.usefixtures("two_entries")
def test_table_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (digits,) = [line for line in lines if line.strip().startswith("digits")]
    (resnet,) = [line for line in lines if line.strip().startswith("cifar_resnet20")]
    assert " yes " in digits
    assert " no " in resnet
    assert "He et al. 2016" in resnet


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
