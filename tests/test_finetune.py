"""Layer-wise fine-tuning: what it learns from, what it keeps, and that it can be interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NETWORKS, PREPROCESSING, converted, images
from torch import Tensor, nn
from torch.nn import functional as F

from snnconv.checkpoint import load_network, sha256
from snnconv.cli.main import run
from snnconv.data.arrays import from_arrays
from snnconv.data.augment import Augmentation, training_batches
from snnconv.data.images import ImageData
from snnconv.engine import counts, endpoint
from snnconv.engine.reference import Engine as Reference
from snnconv.errors import DataError, UsageError
from snnconv.finetune import Course, FinetuneSettings, Finetuning, LayerwiseTuning
from snnconv.finetune.images import Images
from snnconv.finetune.master import Master
from snnconv.finetune.settings import divide
from snnconv.finetune.settings import tunable as positions_of
from snnconv.network import Population, Readout, SpikingNetwork
from snnconv.normalize import count_values
from snnconv.ops import per_channel
from snnconv.pipeline import convert
from snnconv.quant import quantize

COUNT = 60
SHORT = FinetuneSettings(epochs_per_layer=2, batch_size=16, lr=0.3)


def data(count: int = COUNT) -> ImageData:
    pixels = images(count, 4).numpy()
    return from_arrays("noise", "train", pixels.transpose(0, 2, 3, 1), np.arange(count) % 5)


def layerwise(
    network: SpikingNetwork, settings: FinetuneSettings = SHORT, **options: int
) -> LayerwiseTuning:
    tuning = Finetuning(network, data(), settings, **options).layerwise
    assert tuning is not None
    return tuning


def same(a: Population, b: Population, *, but: tuple[str, ...] = ()) -> bool:
    """Compare all tensors of two populations bit for bit."""
    pairs = [(getattr(a, k), getattr(b, k)) for k in ("threshold", "row_unit", "clip")]
    if "bias" not in but:
        pairs.append((a.bias, b.bias))
    for x, y in zip(a.branches, b.branches, strict=True):
        pairs.append((x.shift, y.shift))
        if "weight" not in but or x.kind == "scale":
            pairs.append((x.weight, y.weight))
    return all(torch.equal(x, y) for x, y in pairs)


def changed(before: SpikingNetwork, after: SpikingNetwork) -> set[str]:
    pairs = zip(before.populations, after.populations, strict=True)
    return {a.path for a, b in pairs if not same(a, b)}


def tunable(network: SpikingNetwork) -> list[str]:
    return [
        p.path
        for p in network.populations
        if p.depth > 0 and {s.kind for s in p.branches} != {"scale"}
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_course_has_the_counts_of_the_simulation_and_of_the_end(name: str) -> None:
    network = converted(name).network
    pixels = images(5, 3)
    schedule = network.timetable(name="paper")
    truth = Reference(network, network.timesteps).simulate(pixels, schedule)
    ends = endpoint(network, pixels, network.timesteps)
    course = Course(counts.Engine(network, network.timesteps), pixels)
    for position, node in enumerate(network.nodes):
        if isinstance(node, Population):
            course.advance(network.nodes, position)
            assert torch.equal(course.fired(node)[-1].long(), truth.counts[node.name].long())
            assert course.target is not None
            assert torch.equal(course.target[0].long(), ends.counts[node.name].long())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_master_computes_what_its_integers_do(name: str) -> None:
    """The float layer, on the values of settled counts, quantises to the settled counts."""
    network = converted(name).network
    timesteps, pixels = network.timesteps, images(5, 3)
    engine = counts.Engine(network, timesteps)
    ends: dict[str, Tensor] = {}
    values = {k: v for k, (v, _) in count_values(network.nodes, network.preprocessing).items()}
    for node in network.nodes:
        if isinstance(node, Readout):
            continue
        ends[node.name] = engine.end_value(node, ends, pixels)
        if not isinstance(node, Population):
            continue
        master = Master(node, values, network.weight_bits)
        assert same(master.integers(), node)
        inputs = [
            ends[s.source][0].float()
            * per_channel(values[s.source].float(), ends[s.source].ndim - 1)
            for s in node.branches
        ]
        with torch.no_grad():
            x = master([i / timesteps for i in inputs])
        clip = per_channel(node.clip.float(), x.ndim)
        found = quantize(x, clip, timesteps, two_sided=node.two_sided) / clip * timesteps
        wanted = ends[node.name][0].float()
        # A charge at the point of rounding may fall to either side in float.
        assert (found.round() == wanted).float().mean() > 0.995


def test_the_gradient_is_that_of_the_distance_at_the_proxy() -> None:
    network = converted("residual").network
    tuning = layerwise(network)
    position = tuning.positions[0]
    node = network.nodes[position]
    assert isinstance(node, Population)
    master = Master(node, tuning.means.values, network.weight_bits)
    (course, *_) = tuning.learning.at(network.nodes, position)
    distance = tuning._distance(course, node)
    proxy = tuning._proxy(master, course)
    ((proxy + (distance - proxy).detach()) ** 2).mean().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in master.parameters()]
    master.zero_grad()
    proxy = tuning._proxy(master, course)
    proxy.backward(2 * distance / distance.numel())
    for parameter, gradient in zip(master.parameters(), expected, strict=True):
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    assert float(master.bias.grad.abs().max()) > 0


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "pools", "preactivation"])
def test_only_what_may_move_moves(name: str) -> None:
    network = converted(name).network
    tuning = layerwise(network)
    done = list(tuning.run())
    tuned = tuning.tuned
    moved = changed(network, tuned)
    assert moved <= {layer.layer for layer in done if layer.accepted}
    for before, after in zip(network.populations, tuned.populations, strict=True):
        assert same(before, after, but=("weight", "bias"))
        if before.depth == 0:
            assert same(before, after)
    for before, after in zip(network.readouts, tuned.readouts, strict=True):
        assert before is after
    assert (tuned.schedule, tuned.drain) == ("paper", None)
    assert [layer.layer for layer in done] == tunable(network)


def test_biases_alone_may_be_tuned_and_layers_chosen() -> None:
    network = converted("residual").network
    paths = tunable(network)
    settings = FinetuneSettings(
        epochs_per_layer=2, batch_size=16, lr=20, bias_only=True, layers=paths[1]
    )
    tuning = layerwise(network, settings)
    master = Master(
        tuning.nodes[tuning.positions[0]], tuning.means.values, network.weight_bits, weights=False
    )
    tuning._learn(tuning.positions[0], 0, master)
    assert same(master.integers(), master.node, but=("bias",))
    assert not same(master.integers(), master.node)
    assert [layer.layer for layer in tuning.run()] == [paths[1]]
    assert changed(network, tuning.tuned) <= {paths[1]}


def test_what_does_harm_is_taken_back() -> None:
    network = converted("residual").network
    tuning = layerwise(network, FinetuneSettings(batch_size=16, lr=100))
    done = list(tuning.run())
    assert any(not layer.accepted for layer in done)
    for layer in done:
        assert layer.kl_before is not None and layer.kl_after is not None
        assert layer.accepted == (layer.kl_after <= layer.kl_before)
    assert changed(network, tuning.tuned) <= {layer.layer for layer in done if layer.accepted}
    last = next(layer for layer in reversed(done) if layer.accepted or layer is done[0])
    agreement = tuning.agreement(tuning.tuned)
    assert agreement is not None
    assert agreement["kl"] == (last.kl_after if last.accepted else last.kl_before)


def test_a_batch_is_of_images_from_all_over() -> None:
    tuning = layerwise(converted("residual").network)
    parts = tuning.learning.parts
    assert np.array_equal(np.sort(np.concatenate(parts)), tuning.taught)
    spread = [np.ptp(part) for part in parts]
    assert min(spread) > len(tuning.taught) / 2  # as drawn they would be 16 neighbours


def test_images_are_augmented_as_in_retraining_but_not_alike() -> None:
    network = converted("residual").network
    indices, plain = np.arange(20), images(20, 4)
    whole = Images(network, data(), seed=0)
    (first,), (again,) = whole.batches([indices]), whole.batches([indices])
    (later,) = whole.batches([indices], epoch=1)
    (other,) = Images(network, data(), seed=1).batches([indices])
    assert torch.equal(first, again)
    for pixels in (plain, later, other):
        assert first.shape == pixels.shape and not torch.equal(first, pixels)
    settings = {"augmentation": {"crop": "none", "flip": 1.0}}
    network.provenance["retraining"] = {"settings": settings, "seed": 0}
    (flipped,) = Images(network, data(), seed=0).batches([indices])
    assert torch.equal(flipped, plain.flip(3))
    network.provenance["retraining"] = None
    trained = training_batches(
        data(), network.preprocessing, Augmentation(), [(0, indices)], seed=0
    )
    assert not torch.equal(next(trained)[0], first)


def test_a_second_tuning_is_judged_by_the_same_images() -> None:
    network = converted("residual").network
    first = Finetuning(network, data(100), SHORT, seed=3)
    tuned = first.tuned
    second = Finetuning(tuned, data(100), SHORT, seed=4)
    assert np.array_equal(first.held_out, second.held_out)
    assert not set(second.taught) & set(first.held_out)


def test_two_outputs_are_judged_by_the_error() -> None:
    tuning = layerwise(converted("two_outputs").network)
    for layer in tuning.run():
        assert layer.kl_before is None
        assert layer.accepted == (layer.error_after <= layer.error_before)


def test_the_memory_there_is_changes_nothing() -> None:
    network = converted("concat").network
    whole, none = (layerwise(network, memory=m) for m in (2**30, 0))
    next(whole.run()), next(none.run())
    assert whole.learning.kept and not none.learning.kept
    assert list(whole.run()) == list(none.run())
    assert whole.done == none.done and sha256(whole.tuned) == sha256(none.tuned)
    assert not whole.learning.kept


def test_images_that_were_held_out_of_retraining_teach_nothing() -> None:
    network = converted("residual").network
    network.provenance["retraining"] = {"seed": 3, "held_out_images": 20}
    order = np.random.Generator(np.random.PCG64(3)).permutation(100)
    for seed in (0, 1):
        pool, held_out = divide(network, 100, 5, seed)
        assert set(held_out) == set(order[95:]) and set(pool) == set(order[:80])
    settings = FinetuneSettings(held_out=5, images=30, epochs=1)
    tuning = Finetuning(network, data(100), settings)
    assert tuning.layerwise is not None and tuning.end_to_end is not None
    for part in (tuning.layerwise, tuning.end_to_end):
        assert len(part.taught) == 30 and not set(part.taught) & set(order[80:])
    assert set(tuning.held_out) == set(order[95:])
    with pytest.raises(DataError, match="too few"):
        Finetuning(network, data(5), settings)


def test_images_held_out_of_a_tuning_teach_nothing_in_those_after_it() -> None:
    network = converted("residual").network
    _, first = divide(network, 100, 10, 0)
    for seed, count in ((0, 10), (1, 4), (1, 4)):
        tuning = Finetuning(network, data(100), FinetuneSettings(held_out=count), seed=seed)
        network.provenance["finetuning"] = tuning.described()
        assert set(tuning.held_out) <= set(first)
        assert tuning.layerwise is not None and not set(tuning.layerwise.taught) & set(first)


class BesideTheImage(nn.Module):
    """A layer that reads neurons and the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(torch.cat([F.relu(self.first(x)), x], 1)))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def test_layers_that_read_the_image_keep_their_eight_bits() -> None:
    torch.manual_seed(0)
    model = BesideTheImage().eval()
    network = convert(model, PREPROCESSING, [images(8, 1)], timesteps=3, weight_bits=4).network
    weights = [b.weight for p in network.populations for b in p.branches]
    assert min(int(w.abs().max()) for w in weights) > 100
    settings = FinetuneSettings(lr=1e-6, epochs=1, images=30, held_out=5)
    tuning = Finetuning(network, data(60), settings)
    list(tuning.run())
    tuned = [b.weight for p in tuning.tuned.populations for b in p.branches]
    assert all(torch.equal(a, b) for a, b in zip(weights, tuned, strict=True))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"lr": 0.0}, "lr must be from"),
        ({"layers": 3}, "layers must be str"),
        ({"epochs_per_layer": -1}, "epochs_per_layer"),
        ({"epochs_per_layer": 0}, "nothing is tuned"),
    ],
)
def test_settings_that_make_no_sense(values: dict, match: str) -> None:
    with pytest.raises(UsageError) as error:
        FinetuneSettings(**values)
    assert match in error.value.message + " ".join(error.value.problems)


# The command.

FINETUNE = ["finetune", "--layerwise", "--data", "zoo:digits", "--epochs-per-layer", "1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    path = folder / "digits.snn.safetensors"
    convert = ["convert", "zoo:digits", "--data", "zoo:digits", "-T", "3", "--epochs", "0"]
    convert += ["--calibration", "mse"]
    assert run([*convert, "-q", "-o", str(path)]) == 0
    return path


@pytest.fixture
def folder(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path(digits.name).write_bytes(digits.read_bytes())
    return tmp_path


def test_the_command_makes_a_better_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["finetune", "--layerwise", "--data", "zoo:digits", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "using digits.snn.safetensors" in err and "KL" in err
    parent, tuned = (load_network(Path(f"digits{x}.snn.safetensors")) for x in ("", ".tuned"))
    told = tuned.provenance["finetuning"]
    assert told["parent_sha256"] == sha256(parent)
    assert told["layers"] == found["layers"] and len(found["layers"]) == 6
    before, after = found["held_out"]["before"], found["held_out"]["after"]
    assert after["kl"] < 0.9 * before["kl"]
    assert run(["eval", "--data", "zoo:digits", "--split", "train", "--json", "-q"]) == 0
    now = json.loads(capsys.readouterr().out)
    assert (now["schedule"], now["latency_steps"]) == ("paper", 3)
    settings = ["--schedule", "paper", "--split", "train", "--json", "-q"]
    assert run(["eval", "digits.snn.safetensors", "--data", "zoo:digits", *settings]) == 0
    then = json.loads(capsys.readouterr().out)
    assert now["snn"]["top1_percent"] > then["snn"]["top1_percent"]
    both = ["digits.snn.safetensors", "digits.tuned.snn.safetensors"]
    assert run(["eval", *both, "--data", "zoo:digits", "--baselines", "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 8 and rows[-1]["recovered_percent"] > 0
    stored = Path("digits.baselines.json").read_text(encoding="utf-8")
    assert json.loads(stored)["checkpoints"] == both
    # A table of others does not take its place, and one of the newest says which that was.
    assert run(["eval", both[0], "--data", "zoo:digits", "--baselines", "-q"]) == 2
    assert "digits.baselines.json exists" in capsys.readouterr().err
    assert run(["eval", "--data", "zoo:digits", "--baselines", "--limit", "20", "-q"]) == 0
    newest = json.loads(Path("digits.tuned.limit20.baselines.json").read_text(encoding="utf-8"))
    assert newest["command"].endswith(" digits.tuned.snn.safetensors")
    capsys.readouterr()
    # Left alone, it is not tuned over.
    assert run([*FINETUNE, "-q", "digits.snn.safetensors"]) == 2
    assert "--force" in capsys.readouterr().err


def interrupted(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the user press Ctrl-C while the layer after so many is tuned."""
    learn, count = LayerwiseTuning._learn, iter(range(100))

    def stop(self: LayerwiseTuning, *arguments: object) -> None:
        if next(count) == after:
            raise KeyboardInterrupt
        learn(self, *arguments)

    monkeypatch.setattr(LayerwiseTuning, "_learn", stop)


def test_an_interrupted_tuning_ends_as_one_that_was_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*FINETUNE, "-q"]) == 0
    whole = Path("digits.tuned.snn.safetensors").read_bytes()
    parent = [*FINETUNE, "digits.snn.safetensors", "-o", "again.snn.safetensors"]
    with monkeypatch.context() as patch:
        interrupted(2, patch)
        assert run(parent) == 130
    assert "--resume goes on" in capsys.readouterr().err
    state = Path("again.finetune.part")
    assert state.is_file() and not Path("again.snn.safetensors").exists()
    assert run(parent) == 2  # it would be lost
    assert run([*parent, "--resume", "--lr", "0.1"]) == 2
    assert "settings differ" in capsys.readouterr().err
    assert run([*parent, "--resume", "-q"]) == 0
    assert Path("again.snn.safetensors").read_bytes() == whole
    assert not state.exists()
    assert run([*parent, "--resume", "--force"]) == 2
    assert "no interrupted fine-tuning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["finetune", "--data", "zoo:digits"], 2, "--layerwise, --end-to-end, or both"),
        ([*FINETUNE, "--epochs", "2"], 2, "--epochs belongs to --end-to-end"),
        (["finetune", "--layerwise"], 2, "three ways"),
        (
            [*FINETUNE, "--layers", "nothing"],
            2,
            "no layer to tune fits 'nothing'; there are layer1",
        ),
        (["eval", "a", "b", "--data", "zoo:digits"], 2, "compared with --baselines"),
        (["eval", "--baselines", "--drain", "3"], 2, "--drain would do nothing"),
        (["eval", "--baselines", "--page"], 2, "--page would do nothing"),
        (["eval", "--baselines", "--no-statistics"], 2, "--statistics would do nothing"),
        (["finetune", "--layerwise", "--data", "one.npz"], 2, "would be flattered"),
        ([*FINETUNE, "-o", "x.pt"], 2, "is named *.snn.safetensors"),
        (["finetune", "--layerwise", "--data", "two"], 1, "the data belong to another network"),
        (["eval", "--data", "zoo:digits", "-o", "page.html"], 2, "a report is named *.json"),
        (["eval", "--data", "zoo:digits", "--baselines", "-o", "r.v1"], 2, "is named *.json"),
        ([*FINETUNE, "missing.snn.safetensors"], 1, "no such file"),
    ],
)
def test_refusals(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.delenv("SNNCONV_DATA", raising=False)
    grey = np.zeros((40, 8, 8), np.uint8)
    np.savez("one.npz", images=grey, labels=np.arange(40) % 10)
    Path("two").mkdir()
    for split in ("train", "test"):
        np.savez(f"two/{split}.npz", images=grey, labels=np.arange(40))
    found = run(arguments)
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert found == code


def test_one_process_does_the_tuning(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(FINETUNE) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_a_tuning_too_short_to_move_an_integer_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    short = ["--images", "40", "--epochs-per-layer", "1", "--lr", "0.001", "-q"]
    assert run(["finetune", "--layerwise", "--data", "zoo:digits", *short]) == 0
    out = capsys.readouterr().out
    assert "nothing was learnt" in out and "unchanged" in out
    parent, tuned = (load_network(Path(f"digits{x}.snn.safetensors")) for x in ("", ".tuned"))
    assert changed(parent, tuned) == set()


def test_a_network_with_nothing_to_mend_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a single step all spikes arrive together, so that nothing comes too late."""
    single = ["convert", "zoo:digits", "--data", "zoo:digits", "--epochs", "0", "-T", "1", "-q"]
    assert run([*single, "--no-evaluate", "-o", "one.snn.safetensors"]) == 0
    capsys.readouterr()
    short = ["--images", "40", "--epochs-per-layer", "1", "-q"]
    assert (
        run(["finetune", "one.snn.safetensors", "--layerwise", "--data", "zoo:digits", *short]) == 0
    )
    out = capsys.readouterr().out
    assert "nothing to mend" in out and "nothing was learnt" not in out


def test_the_readout_alone_can_be_tuned() -> None:
    network = converted("residual").network
    assert network.logits is not None
    (position,) = positions_of(network, network.logits.name, also=network.logits)
    assert network.nodes[position] is network.logits
    with pytest.raises(UsageError, match="no layer to tune"):
        positions_of(network, network.logits.name)
