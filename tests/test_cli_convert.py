"""`snnconv convert`, `eval`, `inspect` and `check` from end to end, on the embedded digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import converted
from PIL import Image
from timm.models.nfnet import GammaAct
from torch import nn

from snnconv.checkpoint import load_network, save_network
from snnconv.cli.main import run
from snnconv.files import SUFFIX
from snnconv.replace import replace_activations

DIGITS = ["convert", "zoo:digits", "--data", "zoo:digits", "--epochs", "0", "--quiet"]
EVALUATION_KEYS = {
    "schema", "version", "model", "checkpoint", "task", "metric", "split", "images", "partial",
    "data_sha256", "timesteps", "trained_timesteps", "schedule", "neuron", "initial_membrane",
    "weight_bits", "latency_steps", "drain_steps", "ann", "qann", "qann_float", "snn",
    "agreement", "by_step", "spikes", "wall_ms_per_image", "engine", "device", "threads", "seed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SNNCONV_DATA", raising=False)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def convert(*options: str) -> int:
    return run([*DIGITS, "--limit", "40", *options])


def test_convert_then_eval_then_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--json") == 0
    found = output(capsys)
    assert found["schema"] == "snnconv.conversion/1"
    assert found["verdict"] == "convertible"
    assert found["mac_share_percent"] == {"spiking": 100.0, "analog": 0.0}
    assert found["nodes"] and found["problems"] == []
    assert found["verification"]["equal"]
    assert found["calibration"]["on"]["images"] == 1000
    assert Path("digits.snn.safetensors").is_file()
    assert json.loads(Path("digits.convert.json").read_text())["model"] == found["model"]

    assert run(["eval", "--data", "zoo:digits", "--json", "--limit", "60", "-q"]) == 0
    evaluation = output(capsys)
    assert set(evaluation) >= EVALUATION_KEYS
    assert evaluation["schema"] == "snnconv.evaluation/1"
    assert evaluation["checkpoint"] == "digits.snn.safetensors"
    assert evaluation["agreement"]["counts_exact"]
    assert evaluation["snn"]["top1_percent"] == evaluation["qann"]["top1_percent"] > 90
    assert evaluation["ann"]["source"] == "stored"
    assert evaluation["ann"]["images"] == 40
    assert evaluation["partial"] and evaluation["images"] == 60
    report = json.loads(Path("digits.T7-drain-signed-limit60.eval.json").read_text())
    assert {k: report[k] for k in evaluation} == evaluation
    assert report["command"].startswith("snnconv eval --data zoo:digits")

    assert run(["inspect", "--json"]) == 0
    inspection = output(capsys)
    assert [layer["neurons"] for layer in inspection["layers"]][-1] == 0
    assert sum(layer["neurons"] for layer in inspection["layers"]) == inspection["neurons"]
    assert run(["inspect"]) == 0
    assert "layer1.0:relu_2" in capsys.readouterr().out


def test_eval_with_other_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--calibration", "mse") == 0
    capsys.readouterr()
    base = ["eval", "--data", "zoo:digits", "--limit", "30", "--json"]
    more = ["--ann", "zoo:digits", "-T", "5", "--schedule", "wait", "--neuron", "unsigned"]
    assert run([*base, *more]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "made for T 7, not 5" in err
    assert (found["timesteps"], found["trained_timesteps"]) == (5, 7)
    assert found["spikes"]["negative_percent"] == 0
    assert found["agreement"]["counts_exact"]
    assert found["ann"]["source"] == found["qann_float"]["source"] == "measured"
    lost = found["ann"]["top1_percent"] - found["snn"]["top1_percent"]
    assert found["drop"]["percent"] == pytest.approx(lost)
    least, most = found["drop"]["interval95_percent"]
    assert least <= lost <= most
    assert run([*base, "--schedule", "drain", "--drain", "2", "-q"]) == 0
    assert output(capsys)["latency_steps"] == 9
    assert run([*base, "--schedule", "stagger", "--stagger", "2", "-q"]) == 0
    assert output(capsys)["stagger"] == 2
    assert run([*base, "--engine", "reference", "--schedule", "paper", "-q"]) == 0
    slow = output(capsys)
    assert run([*base, "--engine", "counts", "--schedule", "paper", "-q"]) == 0
    fast = output(capsys)
    for timing in ("wall_ms_per_image", "engine"):
        slow.pop(timing), fast.pop(timing)
    assert slow == fast


def test_same_input_same_bytes_and_no_overwriting(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("-o", "a.snn.safetensors") == 0
    assert convert("-o", "b.snn.safetensors") == 0
    first = Path("a.snn.safetensors").read_bytes()
    assert first == Path("b.snn.safetensors").read_bytes()
    assert convert("-o", "a.snn.safetensors", "-T", "3") == 2
    assert "--force" in capsys.readouterr().err
    assert Path("a.snn.safetensors").read_bytes() == first
    assert convert("-o", "a.snn.safetensors", "-T", "3", "--force") == 0
    assert Path("a.snn.safetensors").read_bytes() != first


def test_without_data_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "zoo:digits", "--json"]) == 0
    found = output(capsys)
    assert found["calibration"] == {"method": "bn", "on": None}
    assert found["model"]["ann"] is None
    assert found["verification"]["sample"] == "random images"
    assert run(["convert", "zoo:digits", "--force"]) == 0
    assert "nothing was measured" in capsys.readouterr().err
    assert run(["eval"]) == 2
    err = capsys.readouterr().err
    assert "--data" in err and "SNNCONV_DATA" in err and "snnconv.toml" in err


@pytest.mark.parametrize("method", ["mse", "percentile", "max", "bn"])
def test_every_calibration_and_few_bits(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("--calibration", method, "--weight-bits", "4", "--json") == 0
    found = output(capsys)
    assert found["weight_bits"] == 4
    assert found["calibration"]["method"] == method
    assert found["verification"]["equal"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "nofile.pt"], 1, "no such file"),
        (["convert", "resnet81"], 2, "did you mean resnet18"),
        (["convert", "zoo:digits", "-T", "0"], 2, "--timesteps"),
        (["convert", "zoo:digits", "-T", "5000"], 2, "4095"),
        (["convert", "zoo:digits", "--drain", "soon"], 2, "--drain"),
        (["convert", "zoo:digits", "--schedule", "paper", "--drain", "3"], 2, "no drain"),
        (["convert", "zoo:digits", "--epochs", "1"], 2, "no data given: nothing to retrain on"),
        (["convert", "zoo:digits", "--calibration", "mse"], 2, "no data given"),
        (["convert", "zoo:digits", "--data", "nowhere"], 1, "no such folder"),
        (["convert", "zoo:digits", "-o", "x.pt"], 2, "*.snn.safetensors"),
        (["convert", "zoo:digits", "-o", "no/x.snn.safetensors"], 2, "no such folder"),
        (["convert", "zoo:digits", "-m", "shortcut"], 2, "K=V"),
        (["convert", "zoo:digits", "-m", "wings=2"], 2, "wings=2"),
        (["eval", "--data", "zoo:digits"], 2, "no checkpoint given"),
        (["eval", "a.snn.safetensors", "--data", "zoo:digits"], 1, "no such file"),
        (["inspect"], 2, "no checkpoint given"),
        (["check", "resnet81"], 2, "did you mean"),
    ],
)
def test_bad_input_gets_one_line_and_a_code(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    own_folder: Path,
) -> None:
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(own_folder.iterdir()) == []


def arrays(folder: Path, size: int, channels: int, classes: int, count: int = 12) -> None:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = generator.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", images=images, labels=np.arange(count) % classes)


def test_images_of_another_size_are_resized_and_it_is_said(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    arrays(own_folder / "d", 9, 1, 10)
    assert run(["convert", "zoo:digits", "--data", "d", "--epochs", "0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "images of 9x9 are resized to the network's 8x8" in err
    assert json.loads(out)["preprocessing"]["input_size"] == [1, 8, 8]


def test_data_of_another_network_are_refused(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    arrays(own_folder / "d", 8, 1, 11)
    assert run(["convert", "zoo:digits", "--data", "d", "-q"]) == 1
    assert "the network has 10 classes" in capsys.readouterr().err
    for k in range(6):
        folder = own_folder / "e" / "abc"[k % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / f"{k}.png")
    assert run(["convert", "zoo:digits", "--data", "e", "-q"]) == 1
    assert "there are 3 classes (a, b, c" in capsys.readouterr().err
    assert not list(own_folder.glob("*.snn.safetensors"))


def test_the_three_lines_work_as_they_stand(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    """A state dict for ten classes names no image size; that of the images is taken."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "test_resnet.pt")
    arrays(own_folder / "d", 32, 3, 10)
    Path("snnconv.toml").write_text('data = "d"\n[convert]\ncalibration-images = 8\n')
    assert run(["convert", "test_resnet.pt"]) == 0
    out, err = capsys.readouterr()
    assert "taking the images' own, 32x32" in err
    assert "3x32x32, mean" in out and "8 train images" in out
    assert run(["eval", "--timesteps", "8", "--json"]) == 0
    found = output(capsys)
    assert found["timesteps"] == 8
    assert found["agreement"]["counts_exact"]
    assert run(["convert", "test_resnet.pt", "--image-size", "40", "--force", "--json"]) == 0
    assert output(capsys)["preprocessing"]["input_size"] == [3, 40, 40]


def test_preprocessing_can_be_overridden(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), "test_resnet.pt")
    options = ["--mean", "104,117,123", "--std", "1", "--channels", "bgr", "--image-size", "24x32"]
    more = ["--crop-pct", "0.9", "--interpolation", "bilinear", "--json"]
    assert run(["convert", "test_resnet.pt", *options, *more]) == 0
    found = output(capsys)
    assert found["preprocessing"] == {
        "input_size": [3, 24, 32],
        "mean": pytest.approx([123 / 255, 117 / 255, 104 / 255]),
        "std": pytest.approx([1 / 255] * 3),
        "crop_pct": 0.9,
        "interpolation": "bilinear",
    }
    assert found["model"]["channels"] == "bgr"
    for wrong in (["--mean", "a,b"], ["--std", "0"], ["--image-size", "3x"], ["--mean", "0.1,0.2"]):
        assert run(["convert", "test_resnet.pt", "--force", *wrong]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_bgr_network_and_its_turned_twin_are_the_same(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), "bgr.pt")
    first = model.pretrained_cfg["first_conv"]
    state = model.state_dict()
    state[f"{first}.weight"] = state[f"{first}.weight"].flip(1)
    torch.save(state, "rgb.pt")
    arrays(own_folder / "d", 32, 3, 10)
    base = ["--arch", "test_resnet", "--data", "d", "--epochs", "0", "-q"]
    assert run(["convert", "bgr.pt", *base, "--channels", "bgr"]) == 0
    assert run(["convert", "rgb.pt", *base]) == 0
    one, two = (load_network(Path(f"{n}.snn.safetensors")) for n in ("bgr", "rgb"))
    for a, b in zip(one.populations, two.populations, strict=True):
        assert torch.equal(a.branches[0].weight, b.branches[0].weight)
    capsys.readouterr()
    assert run(["eval", "bgr.snn.safetensors", "--data", "d", "--ann", "bgr.pt", "--json"]) == 0
    found = output(capsys)
    assert found["ann"]["source"] == "measured"


def test_recipes_say_what_a_file_does_not(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    from snnconv.model_zoo import register

    register()
    torch.manual_seed(0)
    torch.save(timm.create_model("squeezenet1_0", num_classes=10).state_dict(), "weights.pt")
    assert run(["check", "weights.pt", "--recipe", "squeezenet1_0_caffe", "--json"]) == 0
    assert output(capsys)["model"]["name"] == "squeezenet1_0"
    Path("mine.toml").write_text('arch = "squeezenet1_0"\n[preprocessing]\ninput_sise = 3\n')
    assert run(["check", "weights.pt", "--recipe", "mine.toml"]) == 2
    assert "did you mean input_size" in capsys.readouterr().err
    assert run(["check", "weights.pt", "--recipe", "squeezenet"]) == 2
    assert "did you mean squeezenet1_0_caffe" in capsys.readouterr().err


def test_one_part_of_data_is_measured_where_it_did_not_calibrate(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(own_folder / "all.npz", images=images, labels=np.arange(30) % 10)
    options = ["--data", "all.npz", "--calibration-images", "10", "--seed", "5"]
    assert run(["convert", "zoo:digits", *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "10 of 30 images, drawn with seed 5, calibrate, the rest is measured" in err
    assert json.loads(out)["model"]["ann"]["images"] == 20
    assert run(["eval", "--data", "all.npz", "--json", "-q"]) == 0
    found = output(capsys)
    assert found["images"] == 20 and not found["partial"]
    assert found["ann"]["source"] == "stored"
    np.savez(own_folder / "other.npz", images=255 - images, labels=np.arange(30) % 10)
    assert run(["eval", "--data", "other.npz", "--json", "-q"]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["eval", "--data", "other.npz", "--json", "-q", "--force"]) == 0
    found = output(capsys)
    assert found["images"] == 30 and found["ann"] is None


def test_one_unreadable_image_among_those_that_calibrate_is_left_out(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 2)):
        for label in range(10):
            folder = own_folder / "images" / split / str(label)
            folder.mkdir(parents=True)
            for k in range(count):
                image = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{k}.png")
    (own_folder / "images/train/0/0.png").write_bytes(b"junk")
    options = ["--data", "images", "--epochs", "0", "--calibration", "mse", "--no-evaluate"]
    assert run(["convert", "zoo:digits", *options]) == 0
    assert "0.png" in capsys.readouterr().err


def test_a_rank_without_a_job_silences_nobody(
    capsys: pytest.CaptureFixture[str], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert convert("--no-evaluate", "--json") == 0
    assert Path(output(capsys)["checkpoint"]).is_file()


def test_a_network_converted_from_python_can_be_inspected(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    save_network(converted("residual").network, Path("own.snn.safetensors"))
    assert run(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "unnamed" in out and "unknown: it was converted from Python" in out
    assert "None" not in out


def test_a_gate_is_missed_after_the_report(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    assert convert("-T", "1", "--calibration", "bn", "--no-evaluate") == 0
    capsys.readouterr()
    report = Path("gate.json")
    base = ["eval", "--data", "zoo:digits", "--limit", "40", "-q", "--json", "-o", str(report)]
    assert run([*base, "--max-drop", "100"]) == 0
    found = output(capsys)
    lost = found["ann"]["top1_percent"] - found["snn"]["top1_percent"]
    assert lost > 10
    report.unlink()
    assert run([*base, "--max-drop", f"{lost}"]) == 0
    assert output(capsys)["snn"] == found["snn"]
    report.unlink()
    assert run([*base, "--max-drop", f"{lost - 0.1}"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["snn"] == found["snn"] and report.is_file()
    assert f"{lost:.2f} points less" in err
    assert run([*base, "--max-drop", "nan"]) == 2
    others = ["eval", "--data", "zoo:digits", "--limit", "9", "-q", "--max-drop", "1"]
    assert run(others) == 2
    assert "--ann" in capsys.readouterr().err
    assert run([*others, "--ann", "zoo:digits"]) in (0, 4)
    # As many images, but not the same ones.
    assert run([*base[:-2], "--seed", "1", "--max-drop", "100"]) == 2
    assert "--ann" in capsys.readouterr().err


def test_data_named_elsewhere_are_spelled_out_in_the_report(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert("--no-evaluate") == 0
    monkeypatch.setenv("SNNCONV_DATA", "zoo:digits")
    Path("snnconv.toml").write_text("seed = 3\n[eval]\nlimit = 9\npage = false\n")
    assert run(["eval", "-T", "3", "-q"]) == 0
    (report,) = own_folder.glob("*.eval.json")
    command = json.loads(report.read_text(encoding="utf-8"))["command"].split()
    assert command[:2] == ["snnconv", "eval"] and command[-1] == "digits.snn.safetensors"
    for words in ("--data zoo:digits", "--seed 3", "--limit 9", "--no-page", "-T 3"):
        assert f" {words} " in " ".join(command)
    # What they say today is not what they said then.
    monkeypatch.setenv("SNNCONV_DATA", "nowhere")
    Path("snnconv.toml").write_text('[eval]\nschedule = "paper"\n')
    assert run(["reproduce", str(report)]) == 0


def test_a_report_that_knew_the_ann_is_not_replaced_in_silence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert("-T", "3", "--calibration", "mse") == 0
    again = ["eval", "--data", "zoo:digits", "--limit", "40"]
    assert run([*again, "--ann", "zoo:digits"]) == 0
    assert "hint" not in capsys.readouterr().err
    assert run(again) == 0
    assert "made with --ann zoo:digits" in capsys.readouterr().err
    assert run(again) == 0
    assert "hint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("limit = 12.5", "whole number"),
        ("limit = true", "whole number"),
        ("timesteps = [1]", "whole number"),
        ('statistics = "no"', "true or false"),
        ("schedule = []", "a text"),
    ],
)
def test_settings_of_a_wrong_type_are_named(
    line: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("snnconv.toml").write_text(f"[eval]\n{line}\n")
    assert run(["eval", "--data", "zoo:digits"]) == 2
    err = capsys.readouterr().err
    assert f"snnconv.toml: {line.split()[0]} must be" in err and word in err


def test_a_recipe_of_a_wrong_type_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.toml").write_text("[convert]\ncalibration_images = [10]\n")
    assert run(["convert", "zoo:digits", "--recipe", "x.toml"]) == 2
    assert "x.toml: [convert] calibration_images must be" in capsys.readouterr().err


def test_an_evaluation_of_other_data_of_the_same_name_is_kept(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    assert convert("--no-evaluate") == 0
    generator = np.random.default_rng(0)
    for folder in ("one", "two"):
        (own_folder / folder).mkdir()
        images = generator.integers(0, 256, (9, 8, 8), dtype=np.uint8)
        np.savez(own_folder / folder / "all.npz", images=images, labels=np.arange(9))
    assert run(["eval", "--data", "one/all.npz", "-q"]) == 0
    assert run(["eval", "--data", "one/all.npz", "-q"]) == 0
    assert run(["eval", "--data", "two/all.npz", "-q"]) == 2
    assert "--force" in capsys.readouterr().err


def test_a_network_that_cannot_spike_is_refused_with_all_reasons(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), "test_vit.pt")
    assert run(["convert", "test_vit.pt", "--json"]) == 3
    found = output(capsys)
    assert found["schema"] == "snnconv.error/1"
    assert found["exit_code"] == 3
    assert len(found["problems"]) > 3
    assert sorted(p.name for p in own_folder.iterdir()) == ["test_vit.pt"]
    assert run(["check", "test_vit", "--json"]) == 3
    checked = output(capsys)
    assert checked["schema"] == "snnconv.check/1"
    assert checked["verdict"] == "not convertible"
    assert checked["problems"] == found["problems"]


def test_an_interrupt_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("snnconv.pipeline.calibrate_", interrupt)
    assert convert() == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(own_folder.iterdir()) == []


def test_the_ann_must_be_the_one_that_was_converted(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    assert convert() == 0
    torch.manual_seed(1)
    other = timm.create_model("digits_resnet")
    torch.save(other.state_dict(), "digits_resnet.pt")
    arguments = ["eval", "--data", "zoo:digits", "--limit", "9", "--ann", "digits_resnet.pt"]
    assert run(arguments) == 2
    assert "other weights" in capsys.readouterr().err
    torch.save({"conv.weight": torch.zeros(1)}, "digits_resnet.pt")
    assert run(arguments) == 2
    assert "no weights of the digits_resnet" in capsys.readouterr().err


def test_checkpoints_that_were_calibrated_on_different_images_are_not_compared(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(own_folder / "all.npz", images=images, labels=np.arange(30) % 10)
    make = ["convert", "zoo:digits", "--data", "all.npz", "--no-evaluate", "-q", "-T", "2"]
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        drawn = ["--calibration-images", "10", "--seed", seed, "-o", f"{name}.snn.safetensors"]
        assert run([*make, *drawn]) == 0
    compare = ["eval", "--baselines", "--data", "all.npz", "-q", "a.snn.safetensors"]
    assert run([*compare, "b.snn.safetensors", "-o", "ab.json"]) == 0
    assert json.loads(Path("ab.json").read_text())["images"] == 20
    assert run([*compare, "c.snn.safetensors"]) == 2
    assert "calibrated on different images" in capsys.readouterr().err


def test_checkpoints_of_several_networks_have_no_ann_in_common(own_folder: Path) -> None:
    convert("-T", "2")
    save_network(
        replace(load_network(Path("digits.snn.safetensors")), model={}), Path("b" + SUFFIX)
    )
    compare = ["eval", "--baselines", "--data", "zoo:digits", "--limit", "20", "-q"]
    assert run([*compare, "digits" + SUFFIX, "b" + SUFFIX, "-o", "both.json"]) == 0
    report = json.loads(Path("both.json").read_text())
    assert report["model"] == "digits_resnet, network" and report["ann"] is None
    assert run([*compare, "digits" + SUFFIX, "-o", "one.json"]) == 0
    assert json.loads(Path("one.json").read_text())["ann"] is not None
    assert run([*compare, "digits" + SUFFIX, "b" + SUFFIX, "--ann", "zoo:digits", "--force"]) == 2


def test_a_network_without_a_name_is_measured_and_shown(own_folder: Path) -> None:
    """As the Python library makes one."""
    convert("-T", "2")
    save_network(
        replace(load_network(Path("digits.snn.safetensors")), model={}), Path("b" + SUFFIX)
    )
    assert run(["eval", "b" + SUFFIX, "--data", "zoo:digits", "--limit", "9", "-q"]) == 0
    (page,) = Path().glob("b.*.html")
    assert run(["report", "b" + SUFFIX, "-q"]) == 0
    assert "network" in page.read_text()


def test_an_end_point_does_not_replace_a_simulation(own_folder: Path) -> None:
    assert convert() == 0
    base = ["eval", "--data", "zoo:digits", "--limit", "9", "-q"]
    assert run(base) == run([*base, "--engine", "endpoint"]) == 0
    simulated = Path("digits.T7-drain-signed-limit9.eval.json")
    assert json.loads(simulated.read_text())["by_step"]
    end = Path("digits.T7-drain-signed-limit9-endpoint.eval.json")
    assert json.loads(end.read_text())["by_step"] is None
    page = simulated.with_suffix(".html")
    assert page.is_file() and run([*base, "--no-page"]) == 0 and not page.exists()


def test_eval_does_not_overwrite_what_is_not_its_own(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    assert convert() == 0
    base = ["eval", "--data", "zoo:digits", "--limit", "9", "-q"]
    assert run(base) == run(base) == 0
    # Which checkpoint was the newest is stated.
    report = json.loads(Path("digits.T7-drain-signed-limit9.eval.json").read_text())
    assert report["command"].endswith("-q digits.snn.safetensors")
    Path("mine.json").write_text("{}")
    assert run([*base, "-o", "mine.json"]) == 2
    assert Path("mine.json").read_text() == "{}"
    Path("link.json").symlink_to("nowhere.json")
    assert run([*base, "-o", "link.json"]) == 2
    Path("digits.T7-drain-signed-limit9.eval.json").write_text("notes")
    assert run(base) == 2
    assert "--force" in capsys.readouterr().err


def test_smooth_activations_may_become_relu(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4)
    torch.save(model.state_dict(), "test_efficientnet.pt")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = generator.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
        np.savez(f"{split}.npz", images=pixels, labels=np.arange(24) % 4)
    command = ["convert", "test_efficientnet.pt", "-m", "num_classes=4", "--image-size", "32"]
    command += ["--data", ".", "--epochs", "0", "-T", "5", "--json", "-q", "--calibration", "mse"]
    assert run([*command, "--replace-activations", "relu"]) == 0
    found = output(capsys)
    replaced = found["replaced_activations"]
    assert replaced["count"] == {"SiLU": 11} and replaced["ann"]["images"] == 24
    analog = {n["operation"] for n in found["nodes"] if n["role"] == "analog"}
    assert analog == {"Sigmoid", "mul"} and found["verification"]["equal"]
    assert run(["eval", "--data", ".", "--ann", "test_efficientnet.pt", "--json", "-q"]) == 0
    assert output(capsys)["qann_float"] is not None
    assert run([*command, "--force"]) == 0
    assert output(capsys)["replaced_activations"] is None


def test_activations_are_replaced_in_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Sequential(nn.Mish(), nn.Sigmoid()))
    changed, found = replace_activations(model)
    assert found == {"GELU": 1, "Mish": 1}
    assert [type(m) for m in changed.modules()].count(nn.ReLU) == 2
    assert isinstance(changed[2][1], nn.Sigmoid) and isinstance(model[1], nn.GELU)
    alone, found = replace_activations(nn.SiLU())
    assert isinstance(alone, nn.ReLU) and found == {"SiLU": 1}
    act = GammaAct("silu", gamma=1.5)
    changed, found = replace_activations(act)
    assert found == {"GammaAct of silu": 1}
    assert changed(torch.tensor([-1.0, 2.0])).tolist() == [0, 3] and act.act_fn is F.silu


def test_a_conversion_names_no_evaluation_that_is_not_its_own() -> None:
    theirs = Path("digits.T7-drain-signed-limit40.eval.json")
    theirs.write_text("notes")
    assert convert() == 0
    assert theirs.read_text() == "notes"
    assert json.loads(Path("digits.convert.json").read_text())["evaluation"] is None
    assert convert("--force") == 0
    assert json.loads(Path("digits.convert.json").read_text())["evaluation"] == theirs.name
    assert json.loads(theirs.read_text())["checkpoint"] == "digits.snn.safetensors"


def test_a_diagnosis_that_fails_does_not_lose_the_evaluation(
    capsys: pytest.CaptureFixture[str], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate")

    monkeypatch.setattr("snnconv.diagnosis.diagnose", fails)
    source = ["convert", "zoo:digits", "--data", "zoo:digits", "--epochs", "0", "--limit", "50"]
    assert run([*source, "-T", "3"]) == 0
    assert "without a diagnosis: not enough memory" in capsys.readouterr().err
    (path,) = own_folder.glob("*.eval.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["errors"] is None and found["energy"]["snn_nj"]["total"] > 0
