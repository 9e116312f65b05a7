"""Train a network of the zoo in float, for the results that begin with one trained here.

    python model_zoo/results/train_float.py ARCH DATA TARGET.safetensors [--epochs N]

DATA has train.npz. A tenth of the training images is kept apart and measured after every epoch, to
see how it goes; nothing is chosen by it, the last epoch counts. Hyperparameters were set before.
An interrupted training goes on from TARGET.part. The seed is 0.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import resolve_data_config
from torch import Tensor, nn

from snnconv import memory
from snnconv.data import ImageData, choose_indices, open_data
from snnconv.data.augment import Augmentation, training_batches
from snnconv.files import write_atomically
from snnconv.model_zoo import register
from snnconv.preprocess import Preprocessing

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, SMOOTHING = 128, 0.1, 0.9, 5e-4, 0.05
AUGMENTATION = Augmentation(auto_augment="rand-m5-n1-mstd0.5")


def main() -> None:
    """Train, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch")
    parser.add_argument("data")
    parser.add_argument("target", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    memory.keep_freed()
    register()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.arch).to(device).to(memory_format=torch.channels_last)
    cfg = resolve_data_config(model=model)
    preprocessing = Preprocessing(cfg["input_size"], cfg["mean"], cfg["std"])
    images = open_data(args.data, "train")
    held_out = choose_indices(len(images), len(images) // 10, 0)
    training = Training(model, images, preprocessing, held_out, args.epochs, args.workers, device)
    training.resume(args.target.with_suffix(".part"))
    while training.epoch < args.epochs:
        begun = time.monotonic()
        loss = training.run_epoch()
        seconds = time.monotonic() - begun
        print(
            f"{training.epoch}/{args.epochs} {loss:.3f} {training.measure():.2f} % {seconds:.0f} s",
            flush=True,
        )
        training.save()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, args.target, {"arch": args.arch})
    training.state.unlink()


class Training:
    """SGD with a cosine, from its start or from where it was left."""

    def __init__(
        self,
        model: nn.Module,
        images: ImageData,
        preprocessing: Preprocessing,
        held_out: np.ndarray,
        epochs: int,
        workers: int,
        device: str,
    ) -> None:
        self.model, self.images, self.preprocessing = model, images, preprocessing
        self.held_out, self.workers, self.device = held_out, workers, device
        self.indices = np.setdiff1d(np.arange(len(images)), held_out)
        self.steps, self.epoch = len(self.indices) // BATCH, 0
        self.optimizer = torch.optim.SGD(
            model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=epochs * self.steps, cycle_momentum=False
        )
        self.state = Path()

    def resume(self, state: Path) -> None:
        """Go on from a state, if there is one, and keep it there."""
        self.state = state
        if state.is_file():
            found = torch.load(state, map_location=self.device, weights_only=True)
            self.epoch = found["epoch"]
            for name in ("model", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(found[name])

    def save(self) -> None:
        """Write the state."""
        states = {n: getattr(self, n).state_dict() for n in ("model", "optimizer", "schedule")}
        buffer = io.BytesIO()
        torch.save({"epoch": self.epoch, **states}, buffer)
        write_atomically(self.state, buffer.getvalue())

    def run_epoch(self) -> float:
        """Learn from every image once; return the mean loss."""
        generator = np.random.Generator(np.random.PCG64([0, self.epoch]))
        order = generator.permutation(self.indices)
        parts = [(self.epoch, p) for p in np.array_split(order[: self.steps * BATCH], self.steps)]
        total = torch.zeros((), device=self.device)
        self.model.train()
        for pixels, labels in training_batches(
            self.images, self.preprocessing, AUGMENTATION, parts, seed=0, workers=self.workers
        ):
            logits = self.logits(pixels)
            loss = F.cross_entropy(logits, labels.to(self.device), label_smoothing=SMOOTHING)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach()
        self.epoch += 1
        return float(total) / self.steps

    def logits(self, pixels: Tensor) -> Tensor:
        """Return the outputs, computed in bfloat16."""
        inputs = self.preprocessing.normalize(pixels.to(self.device))
        with torch.autocast(self.device, torch.bfloat16):
            found: Tensor = self.model(inputs.contiguous(memory_format=torch.channels_last))
        return found.float()

    def measure(self) -> float:
        """Return the top-1 of the images kept apart, in percent."""
        self.model.eval()
        hits = 0
        parts = [(0, p) for p in np.array_split(self.held_out, 50)]
        plain = Augmentation(crop="none", flip=0.0)
        for pixels, labels in training_batches(
            self.images, self.preprocessing, plain, parts, seed=0
        ):
            with torch.no_grad():
                hits += int((self.logits(pixels).argmax(1).cpu() == labels).sum())
        return 100 * hits / len(self.held_out)


if __name__ == "__main__":
    main()
