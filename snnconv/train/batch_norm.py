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
from torch import Tensor

from snnconv import distributed
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
    """A BatchNorm behind one branch, the layer before it, and what it saw of the last batch.

    `seen` are mean and unbiased variance, `[2, C]`.
    """

    module: Any
    operation: Operation
    before: Any | None
    seen: Tensor | None = None


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
        """Normalise the current of a branch, `[N, C, ...]`, by its own mean and deviation.

        Channels of almost no gain are divided by nothing: they stay as in inference.
        """
        norm = self.norms.get((layer, branch))
        if norm is None or not len(current):
            return current
        module, axes = norm.module, [i for i in range(current.ndim) if i != 1]
        current = current.float()
        gain = self.folder.affine(norm.operation)[0]
        offset = 0.0 if norm.before is None or norm.before.bias is None else norm.before.bias
        variance, mean = torch.var_mean(current, axes, correction=0)
        usable = gain.square() > SMALLEST_SQUARE
        divisor = torch.where(usable, gain, 1.0)
        seen_variance = torch.where(usable, variance / divisor.square(), module.running_var)
        ratio = ((module.running_var + module.eps) / (seen_variance + module.eps)).sqrt()
        shift = gain * (module.running_mean - offset) - mean * ratio
        with torch.no_grad():
            count = current.numel() // current.shape[1]
            unbiased = seen_variance * (count / max(1, count - 1))
            seen = self._seen(norm)
            seen[0] = torch.where(usable, mean / divisor + offset, module.running_mean)
            seen[1] = torch.where(usable, unbiased, module.running_var)
        return current * per_channel(ratio, current.ndim) + per_channel(shift, current.ndim)

    def _seen(self, norm: _Norm) -> Tensor:
        """Return where mean and variance of the last batch are kept, always in the same place."""
        running = norm.module.running_mean
        if norm.seen is None or norm.seen.device != running.device:
            norm.seen = torch.stack([running, norm.module.running_var])
        return norm.seen

    def share_(self, images: int) -> None:
        """Average what ranks have seen, of so many images here."""
        seen = [self._seen(norm) for norm in self.norms.values()]
        if not seen:
            return
        own = torch.cat([s.flatten() for s in seen])
        sums = distributed.sum_over_ranks(torch.cat([own * images, own.new_full((1,), images)]))
        if sums[-1] > 0:
            means = (sums[:-1] / sums[-1]).split([s.numel() for s in seen])
            for target, mean in zip(seen, means, strict=True):
                target.copy_(mean.view_as(target))

    def follow_(self) -> None:
        """Move the running statistics by those of the last batch."""
        with torch.no_grad():
            for norm in self.norms.values():
                momentum = MOMENTUM if norm.module.momentum is None else norm.module.momentum
                mean, variance = self._seen(norm)
                norm.module.running_mean.lerp_(mean, momentum)
                norm.module.running_var.lerp_(variance, momentum)
