"""Fold a traced network into its QANN: for every neuron, weights, one bias, nothing else.

BatchNorm goes into the weights before it. Each summand of a neuron's current becomes a branch
of its own, with weights in the row of the neuron it feeds. See docs/concepts.md, "The integer
network".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from snnconv.graph import Traced
from snnconv.operations import Operation, describe
from snnconv.plan import ConversionPlan, Key, Neurons, Output, PlanNode, Relay, Source, Term
from snnconv.plan import Island as PlannedIsland
from snnconv.quant import Branch, Island, Layer, Qann
from snnconv.rewrite import AFFINE


def fold(traced: Traced, plan: ConversionPlan, dtype: torch.dtype = torch.float32) -> Qann:
    """Build the float QANN of a convertible plan; without clips it computes what the ANN does.

    It is folded in float64 and kept in `dtype`. Raises NotConvertibleError, naming every reason, if
    the plan is not convertible.
    """
    plan.require_convertible()
    folder = Folder(traced, plan, torch.float64, dtype)
    with torch.no_grad():
        return Qann([folder.node(node) for node in plan.nodes])


class Folder:
    """The way from a traced network's parameters to the tensors of its QANN, differentiable.

    A parameter that serves several layers stays one parameter. BatchNorm is taken as in
    inference, so that training through it changes nothing about what is folded afterwards.
    """

    def __init__(
        self,
        traced: Traced,
        plan: ConversionPlan,
        dtype: torch.dtype,
        kept: torch.dtype = torch.float32,
    ) -> None:
        """Compute tensors in `dtype`, which layers keep in another; look operations up once."""
        self.traced, self.dtype, self.kept = traced, dtype, kept
        self.fx = {n.name: n for n in traced.module.graph.nodes}
        self.planned = [n for n in plan.nodes if isinstance(n, (Neurons, Output))]
        self.operations: dict[str, Operation] = {}
        # BatchNorms by which a batch is normalised, and their gain and mean learn from there.
        self.held: set[nn.Module] = set()

    def tensors(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield the weights, one per branch, and the bias `[C]` of every layer in order."""
        for node in self.planned:
            yield [self.weight(t, self.rows(node)) for t in node.terms], self.layer_bias(node)

    def operation(self, name: str) -> Operation:
        """Describe an fx node, once."""
        if name not in self.operations:
            self.operations[name] = describe(self.traced, self.fx[name])
        return self.operations[name]

    def steps(self, term: Term) -> list[Operation]:
        """Return the operations on a term's way; additions are none."""
        return [self.operation(name) for name in self.names(term)]

    def names(self, term: Term) -> list[str]:
        """Name the operations on a term's way."""
        return [name for name in term.key if name in self.fx]

    def node(self, node: PlanNode) -> Source | Relay | Layer | Island:
        """Build what a node of the plan is in the QANN."""
        if isinstance(node, (Neurons, Output)):
            return self.layer(node)
        return Island(node) if isinstance(node, PlannedIsland) else node

    def layer(self, node: Neurons | Output) -> Layer:
        """Build a layer with the values its tensors have now."""
        branches = [self.branch(t, self.rows(node)) for t in node.terms]
        bias = self.layer_bias(node)
        if isinstance(node, Output):
            return Layer(
                node.name, node.name, branches, bias, node.shape, readout=True, dtype=self.kept
            )
        return Layer(
            node.name,
            node.path,
            branches,
            bias,
            node.shape,
            two_sided=node.two_sided,
            cap=node.cap,
            dtype=self.kept,
        )

    def direct(self, node: Neurons | Output) -> bool:
        """Return whether a layer reads counts with no map between."""
        return any(t.key == (f"{node.name}:0",) for t in node.terms)

    def rows(self, node: Neurons | Output) -> int:
        """Return the rows of a layer: the channels of its current before any flattening."""
        site = self.fx[node.site]
        while not self.direct(node):
            operation = self.operation(site.name)
            if operation.kind not in ("flatten", "identity", "max_pool", "gather"):
                break
            site = operation.inputs[0]
        return self.traced.shapes[site.name][0]

    def constant(self, value: float, *shape: int) -> Tensor:
        """Return a tensor of one value where the parameters are."""
        device = next(self.traced.module.parameters(), self.traced.example).device
        return torch.full(shape, value, dtype=self.dtype, device=device)

    def weight(self, term: Term, rows: int) -> Tensor:
        """Multiply the linear maps of one term together."""
        weight = self.constant(1, rows)
        for operation in self.steps(term):
            if operation.kind == "batch_norm":
                gain = self.affine(operation)[0]
                weight = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            elif operation.kind != "average_pool":
                weight = operation.module.weight.to(self.dtype)
        return weight

    def branch(self, term: Term, rows: int) -> Branch:
        """Describe one term, with its weight."""
        kind, attributes, statistics, norm, part_of = "scale", {}, None, "", ""
        pools = []
        for name in self.names(term):
            operation = self.operation(name)
            if operation.kind == "batch_norm":
                statistics, norm = _statistics(operation), name
            elif operation.kind == "average_pool":
                pools.append(operation.attributes["pool"])
            else:
                kind, attributes = operation.kind, operation.attributes
                part_of = getattr(operation.module, "part_of", "")
        weight = self.weight(term, rows)
        shift = self.shift(term, rows)
        return Branch(
            term.source,
            term.key,
            kind,
            weight,
            shift,
            attributes,
            tuple(pools),
            statistics,
            norm,
            part_of,
        )

    def shift(self, term: Term, rows: int) -> Tensor:
        """Return what the operations of one term alone add to the current, `[C]`.

        They are those before the first sum that it shares with another.
        """
        shift, own = self.constant(0, rows), True
        for name in term.key:
            if name not in self.fx:
                own = False
                continue
            operation = self.operation(name)
            if operation.kind == "batch_norm":
                gain, added = self.affine(operation)
                shift = gain * shift + (added if own else 0)
            elif operation.kind in ("conv", "linear") and operation.module.bias is not None and own:
                shift = operation.module.bias.to(self.dtype)
        return shift

    def layer_bias(self, node: Neurons | Output) -> Tensor:
        """Return what a layer's current is when all counts are zero, `[C]`."""
        bias = self.constant(0, self.rows(node))
        if self.direct(node):
            return bias
        return bias + self.bias(self.fx[node.site], (), {t.key for t in node.terms})

    def bias(self, node: fx.Node, trail: Key, keys: set[Key]) -> Tensor:
        """Return what a current is when all counts are zero, `[C]`, or one zero for no bias."""
        operation = self.operation(node.name)
        kind, inputs = operation.kind, operation.inputs
        if kind in ("conv", "linear"):
            bias = operation.module.bias
            return self.constant(0) if bias is None else bias.to(self.dtype)
        if kind == "batch_norm":
            gain, shift = self.affine(operation)
            here = (node.name, *trail)
            if here in keys:
                return shift
            below = self.bias(inputs[0], here, keys)
            if operation.module in self.held:
                below = below.detach() + 0 * below  # no gradient, yet it waits for none
            return shift + gain * below
        if kind == "add":
            total = self.constant(0)
            for i, operand in enumerate(inputs):
                here = (f"{node.name}:{i}", *trail)
                if here not in keys:
                    total = total + self.bias(operand, here, keys)
            return total
        here = (node.name, *trail) if kind == "average_pool" else trail
        return self.bias(inputs[0], here, keys)

    def affine(self, operation: Operation) -> tuple[Tensor, Tensor]:
        """Return gain and shift of a BatchNorm in inference, `[C]`."""
        norm = operation.module
        mean, variance = norm.running_mean.to(self.dtype), norm.running_var.to(self.dtype)
        gain = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            gain = gain * norm.weight.to(self.dtype)
        gain = gain.detach() if norm in self.held else gain
        shift = -mean * gain
        if norm.bias is not None:
            shift = shift + norm.bias.to(self.dtype)
        return gain, shift


def _statistics(operation: Operation) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation of a BatchNorm's output, float64 `[C]`, if it is one."""
    norm = operation.module
    if isinstance(norm, AFFINE):
        return None
    channels = norm.num_features
    mean = torch.zeros(channels) if norm.bias is None else norm.bias.detach()
    spread = torch.ones(channels) if norm.weight is None else norm.weight.detach().abs()
    return mean.double(), spread.double()
