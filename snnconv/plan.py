"""Decide what becomes of every node of a traced graph, before anything is converted.

The plan walks the graph once with two kinds of values. *Counts* are what neurons emit: integers
0..T, and whatever is exact on them (max-pool, concatenation, slices). A *current* is a sum of
linear maps of counts, the input of a neuron. What is linear but feeds another weighted layer
gets a two-sided neuron of its own. The result names the neurons, what each of them sums, and,
for every node, its role with reason and remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx

from snnconv.errors import NotConvertibleError
from snnconv.graph import Traced, flatten_outputs
from snnconv.operations import Operation, describe
from snnconv.ops import Pool
from snnconv.rewrite.modules import TWO_SIDED

ROLES = (
    "synapse", "neuron", "exact", "folded", "removed", "analog", "unsupported", "unexamined",
)  # fmt: skip

# Pixels are counts of no neurons: they are held, and have a value at zero.
OF_PIXELS = (
    "an analog function of the pixels themselves",
    "compute it before the network, or put a layer between",
)

Key = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """What becomes of one node: its role, why, and what to do about it.

    `macs` are the multiply-accumulates per image and time step of a weighted layer, `weights` how
    many weights it has.
    """

    node: str
    path: str
    operation: str
    role: str
    reason: str = ""
    remedy: str = ""
    macs: int = 0
    weights: int = 0


@dataclass(frozen=True)
class Term:
    """One summand of a current: the counts it starts from and the fx nodes on its way.

    `key` lists the nodes in order; an addition appears as `name:operand`. A term whose first
    node is no weighted layer is an identity synapse.
    """

    source: str
    key: Key

    def then(self, step: str) -> Term:
        """Return the term prolonged by one node."""
        return replace(self, key=(*self.key, step))


@dataclass(frozen=True)
class Source:
    """The images themselves, as integers held during T steps."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Relay:
    """A map that is exact on counts, one of `quant.relay`'s: max_pool, concat, slice and others."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Neurons:
    """A population of neurons: one activation call site, or a two-sided one put in by the plan.

    `site` is the fx node whose value is their current. `cap` is the natural upper end of the
    activation (6 for ReLU6), if it has one.
    """

    name: str
    path: str
    site: str
    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    two_sided: bool = False
    cap: float | None = None


@dataclass(frozen=True)
class Output:
    """A readout: a sum of currents without a neuron, one of the network's named outputs."""

    name: str
    site: str
    terms: tuple[Term, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Island:
    """A function that is no sum of spikes (`snnconv.analog`), of the counts of `inputs`.

    `inputs` may be islands themselves. What it emits are integers like a count's, without bounds.
    """

    name: str
    path: str
    function: str
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]


PlanNode = Source | Relay | Neurons | Island | Output


@dataclass
class ConversionPlan:
    """The whole plan: an entry per fx node, and the spiking graph to be built.

    `nodes` stand in topological order and are empty of meaning unless `convertible`. `sites`
    maps each fx node that carries counts to the spiking node that holds them.
    """

    entries: list[Entry]
    nodes: list[PlanNode]
    sites: dict[str, str]

    @property
    def problems(self) -> list[str]:
        """Name every reason against conversion, with its remedy."""
        return [
            f"{e.path} ({e.operation}): {e.reason}; {e.remedy}"
            for e in self.entries
            if e.role == "unsupported"
        ]

    @property
    def convertible(self) -> bool:
        """Return whether every node can be converted."""
        return not self.problems

    @property
    def analog(self) -> list[str]:
        """Name every function that is no sum of spikes."""
        return [f"{e.path} ({e.operation})" for e in self.entries if e.role == "analog"]

    def require_convertible(self, *, strict: bool = False) -> None:
        """Raise NotConvertibleError, naming every reason, unless the plan is convertible.

        A `strict` one may have no analog islands.
        """
        if self.problems:
            raise NotConvertibleError("the network cannot be converted", self.problems)
        if strict and self.analog:
            raise NotConvertibleError(
                "parts of the network are no sums of spikes, and --strict refuses them",
                [f"{what}: no sum of spikes, which --strict refuses" for what in self.analog],
            )

    @property
    def spiking_mac_share(self) -> float:
        """Return the percentage of multiply-accumulates that become spike-driven."""
        total = sum(e.macs for e in self.entries)
        spiking = sum(e.macs for e in self.entries if e.role == "synapse")
        return 100 * spiking / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "verdict": "convertible" if self.convertible else "not convertible",
            "mac_share_percent": {
                "spiking": round(self.spiking_mac_share, 2),
                "analog": round(100 - self.spiking_mac_share, 2) if self.entries else 0.0,
            },
            "nodes": [asdict(e) for e in self.entries],
            "problems": self.problems,
        }


@dataclass(frozen=True)
class _Counts:
    """Integers that synapses can read: counts, or what an island emits (`analog`)."""

    node: str
    two_sided: bool
    analog: bool = False


@dataclass(frozen=True)
class _Current:
    """The value of fx node `site`: a sum of terms of `shape`, then the maps in `pending`.

    Pending are order-preserving maps (max-pool, gather, flatten) that wait to be moved behind a
    neuron.
    """

    terms: tuple[Term, ...]
    site: str
    shape: tuple[int, ...]
    pending: tuple[tuple[str, Operation], ...] = ()


class _Unknown:
    """The value after an unsupported node: everything behind it is still examined."""


_Value = _Counts | _Current | _Unknown | None


def make_plan(traced: Traced) -> ConversionPlan:
    """Plan the conversion of a traced network; never raises for what it cannot convert."""
    return _Planner(traced).run()


class _Planner:
    """Abstract interpretation of the graph; one method per kind of operation."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.entries: list[Entry] = []
        self.nodes: list[PlanNode] = []
        self.values: dict[str, _Value] = {}
        self.sites: dict[str, str] = {}
        self.shapes = traced.shapes

    def run(self) -> ConversionPlan:
        for node in self.traced.module.graph.nodes:
            operation = describe(self.traced, node)
            value: _Value
            if operation.kind == "unsupported":
                self.note(node, "unsupported", operation.reason, operation.remedy)
                value = _Unknown()
            elif operation.kind == "output":
                value = self.output(node)
            elif operation.kind == "shape":
                value = None
            elif any(isinstance(v, _Unknown) for v in self.read(operation)):
                self.note(node, "unexamined", "it reads an unsupported result")
                value = _Unknown()
            else:
                value = getattr(self, operation.kind)(node, operation)
            self.values[node.name] = value
            if isinstance(value, _Counts):
                self.sites[node.name] = value.node
        for name, value in self.values.items():
            if isinstance(value, _Current) and value.site in self.sites:
                # An identity behind a current that got a neuron after it had been passed.
                self.sites[name] = self.sites[value.site]
        return ConversionPlan(self.entries, self._live_nodes(), self.sites)

    def _live_nodes(self) -> list[PlanNode]:
        """Drop nodes no readout depends on."""
        needed = {n.name for n in self.nodes if isinstance(n, Output)}
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(inputs_of(node))
        return [n for n in self.nodes if n.name in needed]

    def note(self, node: fx.Node, role: str, reason: str = "", remedy: str = "") -> None:
        name = node.target if isinstance(node.target, str) else node.name
        if node.op == "call_module":
            module = self.traced.module.get_submodule(str(node.target))
            name = str(getattr(module, "label", type(module).__name__))
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", str(node.target))
        path = self.traced.path(node)
        weights = self.weights(node)
        macs = 0
        if node.name in self.shapes:
            shape = self.shapes[node.name]
            if weights:
                macs = weights * math.prod(shape) // shape[0]
            elif role in ("synapse", "analog"):
                macs = math.prod(shape)
        self.entries.append(Entry(node.name, path, name, role, reason, remedy, macs, weights))

    def weights(self, node: fx.Node) -> int:
        """Return how many weights a convolution or linear layer has, else 0."""
        if node.op != "call_module":
            return 0
        module = self.traced.module.get_submodule(str(node.target))
        if not isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            return 0
        return module.weight.numel()

    def current(self, node: fx.Node, terms: tuple[Term, ...]) -> _Current:
        return _Current(terms, node.name, self.shapes[node.name])

    def read(self, operation: Operation) -> list[_Value]:
        """Return the inputs' values; a current that has got a neuron since is read as counts."""
        values = [self.values[n.name] for n in operation.inputs]
        known = [self.values.get(v.site) if isinstance(v, _Current) else None for v in values]
        return [k if isinstance(k, _Counts) else v for k, v in zip(known, values, strict=True)]

    def materialize(self, value: _Value, why: str) -> _Counts:
        """Put a two-sided neuron on a current, so that it becomes counts for all who read it."""
        if isinstance(value, _Counts):
            return value
        assert isinstance(value, _Current)
        known = self.values.get(value.site)
        if isinstance(known, _Counts):
            return known
        name = f"{value.site}.neuron"
        path = f"{self.path(value.site)} (two-sided)"
        self.nodes.append(Neurons(name, path, value.site, value.terms, value.shape, two_sided=True))
        self.entries.append(Entry(name, path, TWO_SIDED, "neuron", why))
        counts = self.follow(_Counts(name, True), value.pending)
        self.values[value.site] = counts
        self.sites[value.site] = counts.node
        return counts

    def path(self, name: str) -> str:
        return self.traced.path(next(n for n in self.traced.module.graph.nodes if n.name == name))

    def follow(self, counts: _Counts, pending: tuple[tuple[str, Operation], ...]) -> _Counts:
        """Apply the maps that were moved behind a neuron."""
        for site, operation in pending:
            attributes = dict(operation.attributes)
            counts = self.relay(
                f"{site}@{counts.node}", operation.kind, (counts,), self.shapes[site], attributes
            )
        return counts

    def relay(
        self,
        name: str,
        op: str,
        inputs: tuple[_Counts, ...],
        shape: tuple[int, ...],
        attributes: dict[str, Any],
    ) -> _Counts:
        if all(n.name != name for n in self.nodes):
            self.nodes.append(Relay(name, op, tuple(c.node for c in inputs), shape, attributes))
        return _Counts(name, any(c.two_sided for c in inputs))

    def on_counts(self, node: fx.Node, operation: Operation, op: str, reason: str = "") -> _Counts:
        """Plan an operation that is exact on counts, whatever its inputs are now."""
        why = f"{operation.kind} of a current that no neuron follows"
        inputs = tuple(self.materialize(v, why) for v in self.read(operation))
        self.note(node, "exact", reason)
        return self.relay(node.name, op, inputs, self.shapes[node.name], dict(operation.attributes))

    def input(self, node: fx.Node, operation: Operation) -> _Value:
        shape = self.shapes[node.name]
        self.nodes.append(Source(node.name, shape))
        self.note(node, "exact", "8-bit pixels, held during T steps")
        return _Counts(node.name, True)

    def conv(self, node: fx.Node, operation: Operation) -> _Value:
        (value,) = self.read(operation)
        counts = self.materialize(value, "a weighted layer follows a current: T signed levels")
        self.note(node, "synapse")
        return self.current(node, (Term(counts.node, (node.name,)),))

    linear = conv

    def batch_norm(self, node: fx.Node, operation: Operation) -> _Value:
        (value,) = self.read(operation)
        if isinstance(value, _Current) and value.pending:
            kinds = {op.kind for _, op in value.pending}
            commutes = "flatten" not in kinds and (
                "max_pool" not in kinds or _gains_positive(operation)
            )
            if not commutes:
                why = "max-pool or flatten stands between a layer and its BatchNorm"
                value = self.materialize(value, why)
        if isinstance(value, _Current):
            self.note(node, "folded", "into the weights before it")
            terms = tuple(t.then(node.name) for t in value.terms)
            return replace(value, terms=terms, site=node.name)
        assert isinstance(value, _Counts)
        self.note(node, "synapse", "one weight per channel")
        return self.current(node, (Term(value.node, (node.name,)),))

    def activation(self, node: fx.Node, operation: Operation) -> _Value:
        (value,) = self.read(operation)
        two_sided, cap = operation.attributes["two_sided"], operation.attributes["cap"]
        if isinstance(value, _Counts):
            if not (value.two_sided or two_sided or cap):
                self.note(node, "removed", "its input cannot be negative")
                return value
            counts = not (value.analog or self.carries_images(value))
            if value.two_sided and counts and not (two_sided or cap):
                self.note(node, "exact", "the positive part of counts")
                return self.part(node, value, 0, None)
            value = self.current(node, (Term(value.node, (f"{node.name}:0",)),))
        assert isinstance(value, _Current)
        path = self.traced.path(node)
        self.nodes.append(
            Neurons(node.name, path, value.site, value.terms, value.shape, two_sided, cap)
        )
        self.note(node, "neuron", f"clamped at {cap:g}" if cap else "")
        return self.follow(_Counts(node.name, two_sided), value.pending)

    def carries_images(self, counts: _Counts) -> bool:
        """Return whether counts are pixels, or maps of them, which have a value at zero counts."""
        nodes = {n.name: n for n in self.nodes}

        def carries(name: str) -> bool:
            node = nodes[name]
            if isinstance(node, Relay):
                return any(carries(source) for source in node.inputs)
            return isinstance(node, Source)

        return carries(counts.node)

    def analog(self, node: fx.Node, operation: Operation) -> _Value:
        why = "an analog function follows a current: T signed levels"
        read = [self.materialize(v, why) for v in self.read(operation)]
        if any(self.carries_images(counts) for counts in read):
            self.note(node, "unsupported", *OF_PIXELS)
            return _Unknown()
        inputs = tuple(counts.node for counts in read)
        function, attributes = (operation.attributes[k] for k in ("function", "attributes"))
        path, shape = self.traced.path(node), self.shapes[node.name]
        shapes = tuple(self.shapes[n.name] for n in operation.inputs)
        self.nodes.append(Island(node.name, path, function, attributes, inputs, shapes, shape))
        what = "it" if function == "program" else function
        self.note(node, "analog", f"{what} is no sum of spikes")
        return _Counts(node.name, True, analog=True)

    def part(self, node: fx.Node, counts: _Counts, low: int | None, high: int | None) -> _Counts:
        """Plan the positive or the negative part of two-sided counts."""
        bounds = {"low": low, "high": high}
        shape = self.shapes[node.name]
        self.nodes.append(Relay(node.name, "clamp", (counts.node,), shape, bounds))
        return _Counts(node.name, low is None)

    def negative_part(self, node: fx.Node, operation: Operation) -> _Value:
        (value,) = self.read(operation)
        counts = self.materialize(value, "the negative part of a current")
        self.note(node, "exact", "the negative part of counts")
        return self.part(node, counts, None, 0)

    def add(self, node: fx.Node, operation: Operation) -> _Value:
        terms: list[Term] = []
        for i, value in enumerate(self.read(operation)):
            if isinstance(value, _Current) and value.pending:
                kinds = " and ".join(dict.fromkeys(op.kind for _, op in value.pending))
                value = self.materialize(value, f"{kinds} before an addition")
            if isinstance(value, _Counts):
                terms.append(Term(value.node, (f"{node.name}:{i}",)))
            else:
                assert isinstance(value, _Current)
                terms.extend(t.then(f"{node.name}:{i}") for t in value.terms)
        self.note(node, "folded", "its summands are synapses of the next neuron")
        return self.current(node, tuple(terms))

    def concat(self, node: fx.Node, operation: Operation) -> _Value:
        return self.on_counts(node, operation, "concat")

    def slice(self, node: fx.Node, operation: Operation) -> _Value:
        return self.on_counts(node, operation, "slice")

    def rearrange(self, node: fx.Node, operation: Operation) -> _Value:
        return self.on_counts(node, operation, "rearrange")

    def pad(self, node: fx.Node, operation: Operation) -> _Value:
        return self.on_counts(node, operation, "pad")

    def _postpone(self, node: fx.Node, operation: Operation, op: str) -> _Value:
        (value,) = self.read(operation)
        if isinstance(value, _Current):
            self.note(node, "exact", "moved behind the neuron that follows")
            pending = (*value.pending, (node.name, operation))
            return replace(value, site=node.name, pending=pending)
        return self.on_counts(node, operation, op)

    def max_pool(self, node: fx.Node, operation: Operation) -> _Value:
        return self._postpone(node, operation, "max_pool")

    def flatten(self, node: fx.Node, operation: Operation) -> _Value:
        return self._postpone(node, operation, "flatten")

    def gather(self, node: fx.Node, operation: Operation) -> _Value:
        return self._postpone(node, operation, "gather")

    def average_pool(self, node: fx.Node, operation: Operation) -> _Value:
        (value,) = self.read(operation)
        pool: Pool = operation.attributes["pool"]
        if isinstance(value, _Current) and (value.pending or not pool.preserves_constants):
            value = self.materialize(value, "average pooling that weighs a bias by its position")
        if isinstance(value, _Current):
            self.note(node, "folded", "a sum, its divisor folded into the weights before it")
            return self.current(node, tuple(t.then(node.name) for t in value.terms))
        return self.on_counts(
            node, operation, "sum_pool", "a sum, its divisor folded into the next weights"
        )

    def identity(self, node: fx.Node, operation: Operation) -> _Value:
        (value,) = self.read(operation)
        self.note(node, "removed", "does nothing in inference")
        return value

    def output(self, node: fx.Node) -> _Value:
        for name, argument in flatten_outputs(node.args[0]).items():
            value = self.values.get(argument.name) if isinstance(argument, fx.Node) else None
            if isinstance(value, _Unknown):
                continue
            if value is None:
                self.note(node, "unsupported", f"output {name} is no tensor", "return tensors")
                continue
            if isinstance(value, _Current) and any(op.kind != "flatten" for _, op in value.pending):
                value = self.materialize(value, f"{value.pending[-1][1].kind} at the output")
            if isinstance(value, _Counts):
                terms: tuple[Term, ...] = (Term(value.node, (f"{name}:0",)),)
            else:
                assert isinstance(value, _Current)
                terms = value.terms
            self.nodes.append(Output(name, argument.name, terms, self.shapes[argument.name]))
        return None


def _gains_positive(operation: Operation) -> bool:
    """Return whether a BatchNorm preserves the order of its inputs in every channel."""
    weight = operation.module.weight if operation.module is not None else None
    return weight is None or (not weight.is_meta and bool((weight >= 0).all()))


def inputs_of(node: PlanNode) -> Iterator[str]:
    """Yield the names of the nodes a node reads."""
    if isinstance(node, (Relay, Island)):
        yield from node.inputs
    elif isinstance(node, (Neurons, Output)):
        yield from (t.source for t in node.terms)
