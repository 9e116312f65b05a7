"""BatchNorm by a batch's own statistics, in a network that it has been folded into.

In a batch's own mean and deviation a factor per row is lost (Ioffe, Szegedy, arXiv 1502.03167,
section 3), so rows of folded, rounded weights are divided by the gain they were folded with, and
what they make of a batch goes through the BatchNorm as in training: exactly what the network's own
BatchNorm would make of the rounded weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snnconv import distributed
from snnconv.folding import Folder
from snnconv.operations import Operation
from snnconv.ops import per_channel
from snnconv.rewrite import AFFINE

# Smallest gain that rows are divided by.
SMALLEST_GAIN = 1e-6
WEIGHTED = ("conv", "linear")
# What a BatchNorm without a momentum of its own moves by (torch averages over all batches then).
MOMENTUM = 0.1


@dataclass
class _Norm:
    """A BatchNorm behind one branch, the layer before it, and what it saw of the last batch.

    `seen` are mean and unbiased variance, `[2, C]`, of what the layer gives without its bias.
    """

    module: Any
    operation: Operation
    before: Any | None
    seen: Tensor | None = None


class BatchNorms:
    """The BatchNorms that can be given a batch's statistics: each behind one branch alone.

    Those over sums (such as layers that were written apart, `snnconv.rewrite.concats`), behind a
    pooling or serving several layers stay as in inference.
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

    def modules(self) -> set[Any]:
        """Return the modules of all of them."""
        return {norm.module for norm in self.norms.values()}

    def expect_(self, layer: int, branch: int, mean: Tensor, variance: Tensor) -> None:
        """Let a BatchNorm have the statistics, `[C]`, of what a folded branch gives without bias.

        Its gain and shift, those of inference, stay. One without parameters of its own, and
        channels of almost no gain, are left alone.
        """
        norm = self.norms[layer, branch]
        module = norm.module
        if module.weight is None:
            return
        with torch.no_grad():
            gain, shift = self.folder.affine(norm.operation)
            usable = gain.abs() > SMALLEST_GAIN
            divisor = torch.where(usable, gain, 1.0)
            mean = torch.where(usable, mean / divisor + _offset(norm), module.running_mean)
            variance = torch.where(usable, variance / divisor.square(), module.running_var)
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
            module.weight.copy_(gain * (variance + module.eps).sqrt())
            module.bias.copy_(shift + gain * mean)

    def unfolded(self, layer: int, branch: int, weight: Tensor) -> Tensor:
        """Return a branch's weight, `[C, ...]`, without the gain of the BatchNorm behind it.

        Rows of almost no gain are those of the layer itself.
        """
        norm = self.norms.get((layer, branch))
        if norm is None:
            return weight
        with torch.no_grad():
            gain = self.folder.affine(norm.operation)[0].view(-1, *[1] * (weight.ndim - 1))
            usable = gain.abs() > SMALLEST_GAIN
            inverse = torch.where(usable, 1 / gain, 0.0)
            rows = norm.before.weight if norm.before is not None else torch.ones_like(weight)
            rows = torch.where(usable, 0.0, rows)
        return weight * inverse + rows

    def normalize(self, layer: int, branch: int, current: Tensor) -> Tensor:
        """Normalise what a branch of unfolded rows gives, `[N, C, ...]`, by its own statistics.

        What the folded bias has of the BatchNorm's mean is taken out again. A batch of no image, or
        of one number per channel, has no deviation, and is normalised as in inference.
        """
        norm = self.norms.get((layer, branch))
        if norm is None:
            return current
        module, seen = norm.module, self._seen(norm)
        with torch.no_grad():
            mean = module.running_mean - _offset(norm)
            shift = self.folder.affine(norm.operation)[0] * mean
        weight = torch.ones_like(shift) if module.weight is None else module.weight
        if current.numel() <= current.shape[1]:
            seen[0], seen[1] = mean, module.running_var
            gain = weight * torch.rsqrt(module.running_var + module.eps)
            return current * per_channel(gain, current.ndim)
        return F.batch_norm(
            current, seen[0], seen[1], weight, shift, True, momentum=1.0, eps=module.eps
        )

    def _seen(self, norm: _Norm) -> Tensor:
        """Return where mean and variance of the last batch are kept, always in the same place."""
        running = norm.module.running_mean
        if norm.seen is None or norm.seen.device != running.device:
            norm.seen = torch.stack([running - _offset(norm), norm.module.running_var]).detach()
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
                norm.module.running_mean.lerp_(mean + _offset(norm), momentum)
                norm.module.running_var.lerp_(variance, momentum)


def _offset(norm: _Norm) -> Tensor | float:
    """Return the bias of the layer before a BatchNorm, `[C]`."""
    return 0.0 if norm.before is None or norm.before.bias is None else norm.before.bias
