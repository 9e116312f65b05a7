"""The command line's seam: help, errors, exit codes, JSON; and the options all commands share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from snnconv import __version__
from snnconv.cli import console, options
from snnconv.cli.main import COMMANDS, group, run
from snnconv.errors import NotConvertibleError, SnnconvError, UsageError

ROOT = Path(__file__).parents[1]
Fail = Callable[[object], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make `snnconv boom` raise what it is given, or return it as the exit code."""

    def prepare(outcome: object) -> None:
        @options.command("boom", example="snnconv boom")
        @options.json_option
        @options.verbosity_options
        def command(as_json: bool, verbose: bool, quiet: bool) -> object:
            """Fail."""
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome() if callable(outcome) else outcome

        monkeypatch.setitem(COMMANDS, "boom", ("boom", "Fail."))
        monkeypatch.setitem(sys.modules, "snnconv.cli.boom", SimpleNamespace(command=command))

    return prepare


def test_an_error_becomes_one_message_with_every_problem(
    fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(NotConvertibleError("two layers cannot spike", ["a: SiLU", "b: GELU"]))
    assert run(["boom"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: two layers cannot spike\n  - a: SiLU\n  - b: GELU\n"


def test_json_gets_the_error_as_an_object(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(NotConvertibleError("no", ["a: SiLU"]))
    assert run(["boom", "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "schema": "snnconv.error/1",
        "error": "no",
        "problems": ["a: SiLU"],
        "exit_code": 3,
    }
    assert err.startswith("error: no\n")


def test_the_settings_file_may_ask_for_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("snnconv.toml").write_text("[inspect]\njson = true\nverbose = true\n")
    code = run(["inspect", "absent.snn.safetensors"])
    out, err = capsys.readouterr()
    assert code and json.loads(out)["exit_code"] == code
    assert "Traceback" in err
    assert run(["check", "absent"])
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err


def test_json_stays_one_object_when_the_command_had_printed_its_own(
    fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcome() -> None:
        console.emit_json({"schema": "snnconv.boom/1"})
        raise SnnconvError("too late")

    fail(outcome)
    assert run(["boom", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"schema": "snnconv.boom/1"}


@pytest.mark.parametrize(("outcome", "code"), [(None, 0), (0, 0), (3, 3), (4, 4)])
def test_a_command_returns_its_exit_code(fail: Fail, outcome: object, code: int) -> None:
    fail(outcome)
    assert run(["boom"]) == code


def test_ctrl_c_is_interrupted(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(KeyboardInterrupt())
    assert run(["boom", "--json"]) == 130
    out, err = capsys.readouterr()
    assert err.strip() == "interrupted"
    assert json.loads(out)["exit_code"] == 130


def test_a_defect_is_one_line_and_a_traceback_only_with_v(
    fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(ValueError("odd\nthing"))
    assert run(["boom"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("internal error: ValueError: odd thing")
    assert err.count("\n") == 1
    assert run(["boom", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), ["pip install", "torchvision"]),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), ["timm", "pip install"]),
        (PermissionError(13, "Permission denied", "/x/y"), ["/x/y: Permission denied"]),
        (OSError(28, "No space left on device"), ["No space left"]),
        (MemoryError(), ["--batch-size"]),
    ],
)
def test_a_foreign_error_says_what_to_do(
    fail: Fail, capsys: pytest.CaptureFixture[str], error: Exception, words: list[str]
) -> None:
    fail(error)
    assert run(["boom"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)


def test_our_own_missing_module_is_a_defect(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(ModuleNotFoundError("No module named 'snnconv.odd'", name="snnconv.odd"))
    assert run(["boom"]) == 1
    assert capsys.readouterr().err.startswith("internal error")


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["covnert"]) == 2
    assert "did you mean convert?" in capsys.readouterr().err
    assert run(["xyzzy"]) == 2
    assert "snnconv --help" in capsys.readouterr().err


def test_a_wrong_option_is_a_usage_error(fail: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    fail(None)
    assert run(["boom", "--odd", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "snnconv boom --help" in err
    assert json.loads(out)["exit_code"] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_starts_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "-h"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Example: snnconv {name}")
    assert "--json" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_imports_torch_for_its_help(name: str) -> None:
    code = (
        "import sys; from snnconv.cli.main import run; "
        f"assert run([{name!r}, '--help']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from snnconv.cli.main import run; "
        f"assert run({args!r}) == 0; assert not {{'torch', 'numpy', 'rich'}} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = f"snnconv {__version__}" if "--version" in args else "Example: snnconv convert"
    assert done.stdout.startswith(expected)


def test_the_group_lists_every_command_without_importing_it() -> None:
    context = click.Context(group, info_name="snnconv")
    text = group.get_help(context)
    for name, (_, short) in COMMANDS.items():
        assert name in text
        assert short in text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    """Run a command `boom` in an empty folder, and return the values its options got."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SNNCONV_DATA", raising=False)
    seen: dict = {}

    @options.command("boom", example="snnconv boom")
    @options.data_option
    @options.seed_option
    @options.device_option
    @click.option("--batch-size", type=click.IntRange(min=1), default=4)
    @options.json_option
    @options.verbosity_options
    def command(**values: object) -> None:
        """Remember."""
        seen.update(values)

    monkeypatch.setitem(COMMANDS, "boom", ("boom", "Remember."))
    monkeypatch.setitem(sys.modules, "snnconv.cli.boom", SimpleNamespace(command=command))

    def ask(*arguments: str) -> dict:
        seen.clear()
        seen["code"] = run(["boom", *arguments])
        return seen

    return ask


def test_a_flag_then_the_environment_then_settings(
    asked: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked()["data"] is None
    Path("snnconv.toml").write_text(
        'data = "from-file"\nseed = 7\n[boom]\nbatch-size = 9\n[eval]\ntimesteps = 5\n'
    )
    values = asked()
    assert (values["data"], values["seed"], values["batch_size"]) == ("from-file", 7, 9)
    monkeypatch.setenv("SNNCONV_DATA", "from-environment")
    values = asked("--seed", "3")
    assert (values["data"], values["seed"]) == ("from-environment", 3)
    assert asked("--data", "from-flag")["data"] == "from-flag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = [", "not valid TOML"),
        ("data = 3", "must be a text"),
        ('data = ""', "must be a text"),
        ("sede = 3", "sede; did you mean seed?"),
        ("[boom]\nbacth-size = 3", "did you mean batch-size?"),
        ("[boom]\nbatch-size = 0", "--batch-size"),
        ("seed = -1", "--seed"),
        ("boom = 3", "must be a table"),
    ],
)
def test_bad_settings_are_a_usage_error(
    asked: Callable[..., dict], text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("snnconv.toml").write_text(text)
    assert asked()["code"] == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert asked("--help")["code"] == 0


def test_no_data_names_the_three_ways() -> None:
    with pytest.raises(UsageError) as caught:
        options.require_data(None)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 3
    for word in ("--data", "SNNCONV_DATA", "snnconv.toml"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"), [("snnconv con", "convert"), ("snnconv convert zoo:", "zoo:digits")]
)
def test_the_shell_completes(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_SNNCONV_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "snnconv.cli.main"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert expected in done.stdout


def test_newest_checkpoint_is_the_last_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint given"):
        options.newest_checkpoint()
    for age, name in enumerate(["b.snn.safetensors", "a.snn.safetensors", "c.safetensors"]):
        Path(name).touch()
        os.utime(name, (1000 + age, 1000 + age))
    assert options.newest_checkpoint() == Path("a.snn.safetensors")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert options.resolve_device("auto") == "cpu"
    for device in ("cuda", "mps"):
        with pytest.raises(UsageError, match=f"--device {device}"):
            options.resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert options.resolve_device("auto") == "cuda"


def test_progress_prints_plain_lines_away_from_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress() as report:
        for done in range(101):
            report("calibrate", done, 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "calibrate: 0/100\ncalibrate: 100/100\n"


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as report:
        report("calibrate", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": [float("nan"), (1.5, float("inf"))]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [1.5, None]]}


def test_a_table_away_from_a_terminal_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 150
    console.print_table("T", ["name [a]", "top1"], [(long, 91.5), ("y", "9.0")])
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line for line in lines)
    assert "name [a]" in lines[1]
    assert any(line.rstrip().endswith(" 9.0") for line in lines)
