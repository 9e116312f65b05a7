"""The zoo's networks build, by the names timm knows them by."""

from __future__ import annotations

import pytest
import timm
import torch

from snnconv.load import load_model
from snnconv.model_zoo import catalog, register

register()


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda e: e.name)
def test_every_entry_is_registered(entry: catalog.ZooEntry) -> None:
    assert timm.is_model(entry.arch)
    assert entry.path is None or (entry.path.is_file() and entry.path.stat().st_size < 400_000)


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_sizes_are_those_of_the_paper(depth: int, parameters: float) -> None:
    # He et al., arXiv 1512.03385, table 6, in millions.
    model = timm.create_model(f"cifar_resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.03)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth


def test_option_a_has_no_parameters_and_option_b_has() -> None:
    a, b = (timm.create_model("cifar_resnet20", shortcut=s) for s in "AB")
    names = set(b.state_dict()) - set(a.state_dict())
    assert names and all(".shortcut." in n for n in names)
    with pytest.raises(ValueError, match="A or B"):
        timm.create_model("cifar_resnet20", shortcut="C")


def test_the_digits_network_reads_digits() -> None:
    from snnconv.model_zoo.digits import MEAN, STD, digits_images

    train, _ = digits_images("train")
    assert (train / 255).mean() == pytest.approx(MEAN[0], abs=1e-3)
    assert (train / 255).std() == pytest.approx(STD[0], abs=1e-3)
    loaded = load_model("zoo:digits")
    images, labels = digits_images("test")
    x = loaded.preprocessing.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        hits = loaded.model(x).argmax(1).numpy() == labels
    assert hits.mean() > 0.98
