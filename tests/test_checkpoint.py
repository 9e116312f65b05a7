"""Spiking checkpoints: the same bits come back, the same input gives the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, converted, images
from safetensors import safe_open
from safetensors.torch import save_file

from snnconv import checkpoint
from snnconv.checkpoint import load_network, save_network
from snnconv.engine import endpoint, simulate
from snnconv.errors import CheckpointError


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_same_bits_come_back(name: str, tmp_path: Path) -> None:
    network = converted(name, 1, schedule="stagger", stagger=2, drain=3).network
    path = tmp_path / "a.snn.safetensors"
    save_network(network, path)
    again = load_network(path)
    before = simulate(network, images(3), network.timetable())
    after = simulate(again, images(3), again.timetable())
    assert before.schedule == after.schedule
    for readout in network.readouts:
        assert torch.equal(before.charges[readout.name], after.charges[readout.name])
        logits = before.logits(network, readout.name)[-1]
        assert torch.equal(logits, after.logits(again, readout.name)[-1])
    for population in network.populations:
        assert torch.equal(before.counts[population.name], after.counts[population.name])
    assert again.provenance == network.provenance


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.snn.safetensors" for i in range(3)]
    save_network(converted("residual").network, paths[0])
    save_network(converted("residual").network, paths[1])
    save_network(load_network(paths[0]), paths[2])
    first, *others = (path.read_bytes() for path in paths)
    assert all(other == first for other in others)


def test_the_file_alone_is_enough(tmp_path: Path) -> None:
    network = converted("residual").network
    path = tmp_path / "a.snn.safetensors"
    save_network(network, path)
    program = (
        "import sys; from pathlib import Path; from snnconv.checkpoint import load_network;"
        f"network = load_network(Path({str(path)!r}));"
        "assert 'timm' not in sys.modules and 'snnconv.model_zoo' not in sys.modules;"
        "print(network.neurons)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == network.neurons


def test_a_reloaded_checkpoint_runs_at_another_t(tmp_path: Path) -> None:
    network = converted("residual").network
    save_network(network, tmp_path / "a.snn.safetensors")
    again = load_network(tmp_path / "a.snn.safetensors")
    a, b = (endpoint(n, images(2), 9).charges["logits"] for n in (network, again))
    assert torch.equal(a, b)


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.snn.safetensors"
    path.write_bytes(b"the old one")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_network(converted("residual").network, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"the old one"


def rewritten(path: Path, change: object) -> Path:
    """Change a checkpoint's header and tensors, and write it beside."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["snnconv"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(header, tensors)  # type: ignore[operator]
    header["content_sha256"] = checkpoint._content_hash(header, tensors)
    other = path.with_name("other.snn.safetensors")
    save_file(tensors, other, {"snnconv": json.dumps(header)})
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format=99), "update snnconv"),
        (lambda h, t: h.pop("timesteps"), "timesteps"),
        (lambda h, t: h.update(timesteps=0), "between 1 and 4095"),
        (lambda h, t: h.update(schedule="eager"), "eager"),
        (lambda h, t: h["graph"].pop(1), "reads"),
        (lambda h, t: h["graph"].append(h["graph"][-1]), "stands twice"),
        (lambda h, t: h["graph"].pop(), "no readout"),
        (lambda h, t: h["graph"][1].update(kind="magic"), "magic"),
        (lambda h, t: t.pop("relu/bias"), "relu/bias"),
        (lambda h, t: t.update({"relu/threshold": t["relu/threshold"] * 0}), "below 1"),
        (lambda h, t: t.update({"relu/bias": t["relu/bias"].float()}), "float32"),
        (lambda h, t: t.update({"relu/0.shift": t["relu/0.shift"] + 40}), "out of range"),
    ],
)
def test_inconsistent_files_are_refused(change: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.snn.safetensors"
    save_network(converted("residual").network, path)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_network(rewritten(path, change))
    assert "other.snn.safetensors" in str(raised.value)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.snn.safetensors"
    save_network(converted("residual").network, path)
    whole = path.read_bytes()
    for contents in (b"", b"junk" * 100, whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match="damaged"):
            load_network(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no spiking checkpoint"):
        load_network(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_network(tmp_path / "none.snn.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.snn.safetensors"
    save_network(converted("residual").network, path)
    path.chmod(0)
    with pytest.raises(PermissionError):
        load_network(path)
