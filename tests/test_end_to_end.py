"""Fine-tuning of all layers together: its outputs, its gradients, what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, PREPROCESSING, conv_bn, converted, images
from test_finetune import changed, data, digits, folder, same, tunable  # noqa: F401
from torch import Tensor, nn

from snnconv.checkpoint import load_network, sha256
from snnconv.cli.main import run
from snnconv.engine.reference import Engine as Reference
from snnconv.errors import UsageError
from snnconv.finetune import EndToEndTuning, FinetuneSettings, Finetuning
from snnconv.network import SpikingNetwork
from snnconv.normalize import rounded_qann
from snnconv.pipeline import convert

SHORT = FinetuneSettings(epochs_per_layer=0, epochs=2, batch_size=16, lr=0.3)
CLASSIFIERS = [name for name in NETWORKS if converted(name).network.logits is not None]


def end_to_end(
    network: SpikingNetwork, settings: FinetuneSettings = SHORT, **options: int
) -> EndToEndTuning:
    tuning = Finetuning(network, data(), settings, **options)
    assert tuning.end_to_end is not None and tuning.layerwise is None
    return tuning.end_to_end


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_outputs_are_those_of_the_simulation(name: str) -> None:
    network = converted(name).network
    assert network.logits is not None
    course = Reference(network, network.timesteps).simulate(
        images(6, 3), network.timetable(name="paper", drain=None)
    )
    wanted = course.logits(network, network.logits.name)[-1].flatten(1)
    logits = end_to_end(network).logits(images(6, 3))
    torch.testing.assert_close(logits.detach().double(), wanted, rtol=1e-5, atol=1e-5)
    assert logits.requires_grad


class Two(nn.Module):
    """A layer whose input is constant, and one behind it: its mean input is settled at T."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 6), conv_bn(6, 8, stride=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(F.relu(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_gradients_are_those_of_the_quantised_ann() -> None:
    torch.manual_seed(0)
    conversion = convert(Two().eval(), PREPROCESSING, [images(8, 1)], timesteps=5)
    network, pixels = conversion.network, images(6, 3)
    tuning = end_to_end(network)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(6, 5, generator=generator)
    (tuning.logits(pixels) * direction).sum().backward()
    qann = rounded_qann(conversion.qann, network)
    outputs = qann(PREPROCESSING.center(pixels), network.timesteps)
    (outputs["logits"] * direction).sum().backward()
    position, _ = tuning.positions  # the other is the readout's, whose inputs differ
    (layer,) = (n for n in qann.nodes if n.name == network.nodes[position].name)
    master = tuning.masters[str(position)]
    assert float(layer.weights[0].grad.abs().max()) > 0
    torch.testing.assert_close(
        master.weights[0].grad, layer.weights[0].grad * master.units[0], rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        master.bias.grad, layer.bias.grad * master.unit, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "pools", "preactivation"])
def test_only_what_may_move_moves_and_the_best_epoch_is_kept(name: str) -> None:
    network = converted(name).network
    tuning = end_to_end(network)
    epochs = list(tuning.run())
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2]
    tuned = tuning.tuned
    for before, after in zip(network.populations, tuned.populations, strict=True):
        assert same(before, after, but=("weight", "bias"))
    assert changed(network, tuned) <= set(tunable(network))
    for a, b in zip(network.readouts, tuned.readouts, strict=True):
        assert (a.unit, a.threshold) == (b.unit, b.threshold)
        assert a.branches[0].weight.dtype == b.branches[0].weight.dtype
    found = tuning.agreement(tuned)
    assert found is not None
    assert found["kl"] == min(epoch.kl for epoch in epochs) <= epochs[0].kl
    assert (tuned.schedule, tuned.drain) == ("paper", None)


def test_biases_alone_and_some_layers_alone() -> None:
    network = converted("residual").network
    path = tunable(network)[2]
    settings = FinetuneSettings(
        epochs_per_layer=0, epochs=2, batch_size=16, lr=20, bias_only=True, layers=path
    )
    tuning = end_to_end(network, settings)
    tuning._epoch(1)
    (position,) = tuning.positions
    now, before = tuning._integers()[position], network.nodes[position]
    assert same(now, before, but=("bias",)) and not same(now, before)


def test_it_begins_where_the_layers_ended() -> None:
    network = converted("residual").network
    settings = FinetuneSettings(epochs_per_layer=2, epochs=1, batch_size=16, lr=0.3)
    tuning = Finetuning(network, data(), settings)
    results = list(tuning.run())
    assert tuning.layerwise is not None and tuning.end_to_end is not None
    count = len(tunable(network))
    assert results[count].kl == tuning.agreement(tuning.layerwise.tuned)["kl"]
    assert tuning.tuned.provenance["finetuning"]["images"] == {"layers": 54, "together": 54}


def test_other_networks_are_refused() -> None:
    with pytest.raises(UsageError, match="no classifier; tune it layer by layer"):
        end_to_end(converted("two_outputs").network)


def test_what_it_learns_is_kept(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["finetune", "--end-to-end", "--data", "zoo:digits", "--epochs", "3", "--lr", "0.3"]
    assert run([*command, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, *after = (epoch["kl"] for epoch in found["epochs"])
    assert min(after) < 0.8 * before and found["layers"] == []
    parent, tuned = (load_network(Path(f"digits{x}.snn.safetensors")) for x in ("", ".tuned"))
    assert changed(parent, tuned) == set(tunable(parent))
    assert found["held_out"]["after"]["kl"] == min(after)


@pytest.mark.parametrize("stage", ["layers", "epochs"])
def test_an_interrupted_tuning_ends_as_one_that_was_not(
    stage: str,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["finetune", "digits.snn.safetensors", "--layerwise", "--end-to-end", "--images"]
    command += [
        "400",
        "--data",
        "zoo:digits",
        "--epochs-per-layer",
        "1",
        "--epochs",
        "2",
        "-q",
        "--lr",
        "0.3",
    ]
    assert run(command) == 0
    capsys.readouterr()
    again = [*command, "-o", "again.snn.safetensors"]
    stop = {"layers": "snnconv.finetune.LayerwiseTuning._learn", "epochs": EPOCH}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(stop, stopping(stop, after=1))
        assert run(again) == 130
    state = Path("again.finetune.part")
    assert state.is_file()
    assert run([*again, "--resume"]) == 0
    assert not state.exists()
    held_out = load_network(Path("again.snn.safetensors")).provenance["finetuning"]["held_out"]
    assert held_out["after"]["kl"] < 0.8 * held_out["before"]["kl"]
    whole, resumed = (load_network(Path(f"{n}.snn.safetensors")) for n in ("digits.tuned", "again"))
    assert sha256(whole) == sha256(resumed)
    assert [e["epoch"] for e in whole.provenance["finetuning"]["epochs"]] == [0, 1, 2]
    state.write_bytes(b"damaged")
    assert run([*again, "--resume", "--force"]) == 2
    assert "is damaged" in capsys.readouterr().err


EPOCH = "snnconv.finetune.EndToEndTuning._epoch"


def stopping(target: str, after: int) -> Callable[..., object]:
    """Return a method that lets the user press Ctrl-C after so many calls."""
    name = target.rsplit(".", 2)[-2:]
    import snnconv.finetune

    method, calls = getattr(getattr(snnconv.finetune, name[0]), name[1]), iter(range(100))

    def stop(*arguments: object) -> object:
        if next(calls) == after:
            raise KeyboardInterrupt
        return method(*arguments)

    return stop
