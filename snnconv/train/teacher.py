"""A teacher other than the network itself: a stronger one for the same images and classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snnconv.errors import UsageError
from snnconv.load import LoadedModel
from snnconv.ops import per_channel
from snnconv.preprocess import Preprocessing


def teacher_for(teacher: LoadedModel, student: LoadedModel) -> nn.Module:
    """Return a teacher's model that takes images normalised for the student.

    Raises UsageError if it knows other classes or takes images of another size.
    """
    if teacher.num_classes != student.num_classes:
        raise UsageError(
            f"the teacher {teacher.name} knows {teacher.num_classes} classes, {student.name} "
            f"{student.num_classes}"
        )
    theirs, ours = teacher.preprocessing, student.preprocessing
    if theirs.input_size != ours.input_size:
        their_size, our_size = ("x".join(map(str, p.input_size)) for p in (theirs, ours))
        raise UsageError(
            f"the teacher {teacher.name} takes images of {their_size}, {student.name} of {our_size}"
        )
    if (theirs.mean, theirs.std) == (ours.mean, ours.std):
        return teacher.model
    return Renormalized(teacher.model, theirs, ours)


class Renormalized(nn.Module):
    """A network for images that were normalised for another one."""

    factor: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, own: Preprocessing, given: Preprocessing) -> None:
        """Hold what turns images normalised as `given` into the network's `own`, per channel."""
        super().__init__()
        self.model = model
        mean, std, given_mean, given_std = (
            torch.tensor(v, dtype=torch.float64) for v in (own.mean, own.std, given.mean, given.std)
        )
        self.register_buffer("factor", (given_std / std).float())
        self.register_buffer("shift", ((given_mean - mean) / std).float())

    def forward(self, images: Tensor) -> Tensor:
        """Return what the network says of normalised images `[N, C, H, W]`."""
        ndim = images.ndim
        return self.model(images * per_channel(self.factor, ndim) + per_channel(self.shift, ndim))
