"""BatchNorm by a batch's own statistics, in a network that it has been folded into.

A folded current is `gain` times what the BatchNorm saw, `gain` being that of inference. Scaled
and shifted to the mean and deviation that inference expects, it is what the BatchNorm of a network
in training would give (Ioffe, Szegedy, arXiv 1502.03167, section 3.1); rows are rounded to
integers before, which a factor per row leaves as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnconv.folding import Folder
from snnconv.operations import Operation
from snnconv.ops import per_channel
from snnconv.rewrite import AFFINE

# Square of the smallest gain by which a current is divided.
SMALLEST_SQUARE = 1e-12
WEIGHTED = ("conv", "linear")
# What a BatchNorm without a momentum of its own moves by (torch averages over all batches then).
MOMENTUM = 0.1


@dataclass
class _Norm:
    """A BatchNorm behind one branch, the layer before it, and what the last batch had."""

    module: Any
    operation: Operation
    before: nn.Module | None
    mean: Tensor | None = None
    variance: Tensor | None = None


class BatchNorms:
    """The BatchNorms that can be given a batch's statistics: each behind one branch alone.

    Those over sums, behind a pooling or serving several layers stay as in inference.
    """

    def __init__(self, folder: Folder) -> None:
        """Find them in the network of a folder."""
        self.folder = folder
        ways = {
            (i, j): [name for name in term.key if name in folder.fx]
            for i, node in enumerate(folder.planned)
            for j, term in enumerate(node.terms)
        }
        uses = Counter(id(folder.operation(name).module) for way in ways.values() for name in way)
        self.norms: dict[tuple[int, int], _Norm] = {}
        for place, way in ways.items():
            if not way:
                continue
            *before, norm = map(folder.operation, way)
            if norm.kind != "batch_norm" or isinstance(norm.module, AFFINE):
                continue
            if uses[id(norm.module)] > 1:
                continue
            direct = [o.kind in WEIGHTED and norm.inputs[0].name == way[0] for o in before]
            if direct in ([], [True]):
                self.norms[place] = _Norm(norm.module, norm, before[0].module if before else None)

    def statistics(self) -> list[Tensor]:
        """Return the running statistics, `[C]` each, of all of them in order."""
        modules = [norm.module for norm in self.norms.values()]
        return [s for m in modules for s in (m.running_mean, m.running_var)]

    def normalize(self, layer: int, branch: int, current: Tensor) -> Tensor:
        """Normalise the current of a branch, `[N, C, ...]`, by its own mean and deviation."""
        norm = self.norms.get((layer, branch))
        if norm is None:
            return current
        module, axes = norm.module, [i for i in range(current.ndim) if i != 1]
        current = current.float()
        gain = self.folder.affine(norm.operation)[0].float()
        offset = getattr(norm.before, "bias", None)
        variance, mean = torch.var_mean(current, axes, correction=0)
        square = gain.square().clamp_min(SMALLEST_SQUARE)
        raw_variance = variance / square
        ratio = ((module.running_var + module.eps) / (raw_variance + module.eps)).sqrt()
        expected = gain * (module.running_mean if offset is None else module.running_mean - offset)
        with torch.no_grad():
            count = current.numel() // current.shape[1]
            raw_mean = gain.sign() * mean / square.sqrt()
            norm.mean = raw_mean if offset is None else raw_mean + offset
            norm.variance = raw_variance * (count / max(1, count - 1))
        ratio, shift = ratio, expected - mean * ratio
        return current * per_channel(ratio, current.ndim) + per_channel(shift, current.ndim)

    def follow_(self) -> None:
        """Move the running statistics by those of the last batch."""
        with torch.no_grad():
            for norm in self.norms.values():
                if norm.mean is not None and norm.variance is not None:
                    momentum = MOMENTUM if norm.module.momentum is None else norm.module.momentum
                    norm.module.running_mean.lerp_(norm.mean, momentum)
                    norm.module.running_var.lerp_(norm.variance, momentum)
