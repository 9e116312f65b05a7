"""The course of a retraining: batches, steps, held-out images, states to resume from."""

from __future__ import annotations

import copy
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnconv import distributed
from snnconv.data import ImageData, choose_indices, default_batch
from snnconv.data.augment import UNLABELLED, training_batches
from snnconv.divergence import divergence
from snnconv.engine import prepare
from snnconv.errors import DataError, SnnconvError, UsageError, first_line
from snnconv.files import write_atomically
from snnconv.graph import flatten_outputs
from snnconv.network import SpikingNetwork
from snnconv.normalize import integerize
from snnconv.progress import Progress, silent
from snnconv.quant import Qann, only_logits
from snnconv.train.capture import CapturedStep, Compute
from snnconv.train.settings import TrainSettings
from snnconv.train.student import Student, laid_out

# A state is written after every epoch, and in between when it is this old.
SAVE_SECONDS = 60.0
# The first step takes its time, and on a GPU the second is recorded.
UNTIMED_STEPS, TIMED_STEPS = 2, 5
# How often the loss of a training on a GPU is looked at.
READ_SECONDS = 0.5
# Augmentation of held-out images is that of an epoch that never comes.
HELD_OUT_EPOCH = 2**31 - 1
HELD_OUT_SHARE = 0.1
# Held-out images of so many bytes stay in memory.
KEPT_BYTES = 2**28
# Instructions of CPUs for bfloat16, as torch.cpu names them.
HALVES = ("avx512_bf16", "amx_tile")
# In this last share of the epochs nothing is computed in half precision.
EXACT_SHARE = 0.25


@dataclass
class _Progressed:
    """How far a training is: what `--resume` needs beside the parameters."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    hits: int = 0
    labelled: int = 0
    images: int = 0
    best_score: float = math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    written: int = 0


class Training:
    """One retraining of a calibrated network, from its start or from where it was left.

    `teacher` is a float network, on normalised images. `identity` tells one training from another:
    a state on disk is only continued under the same. `state` and `metrics` are the files written by
    the way (None: none).
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module,
        data: ImageData,
        settings: TrainSettings,
        *,
        seed: int = 0,
        device: str = "cpu",
        workers: int = 0,
        identity: dict[str, Any] | None = None,
        state: Path | None = None,
        metrics: Path | None = None,
        progress: Progress = silent,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Divide the images and build the optimiser.

        Raises DataError for too few images, UsageError for what cannot be retrained and for an
        optimizer timm has not.
        """
        from timm.scheduler import CosineLRScheduler

        self.student, self.teacher = student.to(device), teacher.to(device).eval()
        self.student.qann.to(device)
        self.data, self.settings, self.seed, self.device = data, settings, seed, device
        self.workers = workers
        self.identity = {**(identity or {}), "settings": settings.to_dict(), "seed": seed}
        self.state, self.metrics = state, metrics
        self.progress, self.announce = progress, announce
        self.timesteps = student.timesteps
        self.preprocessing = student.preprocessing
        held_out = min(settings.held_out, int(len(data) * HELD_OUT_SHARE))
        # Others than those that calibrated, which are the first of the same order.
        self.held_out = choose_indices(len(data), held_out, seed, others=True)
        self.indices = np.setdiff1d(np.arange(len(data)), self.held_out)
        if not len(self.held_out):
            raise DataError(
                f"{data.name}: {len(data)} training images are too few to retrain; take --epochs 0"
            )
        self.batch = min(settings.batch_size, len(self.indices))
        self.steps = len(self.indices) // self.batch
        if self.batch < distributed.size():
            raise UsageError(f"a batch of {self.batch} images cannot be shared by more processes")
        # Lookahead counts steps in Python, which a recording does not repeat.
        recordable = self._alone_on_gpu() and not settings.optimizer.startswith("lookahead_")
        self.optimizer = self._optimizer({"capturable": True} if recordable else {})
        # The rates that a recorded step of the optimizer reads; None if it cannot be recorded.
        self.rates: list[Tensor] | None = None
        if self.optimizer.defaults.get("capturable"):
            self.rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        total = self.steps * settings.epochs
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, total),
            warmup_t=int(total * settings.warmup),
            t_in_epochs=False,
        )
        self.at = _Progressed()
        self.ema = self._copies() if settings.ema else None
        self.best: list[Tensor] | None = None
        self.readout = _classifier(student.qann)
        self.teacher_logits: dict[int, Tensor] = {}
        self.captured: dict[tuple[int, bool, bool], CapturedStep | None] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.clock = _Clock()
        # What the last steps found on the device, and when it was last read.
        self.sums: Tensor | None = None
        self.read = time.monotonic()
        settings.augmentation.transform(self.preprocessing)  # complains before anything is done

    def _optimizer(self, options: dict[str, Any]) -> torch.optim.Optimizer:
        """Build timm's optimizer, without options that it has not."""
        from timm.optim import create_optimizer_v2

        settings = self.settings
        try:
            return create_optimizer_v2(
                _groups(self.student, settings),
                opt=settings.optimizer,
                lr=settings.lr,
                momentum=settings.momentum,
                **options,
            )
        except (ValueError, AssertionError, TypeError) as error:
            if options:
                return self._optimizer({})
            raise UsageError(
                f"training: timm has no optimizer {settings.optimizer!r} ({first_line(error)})"
            ) from error

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train, and leave the best epoch's parameters in the student and its QANN.

        Returns what was chosen, as plain JSON values. Raises SnnconvError if the loss is not
        finite, UsageError if `resume` finds no state or one of another training.
        """
        if resume:
            self._load()
        elif distributed.rank() == 0:
            # What an earlier training left must not be taken for this one's.
            if self.state is not None:
                self.state.unlink(missing_ok=True)
            if self.metrics is not None:
                self.metrics.unlink(missing_ok=True)
        try:
            self._train()
        except KeyboardInterrupt:
            if self.state is not None and self.state.is_file():
                self.announce("the same command with --resume goes on with the retraining")
            raise
        assert self.best is not None
        _assign(self.student.state(), self.best)
        for module in (self.student, self.student.qann, self.teacher):
            module.cpu()
        self.student.refresh()
        return {
            "settings": self.settings.to_dict(),
            "seed": self.seed,
            "images": len(self.indices),
            "held_out_images": len(self.held_out),
            "held_out_kl": self.at.best_score,
            "chosen_epoch": self.at.best_epoch,
        }

    def _train(self) -> None:
        """Go through the epochs that are left."""
        model, batches = self._shared(), self._batches()
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            if self.at.epoch == 0 and self.at.step == 0:
                self.student.timesteps = self._stage(0)
                self._finish_epoch(0.0)
            while self.at.epoch < self.settings.epochs:
                self._epoch(model, batches)

    def _shared(self) -> nn.Module:
        if distributed.size() == 1:
            return self.student
        # Kernels of one pixel look alike in both layouts, to all but this warning.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(self.student)

    def _stage(self, epoch: int) -> int:
        """Return the T of an epoch."""
        stages = (*self.settings.stages, self.timesteps)
        return stages[min(epoch * len(stages) // self.settings.epochs, len(stages) - 1)]

    def _epoch(self, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        at, epoch = self.at, self.at.epoch
        early = epoch < round(self.settings.batch_statistics * self.settings.epochs)
        self.student.batch_statistics = early
        started = saved = time.monotonic()
        for pixels, labels in islice(batches, self.steps - at.step):
            self._step(model, self._moved(pixels), self._moved(labels))
            at.step += 1
            self.progress(
                "retrain",
                epoch * self.steps + at.step,
                self.steps * self.settings.epochs,
                f"epoch {epoch + 1}/{self.settings.epochs}, loss {self._mean_loss():.3f}, "
                f"held-out KL {at.best_score:.4f}",
            )
            if (seconds := self.clock.step()) is not None:
                self._estimate(seconds)
            if time.monotonic() - saved > SAVE_SECONDS and at.step < self.steps:
                self._read_sums()
                at.seconds += time.monotonic() - started
                started = saved = time.monotonic()
                self._save()
        self._read_sums()
        at.seconds += time.monotonic() - started
        self.student.batch_statistics = False
        self._require_finite()
        at.epoch, at.step = epoch + 1, 0
        self._finish_epoch(float(self.optimizer.param_groups[0]["lr"]))
        if at.epoch < self.settings.epochs:
            self.student.timesteps = self._stage(at.epoch)
        self._save()

    def _estimate(self, seconds: float) -> None:
        """Say how long the rest will take."""
        epochs = self.settings.epochs - self.at.epoch
        left = seconds * (self.steps * epochs - self.at.step) + self.clock.measuring * epochs
        self.announce(
            f"retraining: {self.settings.epochs} epochs of {self.steps} steps, {seconds:.2f} s a "
            f"step, about {math.ceil(left / 60)} minutes to go; it can be interrupted and "
            "continued with --resume"
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of all batches that are left."""

        def batches(epoch: int, step: int) -> Iterator[tuple[int, np.ndarray]]:
            while epoch < self.settings.epochs:
                generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
                order = generator.permutation(self.indices)
                for k in range(step, self.steps):
                    batch = order[k * self.batch : (k + 1) * self.batch]
                    yield epoch, distributed.share(batch)
                epoch, step = epoch + 1, 0

        return training_batches(
            self.data,
            self.preprocessing,
            self.settings.augmentation,
            batches(self.at.epoch, self.at.step),
            seed=self.seed,
            workers=self.workers,
            partners=self.indices,
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to the device, without waiting for it."""
        if not self.device.startswith("cuda"):
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _precision(self) -> Any:
        """Return the context of a forward pass: bfloat16 where it pays, but not near the end."""
        if not self._in_half():
            return nullcontext()
        # What it would keep of a parameter's half would be another's in the next step.
        return torch.autocast(self._kind(), torch.bfloat16, cache_enabled=False)

    def _kind(self) -> str:
        return torch.device(self.device).type

    def _in_half(self) -> bool:
        last = math.ceil(self.settings.epochs * EXACT_SHARE)
        early = self.at.epoch < self.settings.epochs - last
        return self.settings.amp and early and (self._kind() != "cpu" or _multiplies_halves())

    def _step(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> None:
        """Take one step on this rank's share of a batch."""
        self._set_rates()
        recorded = self._recorded(model, pixels, labels)
        if recorded is None:
            self.optimizer.zero_grad(set_to_none=True)
            loss, hits = self._compute(model, pixels, labels)
            loss.backward()
        else:
            loss, hits = recorded(pixels, labels)
        counts = [hits, (labels != UNLABELLED).sum(), torch.full_like(hits, len(labels))]
        here = [loss.detach() / distributed.size(), *counts]
        sums = distributed.sum_over_ranks(torch.stack([v.double() for v in here]))
        self.sums = sums if self.sums is None else self.sums + sums
        if self._is_time_to_read():
            self._read_sums()
        if recorded is None or not recorded.updates:
            if self.student.batch_statistics and distributed.size() > 1:
                self.student.norms.share_(len(labels))
            self._update()
        if self.ema is not None:
            torch._foreach_lerp_(self.ema, self.student.state(), 1 - self.settings.ema)

    def _set_rates(self) -> None:
        """Set the learning rates of the step that comes."""
        self.schedule.step_update(self.at.epoch * self.steps + self.at.step)
        if self.rates is not None:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])

    def _update(self) -> None:
        """Move all that training changes, by the gradients and statistics that are there."""
        self.optimizer.step()
        self.student.bound_()
        if self.student.batch_statistics:
            self.student.norms.follow_()

    def _is_time_to_read(self) -> bool:
        """Return whether to look at the loss now; ranks do at the same step."""
        timing = self.clock.steps < UNTIMED_STEPS + TIMED_STEPS
        return timing or not self._alone_on_gpu() or time.monotonic() - self.read > READ_SECONDS

    def _read_sums(self) -> None:
        """Add up what steps have found since the last time.

        Raises SnnconvError if the loss is not finite.
        """
        self.read = time.monotonic()
        if self.sums is None:
            return
        loss, hits, labelled, images = self.sums.tolist()
        self.sums = None
        if not math.isfinite(loss):
            step = min(self.at.step + 1, self.steps)
            raise self._diverged(f"the loss is {loss} by step {step}")
        at = self.at
        at.loss, at.images = at.loss + loss, at.images + int(images)
        at.hits, at.labelled = at.hits + int(hits), at.labelled + int(labelled)

    def _mean_loss(self) -> float:
        """Return the mean of the epoch's losses that have been read."""
        return self.at.loss * self.batch / max(1, self.at.images)

    def _compute(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the loss, and its hits."""
        with self._precision():
            logits = model(pixels)[self.readout].flatten(1).float()
            # A rank whose images cannot be read takes part all the same.
            loss = self._loss(logits, pixels, labels) if len(labels) else logits.sum() * 0
        # DDP averages over ranks; a rank may have an image less than another.
        loss = loss * (len(labels) * distributed.size() / self.batch)
        return loss, (logits.argmax(1) == labels).sum()

    def _recorded(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> CapturedStep | None:
        """Return the recorded step for such batches; None where there is none."""
        # In the first step libraries and the optimizer make what they keep.
        if not self._alone_on_gpu() or not self.clock.steps or len(labels) < self.batch:
            return None
        key = self.student.timesteps, self._in_half(), self.student.batch_statistics
        if key not in self.captured:
            self.captured.clear()  # its memory is free for the next
            self.captured[key] = self._capture(partial(self._compute, model), pixels, labels)
        return self.captured[key]

    def _alone_on_gpu(self) -> bool:
        """Return whether steps can be recorded, and need not be waited for."""
        return self.device.startswith("cuda") and distributed.size() == 1

    def _capture(self, compute: Compute, pixels: Tensor, labels: Tensor) -> CapturedStep | None:
        """Record a step, or say that it cannot be."""
        try:
            update = self._update if self.rates is not None else None
            return CapturedStep(compute, self.student.trained(), pixels, labels, update)
        except RuntimeError as error:
            if self.rates is not None:
                self.rates = None  # perhaps the rest can
                return self._capture(compute, pixels, labels)
            self.announce(f"steps are not recorded as a CUDA graph: {first_line(error)}")
            return None

    def _diverged(self, what: str) -> SnnconvError:
        return SnnconvError(
            f"retraining: {what} of epoch {self.at.epoch + 1}; begin anew with a smaller --lr than "
            f"{self.settings.lr:g} (the last good state was kept)"
        )

    def _require_finite(self) -> None:
        """Raise SnnconvError if a parameter has become infinite or undefined."""
        for tensor in self.student.state():
            if not bool(tensor.isfinite().all()):
                where = f"after step {self.at.step}"
                raise self._diverged(f"a parameter is infinite or undefined {where}")

    def _loss(self, logits: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of cross entropy and divergence from the teacher over images.

        An image without a label has no cross entropy.
        """
        share, temperature = self.settings.distill, self.settings.temperature
        loss = logits.new_zeros(())
        if share < 1:
            entropy = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
            loss = (1 - share) * entropy / len(labels)
        if share:
            with torch.no_grad():
                target = self._teach(pixels).float() / temperature
            divergence = F.kl_div(
                F.log_softmax(logits / temperature, 1),
                F.log_softmax(target, 1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + share * temperature**2 * divergence
        return loss

    def _teach(self, pixels: Tensor) -> Tensor:
        """Return the teacher's logits."""
        images = laid_out(self.preprocessing.normalize(pixels))
        outputs = flatten_outputs(self.teacher(images))
        logits: Tensor = next(iter(outputs.values())).flatten(1)
        return logits

    def network(self) -> SpikingNetwork:
        """Return the spiking network the parameters amount to now."""
        self.student.refresh()
        qann = copy.deepcopy(self.student.qann).cpu()
        return integerize(
            qann,
            self.preprocessing,
            self.student.timesteps,
            weight_bits=self.student.weight_bits,
            initial_membrane=self.student.initial_membrane,
        )

    def _finish_epoch(self, lr: float) -> None:
        """Measure the integer network on held-out images, keep it if it is the best so far."""
        begun = time.monotonic()
        at, current = self.at, self._copies()
        if self.ema is not None:
            _assign(self.student.state(), self.ema)
        kl, accuracy = self._measure()
        self.clock.measuring = time.monotonic() - begun
        if self.student.timesteps == self.timesteps and kl < at.best_score:
            at.best_score, at.best_epoch = kl, at.epoch
            self.best = self._copies()
        _assign(self.student.state(), current)
        line = {
            "epoch": at.epoch,
            "timesteps": self.student.timesteps,
            "loss": at.loss / self.steps if at.images else None,
            "train_top1_percent": 100 * at.hits / at.labelled if at.labelled else None,
            "held_out_kl": kl,
            "held_out_top1_percent": accuracy,
            "lr": lr,
            "seconds": round(at.seconds, 1),
            "device": self._hardware(),
        }
        at.loss, at.hits, at.labelled, at.images = 0.0, 0, 0, 0
        if self.metrics is not None and distributed.rank() == 0:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            at.written = self.metrics.stat().st_size

    def _hardware(self) -> str:
        """Name what this epoch was trained on: `cpu`, or a GPU by its model."""
        name = self.device
        if name.startswith("cuda"):
            name = torch.cuda.get_device_name(name)
        return name if distributed.size() == 1 else f"{distributed.size()} x {name}"

    def _copies(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.student.state()]

    def _measure(self) -> tuple[float, float]:
        """Return KL to the teacher and top-1 in percent of the integers, on held-out images.

        The images are augmented, always alike: a pretrained network knows them as they are.
        """
        network = self.network()
        runner = prepare(network, network.timesteps, device=self.device)
        kl, hits, seen = 0.0, 0, 0
        for i, (pixels, labels) in enumerate(self._held_out_batches()):
            if not len(labels):
                continue
            pixels = pixels.to(self.device)
            with torch.no_grad():
                if i not in self.teacher_logits:
                    self.teacher_logits[i] = self._teach(pixels).double().cpu()
                end = runner.endpoint(pixels)
                logits = end.logits(network, self.readout).flatten(1).double().cpu()
            kl += divergence(logits, self.teacher_logits[i])
            hits += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
            self.progress("held out", seen * distributed.size(), len(self.held_out))
        sums = distributed.sum_over_ranks(torch.tensor([kl, hits, seen], dtype=torch.float64))
        return float(sums[0] / sums[2]), float(100 * sums[1] / sums[2])

    def _held_out_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return this rank's held-out images, augmented; they are kept if there are few."""
        if self.kept:
            return self.kept
        count = -(-len(self.held_out) // default_batch(self.preprocessing))
        parts = distributed.share(np.array_split(self.held_out, count))
        batches = training_batches(
            self.data,
            self.preprocessing,
            self.settings.augmentation,
            ((HELD_OUT_EPOCH, part) for part in parts),
            seed=self.seed,
            workers=self.workers,
        )
        if len(self.held_out) * math.prod(self.preprocessing.input_size) > KEPT_BYTES:
            return batches
        # Copies: those of other processes lie in shared memory, of which there is little.
        self.kept = [(pixels.clone(), labels.clone()) for pixels, labels in batches]
        return self.kept

    def _save(self) -> None:
        if self.state is None or distributed.rank() != 0:
            return
        self._require_finite()
        contents = {
            "identity": self.identity,
            "at": asdict(self.at),
            "timesteps": self.student.timesteps,
            "parameters": self.student.state(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "best": self.best,
        }
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        write_atomically(self.state, buffer.getvalue())

    def _take(self, found: dict[str, Any]) -> None:
        """Continue from a state that has been read."""
        self.at = _Progressed(**found["at"])
        self.student.timesteps = found["timesteps"]
        _assign(self.student.state(), found["parameters"])
        for group in found["optimizer"]["param_groups"]:
            if "capturable" in group:  # it may have been saved on another device
                group["capturable"] = self.rates is not None
        self.optimizer.load_state_dict(found["optimizer"])
        self.best = found["best"] and [b.to(self.device) for b in found["best"]]
        self.ema = found["ema"] and [e.to(self.device) for e in found["ema"]]

    def _load(self) -> None:
        """Take up the state on disk. Raises UsageError with every difference if it is another's."""
        if self.state is None or not self.state.is_file():
            raise UsageError(f"--resume: there is no state {self.state} to go on from")
        try:
            found = torch.load(self.state, map_location="cpu", weights_only=True)
            other = _differences(found["identity"], self.identity)
            if not other:
                self._take(found)
        except Exception as error:  # a file may be wrong in any way there is
            raise UsageError(
                f"--resume: {self.state} is damaged ({first_line(error)}); start anew with --force"
            ) from error
        if other:
            raise UsageError(f"--resume: {self.state} is of another training", other)
        if self.metrics is not None and self.metrics.is_file() and distributed.rank() == 0:
            with self.metrics.open("r+b") as file:
                file.truncate(min(self.at.written, self.metrics.stat().st_size))


@dataclass
class _Clock:
    """Times the first steps of a run, for an estimate; `measuring` is a held-out pass, in s."""

    steps: int = 0
    begun: float = 0.0
    measuring: float = 0.0

    def step(self) -> float | None:
        """Count a step; return the seconds of one when enough have been timed, once."""
        self.steps += 1
        if self.steps == UNTIMED_STEPS:
            self.begun = time.monotonic()
        if self.steps == UNTIMED_STEPS + TIMED_STEPS:
            return (time.monotonic() - self.begun) / TIMED_STEPS
        return None


@cache
def _multiplies_halves() -> bool:
    """Return whether this CPU has instructions for bfloat16; others are slower in it."""
    # Older versions of torch do not tell: `bool()` is False.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in HALVES)


def _classifier(qann: Qann) -> str:
    """Name the one output of a classifier. Raises UsageError for other networks."""
    logits = only_logits(qann.readouts())
    if logits is None:
        shapes = ", ".join(f"{r.name} {list(r.shape)}" for r in qann.readouts())
        raise UsageError(
            f"only classifiers can be retrained, and the outputs are {shapes}; take --epochs 0"
        )
    return logits.name


def _groups(student: Student, settings: TrainSettings) -> list[dict[str, Any]]:
    """Divide the parameters: weights decay; biases, gains and clips do not; clips move slower."""
    kinds: dict[str, list[nn.Parameter]] = {"weights": [], "vectors": [], "clips": []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            clip = name.startswith(("log_clips", "log_shares"))
            kinds["clips" if clip else "weights" if parameter.ndim > 1 else "vectors"].append(
                parameter
            )
    rates = {
        "weights": settings.lr,
        "vectors": settings.lr,
        "clips": settings.lr * settings.clip_lr,
    }
    decays = {"weights": settings.weight_decay, "vectors": 0.0, "clips": 0.0}
    return [
        {"params": found, "lr": rates[kind], "weight_decay": decays[kind]}
        for kind, found in kinds.items()
        if found
    ]


def _assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Name every value that differs between two trees of dicts."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        return [d for k in keys for d in _differences(found.get(k), wanted.get(k), f"{path}{k}.")]
    return [] if found == wanted else [f"{path.rstrip('.')}: {found} there, {wanted} here"]
