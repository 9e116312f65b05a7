"""`snnconv convert` with retraining: defaults, resuming, refusals, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from snnconv.checkpoint import load_network, sha256
from snnconv.cli.main import run
from snnconv.errors import UsageError
from snnconv.load import load_model
from snnconv.preprocess import Preprocessing
from snnconv.train.teacher import Renormalized, teacher_for

DIGITS = ["convert", "zoo:digits", "--data", "zoo:digits", "-T", "2"]
LENET = Path(__file__).parents[1] / "model_zoo/checkpoints/mnist_lenet.mnist-t3.snn.safetensors"
SHORT = [*DIGITS, "--epochs", "2", "--batch-size", "101"]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_the_report_says_how_it_was_retrained(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    assert run([*SHORT, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "retraining: 2 epochs of 11 steps" in err and "minutes to go" in err
    retraining = found["retraining"]
    assert retraining["settings"]["epochs"] == 2 and retraining["settings"]["batch_size"] == 101
    lines = [json.loads(x) for x in Path("digits.metrics.jsonl").read_text().splitlines()]
    assert retraining["epochs"] == lines and [x["epoch"] for x in lines] == [0, 1, 2]
    assert retraining["held_out_kl"] == min(x["held_out_kl"] for x in lines)
    assert abs(found["qann"]["top1_percent"] - found["qann_float"]["top1_percent"]) < 1
    assert found["verification"]["equal"]
    assert not Path("digits.train.pt").exists()
    assert run(["eval", "--data", "zoo:digits", "--json", "-q"]) == 0
    evaluated = output(capsys)
    assert evaluated["qann"]["top1_percent"] == found["qann"]["top1_percent"]
    assert run(["eval", "--data", "zoo:digits", "--ann", "zoo:digits", "--json", "-q"]) == 0
    assert output(capsys)["qann_float"] is None


def test_another_network_can_teach(capsys: pytest.CaptureFixture[str], own_folder: Path) -> None:
    train = [*SHORT, "--no-evaluate", "--json", "-q", "--force"]
    itself = ["--teacher", "zoo:digits"]
    kls = []
    for teacher in ([], itself):
        assert run([*train, *teacher, "-o", f"{len(teacher)}.snn.safetensors"]) == 0
        kls.append(output(capsys)["retraining"])
    assert kls[0]["teacher"] is None and kls[1]["teacher"]["name"] == "digits_resnet"
    assert kls[0]["held_out_kl"] == kls[1]["held_out_kl"]
    # Another network: the same one, dumber.
    other = load_model("zoo:digits").model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    save_file(other.state_dict(), "other.safetensors", {"arch": "digits_resnet"})
    dumber = ["--teacher", "other.safetensors"]
    assert run([*train[:-3], "--force", *dumber, "-o", "2.snn.safetensors"]) == 0
    assert "taught by digits_resnet" in capsys.readouterr().out
    report = json.loads(Path("2.convert.json").read_text())["retraining"]
    assert report["held_out_kl"] != kls[0]["held_out_kl"]
    assert report["teacher"]["weights_sha256"] != kls[1]["teacher"]["weights_sha256"]


def test_a_retraining_starts_from_a_spiking_checkpoint(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    """Of the same T it begins where the other ended; of fewer weight bits it can begin, too."""
    train = ["convert", "zoo:digits", "--data", "zoo:digits", "--no-evaluate", "--lr", "1e-9"]
    train += ["--epochs", "1", "--timesteps", "2"]
    assert run([*SHORT, "--no-evaluate", "--json", "-q", "-o", "a.snn.safetensors"]) == 0
    first = output(capsys)["retraining"]
    assert run([*train, "-o", "b.snn.safetensors", "--start-from", "a.snn.safetensors"]) == 0
    assert "started from a.snn.safetensors" in capsys.readouterr().out
    second = json.loads(Path("b.convert.json").read_text())["retraining"]
    assert second["held_out_kl"] == pytest.approx(first["held_out_kl"], rel=0.1)
    assert second["held_out_kl"] < 0.7 * first["epochs"][0]["held_out_kl"]
    one, two = (load_network(Path(f"{n}.snn.safetensors")) for n in "ab")
    assert second["started_from"] == {"name": "a.snn.safetensors", "sha256": sha256(one)}
    # A rate so small moves nothing.
    for ours, theirs in zip(two.populations, one.populations, strict=True):
        assert torch.allclose(ours.clip, theirs.clip)
        for a, b in zip(ours.branches, theirs.branches, strict=True):
            assert int((a.weight - b.weight).abs().max()) <= 1
    fewer = [*train, "--weight-bits", "4", "-o", "c.snn.safetensors"]
    assert run([*fewer, "--start-from", "a.snn.safetensors", "-q"]) == 0
    assert load_network(Path("c.snn.safetensors")).weight_bits == 4
    hint = "a.snn.safetensors was trained with --seed 0"
    assert hint not in capsys.readouterr().err
    Path("d.train.pt").write_bytes(b"hours of work")
    seeded = [*train, "-o", "d.snn.safetensors", "--seed", "1", "--force"]
    assert run([*seeded, "--start-from", "a.snn.safetensors"]) == 0
    err = capsys.readouterr().err
    assert hint in err and "interrupted retraining d.train.pt is given up" in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--start-from", "nowhere.snn.safetensors"], 1, "nowhere.snn.safetensors"),
        (["--start-from", "x", "--epochs", "0"], 2, "--start-from would do nothing"),
        (["--start-from", str(LENET)], 2, "prepares its images otherwise"),
        (["--start-from", "zoo:mnist_lenet.mnist-t3"], 2, "prepares its images otherwise"),
        (["--start-from", "zoo:mnist"], 2, "the zoo has no spiking checkpoint 'mnist'"),
        (["--teacher", "zoo:digits", "--no-distill"], 2, "would teach nothing"),
        (["--teacher", "zoo:digits", "--epochs", "0"], 2, "--teacher would do nothing"),
        (["--teacher", "nowhere.pt"], 1, "nowhere.pt"),
    ],
)
def test_teachers_and_starts_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str],
    own_folder: Path,
    options: list[str],
    code: int,
    message: str,
) -> None:
    assert run([*SHORT, *options]) == code
    err = capsys.readouterr().err
    assert message in err.replace("\n", " ") and not list(own_folder.iterdir())


def test_a_teacher_of_other_classes_or_images_is_refused() -> None:
    digits = load_model("zoo:digits")
    assert teacher_for(digits, digits) is digits.model
    with pytest.raises(UsageError, match="digits_resnet knows 7 classes, digits_resnet 10"):
        teacher_for(replace(digits, num_classes=7), digits)
    size = replace(digits.preprocessing, input_size=(1, 9, 7))
    with pytest.raises(UsageError, match="takes images of 1x9x7, digits_resnet of 1x"):
        teacher_for(replace(digits, preprocessing=size), digits)


def test_a_teacher_sees_images_as_it_was_trained_on_them() -> None:
    own = Preprocessing((3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    given = Preprocessing((3, 4, 4), (0.4, 0.4, 0.5), (0.2, 0.3, 0.9))
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    found = Renormalized(torch.nn.Identity(), own, given)(given.normalize(pixels))
    torch.testing.assert_close(found, own.normalize(pixels))


def test_a_recipe_says_how_and_options_override_it(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    Path("mine.toml").write_text(
        'arch = "digits_resnet"\ntimesteps = 2\n[train]\nepochs = 5\nlr = 0.02\n'
        "batch_size = 100\n[train.augmentation]\ncrop = 'none'\n"
    )
    options = ["--recipe", "mine.toml", "--epochs", "1", "--no-distill", "--json", "-q"]
    assert run(["convert", "zoo:digits", "--data", "zoo:digits", *options]) == 0
    found = output(capsys)
    settings = found["retraining"]["settings"]
    assert found["timesteps"] == 2
    assert (settings["epochs"], settings["lr"], settings["distill"]) == (1, 0.02, 0)
    assert settings["augmentation"]["crop"] == "none"
    Path("mine.toml").write_text('arch = "digits_resnet"\n[train]\nepoch = 5\n')
    command = ["convert", "zoo:digits", "--data", "zoo:digits", "--recipe", "mine.toml", "--force"]
    assert run(command) == 2
    assert "epoch; did you mean epochs?" in capsys.readouterr().err


def test_a_recipe_says_how_to_convert_and_options_override_it(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    command = ["convert", "zoo:digits", "--data", "zoo:digits", "-T", "20", "--json", "-q"]
    assert run([*command, "--recipe", "spiking_resnet", "--schedule", "wait"]) == 0
    found = output(capsys)
    assert (found["neuron"], found["schedule"], found["timesteps"]) == ("unsigned", "wait", 20)
    assert found["calibration"]["method"] == "percentile"
    assert found["calibration"]["percentile"] == 99.9 and found["retraining"] is None
    Path("mine.toml").write_text(
        '[convert]\nneuron = "unsigned"\npercentile = 90.5\ninitial_membrane = "half"\n'
    )
    Path("snnconv.toml").write_text('[convert]\nneuron = "signed"\nepochs = 0\n')
    command += ["--recipe", "mine.toml", "--force"]
    assert run([*command, "--calibration", "percentile"]) == 0
    found = output(capsys)
    assert (found["neuron"], found["calibration"]["percentile"]) == ("signed", 90.5)
    assert run([*command, "--compensation", "gain"]) == 0
    found = output(capsys)
    assert (found["calibration"]["method"], found["initial_membrane"]) == ("mse", "zero")
    # What is made up for is missing after T steps, and not where counts settle.
    assert found["schedule"] == "paper"
    capsys.readouterr()
    everything = ["--compensation", "bias", "--calibration-images", "9999"]
    assert run([*command, *everything]) == 2
    assert "lower --calibration-images" in capsys.readouterr().err
    assert run([*command, "--percentile", "99"]) == 2
    assert "--percentile belongs to --calibration percentile, not mse" in capsys.readouterr().err
    Path("snnconv.toml").unlink()
    Path("mine.toml").write_text('[convert]\nneuron = "sined"\n')
    assert run(command) == 2
    assert "sined" in capsys.readouterr().err
    Path("mine.toml").write_text('[convert]\nneurons = "signed"\n')
    assert run(command) == 2
    assert "neurons; did you mean neuron?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--epochs", "0", "--lr", "0.1"], 2, "--lr would do nothing"),
        (["--epochs", "-1"], 2, "--epochs"),
        (["--lr", "0"], 2, "--lr"),
        (["--lr", "nan"], 2, "lr must be"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--workers", "-1"], 2, "--workers"),
        (["--resume"], 2, "no interrupted retraining"),
        (["--workers", "1", "--epochs", "0"], 2, "--workers would do nothing"),
    ],
)
def test_bad_options_get_one_line(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    own_folder: Path,
) -> None:
    found = run([*DIGITS, *arguments, "-q"])
    err = capsys.readouterr().err
    assert found == code and message in err
    assert "Traceback" not in err


def test_conversion_without_training_leaves_an_interrupted_one_alone(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    Path("digits.train.pt").write_bytes(b"hours of work")
    assert run([*DIGITS, "-q"]) == 2
    assert "is an interrupted retraining; give --resume" in capsys.readouterr().err
    assert run([*DIGITS, "--epochs", "0", "--force", "-q"]) == 0
    assert Path("digits.train.pt").read_bytes() == b"hours of work"


def test_data_of_one_part_are_retrained_on_only_if_asked(
    capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    np.savez("all.npz", images=images, labels=np.arange(60) % 10)
    one = ["convert", "zoo:digits", "--data", "all.npz", "--calibration-images", "20"]
    assert run([*one, "--lr", "0.1", "-q"]) == 2
    assert "retrained on with --epochs only; --lr would do" in capsys.readouterr().err
    assert run([*one, "--epochs", "1", "--calibration", "bn", "-q"]) == 2
    assert "--calibration bn leaves all images" in capsys.readouterr().err
    assert run([*one, "--json", "-q"]) == 0
    assert output(capsys)["retraining"] is None
    assert run([*one, "--epochs", "1", "--json", "--force"]) == 0
    out, err = capsys.readouterr()
    retraining = json.loads(out)["retraining"]
    assert (retraining["images"], retraining["held_out_images"]) == (18, 2)
    assert "images that calibrate retrain" in err
    assert run(["eval", "--data", "all.npz", "--json", "-q"]) == 0
    assert output(capsys)["images"] == 40


def snnconv(arguments: list[str], folder: Path, *launcher: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [*(launcher or (sys.executable,)), "-m", "snnconv.cli.main", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_interrupted_and_resumed_it_ends_with_the_same_bytes(
    sign: signal.Signals, own_folder: Path
) -> None:
    arguments = [*DIGITS, "--epochs", "12", "-q"]
    folders = [own_folder / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    whole, stopped = (snnconv(arguments, folder) for folder in folders)
    wait_for(folders[1] / "digits.train.pt")
    os.killpg(stopped.pid, sign)
    text, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == (130 if sign == signal.SIGINT else -sign)
    assert "Traceback" not in text and not (folders[1] / "digits.snn.safetensors").exists()
    again = snnconv(arguments, folders[1])
    text, _ = again.communicate(timeout=60)
    assert again.returncode == 2 and "give --resume to go on with it" in text
    other = snnconv([*arguments, "--resume", "--lr", "0.5"], folders[1])
    text, _ = other.communicate(timeout=60)
    assert other.returncode == 2 and "settings.lr: 0.0007 there, 0.5 here" in text
    resumed = snnconv([*arguments, "--resume"], folders[1])
    assert resumed.wait(timeout=120) == 0 and whole.wait(timeout=120) == 0
    one, two = ((folder / "digits.snn.safetensors").read_bytes() for folder in folders)
    assert one == two


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


SHARING = """
import torch
import torch.distributed as dist
from snnconv.train.batch_norm import BatchNorms, _Norm
dist.init_process_group("gloo")
rank = dist.get_rank()
norms = BatchNorms.__new__(BatchNorms)
norm = _Norm(torch.nn.BatchNorm2d(3), None, None, torch.full((2, 3), float(rank)))
norms.norms = {(0, 0): norm}
norms.share_(1 + 2 * rank)
assert torch.equal(norm.seen, torch.full((2, 3), 0.75)), norm.seen
norms.share_(0)
assert torch.equal(norm.seen, torch.full((2, 3), 0.75)), norm.seen
dist.destroy_process_group()
"""


def test_processes_share_what_batch_norm_has_seen(own_folder: Path) -> None:
    """Weighted by their images; of no images at all, nothing changes."""
    Path("sharing.py").write_text(SHARING)
    done = subprocess.run([*TORCHRUN, "sharing.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "loss", "kl"),
    [("", 1e-3, 0.05), ("batch_statistics = 0.5\nema = 0.5\n", 0.1, 0.2)],
)
def test_two_processes_do_what_one_does(
    capsys: pytest.CaptureFixture[str], own_folder: Path, settings: str, loss: float, kl: float
) -> None:
    """But for BatchNorm, which takes the statistics of half a batch each."""
    (own_folder / "one").mkdir()
    (own_folder / "two").mkdir()
    # A high rate, Adam, or halves would blow up the differences in the last bits of the sums.
    recipe = own_folder / "sgd.toml"
    recipe.write_text(
        'arch = "digits_resnet"\n[train]\namp = false\n'
        'optimizer = "sgd"\nlr = 0.003\nclip_lr = 0.1\n' + settings
    )
    arguments = [*SHORT, "--recipe", str(recipe), "-q"]
    jobs = [
        snnconv(arguments, own_folder / "one"),
        snnconv(arguments, own_folder / "two", *TORCHRUN),
    ]
    assert [job.wait(timeout=180) for job in jobs] == [0, 0]
    one, two = (
        [json.loads(x) for x in (own_folder / n / "digits.metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert b["held_out_kl"] == pytest.approx(a["held_out_kl"], rel=kl)
        if a["loss"] is not None:
            assert b["loss"] == pytest.approx(a["loss"], rel=loss)
    evaluate = ["eval", "one/digits.snn.safetensors", "--data", "zoo:digits", "--json", "-q"]
    assert run([*evaluate, "-o", "1.json"]) == 0
    alone = output(capsys)
    job = snnconv([*evaluate, "-o", "2.json"], own_folder, *TORCHRUN)
    assert job.wait(timeout=120) == 0
    shared = json.loads(Path("2.json").read_text())
    times = ("wall_ms_per_image", "threads", "command", "created")
    assert {k: v for k, v in alone.items() if k not in times} == {
        k: v for k, v in shared.items() if k not in times
    }


def test_the_others_say_that_a_process_has_died(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(20000 + os.getpid() % 10000))
    monkeypatch.setenv("WORLD_SIZE", "2")
    jobs = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        jobs.append(snnconv([*DIGITS, "--epochs", "20"], own_folder))
    wait_for(own_folder / "digits.train.pt")
    jobs[1].kill()
    text, _ = jobs[0].communicate(timeout=60)
    assert jobs[0].returncode == 1
    assert "error: another process of the job has ended" in text
    assert "start it again with --resume" in text


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_which_can_be_resumed(own_folder: Path) -> None:
    arguments = [*DIGITS, "--epochs", "20"]
    job = snnconv(arguments, own_folder, *TORCHRUN)
    wait_for(own_folder / "digits.train.pt")
    children = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    job.communicate(timeout=120)
    assert job.returncode != 0
    resumed = snnconv([*arguments, "--resume"], own_folder, *TORCHRUN)
    text, _ = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, text
    assert (own_folder / "digits.snn.safetensors").exists()
