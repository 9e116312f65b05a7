"""How far the outputs of one classifier are from those of another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def divergence(logits: Tensor, wanted: Tensor) -> float:
    """Return the KL divergence of class probabilities from those of `wanted`, summed over images.

    Both are logits `[N, classes]`; nats, in float64.
    """
    logs = logits.double().log_softmax(1), wanted.double().log_softmax(1)
    return float(F.kl_div(*logs, log_target=True, reduction="sum"))
