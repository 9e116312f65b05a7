"""Train the digits network; its weights stand in model_zoo/weights.

    python -m snnconv.model_zoo.train_digits

takes less than a minute. Hyperparameters were set beforehand; the test accuracy is measured once,
at the end.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from . import register
from .catalog import WEIGHTS
from .digits import MEAN, STD, digits_images

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 40, 64, 0.1, 5e-4


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return normalised images `[N, 1, 8, 8]` and labels `[N]`."""
    images, labels = digits_images(split)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN[0]) / STD[0], torch.from_numpy(labels)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to one pixel."""
    padded = F.pad(images, (1, 1, 1, 1), value=-MEAN[0] / STD[0])
    corners = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack(
        [p[:, y : y + 8, x : x + 8] for p, (y, x) in zip(padded, corners, strict=True)]
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, write the weights, print the accuracies."""
    register()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model("digits_resnet")
    images, labels = load("train")
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(
                model(shift(images[batch], generator)), labels[batch], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    WEIGHTS.mkdir(exist_ok=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, WEIGHTS / "digits_resnet.safetensors", {"arch": "digits_resnet"})
    print(f"train {accuracy(model, images, labels):.2f} %")
    print(f"test {accuracy(model, *load('test')):.2f} %")


if __name__ == "__main__":
    main()
