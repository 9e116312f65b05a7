"""Retraining: gradients, the integers it sees, resuming, refusals, several processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import PREPROCESSING as SMALL
from networks import Residual, converted
from random_networks import SIZE, RandomNetwork
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snnconv.calibrate import calibrate_
from snnconv.checkpoint import save_network
from snnconv.data import choose_indices, open_data
from snnconv.data.augment import UNLABELLED, Augmentation
from snnconv.engine import endpoint
from snnconv.errors import DataError, SnnconvError, UsageError
from snnconv.folding import Folder, fold
from snnconv.graph import trace
from snnconv.load import load_model
from snnconv.normalize import integerize, rounded_qann
from snnconv.pipeline import check_equal, convert
from snnconv.plan import make_plan
from snnconv.preprocess import Preprocessing
from snnconv.quant import FakeQuantize, Layer
from snnconv.train import Student, Training, TrainSettings
from snnconv.train.batch_norm import BatchNorms
from snnconv.train.student import _clipped

RANDOM = Preprocessing(SIZE, (0.4, 0.5, 0.45), (0.25, 0.2, 0.3))


def noise(preprocessing: Preprocessing, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *preprocessing.input_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("two_sided", [False, True])
def test_gradients_of_the_quantiser(two_sided: bool) -> None:
    """One value at a time, by the formulas of the straight-through estimator."""
    timesteps, clip = 3, 1.5
    values = [-2.0, -1.5, -0.7, 0.0, 0.1, 0.6, 1.4, 1.5, 9.0]
    for value in values:
        x = torch.tensor([[value]], requires_grad=True)
        alpha = torch.tensor([clip], requires_grad=True)
        output = FakeQuantize.apply(x, alpha, timesteps, two_sided, 0.5)
        by_x, by_clip = torch.autograd.grad(output.sum(), (x, alpha))
        a = float(output.detach())
        low = -clip if two_sided else 0.0
        inside = low < value < clip
        level = np.floor(np.clip(value, low, clip) / (clip / timesteps) + 0.5)
        assert a == pytest.approx(level * clip / timesteps)
        assert float(by_x) == float(inside)
        expected = (a - value) / clip if inside else float(value >= clip)
        if two_sided and value <= -clip:
            expected = -1.0
        assert float(by_clip) == pytest.approx(expected, abs=1e-6)


def test_folding_is_differentiable_and_shares_what_the_network_shares() -> None:
    torch.manual_seed(1)
    traced = trace(Residual(), SMALL.input_size)
    plan = make_plan(traced)
    folder = Folder(traced, plan, torch.float32)
    for (weights, bias), layer in zip(folder.tensors(), fold(traced, plan).weighted(), strict=True):
        for weight, expected in zip(weights, layer.weights, strict=True):
            assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)
        assert torch.allclose(bias, layer.bias, rtol=1e-5, atol=1e-6)
    total = sum(w.square().sum() for ws, _ in folder.tensors() for w in ws)
    total.backward()  # type: ignore[union-attr]
    grads = {n: p.grad for n, p in traced.module.named_parameters() if p.ndim > 1}
    assert all(grad is not None and float(grad.abs().sum()) > 0 for grad in grads.values())


class Twice(torch.nn.Module):
    """One convolution at two call sites."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.head = torch.nn.Linear(4 * 144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        return self.head(x.flatten(1))


def test_what_the_network_shares_stays_shared() -> None:
    torch.manual_seed(0)
    model = Twice()
    traced = trace(model, SMALL.input_size)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    pixels = noise(SMALL, 4)
    calibrate_(qann, [SMALL.normalize(pixels)], 7)
    student = Student(traced, plan, qann, SMALL, 7)
    weights = {n: p for n, p in student.named_parameters() if p.ndim > 1}
    assert len(weights) == 3
    student(pixels)["logits"].square().sum().backward()
    with torch.no_grad():
        weights["network.conv.weight"] -= 0.1
    student.refresh()
    one, two = (layer.weights[0] for layer in qann.weighted()[1:3])
    assert torch.equal(one, two) and not torch.equal(one, model.conv.weight)


@pytest.mark.parametrize("seed", range(12))
def test_what_training_sees_is_what_is_stored(seed: int) -> None:
    """The rounded float network has the integer network's counts, every single one."""
    pixels = noise(RANDOM, 5, seed)
    bits, timesteps = (8, 4, 2)[seed % 3], (1, 3, 7, 15)[seed % 4]
    conversion = convert(
        RandomNetwork(seed), RANDOM, [pixels], timesteps=timesteps, weight_bits=bits
    )
    network = conversion.network
    end = endpoint(network, pixels, timesteps)
    compared = {}

    def observe(layer: Layer, activation: Tensor) -> None:
        clip = layer.clip.view(-1, *[1] * (activation.ndim - 2))
        compared[layer.name] = (activation * timesteps / clip).round()

    images = (pixels.double() - torch.tensor(RANDOM.zero_point).view(-1, 1, 1)) / (
        255 * torch.tensor(RANDOM.std, dtype=torch.float64).view(-1, 1, 1)
    )
    assert torch.allclose(RANDOM.center(pixels).double(), images, rtol=1e-5)
    for dtype, given in ((torch.float32, RANDOM.center(pixels)), (torch.float64, images)):
        with torch.no_grad():
            qann = rounded_qann(copy.deepcopy(conversion.qann).to(dtype), network)
            logits = qann(given, timesteps, observe=observe)["logits"]
        for population in network.populations:
            assert torch.equal(compared[population.name].long(), end.counts[population.name].long())
    expected = end.logits(network, "logits").double()
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    student = Student(conversion.traced, conversion.plan, conversion.qann, RANDOM, timesteps, bits)
    with torch.no_grad():
        seen = student(pixels)["logits"]
    close = (seen - expected).abs().amax(1) < 1e-3 * expected.abs().max()
    assert int(close.sum()) >= 4  # float32 folds anew: a rounding may fall to the other side


def test_every_parameter_of_few_bits_gets_a_gradient() -> None:
    torch.manual_seed(0)
    traced = trace(Residual(), SMALL.input_size)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    pixels = noise(SMALL, 8)
    calibrate_(qann, [SMALL.normalize(pixels)], 3)
    student = Student(traced, plan, qann, SMALL, 3, weight_bits=2)
    assert len(student.log_shares)
    student(pixels)["logits"].square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    share = student.log_shares[next(iter(student.log_shares))]
    before = integerize(qann, SMALL, 3, weight_bits=2).populations[1].branches[0].weight
    with torch.no_grad():
        for log in student.log_shares.values():
            log -= 1.0
    student.refresh()
    after = integerize(qann, SMALL, 3, weight_bits=2).populations[1].branches[0].weight
    assert share.grad is not None and float(share.grad.abs().sum()) > 0
    assert int(after.abs().sum()) > int(before.abs().sum())  # a lower upper end: fewer zeros


class Waiting(TorchDispatchMode):
    """Lists the operations for which a GPU would have to wait: it could not record them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(function).split(".")[1] in ("_local_scalar_dense", "lift_fresh", "nonzero"):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", ["residual", "pools", "depthwise", "concat"])
def test_a_step_never_waits_for_a_value(name: str, bits: int) -> None:
    conversion = converted(name)
    student = Student(conversion.traced, conversion.plan, conversion.qann, SMALL, 3, bits)
    pixels = noise(SMALL, 4)
    for by_batches in (False, True):
        student.batch_statistics = by_batches
        student(pixels)  # constants are made once
        with Waiting() as waiting:
            student(pixels)["logits"].square().sum().backward()
            student.norms.follow_()
            SMALL.normalize(pixels)
        assert not waiting.found
    with waiting:
        bool(torch.ones(()) > 0)
    assert waiting.found


SHORT = {"epochs": 3, "batch_size": 100, "held_out": 100}


class Digits:
    """A short training of the embedded digits network."""

    def __init__(self, folder: Path, timesteps: int = 2, **settings: Any) -> None:
        self.folder = folder
        self.loaded = load_model("zoo:digits")
        self.data = open_data("zoo:digits", "train")
        self.data = self.data.part(np.arange(600), "train", "")
        preprocessing = self.loaded.preprocessing
        batches = list(self.data.batches(preprocessing, np.arange(200)))
        self.images = [preprocessing.normalize(pixels) for pixels, _ in batches]
        self.sample = batches[0][0][:8]
        self.timesteps, self.settings = timesteps, TrainSettings(**{**SHORT, **settings})
        self.options: dict[str, Any] = {}
        self.weight_bits = 8

    def run(self, resume: bool = False, **options: Any) -> dict[str, Any]:
        traced = trace(self.loaded.model, self.loaded.preprocessing.input_size)
        plan = make_plan(traced)
        qann = fold(traced, plan)
        calibrate_(qann, self.images, (*self.settings.stages, self.timesteps)[0])
        student = Student(
            traced, plan, qann, self.loaded.preprocessing, self.timesteps, self.weight_bits
        )
        self.training = Training(
            student,
            self.loaded.model,
            self.data,
            self.settings,
            state=self.folder / "a.train.pt",
            metrics=self.folder / "a.metrics.jsonl",
            **options,
        )
        return self.training.run(resume)

    def bytes(self) -> bytes:
        path = self.folder / "a.snn.safetensors"
        save_network(self.training.network(), path)
        return path.read_bytes()

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "a.metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


def test_retraining_comes_nearer_to_the_float_network(tmp_path: Path) -> None:
    digits = Digits(tmp_path)
    found = digits.run()
    lines = digits.metrics()
    assert [x["epoch"] for x in lines] == [0, 1, 2, 3]
    assert (
        found["held_out_kl"] == min(x["held_out_kl"] for x in lines) < 0.6 * lines[0]["held_out_kl"]
    )
    assert found["images"] == 540 and found["held_out_images"] == 60
    calibrating = choose_indices(600, 500, 0)
    assert not np.isin(digits.training.held_out, calibrating).any()
    assert not np.isin(digits.training.indices, digits.training.held_out).any()
    assert lines[1]["train_top1_percent"] > 80 and lines[2]["loss"] < lines[1]["loss"]


def test_mixed_images_learn_from_the_teacher_alone(tmp_path: Path) -> None:
    Digits(tmp_path, epochs=1).run()
    plain = Digits(tmp_path).metrics()
    digits = Digits(tmp_path, epochs=1, augmentation=Augmentation(mix=1.0))
    digits.run()
    first, last = digits.metrics()
    assert first == plain[0], "what is held out is never mixed"
    assert last["train_top1_percent"] is None and last["held_out_kl"] < 0.8 * first["held_out_kl"]

    logits, pixels = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), noise(SMALL, 4)
    taught = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, UNLABELLED, UNLABELLED, 8])
    digits.training._teach = lambda _: taught  # type: ignore[method-assign]
    loss = float(digits.training._loss(logits, pixels, labels))
    p, q = (np.exp(x.numpy().astype(np.float64) / 2) for x in (taught, logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    plainly = np.exp(logits.numpy().astype(np.float64))
    entropy = -np.log(plainly / plainly.sum(1, keepdims=True))
    expected = 0.1 * (entropy[0, 3] + entropy[3, 8]) / 4
    expected += 0.9 * 4 * (p * np.log(p / q)).sum() / 4
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_chosen_network_verifies_against_its_own_graph(tmp_path: Path) -> None:
    digits = Digits(tmp_path, epochs=1)

    def retrain(traced: Any, plan: Any, qann: Any) -> dict[str, Any]:
        student = Student(traced, plan, qann, digits.loaded.preprocessing, 2)
        return Training(student, digits.loaded.model, digits.data, digits.settings).run()

    untrained, trained = (
        convert(
            digits.loaded.model,
            digits.loaded.preprocessing,
            [digits.sample],
            timesteps=2,
            retrain=how,
        )
        for how in (None, retrain)
    )
    found, _ = check_equal(trained, digits.sample)
    assert found.equal and found.integers > 10_000
    one, two = (c.network.populations[2].branches[0].weight for c in (untrained, trained))
    assert not torch.equal(one, two)
    assert trained.network.provenance["retraining"]["settings"]["epochs"] == 1


def test_weights_of_two_bits_are_learnt(tmp_path: Path) -> None:
    digits = Digits(tmp_path, timesteps=7, epochs=6)
    digits.weight_bits = 2
    found = digits.run()
    assert found["held_out_kl"] < 0.5 * digits.metrics()[0]["held_out_kl"]
    network = digits.training.network()
    stem, *rest = network.populations
    assert int(stem.branches[0].weight.abs().max()) == 127
    weights = [s.weight for p in rest for s in p.branches if s.kind != "scale"]
    assert all(int(w.abs().max()) == 1 for w in weights)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_statistics": 0.5},
        {"optimizer": "sgd", "lr": 0.01, "ema": 0.9, "stages": (5,), "batch_statistics": 1.0},
    ],
)
@pytest.mark.parametrize("step", [2, 5, 12])
def test_an_interrupted_training_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], step: int
) -> None:
    monkeypatch.setattr("snnconv.train.loop.SAVE_SECONDS", 0.0)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    whole, parts = (Digits(folder, **settings) for folder in folders)
    whole.run()

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "retrain" and done == step:
            raise Stopped

    with pytest.raises(Stopped):
        parts.run(progress=stop)
    parts.run(resume=True)
    assert parts.bytes() == whole.bytes()
    assert parts.metrics() == whole.metrics()


class Replayed:
    """Stands for a recorded step where there is no GPU: it runs what would be replayed."""

    def __init__(
        self, compute: Any, parameters: Any, pixels: Tensor, labels: Tensor, update: Any = None
    ) -> None:
        self.compute, self.parameters, self.update = compute, parameters, update
        self.updates = update is not None

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        loss, hits = self.compute(pixels, labels)
        loss.backward()
        if self.update is not None:
            self.update()
        return loss.detach(), hits


def record_by(monkeypatch: pytest.MonkeyPatch, recording: type, whole: bool) -> None:
    """Record steps as on a GPU, with the optimizer's or without."""
    build = Training._optimizer

    def recordable(self: Training, options: dict[str, Any]) -> torch.optim.Optimizer:
        optimizer = build(self, options)
        optimizer.defaults["capturable"] = whole
        return optimizer

    monkeypatch.setattr(Training, "_alone_on_gpu", lambda self: True)
    monkeypatch.setattr(Training, "_optimizer", recordable)
    monkeypatch.setattr("snnconv.train.loop.CapturedStep", recording)


@pytest.mark.parametrize("whole", [False, True])
def test_recorded_steps_are_taken_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """With the optimizer's step in the recording, and with that left out."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    settings = {"optimizer": "sgd", "lr": 0.01, "batch_statistics": 0.5, "ema": 0.5}
    plain, recorded = (Digits(folder, **settings) for folder in folders)
    plain.run()
    record_by(monkeypatch, Replayed, whole)
    recorded.run()
    (step,) = recorded.training.captured.values()
    assert step is not None and step.updates == whole
    if not whole:  # rates are of single precision in a recording
        assert recorded.bytes() == plain.bytes()
    for one, two in zip(recorded.metrics(), plain.metrics(), strict=True):
        assert one["held_out_kl"] == pytest.approx(two["held_out_kl"], rel=0.02)
        assert (one["loss"] or 0) == pytest.approx(two["loss"] or 0, rel=1e-3)


def test_a_recording_that_fails_is_tried_without_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Failing(Replayed):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            if self.updates:
                raise RuntimeError("no optimizer in here")

    digits = Digits(tmp_path, epochs=1, optimizer="sgd")
    record_by(monkeypatch, Failing, True)
    digits.run(announce=told.append)
    (step,) = digits.training.captured.values()
    assert step is not None and not step.updates and digits.training.rates is None
    assert not any("not recorded" in text for text in told)


def test_another_training_is_not_continued(tmp_path: Path) -> None:
    Digits(tmp_path, epochs=1).run(identity={"data": "this"})
    other = Digits(tmp_path, epochs=1, lr=0.5)
    with pytest.raises(UsageError) as error:
        other.run(resume=True, identity={"data": "that"})
    assert error.value.problems == [
        "data: this there, that here",
        "settings.lr: 0.0007 there, 0.5 here",
    ]
    (tmp_path / "a.train.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match="damaged"):
        other.run(resume=True)
    (tmp_path / "a.train.pt").unlink()
    with pytest.raises(UsageError, match="no state"):
        other.run(resume=True)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    digits = Digits(tmp_path, epochs=2)
    model = digits.loaded.model
    calls: list[int] = []

    class Failing(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return model(x) * (float("nan") if calls.count(100) > 8 else 1)

    traced = trace(model, digits.loaded.preprocessing.input_size)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    calibrate_(qann, digits.images, 2)
    student = Student(traced, plan, qann, digits.loaded.preprocessing, 2)
    training = Training(
        student, Failing(), digits.data, digits.settings, state=tmp_path / "a.train.pt"
    )
    with pytest.raises(SnnconvError, match="the loss is nan by step 4 of epoch 2"):
        training.run()
    kept = torch.load(tmp_path / "a.train.pt", weights_only=True)
    assert kept["at"]["epoch"] == 1
    assert all(bool(p.isfinite().all()) for p in kept["parameters"])


def test_a_step_too_far_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snnconv.train.loop.SAVE_SECONDS", 0.0)
    digits = Digits(tmp_path)

    def spoil(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "retrain" and done == 4:
            with torch.no_grad():
                digits.training.student.trained()[0][0] = float("inf")

    with pytest.raises(
        SnnconvError, match="a parameter is infinite or undefined after step 4 of epoch 1"
    ):
        digits.run(progress=spoil)
    kept = torch.load(tmp_path / "a.train.pt", weights_only=True)
    assert kept["at"]["step"] == 3
    assert all(bool(p.isfinite().all()) for p in kept["parameters"])


def test_a_new_training_forgets_the_state_of_another(tmp_path: Path) -> None:
    digits = Digits(tmp_path, epochs=1)
    digits.run()

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        raise Stopped

    with pytest.raises(Stopped):
        digits.run(progress=stop)
    assert not (tmp_path / "a.train.pt").exists()


def test_clips_come_back_within_their_bounds_and_can_leave_them() -> None:
    traced = trace(RandomNetwork(5), SIZE)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    calibrate_(qann, [RANDOM.normalize(noise(RANDOM, 4))], 3)
    student = Student(traced, plan, qann, RANDOM, 3, weight_bits=2)
    with torch.no_grad():
        for log in student.log_clips:
            log[0] = -20.0
        for log in student.log_shares.values():
            log.add_(3.0)
    student.bound_()
    student.refresh()
    for layer in qann.populations():
        assert float(layer.clip.min()) >= float(layer.clip.max()) / 16.001
        assert layer.cap is None or float(layer.clip.max()) <= layer.cap * (1 + 1e-6)
    assert all(float(log.detach().max()) <= 0 for log in student.log_shares.values())
    student(noise(RANDOM, 4))["logits"].square().sum().backward()
    assert any(float(log.grad.abs().sum()) > 0 for log in student.log_shares.values())


def test_gradient_of_the_upper_end_of_weights() -> None:
    """By the formula of learnt step sizes: the rounding error inside, the end itself beyond."""
    traced = trace(Residual(), SMALL.input_size)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    calibrate_(qann, [SMALL.normalize(noise(SMALL, 4))], 3)
    layer = qann.weighted()[1]
    weight = layer.weights[0].detach().clone().requires_grad_()
    log = torch.zeros(len(weight), requires_grad=True)
    clip = qann.weighted()[0].clip
    worth = clip.view(1, -1, 1, 1)
    scale = (weight.detach() * worth).flatten(1).abs().amax(1) / 4
    out = _clipped(layer.branches[0], weight, clip, log, scale, 3) * worth
    by_log, by_weight = torch.autograd.grad(out.sum(), (log, weight))
    x = (weight.detach() * worth / scale.view(-1, 1, 1, 1)).numpy().astype(np.float64)
    error = np.where(np.abs(x) <= 3, np.round(np.clip(x, -3, 3)) - x, 3 * np.sign(x))
    expected = (error * scale.numpy()[:, None, None, None]).sum((1, 2, 3))
    assert np.allclose(by_log.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    assert np.array_equal(by_weight.numpy() != 0, np.abs(x) <= 3)


class Normalized(torch.nn.Module):
    """A convolution and a shortcut, each with its BatchNorm, and one BatchNorm of counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6)
        self.conv, self.second = torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.BatchNorm2d(6)
        self.third = torch.nn.BatchNorm2d(6)
        self.head = torch.nn.Linear(6, 5)
        for norm in (self.first, self.second, self.third):
            torch.nn.init.uniform_(norm.weight, -1.0, 1.5)
            torch.nn.init.uniform_(norm.bias, -0.5, 1.0)
            assert norm.running_mean is not None and norm.running_var is not None
            torch.nn.init.uniform_(norm.running_mean, -1.0, 1.0)
            torch.nn.init.uniform_(norm.running_var, 0.3, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.stem(x)))
        x = torch.relu(self.second(self.conv(x)) + self.third(x))
        return self.head(x.mean((2, 3)))


def test_batch_statistics_are_what_batch_norm_takes_in_training() -> None:
    """Outputs, gradients and running statistics; T is so large that little is rounded."""
    torch.manual_seed(0)
    model = Normalized()
    traced = trace(model, SMALL.input_size)
    plan = make_plan(traced)
    qann = fold(traced, plan)
    pixels = noise(SMALL, 16)
    calibrate_(qann, [SMALL.normalize(pixels)], 4095, "max")
    for layer in qann.populations():
        layer.clip.mul_(8)  # nothing reaches it
    student = Student(traced, plan, qann, SMALL, 4095)
    assert len(student.norms.norms) == 3
    student.batch_statistics = True
    found = student(pixels)["logits"]
    found.square().sum().backward()
    student.norms.follow_()
    expected = model.train()(SMALL.normalize(pixels))
    expected.square().sum().backward()
    with torch.no_grad():
        assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
    trained = dict(traced.module.named_parameters())
    for name, parameter in model.named_parameters():
        one, two = trained[name].grad, parameter.grad
        assert one is not None and two is not None
        if name not in ("stem.bias", "conv.bias"):  # those BatchNorm takes away again
            assert float((one - two).norm()) < 0.2 * float(two.norm()), name
    buffers = dict(traced.module.named_buffers())
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffers[name], buffer, rtol=0.02, atol=0.005)
    student.batch_statistics = False
    with torch.no_grad():
        assert float((student(pixels)["logits"] - expected).abs().max()) > 0.1


@pytest.mark.parametrize("gain", [0.7, -0.3, 0.01, 1e-8, 0.0])
def test_a_batch_norm_of_any_gain(gain: float) -> None:
    """Of few numbers, so that the variance's correction shows; channels of no gain do no harm."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)
    torch.nn.init.constant_(norm.weight, gain)
    torch.nn.init.uniform_(norm.bias)
    head = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    traced = trace(torch.nn.Sequential(conv, norm, *head), (2, 2, 2))
    norms = BatchNorms(Folder(traced, make_plan(traced), torch.float32))
    x = torch.randn(3, 2, 2, 2)
    folded, bias = next(iter(norms.folder.tensors()))
    rows = norms.unfolded(0, 0, folded[0])
    found = norms.normalize(0, 0, torch.nn.functional.conv2d(x, rows)) + bias.view(-1, 1, 1)
    expected = norm.train()(conv(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    norms.follow_()
    mean, variance = norms.statistics()
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(variance, norm.running_var, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gain", [0.7, 0.0])
def test_one_number_per_channel_is_normalised_as_in_inference(gain: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    torch.nn.init.constant_(model[1].weight, gain)
    model[1].running_mean.uniform_()
    model[1].running_var.uniform_(0.5, 2)
    traced = trace(
        torch.nn.Sequential(torch.nn.Flatten(), *model, torch.nn.Linear(3, 2)), (1, 2, 2)
    )
    norms = BatchNorms(Folder(traced, make_plan(traced), torch.float32))
    x = torch.randn(1, 4)
    folded, bias = next(iter(norms.folder.tensors()))
    found = norms.normalize(0, 0, x @ norms.unfolded(0, 0, folded[0]).t()) + bias
    torch.testing.assert_close(found, model[:2].eval()(x))
    before = [s.clone() for s in norms.statistics()]
    norms.follow_()
    torch.testing.assert_close(norms.statistics(), before)


def test_a_batch_without_images_leaves_the_statistics_alone() -> None:
    conversion = converted("residual")
    student = Student(conversion.traced, conversion.plan, conversion.qann, SMALL, 3)
    student.batch_statistics = True
    student(noise(SMALL, 4))
    student.norms.follow_()
    before = [s.clone() for s in student.norms.statistics()]
    (student(noise(SMALL, 0))["logits"].sum() * 0).backward()
    student.norms.share_(0)
    student.norms.follow_()
    torch.testing.assert_close(student.norms.statistics(), before)
    assert all(bool(t.isfinite().all()) for t in student.state())
    # Other processes wait for the gradient of every parameter.
    grads = [p.grad for p in student.trained()]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("optimizer", ["adamw", "nadamuon"])
def test_a_state_of_a_gpu_is_continued_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr("snnconv.train.loop.SAVE_SECONDS", 0.0)
    digits = Digits(tmp_path, epochs=2, optimizer=optimizer)

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "retrain" and done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        digits.run(progress=stop)
    kept = torch.load(tmp_path / "a.train.pt", weights_only=True)
    for group in kept["optimizer"]["param_groups"]:
        group |= {"capturable": True, "lr": torch.tensor(0.1)}  # as a recorded optimizer has it
    torch.save(kept, tmp_path / "a.train.pt")
    assert digits.run(resume=True)["chosen_epoch"] == 2


def test_shared_batch_norms_stay_as_in_inference() -> None:
    """One at two call sites, and one over a sum."""

    class Shared(Normalized):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(self.stem(x)))
            x = torch.relu(self.second(self.conv(x)))
            x = torch.relu(self.second(self.conv(x)))
            return self.head(torch.relu(self.third(self.conv(x) + x)).mean((2, 3)))

    traced = trace(Shared(), SMALL.input_size)
    norms = BatchNorms(Folder(traced, make_plan(traced), torch.float32))
    assert [norm.module for norm in norms.norms.values()] == [traced.module.first]


def test_stages_go_through_larger_t_first(tmp_path: Path) -> None:
    digits = Digits(tmp_path, stages=(7, 4))
    found = digits.run()
    lines = digits.metrics()
    assert [x["timesteps"] for x in lines] == [7, 7, 4, 2]
    assert found["chosen_epoch"] == 3
    assert digits.training.network().timesteps == 2
    # What was learnt for one T helps at the next.
    kls = [x["held_out_kl"] for x in lines]
    plain = Digits(tmp_path)
    plain.run()
    assert kls[3] < plain.metrics()[1]["held_out_kl"]


def test_too_few_images_and_wrong_settings_are_refused(tmp_path: Path) -> None:
    digits = Digits(tmp_path)
    digits.data = digits.data.part(np.arange(9), "train", "")
    with pytest.raises(DataError, match="too few to retrain; take --epochs 0"):
        digits.run()
    with pytest.raises(UsageError, match="timm has no optimizer 'sgdd'"):
        Digits(tmp_path, optimizer="sgdd").run()
    for wrong in (
        {"lr": 0.0}, {"lr": float("nan")}, {"epochs": 0}, {"distill": 1.5}, {"epochs": 3.0},
        {"epochs": "12"}, {"batch_size": True}, {"stages": [7]}, {"stages": (0,)}, {"ema": 1},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(wrong))):
            TrainSettings(**wrong)
    with pytest.raises(UsageError, match="only a teacher can say what mixed images show"):
        TrainSettings(distill=0.0, augmentation=Augmentation(mix=0.1))
    with pytest.raises(UsageError, match="2 epochs are too few for 2 stages"):
        TrainSettings(epochs=2, stages=(31, 15))
    with pytest.raises(UsageError, match="timm knows no auto_augment 'foo'"):
        Digits(tmp_path, augmentation=Augmentation(auto_augment="foo")).run()
    with pytest.raises(UsageError, match="unknown keys") as error:
        TrainSettings.from_dict("r.toml", {"epoch": 3})
    assert error.value.problems == ["epoch; did you mean epochs?"]
    with pytest.raises(UsageError) as error:
        TrainSettings.from_dict("r.toml", {"augmentation": {"flips": 0.5}})
    assert error.value.problems == ["flips; did you mean flip?"]
