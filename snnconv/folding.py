"""Fold a traced network into its QANN: for every neuron, weights, one bias, nothing else.

BatchNorm goes into the weights before it. Each summand of a neuron's current becomes a branch
of its own, with weights in the row of the neuron it feeds (method.md, section 4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from snnconv.graph import Traced
from snnconv.operations import Operation, describe
from snnconv.ops import Pool
from snnconv.plan import ConversionPlan, Key, Neurons, Output, Term
from snnconv.quant import Branch, Layer, Qann


def fold(traced: Traced, plan: ConversionPlan) -> Qann:
    """Build the float QANN of a convertible plan; without clips it computes what the ANN does.

    Raises NotConvertibleError, naming every reason, if the plan is not convertible.
    """
    plan.require_convertible()
    folder = _Folder(traced)
    nodes = [
        folder.layer(node) if isinstance(node, (Neurons, Output)) else node for node in plan.nodes
    ]
    return Qann(nodes)


class _Folder:
    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.fx = {n.name: n for n in traced.module.graph.nodes}

    def operation(self, name: str) -> Operation:
        return describe(self.traced, self.fx[name])

    def layer(self, node: Neurons | Output) -> Layer:
        site = self.fx[node.site]
        keys = {t.key for t in node.terms}
        direct = (f"{node.name}:0",) in keys
        channels = self.traced.shapes[site.name][0] if direct else self.channels(site)
        branches = [self.branch(t, channels) for t in node.terms]
        bias = torch.zeros(channels, dtype=torch.float64)
        if not direct:
            bias = bias + self.bias(site, (), keys)
        if isinstance(node, Output):
            return Layer(node.name, node.name, branches, bias, node.shape, readout=True)
        return Layer(
            node.name,
            node.path,
            branches,
            bias,
            node.shape,
            two_sided=node.two_sided,
            cap=node.cap,
        )

    def channels(self, node: fx.Node) -> int:
        """Return the rows of a current: its channels before any flattening."""
        while self.operation(node.name).kind in ("flatten", "identity", "max_pool"):
            node = self.operation(node.name).inputs[0]
        return self.traced.shapes[node.name][0]

    def branch(self, term: Term, channels: int) -> Branch:
        """Multiply the linear maps of one term together."""
        first, *rest = term.key
        kind, attributes, pools, statistics = "scale", {}, [], None
        weight = torch.ones(channels, dtype=torch.float64)
        if first in self.fx:
            operation = self.operation(first)
            if operation.kind == "batch_norm":
                weight, statistics = _affine(operation)[0], _statistics(operation)
            elif operation.kind == "average_pool":
                pools.append(operation.attributes["pool"])
            else:
                kind, attributes = operation.kind, operation.attributes
                weight = operation.module.weight.detach().double()
        for step in rest:
            if step not in self.fx:
                continue
            operation = self.operation(step)
            if operation.kind == "batch_norm":
                gain = _affine(operation)[0]
                weight = weight * gain.view(-1, *[1] * (weight.ndim - 1))
                statistics = _statistics(operation)
            else:
                pool: Pool = operation.attributes["pool"]
                pools.append(pool)
        return Branch(term.source, term.key, kind, weight, attributes, tuple(pools), statistics)

    def bias(self, node: fx.Node, trail: Key, keys: set[Key]) -> Tensor:
        """Return what a current is when all counts are zero, float64 `[C]`."""
        operation = self.operation(node.name)
        kind, inputs = operation.kind, operation.inputs
        if kind in ("conv", "linear"):
            bias = operation.module.bias
            if bias is None:
                return torch.zeros((), dtype=torch.float64)
            return bias.detach().double()
        if kind == "batch_norm":
            gain, shift = _affine(operation)
            here = (node.name, *trail)
            return shift if here in keys else shift + gain * self.bias(inputs[0], here, keys)
        if kind == "add":
            total = torch.zeros((), dtype=torch.float64)
            for i, operand in enumerate(inputs):
                here = (f"{node.name}:{i}", *trail)
                if here not in keys:
                    total = total + self.bias(operand, here, keys)
            return total
        here = (node.name, *trail) if kind == "average_pool" else trail
        return self.bias(inputs[0], here, keys)


def _affine(operation: Operation) -> tuple[Tensor, Tensor]:
    """Return gain and shift of a BatchNorm in inference, float64 `[C]`."""
    norm = operation.module
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = -mean * gain
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return gain, shift


def _statistics(operation: Operation) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a BatchNorm's output, float64 `[C]`."""
    norm = operation.module
    channels = norm.num_features
    mean = torch.zeros(channels) if norm.bias is None else norm.bias.detach()
    spread = torch.ones(channels) if norm.weight is None else norm.weight.detach().abs()
    return mean.double(), spread.double()
