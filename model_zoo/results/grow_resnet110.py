"""Grow ResNet-110 for CIFAR-10 out of ResNet-56, and train it for one epoch.

    python model_zoo/results/grow_resnet110.py RESNET56.th DATA RESNET110.safetensors

Behind every block of ResNet-56 comes a new one whose last BatchNorm has the gain 0, so that at
first both networks compute the same. DATA has train.npz and test.npz. Hyperparameters were set
beforehand, and nothing is measured here; `very_deep.sh` does. The seed is 0.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from snnconv.data import open_data
from snnconv.data.augment import Augmentation, training_batches
from snnconv.load import load_model
from snnconv.model_zoo import register

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.01, 0.9, 1e-4


def grown(small: nn.Module) -> nn.Module:
    """Return ResNet-110 that computes what ResNet-56 does."""
    large = timm.create_model("cifar_resnet110")
    for name in ("conv1", "bn1", "linear"):
        large.get_submodule(name).load_state_dict(small.get_submodule(name).state_dict())
    for stage in ("layer1", "layer2", "layer3"):
        for at, block in enumerate(large.get_submodule(stage).children()):
            if at % 2 == 0:
                old = small.get_submodule(f"{stage}.{at // 2}")
                block.load_state_dict(old.state_dict())
            else:
                nn.init.zeros_(block.get_parameter("bn2.weight"))
    return large


def main(source: str, data: str, target: str) -> None:
    """Grow, train, and write the weights."""
    torch.manual_seed(0)
    register()
    loaded = load_model(source, arch="cifar_resnet56")
    model = grown(loaded.model.eval()).eval()
    noise = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(noise), loaded.model(noise))
    images = open_data(data, "train")
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(images))
    batches = [(0, order[k : k + BATCH]) for k in range(0, len(order), BATCH)]
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    started = time.monotonic()
    training = training_batches(images, loaded.preprocessing, Augmentation(), batches, seed=0)
    for step, (pixels, labels) in enumerate(training, 1):
        loss = F.cross_entropy(model(loaded.preprocessing.normalize(pixels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        if step % 10 == 0:
            print(
                f"{step}/{len(batches)} {loss:.3f} {time.monotonic() - started:.0f} s", flush=True
            )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, target, {"arch": "cifar_resnet110"})


if __name__ == "__main__":
    main(*sys.argv[1:])
