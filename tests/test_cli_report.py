"""`snnconv report`: which reports it takes, what it writes and prints, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluations
import pytest
from evaluations import RESULTS, whole

from snnconv.cli.main import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, contents: Any, age: int = 0) -> None:
    Path(name).write_text(json.dumps(contents), encoding="utf-8")
    os.utime(name, ns=(10**18 - age, 10**18 - age))


def test_the_newest_report_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    save("new.eval.json", whole())
    save("old.eval.json", whole("resnet20-T3-drain-signed.eval.json"), age=10**9)
    assert run(["report"]) == 0
    out, err = capsys.readouterr()
    assert "using new.eval.json" in err and "page: new.eval.html" in err
    assert "89.15 %" in out and "Mend first" in out and "70.54" not in out
    assert "89.15" in Path("new.eval.html").read_text(encoding="utf-8")
    assert run(["report", "-q"]) == 0  # a page of ours is replaced


def test_of_a_checkpoint_all_its_reports_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.snn.safetensors").touch()
    for name in ("T8-drain-signed", "T8-paper-signed"):
        e = whole(f"resnet20-{name}.eval.json", checkpoint="net.snn.safetensors")
        save(f"net.{name}.eval.json", e)
    save("net.tuned.T8-drain-signed.eval.json", whole(checkpoint="net.tuned.snn.safetensors"))
    assert run(["report", "net.snn.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "snnconv.report/1" and found["page"] == "net.report.html"
    assert [r["file"] for r in found["reports"]] == [
        "net.T8-drain-signed.eval.json",
        "net.T8-paper-signed.eval.json",
    ]
    assert [row["on_latency_front"] for row in found["comparison"]] == [True, True]
    assert found["reports"][0]["report"]["snn"]["top1_percent"] == 89.15


def test_the_page_of_a_checkpoint_has_its_whole_name() -> None:
    name = "net.t3.snn.safetensors"
    Path(name).touch()
    for schedule in ("drain", "paper"):
        e = whole(f"resnet20-T8-{schedule}-signed.eval.json", checkpoint=name)
        save(f"net.t3.T8-{schedule}-signed.eval.json", e)
    assert run(["report", name, "-q"]) == 0
    assert Path("net.t3.report.html").is_file() and not Path("net.report.html").exists()


def test_markdown_by_the_name_of_the_output() -> None:
    save("a.eval.json", whole())
    assert run(["report", "a.eval.json", "-o", "a.md", "-q"]) == 0
    assert Path("a.md").read_text(encoding="utf-8").startswith("# cifar\\_resnet20, T 8\n")


def test_baselines_are_shown_as_their_table(capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = RESULTS.glob("*.baselines.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    save("a.eval.json", whole())
    assert run(["report", str(path), "a.eval.json", "-o", "b.md"]) == 0
    text = Path("b.md").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    for row in rows:
        assert f"| {row['method']} | {row['checkpoint']} | {row['top1_percent']:.2f} |" in (
            text.replace("\\_", "_")
        )
        assert row["checkpoint"] in out


def test_energies_are_computed_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SimpleNamespace(energy=evaluations.energy)
    monkeypatch.setitem(sys.modules, "snnconv.energy", module)  # type: ignore[arg-type]
    e = whole()
    save("a.eval.json", e)
    assert run(["report", "-q", "--energy", "add_int8_pj=0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed_assumptions"] == {"add_int8_pj": 0.3}
    before, now = e["energy"], found["reports"][0]["report"]["energy"]
    assert now["snn_nj"]["synapses"] == pytest.approx(10 * before["snn_nj"]["synapses"])
    assert now["snn_nj"]["bias"] == before["snn_nj"]["bias"]
    assert now["assumptions"] == {**before["assumptions"], "add_int8_pj": 0.3}
    assert now["verdict"] != before["verdict"]
    assert json.loads(Path("a.eval.json").read_text(encoding="utf-8")) == e


def test_baselines_may_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    e = whole()
    e["energy"]["qann_nj"] = 0
    save("a.eval.json", e)
    assert run(["report"]) == 0
    assert "infinitely many times the quantised ANN's" in capsys.readouterr().out


NOT_WHOLE = {"schema": "snnconv.evaluation/1", "model": "x", "images": "many"}


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["missing.eval.json"], 2, "no such report"),
        (["missing.snn.safetensors"], 2, "no such checkpoint"),
        (["lonely.snn.safetensors"], 2, "no report lonely.*.eval.json"),
        (["text.json"], 1, "does not hold JSON"),
        (["nan.json"], 1, "does not hold JSON"),
        (["list.json"], 1, "no report of snnconv"),
        (["other.json"], 1, "'snnconv.conversion/1'"),
        (["."], 2, "is a folder"),
        (["folder.json"], 2, "is a folder"),
        (["part.json"], 1, "no whole report"),
        (["inner.eval.json"], 1, "inner.eval.json: not as snnconv eval writes it"),
        (["a.eval.json", "-o", "a.pdf"], 2, "*.html or *.md"),
        (["a.eval.json", "-o", "taken.html"], 2, "--force"),
        (["a.eval.json", "-o", "no/a.html"], 2, "no such folder"),
        (["a.eval.json", "--energy", "add_int_pj=1"], 2, "did you mean add_int"),
        (["a.eval.json", "--energy", "add_int8_pj"], 2, "NAME=PJ"),
        (["a.eval.json", "--energy", "add_int8_pj=-1"], 2, "NAME=PJ"),
        (["a.eval.json", "--energy", "add_int8_pj=nan"], 2, "NAME=PJ"),
        (["old.eval.json", "--energy", "add_int8_pj=1"], 2, "measure again"),
    ],
)
def test_mistakes_are_told_in_plain_words(
    arguments: list[str], code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("a.eval.json", whole())
    save("old.eval.json", evaluations.stored("resnet20-T8-drain-signed.eval.json"))
    save("list.json", [1])
    save("other.json", {"schema": "snnconv.conversion/1"})
    save("part.json", NOT_WHOLE)
    save("inner.eval.json", whole(snn={"top1_percent": "high"}))
    Path("text.json").write_text("# text", encoding="utf-8")
    Path("nan.json").write_text('{"schema": NaN}', encoding="utf-8")
    Path("taken.html").write_text("mine", encoding="utf-8")
    Path("folder.json").mkdir()
    Path("lonely.snn.safetensors").touch()
    assert run(["report", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and word in err and err.startswith("error: ")
    assert "Traceback" not in err and "internal" not in err
    assert all(line.startswith("  - ") for line in err.splitlines()[1:])
    assert Path("taken.html").read_text(encoding="utf-8") == "mine"


def test_an_empty_folder_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report"]) == 2
    assert "snnconv eval" in capsys.readouterr().err


def test_a_file_that_is_no_page_of_ours_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    save("a.eval.json", whole())
    Path("a.eval.html").write_text("<html>mine</html>", encoding="utf-8")
    assert run(["report"]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["report", "--force"]) == 0


def test_rendering_imports_no_torch() -> None:
    save("a.eval.json", whole())
    code = (
        "import sys; from snnconv.cli.main import run; assert run(['report', '-q']) == 0; "
        "print('\\n' + str(sorted({'torch', 'numpy', 'timm'} & set(sys.modules))))"
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stdout.splitlines()[-1] == "[]"
