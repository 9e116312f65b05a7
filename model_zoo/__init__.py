"""The networks that come with snnconv: architectures that timm lacks, and small trained weights."""

from __future__ import annotations


def register() -> None:
    """Make the zoo's architectures known to timm, so that `timm.create_model` builds them."""
    from . import cifar_resnet, digits, small_cnns, squeezenet  # noqa: F401  importing registers
