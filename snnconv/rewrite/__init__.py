"""Write a traced graph anew, in the few operations that the rest of the package knows.

Networks say the same in many ways: a weight that is standardised in every pass is a constant, half
of a split is a slice, a LeakyReLU is the difference of two ReLUs, a linear layer over channels that
stand last is a 1x1 convolution. Every pass here leaves what the
graph computes as it is; `snnconv.graph.trace` holds the result against the model.
"""

from __future__ import annotations

from torch import Tensor, fx

from snnconv.rewrite.arithmetic import arithmetic
from snnconv.rewrite.broadcasts import broadcasts
from snnconv.rewrite.channels_last import channels_last
from snnconv.rewrite.composites import Composite, composites
from snnconv.rewrite.concats import concats
from snnconv.rewrite.constants import casts, constants, sizes
from snnconv.rewrite.in_place import in_place
from snnconv.rewrite.islands import islands
from snnconv.rewrite.keywords import keywords
from snnconv.rewrite.leaky import leaky
from snnconv.rewrite.modules import AFFINE, Neurons, Rearrangement
from snnconv.rewrite.norms import norms
from snnconv.rewrite.pools import pools
from snnconv.rewrite.rearrangements import foldings, rearrangements, views
from snnconv.rewrite.splits import splits
from snnconv.rewrite.tools import Values
from snnconv.rewrite.upsampling import upsampling
from snnconv.rewrite.zeros import zeros

__all__ = ["AFFINE", "Composite", "Neurons", "Rearrangement", "Values", "rewrite"]

# In this order; each takes the graph and its values, and returns whether it changed anything.
CHANGES = (
    views, casts, sizes, constants, splits, norms, channels_last, foldings, rearrangements, pools,
    upsampling, broadcasts, zeros, composites, arithmetic, leaky, islands, concats,
)  # fmt: skip


def rewrite(module: fx.GraphModule, example: Tensor) -> Values:
    """Rewrite a graph in place; return the shapes of what it is then."""
    keywords(module)
    in_place(module)
    values = _cleaned(module, example)
    for change in CHANGES:
        if change(module, values):
            values = _cleaned(module, example)
    return values


def _cleaned(module: fx.GraphModule, example: Tensor) -> Values:
    """Drop what nobody reads, and run what is left."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return Values(module, example)
