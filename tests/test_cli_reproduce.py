"""`snnconv reproduce`: the command of a report is run again, and every number is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snnconv.cli.main import run
from snnconv.report.difference import compare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the digits network and measure it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        convert = ["convert", "zoo:digits", "--data", "zoo:digits", "-T", "3", "--epochs", "0"]
        quick = ["--calibration", "mse", "-o", "d.snn.safetensors", "-q"]
        assert run([*convert, *quick]) == 0
        evaluate = ["eval", "d.snn.safetensors", "--data", "zoo:digits", "--limit", "20"]
        assert run([*evaluate, "-q", "-od.eval.json"]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def changed(folder: Path, target: Path, **values: Any) -> Path:
    """Write the evaluation with other values."""
    e = json.loads((folder / "d.eval.json").read_text(encoding="utf-8"))
    target.write_text(json.dumps({**e, **values}), encoding="utf-8")
    return target


@pytest.mark.parametrize("name", ["d.eval.json", "d.convert.json", "d.T3-drain-signed.eval.json"])
def test_the_same_command_gives_the_same_numbers(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = contents(made)
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", str(made / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "snnconv.reproduction/1"
    assert found["equal"] and not found["different"] and not found["new"]
    assert found["same"] > 80
    assert contents(made) == before  # nothing was overwritten
    assert not list(tmp_path.iterdir())


def test_a_planted_difference_is_found(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(made, tmp_path / "planted.json", wall_ms_per_image=1e9, threads=99)
    e = json.loads(path.read_text(encoding="utf-8"))
    e["layers"][2]["spikes_per_neuron"] += 0.25
    del e["weight_bits"]
    path.write_text(json.dumps(e), encoding="utf-8")
    assert run(["reproduce", str(path), "--cwd", str(made)]) == 1
    out, err = capsys.readouterr()
    layer, new = e["layers"][2]["layer"], e["layers"][2]["spikes_per_neuron"] - 0.25
    (line,) = [x for x in out.splitlines() if "→" in x and "then → now" not in x]
    assert f"layers[{layer}].spikes_per_neuron" in line and f"→ {new!r}"[:8] in line
    assert "not reproduced: 1 of" in out
    assert "then threads 99" in err and "not in the older report: weight_bits" in err


@pytest.mark.parametrize(
    ("command", "code", "word"),
    [
        ("rm -rf /", 1, "nothing else is run"),
        ("python -m snnconv eval", 1, "nothing else is run"),
        ("snnconv finetune x", 1, "nothing else is run"),
        ("snnconv convert zoo:digits", 1, "nothing else is run"),
        ("snnconv eval 'x", 1, "cannot be read"),
        (None, 1, "does not say by which command"),
        ("snnconv eval gone.snn.safetensors --data zoo:digits", 1, "gone.snn.safetensors"),
        ("snnconv eval d.snn.safetensors --data gone", 1, "gone"),
        ("snnconv eval d.snn.safetensors --dat zoo:digits", 2, "--dat"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(
    command: str | None, code: int, word: str, made: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = changed(made, tmp_path / "x.json", command=command)
    assert run(["reproduce", str(path), "--cwd", str(made), "-q"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and word in err
    assert len(err.splitlines()) == 1


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"schema": "snnconv.finetuning/1"}', encoding="utf-8")
    assert run(["reproduce", str(tmp_path / "a.json")]) == 1
    assert "snnconv.finetuning/1" in capsys.readouterr().err
    assert run(["reproduce", str(tmp_path / "b.json")]) == 2


def test_values_are_compared_by_name() -> None:
    old = {
        "a": 1,
        "rows": [{"step": 1, "x": 0.5}, {"step": 2, "x": 0.25}],
        "seconds": 3,
        "gone": 2,
        "none": None,
        "filled": None,
        "version": "0.1",
    }
    new = {
        "a": 1.0,
        "rows": [{"step": 2, "x": 0.25}, {"step": 1, "x": 0.75, "y": 2}],
        "seconds": 4,
        "filled": {"top1_percent": 1.5},
        "version": "0.2",
        "more": {"deep": [1]},
    }
    found = compare(old, new)
    assert {c.place: (c.old, c.new) for c in found.changes} == {
        "rows[1].x": (0.5, 0.75),
        "gone": (2, None),
        "filled": (None, {"top1_percent": 1.5}),
    }
    assert found.same == {"a": 1, "rows[].step": 2, "rows[].x": 1, "none": 1}
    assert found.added == ["more.deep[]", "rows[].y"]
    assert [(c.place, c.old, c.new) for c in found.machine] == [("version", "0.1", "0.2")]
    assert not found.equal and compare(old, old).equal
