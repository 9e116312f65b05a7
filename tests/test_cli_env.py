"""`snnconv env` describes the installation, also a broken one."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

import pytest

from snnconv import __version__
from snnconv.cli import env
from snnconv.cli.main import run


def test_json_describes_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "snnconv.env/1"
    assert found["version"] == __version__
    assert found["problems"] == []
    assert all(found["packages"].values())
    assert found["cores"] >= 1
    assert found["threads"] >= 1
    assert found["engine"]["name"] in ("native", "counts")
    assert (found["engine"]["reason"] is None) == (found["engine"]["name"] == "native")


def test_table_names_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env"]) == 0
    out = capsys.readouterr().out
    for name in (*env.PACKAGES, "accelerators", "cores"):
        assert name in out


def test_it_works_when_torch_and_timm_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, package: str | None = None) -> ModuleType:
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist")
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return importlib.__import__(name)

    monkeypatch.setattr(env.importlib, "import_module", broken)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = env.environment()
    assert found["threads"] is None
    assert found["accelerators"] == []
    assert {p["package"] for p in found["problems"]} == {"torch", "timm"}
    assert "pip install" in found["problems"][1]["error"]
    monkeypatch.setattr(env, "environment", lambda: found)
    assert env.command.main(args=[], standalone_mode=False) is None
    assert "timm fails" in capsys.readouterr().out


def test_accelerators_say_how_fast_their_engine_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = env.environment()
    engine = {"int8": None, "triton": "it has no compiler"}
    found["accelerators"] = [{"device": "cuda:0", "name": "GPU", "memory_gib": 8, "engine": engine}]
    monkeypatch.setattr(env, "environment", lambda: found)
    assert env.command.main(args=[], standalone_mode=False) is None
    out = " ".join(capsys.readouterr().out.split())
    assert "GPU, counts engine with int8, not triton: it has no compiler" in out
