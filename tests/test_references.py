"""Published checkpoints give the accuracies stated for them, so loading and pixels are right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snnconv.data import open_data
from snnconv.load import load_model
from snnconv.measure import top1_percents
from snnconv.recipe import read_recipe


def unpacked(kind: str, shared_data: Path, folder: Path) -> str:
    tool = shared_data.parent / "tools" / "unpack.py"
    subprocess.run([sys.executable, str(tool), kind, str(folder)], check=True, capture_output=True)
    return str(folder)


def accuracy(checkpoint: Path, recipe: str, data: str) -> float:
    loaded = load_model(str(checkpoint), recipe=read_recipe(recipe))
    test = open_data(data, "test", calibration_images=0)
    indices = np.arange(len(test))
    normalize = loaded.preprocessing.normalize
    forwards = {"ann": lambda pixels: loaded.model(normalize(pixels))}
    found = top1_percents(forwards, test, loaded.preprocessing, indices)["ann"]
    assert found["images"] == len(test)
    return float(found["top1_percent"])


@pytest.mark.data
def test_lenet_on_mnist(shared_data: Path, tmp_path: Path) -> None:
    data = unpacked("mnist", shared_data, tmp_path)
    checkpoint = shared_data / "mnist" / "shrinkbench_mnistnet.pt"
    assert accuracy(checkpoint, "mnist_lenet", data) == pytest.approx(98.96, abs=0.005)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "recipe", "expected"),
    [
        ("squeezenet1_0_deepcompressed_bgr", "squeezenet1_0_caffe", 62.2),
        ("mobilenetv1_100_tf_in1k", "mobilenetv1_100_tf", 87.5),
        ("mobilenetv2_100_tf2_in1k", "mobilenetv2_100_tf", 88.2),
    ],
)
def test_imagenet_networks_on_a_sample(
    file: str, recipe: str, expected: float, shared_data: Path, tmp_path: Path
) -> None:
    data = unpacked("imagenet_sample", shared_data, tmp_path)
    checkpoint = shared_data / "imagenet_models" / f"{file}.fp16.safetensors"
    assert accuracy(checkpoint, recipe, data) == pytest.approx(expected, abs=0.3)
