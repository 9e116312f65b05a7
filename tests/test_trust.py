"""Hostile and damaged files, full disks, sudden ends: a clean error, or a file that verifies."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from networks import converted, images
from safetensors.torch import save_file

from snnconv.checkpoint import load_network, save_network
from snnconv.cli.main import run
from snnconv.engine import endpoint
from snnconv.errors import CheckpointError, SnnconvError
from snnconv.load import load_model
from snnconv.pipeline import check_equal, convert

SPIKING_MUTATIONS, FOREIGN_MUTATIONS = 1000, 300


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing here asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def mutated(contents: bytes, draw: random.Random) -> bytes:
    """Damage a file: flip bytes, cut, insert, repeat or blank a stretch, or change a digit."""
    changed = bytearray(contents)
    for _ in range(draw.choice([1, 1, 2, 5])):
        # Headers are small and decide most: aim at the first bytes, the first kilobytes, anywhere.
        place = draw.randrange(min(len(changed), draw.choice([16, 4096, len(changed)])) or 1)
        kind = draw.choice(["flip", "flip", "cut", "insert", "repeat", "blank", "digit"])
        length = draw.choice([1, 4, 100])
        if kind == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del changed[place : place + draw.choice([length, len(changed)])]
        elif kind == "insert":
            changed[place:place] = draw.randbytes(length)
        elif kind == "repeat":
            changed[place:place] = changed[place : place + length]
        elif kind == "blank":
            changed[place : place + length] = bytes(min(length, len(changed) - place))
        else:
            digits = [
                i for i in range(place, min(place + 300, len(changed))) if 48 <= changed[i] < 58
            ]
            if digits:
                changed[draw.choice(digits)] = 48 + draw.randrange(10)
        if not changed:
            break
    return bytes(changed)


def examine_spiking(count: int, folder: Path) -> int:
    """Return how many of `count` damaged checkpoints were refused; the others must be whole."""
    network = converted("residual").network
    path = folder / "a.snn.safetensors"
    save_network(network, path)
    whole = path.read_bytes()
    expected = endpoint(network, images(2), 5)
    draw = random.Random(0)
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(whole, draw))
        try:
            found = endpoint(load_network(path), images(2), 5)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert all(torch.equal(found.counts[k], expected.counts[k]) for k in expected.counts)
    return refused


def examine_foreign(count: int, folder: Path) -> int:
    """Return how many of `count` damaged foreign checkpoints were refused; the others convert."""
    model = load_model("zoo:digits").model
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "digits_resnet.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "digits_resnet.pt")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=generator)
    draw = random.Random(1)
    refused = 0
    for k in range(count):
        source = folder / ("digits_resnet.safetensors" if k % 2 else "digits_resnet.pt")
        path = folder / f"digits_resnet-{k:08x}{source.suffix}"
        path.write_bytes(mutated(source.read_bytes(), draw))
        try:
            loaded = load_model(str(path))
            conversion = convert(loaded.model, loaded.preprocessing, [pixels], timesteps=3)
            assert check_equal(conversion, pixels[:2])[0].equal
        except SnnconvError as error:
            assert str(error)
            refused += 1
        path.unlink()
    return refused


def test_damaged_spiking_checkpoints_are_refused(tmp_path: Path) -> None:
    assert examine_spiking(60, tmp_path) > 50


def test_damaged_foreign_checkpoints_are_refused_or_convert(tmp_path: Path) -> None:
    assert examine_foreign(12, tmp_path) > 0


@pytest.mark.slow
def test_a_thousand_damaged_spiking_checkpoints(tmp_path: Path) -> None:
    assert examine_spiking(SPIKING_MUTATIONS, tmp_path) > 0.9 * SPIKING_MUTATIONS


@pytest.mark.slow
def test_three_hundred_damaged_foreign_checkpoints(tmp_path: Path) -> None:
    assert examine_foreign(FOREIGN_MUTATIONS, tmp_path) > 0


def test_an_archive_that_would_unpack_to_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(30_000_000))
    with pytest.raises(CheckpointError, match="would unpack from"):
        load_model(str(path))


def test_an_archive_with_names_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_resnet.pt"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with zipfile.ZipFile(path) as file:
        name = next(n for n in file.namelist() if n.endswith("data.pkl"))
        contents = file.read(name)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(name, contents)
    with pytest.raises(CheckpointError, match="same name"):
        load_model(str(path))


def test_links_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "real.snn.safetensors"
    save_network(converted("residual").network, path)
    (tmp_path / "link.snn.safetensors").symlink_to(path)
    assert load_network(tmp_path / "link.snn.safetensors").neurons > 0
    (tmp_path / "dangling.snn.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="no such file"):
        load_network(tmp_path / "dangling.snn.safetensors")


def test_a_name_twice_in_the_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.snn.safetensors"
    save_network(converted("residual").network, path)
    whole = path.read_bytes()
    entry = b'\\"schedule\\":\\"drain\\"'
    assert whole.count(entry) == 1
    # Of the same length, so that the safetensors header stays valid.
    path.write_bytes(whole.replace(entry, b'\\"timesteps\\":5'.ljust(len(entry))))
    with pytest.raises(CheckpointError, match="twice"):
        load_network(path)


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from networks import converted
from snnconv.checkpoint import save_network
{setting}
save_network(converted("residual").network, Path({path!r}))
"""


def save_in_a_process(path: Path, setting: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent), setting=setting, path=str(path))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("old", [None, b"the old one"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(old: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.snn.safetensors"
    if old:
        path.write_bytes(old)
    setting = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    )
    done = save_in_a_process(path, setting)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("old", [None, b"the old one"])
def test_a_kill_while_writing_leaves_no_half_file(old: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.snn.safetensors"
    if old:
        path.write_bytes(old)
    done = save_in_a_process(path, "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -9
    assert (path.read_bytes() if path.exists() else None) == old
    # What is left of the writing is hidden, and no command takes it for a checkpoint.
    assert all(p == path or p.name.startswith(".") for p in tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["convert", "zoo:digits", "-q", "-o", "/proc/x.snn.safetensors"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_wins(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snnconv.cli.main", "convert", "zoo:digits", "-q"]
    environment = {k: v for k, v in os.environ.items() if k != "SNNCONV_DATA"}
    runs = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [r.communicate()[1] for r in runs]
    assert sorted(r.returncode for r in runs) == [0, 2], errors
    assert "--force" in "".join(errors) or "meanwhile" in "".join(errors)
    assert load_network(tmp_path / "digits.snn.safetensors").neurons > 0


def test_weights_of_absurd_size_end_in_a_clean_error() -> None:
    loaded = load_model("zoo:digits")
    with torch.no_grad():
        loaded.model.layer1[0].conv1.weight.mul_(1e30)
    pixels = torch.from_numpy(np.full((3, 1, 8, 8), 100, np.uint8))
    try:
        conversion = convert(loaded.model, loaded.preprocessing, [pixels], timesteps=3)
        assert check_equal(conversion, pixels)[0].equal
    except SnnconvError as error:
        assert str(error)
