"""The embedded default: a small residual network on scikit-learn's digits.

1,797 real images of handwritten digits, 8x8 pixels; they come with scikit-learn, so the demo needs
no download.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .cifar_resnet import CifarResNet

# Mean and standard deviation of the training images, of pixels scaled to 0..1.
MEAN, STD = (0.3052,), (0.3759,)
TEST_IMAGES = 500

default_cfgs = generate_default_cfgs(
    {
        "digits_resnet.digits": {
            "url": "",
            "num_classes": 10,
            "input_size": (1, 8, 8),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": MEAN,
            "std": STD,
            "first_conv": "conv1",
            "classifier": "linear",
        }
    }
)


@register_model
def digits_resnet(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build a residual network of 8 weighted layers for `[N, 1, 8, 8]`."""
    kwargs = {"in_chans": 1, "shortcut": "B", **kwargs}
    model: CifarResNet = build_model_with_cfg(
        CifarResNet, "digits_resnet", pretrained, blocks=1, **kwargs
    )
    return model


def digits_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 `[N, 8, 8, 1]` and labels int64 `[N]` of `train` or `test`.

    scikit-learn has no split of its own; 500 images drawn with seed 0 are the test set.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pixels))
    chosen = np.sort(order[:TEST_IMAGES] if split == "test" else order[TEST_IMAGES:])
    return pixels[chosen], labels[chosen].astype(np.int64)
