"""Check a spiking network against the traced network it was made from.

The oracle walks the traced fx graph in float64, with the user's own modules (their strides,
padding and wiring), the stored integers as weights, and the floor of the quantiser at every
activation. It shares no code with the network's own maps or its engines, so a wrong fold, branch
or padding cannot hide. The integers themselves are held against the float weights, folded here a
second time. See docs/concepts.md, "Verification".
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from snnconv.errors import NotEqualError
from snnconv.graph import Traced
from snnconv.network import Image, Island, Population, Readout, SpikingNetwork, Synapse
from snnconv.plan import ConversionPlan, Key, Neurons, Output
from snnconv.quant import Qann

# Rounding to integers leaves at most half a unit; what was folded was kept in float32.
HALF_UNIT = 0.5 + 1e-5
FOLDING = 2.0**-24
# Where the output of an island ends, in integers per step.
LARGEST_OF_ISLANDS = 256
# A half is rounded up, and what float64 takes for a little less than one.
NEARLY_HALF = 0.5 + 2.0**-20
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Verification:
    """What was compared, and every difference, the first layer first.

    `sites` is the number of places in the traced graph whose counts were compared, on `images`
    images at `timesteps` levels; `integers` the number of stored integers held against floats.
    """

    images: int
    timesteps: int
    sites: int
    integers: int
    problems: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Return whether no difference was found."""
        return not self.problems

    def require_equal(self) -> None:
        """Raise NotEqualError, naming the first differing layer, unless all is equal."""
        if self.problems:
            raise NotEqualError(
                f"the spiking network does not equal its quantised ANN; first: {self.problems[0]}",
                self.problems[1:],
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "problems": list(self.problems), "equal": self.equal}


def verify(
    traced: Traced,
    plan: ConversionPlan,
    network: SpikingNetwork,
    pixels: Tensor,
    timesteps: int,
    counts: Mapping[str, Tensor],
    charges: Mapping[str, Tensor],
    changes: Mapping[str, Change] | None = None,
) -> Verification:
    """Compare a network's end point with the traced graph, integer for integer.

    `pixels` are uint8 `[N, C, H, W]`; `counts` hold the final counts of every population and count
    map, `charges` the final charge of every readout, both as the engine computed them. `changes`
    say, by the names of layers, what was added to the ANN's folded weights and biases on purpose.
    """
    oracle = _Oracle(traced, plan, network, timesteps)
    with torch.no_grad():
        problems, integers = _compare_integers(oracle, changes or {})
        sites = 0
        for path, expected, name in oracle.run(pixels):
            sites += 1
            actual = counts.get(name, charges.get(name))
            if actual is None:
                problems.append(f"{path}: the network has no counts for it")
                continue
            if isinstance(expected, str):
                problems.append(f"{path}: {expected}")
                break
            wrong = int((actual.double().reshape(expected.shape) != expected).sum())
            if wrong:
                share = f"{wrong} of {expected.numel()} integers differ"
                problems.append(f"{path}: {share}")
                break
    return Verification(len(pixels), timesteps, sites, integers, tuple(problems))


class Change(Protocol):
    """What was added to a layer's weights, by the key of their branch, and to its bias, float64."""

    @property
    def weights(self) -> Mapping[Key, Tensor]:
        """What was added to each branch's folded weights, in their shape."""

    @property
    def bias(self) -> Tensor:
        """What was added to the bias, `[C]`."""


class _Missing(Exception):
    """A synapse the traced graph has, and the spiking network has not."""


class _Oracle:
    """The traced graph in float64, its weights replaced by the network's integers."""

    def __init__(
        self, traced: Traced, plan: ConversionPlan, network: SpikingNetwork, timesteps: int
    ) -> None:
        self.traced, self.plan, self.network, self.timesteps = traced, plan, network, timesteps
        self.module = copy.deepcopy(traced.module).double().eval()
        self.fx = {n.name: n for n in self.module.graph.nodes}
        self.nodes = {n.name: n for n in network.nodes}
        planned = [n for n in plan.nodes if isinstance(n, (Neurons, Output))]
        self.neurons = [n for n in planned if isinstance(n, Neurons)]
        self.outputs = [n for n in planned if isinstance(n, Output)]
        # The fx node each population stands at: its activation, or the current it was put behind.
        self.fired = {(n.name if n.name in self.fx else n.site): n for n in self.neurons}
        self.values: dict[str, Any] = {}
        self.worths: dict[str, Tensor] | None = None

    def run(self, pixels: Tensor) -> Iterator[tuple[str, Tensor | str, str]]:
        """Yield (where, expected integers or what is missing, name in the network)."""
        fired = self.fired
        for node in self.module.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                zero = torch.tensor(self.network.preprocessing.zero_point).view(-1, 1, 1)
                self.values[node.name] = self.timesteps * (pixels.double() - zero)
            elif node.name in fired:
                try:
                    self.values[node.name] = self.fire(fired[node.name])
                except _Missing as missing:
                    yield fired[node.name].path, str(missing), fired[node.name].name
                    return
            elif isinstance(self.nodes.get(node.name), Island):
                self.values[node.name] = self.emitted(node)
            elif node.name in self.plan.sites or not self.has_shape(node):
                self.values[node.name] = self.call(node, len(pixels))
            else:
                continue
            name = self.plan.sites.get(node.name)
            if name in self.nodes and not isinstance(self.nodes[name], Image):
                yield self.traced.path(node), self.values[node.name], name
        for output in self.outputs:
            try:
                yield output.name, self.charge(output), output.name
            except _Missing as missing:
                yield output.name, str(missing), output.name

    def has_shape(self, node: fx.Node) -> bool:
        return node.name in self.traced.shapes

    def call(self, node: fx.Node, images: int) -> Any:
        """Run a node as the user wrote it; average pooling gives its sum."""

        def value(argument: fx.Node) -> Any:
            if argument.name in self.values or argument.name in self.plan.sites:
                return self.counts(argument)
            return torch.zeros(images, *self.traced.shapes[argument.name], dtype=torch.float64)

        result = self.apply(node, value)
        if isinstance(result, Tensor) and (factor := self.pool_factor(node)):
            result = (result * factor).round()
        return result

    def emitted(self, node: fx.Node) -> Tensor:
        """Return T times the user's function of mean values, in integers of the island's unit."""
        island = self.nodes[node.name]
        assert isinstance(island, Island)

        def mean(argument: fx.Node) -> Any:
            if not self.has_shape(argument):
                return self.counts(argument)
            counts = self.counts(argument)
            return counts * _spread(self.worth(argument), counts) / self.timesteps

        found = self.apply(node, mean)
        found = found / _spread(island.unit, found)
        found = torch.where(found.isnan(), torch.zeros_like(found), found)
        found = found.clamp(-LARGEST_OF_ISLANDS, LARGEST_OF_ISLANDS)
        return (found * self.timesteps + NEARLY_HALF).floor()

    def worth(self, node: fx.Node) -> Tensor:
        """Return what a count of a population, a map of one, or an island is worth, `[C]`."""
        name = self.plan.sites[node.name]
        held = self.nodes[name]
        if isinstance(held, Island):
            return held.unit
        if self.worths is None:
            self.worths = _worths(self)
        plane = self.worths[name][0]
        return plane.flatten(1).amax(1) if plane.ndim > 1 else plane

    def counts(self, node: fx.Node) -> Any:
        """Return the value of a node; one that only passes counts on is run when it is read."""
        if node.name not in self.values:
            self.values[node.name] = self.apply(node, self.counts)
        return self.values[node.name]

    def apply(self, node: fx.Node, value: Any) -> Any:
        args = fx.node.map_arg(node.args, value)
        kwargs = fx.node.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.module)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def pool_factor(self, node: fx.Node) -> int:
        """Return what turns an average into the stored sum; 0 where nothing is averaged."""
        relay = self.nodes.get(node.name)
        if getattr(relay, "op", "") != "sum_pool":
            return 0
        return int(relay.attributes["pool"].lcm)  # type: ignore[union-attr]

    def fire(self, neurons: Neurons) -> Tensor:
        """Return the floor of eq. 1 of everything a population receives in T steps."""
        population = self.nodes[neurons.name]
        assert isinstance(population, Population)
        charge = self.charge(neurons)
        threshold = population.threshold.double()
        start = (threshold / 2).floor() if self.network.initial_membrane == "half" else 0
        low = -self.timesteps if neurons.two_sided else 0
        counts = (charge + _spread(start, charge)) / _spread(threshold, charge)
        return counts.floor().clamp(low, self.timesteps)

    def charge(self, planned: Neurons | Output) -> Tensor:
        """Return the sum of all currents and biases over T steps, in row units."""
        node = self.nodes[planned.name]
        assert isinstance(node, (Population, Readout))
        synapses = {s.key: s for s in node.branches}
        site = self.fx[planned.site]
        direct: Key = (f"{planned.name}:0",)
        if direct in synapses:
            on_counts = isinstance(planned, Neurons) and site.name == planned.name
            source = self.inputs(site)[0] if on_counts else site
            total = self.scaled(synapses.pop(direct), self.counts(source))
        else:
            total = self.pull(site, (), synapses)
        if synapses:
            extra = ", ".join(s.source for s in synapses.values())
            raise _Missing(f"the network has synapses the traced graph has not: from {extra}")
        return total + self.timesteps * _spread(node.bias.double(), total)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in (*node.args, *node.kwargs.values()) if isinstance(n, fx.Node)]

    def pull(self, node: fx.Node, trail: Key, synapses: dict[Key, Synapse]) -> Tensor:
        """Return the current at `node`, `trail` being the linear nodes between it and the sum.

        Every synapse is used up when its key is met.
        """
        if node.target in ADDITIONS and len(self.inputs(node)) > 1:
            total: Tensor | None = None
            for i, operand in enumerate(self.inputs(node)):
                here = (f"{node.name}:{i}", *trail)
                if here in synapses:
                    current = self.scaled(synapses.pop(here), self.counts(operand))
                else:
                    current = self.pull(operand, here, synapses)
                total = current if total is None else total + current
            assert total is not None
            return total
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        here = (node.name, *trail)
        if here in synapses:
            counts = self.counts(self.inputs(node)[0])
            return self.weighted(module, synapses.pop(here), counts)
        if isinstance(module, (nn.Conv2d, nn.Linear)) or node.name in self.nodes:
            raise _Missing(f"the network has no synapse from {self.traced.path(node)}")
        (source, *_) = self.inputs(node)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return self.pull(source, here, synapses)
        divisor = self.folded_pool(here, synapses)
        current = self.pull(source, here if divisor else trail, synapses)
        result: Tensor = self.apply(node, lambda n: current if n is source else self.counts(n))
        return (result * divisor).round() if divisor else result

    def folded_pool(self, here: Key, synapses: dict[Key, Synapse]) -> int:
        """Return the divisor of an average pooling that synapses have in their weights, or 0."""
        for key, synapse in synapses.items():
            if key[-len(here) :] == here and synapse.pools:
                position = sum(step in _pools(self.fx, self.module) for step in key[: -len(here)])
                return int(synapse.pools[position].lcm)
        return 0

    def weighted(self, module: nn.Module | None, synapse: Synapse, counts: Tensor) -> Tensor:
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            return self.scaled(synapse, counts)
        parameters = {"weight": synapse.weight.double()}
        if module.bias is not None:
            parameters["bias"] = torch.zeros_like(module.bias)
        current: Tensor = functional_call(module, parameters, (counts,))
        return current * _spread(2.0 ** synapse.shift.double(), current)

    def scaled(self, synapse: Synapse, counts: Tensor) -> Tensor:
        weight = synapse.weight.double() * 2.0 ** synapse.shift.double()
        return counts * _spread(weight, counts)


def _pools(nodes: Mapping[str, fx.Node], module: nn.Module) -> set[str]:
    """Return the names of the nodes that average."""
    names = set()
    for name, node in nodes.items():
        target = node.target
        if node.op == "call_module":
            target = type(module.get_submodule(str(target)))
        label = target if isinstance(target, str) else getattr(target, "__name__", "")
        if "avg" in label.lower() or "average" in label.lower():
            names.add(name)
    return names


def _spread(vector: Tensor | int, like: Tensor) -> Tensor | int:
    """View a vector per channel so that it broadcasts over axis 1, flattened or not."""
    if isinstance(vector, int):
        return vector
    if like.ndim == 2 and like.shape[1] != len(vector):
        return vector.repeat_interleave(like.shape[1] // len(vector))
    return vector.view(-1, *[1] * (like.ndim - 2))


def _compare_integers(oracle: _Oracle, changes: Mapping[str, Change]) -> tuple[list[str], int]:
    """Hold every stored integer against the float it stands for."""
    worths = oracle.worths = _worths(oracle)
    carriers = _image_carriers(oracle.network)
    preprocessing = oracle.network.preprocessing
    problems = [
        f"{node.name}: the zero points are not the preprocessing's"
        for node in oracle.network.nodes
        if isinstance(node, Image) and tuple(node.zero_point) != preprocessing.zero_point
    ]
    compared = 0
    everything: list[Neurons | Output] = [*oracle.neurons, *oracle.outputs]
    for planned in everything:
        node = oracle.nodes[planned.name]
        assert isinstance(node, (Population, Readout))
        path = getattr(planned, "path", planned.name)
        unit = torch.as_tensor(
            node.row_unit if isinstance(node, Population) else node.unit, dtype=torch.float64
        ).expand(len(node.bias))
        eight = isinstance(node, Readout) or any(s.source in carriers for s in node.branches)
        bits = 8 if eight else oracle.network.weight_bits
        change = changes.get(planned.name)
        for synapse in node.branches:
            compared += synapse.weight.numel()
            added = None if change is None else change.weights[synapse.key]
            if bad := _wrong_weights(oracle, synapse, unit, worths, bits, added):
                problems.append(f"{path}: {bad} weights from {synapse.source} are not the ANN's")
        bias = _bias(oracle, planned, {s.key for s in node.branches})
        if change is not None:
            bias = bias + change.bias + _added_constant(oracle, planned, change)
        kept = node.bias.abs()
        if change is not None:
            # What was added may cancel: the float32 the bias is kept in has rounded both.
            kept = kept + (change.bias / unit).abs()
        away = {"biases": (node.bias - bias / unit).abs() - FOLDING * kept}
        if isinstance(node, Population):
            exact = (node.threshold - node.clip / unit).abs()
            least = (node.threshold == 1) & (node.clip < unit)
            away["thresholds"] = torch.where(least, torch.zeros_like(exact), exact)
        for what, distances in away.items():
            compared += len(distances)
            if bad := int((distances > HALF_UNIT).sum()):
                problems.append(f"{path}: {bad} {what} are not the ANN's")
    return problems, compared


def _image_carriers(network: SpikingNetwork) -> set[str]:
    """Return the nodes that carry pixels: what reads them has 8-bit weights."""
    names: set[str] = set()
    for node in network.nodes:
        if isinstance(node, Image) or names & set(getattr(node, "inputs", ())):
            names.add(node.name)
    return names


def _constant(oracle: _Oracle, node: fx.Node) -> Tensor | None:
    """Return per channel what the value is when its counts are zero, `[C]`; None for neurons.

    Only images have such a part: their integers are pixels minus a rounded mean.
    """
    plane = _constant_plane(oracle, node)
    if plane is None or plane.ndim == 2:
        return None if plane is None else plane[0]
    # Padding adds zeros at the border; the constant is that of the inside.
    flat = plane[0].flatten(1)
    return flat.gather(1, flat.abs().argmax(1, keepdim=True))[:, 0]


def _constant_plane(oracle: _Oracle, node: fx.Node) -> Tensor | None:
    if node.op == "placeholder":
        preprocessing = oracle.network.preprocessing
        pixel = torch.tensor(preprocessing.zero_point, dtype=torch.uint8).view(1, -1, 1, 1)
        shape = (1, *oracle.traced.shapes[node.name])
        return preprocessing.normalize(pixel.double()).expand(shape)
    if node.name in oracle.fired or node.target in ADDITIONS:
        return None
    module = oracle.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._NormBase)):
        return None
    sources = [n for n in node.all_input_nodes if oracle.has_shape(n)]
    planes = {n.name: _constant_plane(oracle, n) for n in sources}
    if all(p is None for p in planes.values()):
        return None

    def value(argument: fx.Node) -> Any:
        plane = planes.get(argument.name)
        if argument.op == "placeholder":
            return _constant_plane(oracle, argument)
        shape = oracle.traced.shapes.get(argument.name)
        if plane is None and shape is not None:
            return torch.zeros(1, *shape, dtype=torch.float64)
        return plane if plane is not None else oracle.apply(argument, value)

    result = oracle.apply(node, value)
    return result if isinstance(result, Tensor) else None


def _worths(oracle: _Oracle) -> dict[str, Tensor]:
    """Return what one count of every fx node that carries counts is worth, `[1, C, ...]`.

    A neuron's count is worth its threshold; the user's own modules carry that along.
    """
    worths: dict[str, Tensor] = {}
    by_node: dict[str, Tensor] = {}
    fired = oracle.fired
    for node in oracle.module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            std = torch.tensor(oracle.network.preprocessing.std, dtype=torch.float64)
            shape = (1, *oracle.traced.shapes[node.name])
            worths[node.name] = (1 / (255 * std)).view(1, -1, 1, 1).expand(shape)
        elif node.name in fired:
            population = oracle.nodes[fired[node.name].name]
            assert isinstance(population, Population)
            shape = (1, *oracle.traced.shapes[node.name])
            plane = torch.ones(shape, dtype=torch.float64)
            worths[node.name] = plane * _spread(population.clip.double(), plane)
        elif isinstance(island := oracle.nodes.get(node.name), Island):
            plane = torch.ones((1, *oracle.traced.shapes[node.name]), dtype=torch.float64)
            worths[node.name] = plane * _spread(island.unit, plane)
        elif node.name in oracle.plan.sites or not oracle.has_shape(node):
            worths[node.name] = oracle.apply(node, lambda n: _worth(oracle, worths, n))
            if factor := oracle.pool_factor(node):
                before = worths[oracle.inputs(node)[0].name].amax((2, 3), keepdim=True)
                worths[node.name] = (before / factor).expand_as(worths[node.name])
        if (name := oracle.plan.sites.get(node.name)) is not None:
            by_node.setdefault(name, worths[node.name])
    for neurons in oracle.neurons:
        population = oracle.nodes[neurons.name]
        assert isinstance(population, Population)
        by_node.setdefault(neurons.name, population.clip.double()[None])
    return by_node


def _worth(oracle: _Oracle, worths: dict[str, Tensor], node: fx.Node) -> Any:
    if node.name not in worths and node.name in oracle.plan.sites:
        worths[node.name] = oracle.apply(node, lambda n: _worth(oracle, worths, n))
    if node.name in worths:
        return worths[node.name]
    return torch.zeros(1, *oracle.traced.shapes[node.name], dtype=torch.float64)


def _added_constant(oracle: _Oracle, planned: Neurons | Output, change: Change) -> Tensor:
    """Return what weights that were added make of the images' constant part, `[C]`."""
    total = torch.zeros_like(change.bias)
    for key, added in change.weights.items():
        constant = _constant(oracle, _fed_by(oracle, planned, key))
        if constant is None:
            continue
        flat = added.flatten(2).sum(2) if added.ndim > 2 else added
        if flat.ndim == 1:
            total = total + flat * constant
            continue
        groups = len(constant) // flat.shape[1]
        total = total + (
            flat * constant.view(groups, -1).repeat_interleave(len(flat) // groups, 0)
        ).sum(1)
    return total


def _fed_by(oracle: _Oracle, planned: Neurons | Output, key: Key) -> fx.Node:
    """Return the node whose value the first step of a synapse is applied to."""
    if key == (f"{planned.name}:0",):
        site = oracle.fx[planned.site]
        on_counts = isinstance(planned, Neurons) and site.name == planned.name
        return oracle.inputs(site)[0] if on_counts else site
    name, _, operand = key[0].partition(":")
    return oracle.inputs(oracle.fx[name])[int(operand or 0)]


def _wrong_weights(
    oracle: _Oracle,
    synapse: Synapse,
    unit: Tensor,
    worths: dict[str, Tensor],
    bits: int,
    added: Tensor | None,
) -> int:
    """Count the weights of a synapse that are not the nearest integers of the ANN's.

    `added` has been added to the ANN's folded weights on purpose.
    """
    first, *rest = synapse.key
    node = oracle.fx.get(first)
    module = None
    if node is not None and node.op == "call_module":
        module = oracle.module.get_submodule(str(node.target))
    worth = worths[synapse.source][0]
    if not isinstance(module, nn.Linear) and worth.ndim > 1:
        worth = worth.flatten(1).amax(1)
    if isinstance(module, nn.Conv2d):
        per_group = worth.view(module.groups, 1, -1, 1, 1)
        weight = module.weight.detach()
        worth = per_group.expand(-1, len(weight) // module.groups, -1, *weight.shape[2:])
        worth = worth.reshape(weight.shape)
        floats = weight * worth
    elif isinstance(module, nn.Linear):
        floats = module.weight.detach() * worth
        worth = worth.expand_as(floats)
    else:
        rest = list(synapse.key)
        floats = worth
    for step in rest:
        linear = oracle.fx.get(step)
        if linear is not None and linear.op == "call_module":
            norm = oracle.module.get_submodule(str(linear.target))
            if isinstance(norm, nn.modules.batchnorm._NormBase):
                gain = _affine(norm, torch.ones(norm.num_features)) - _affine(
                    norm, torch.zeros(norm.num_features)
                )
                floats = floats * gain.view(-1, *[1] * (floats.ndim - 1))
    if added is not None:
        floats = floats + added * worth
    for pool in synapse.pools:
        floats = floats / pool.lcm
    row = (unit * 2.0 ** synapse.shift.double()).view(-1, *[1] * (floats.ndim - 1))
    integers = synapse.weight.double()
    away = (integers - floats / row).abs()
    if floats is not worth:  # that of an identity was never rounded
        away = away - FOLDING * integers.abs()
    if synapse.kind != "scale":
        top = 2 ** (bits - 1) - 1
        clipped = (integers.abs() >= top) & (floats / row * integers.sign() > integers.abs())
        away = torch.where(clipped, torch.zeros_like(away), away)
    # Channels that are always zero (option A) may have any weight.
    return int(((away > HALF_UNIT) & (worth != 0)).sum())


def _affine(norm: nn.Module, x: Tensor) -> Tensor:
    """Run a BatchNorm on one value per channel, `[C]`."""
    shape = (1, -1, 1, 1) if isinstance(norm, nn.BatchNorm2d) else (1, -1)
    result: Tensor = norm(x.double().view(shape))
    return result.flatten()


def _bias(oracle: _Oracle, planned: Neurons | Output, keys: set[Key]) -> Tensor:
    """Return the float bias of every row: the current when nothing has spiked, `[C]`."""
    rows = len(oracle.nodes[planned.name].bias)  # type: ignore[union-attr]
    site = oracle.fx[planned.site]
    if (f"{planned.name}:0",) in keys:
        on_counts = isinstance(planned, Neurons) and site.name == planned.name
        constant = _constant(oracle, oracle.inputs(site)[0] if on_counts else site)
        return torch.zeros(rows, dtype=torch.float64) if constant is None else constant
    return _silent(oracle, site, (), keys, rows)


def _silent(oracle: _Oracle, node: fx.Node, trail: Key, keys: set[Key], rows: int) -> Tensor:
    nothing = torch.zeros(rows, dtype=torch.float64)
    if node.target in ADDITIONS and len(oracle.inputs(node)) > 1:
        total = nothing
        for i, operand in enumerate(oracle.inputs(node)):
            here = (f"{node.name}:{i}", *trail)
            if here not in keys:
                total = total + _silent(oracle, operand, here, keys, rows)
            elif (constant := _constant(oracle, operand)) is not None:
                total = total + constant
        return total
    module = oracle.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    here = (node.name, *trail)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        bias = nothing if module.bias is None else module.bias.detach()
        constant = _constant(oracle, oracle.inputs(node)[0])
        if constant is not None:
            weight = module.weight.detach()
            weight = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            groups = getattr(module, "groups", 1)
            constant = constant.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
            bias = bias + (weight * constant).sum(1)
        return bias
    if isinstance(module, nn.modules.batchnorm._NormBase):
        if here in keys:
            constant = _constant(oracle, oracle.inputs(node)[0])
            return _affine(module, nothing if constant is None else constant)
        return _affine(module, _silent(oracle, oracle.inputs(node)[0], here, keys, rows))
    if node.name in _pools(oracle.fx, oracle.module):
        return _silent(oracle, oracle.inputs(node)[0], here, keys, rows)
    return _silent(oracle, oracle.inputs(node)[0], trail, keys, rows)


@dataclass(frozen=True)
class FloatAgreement:
    """How far the float QANN and the integer network agree; rounding of weights parts them."""

    counts_percent: float
    argmax_percent: float


def compare_float(
    qann: Qann,
    network: SpikingNetwork,
    pixels: Tensor,
    timesteps: int,
    counts: Mapping[str, Tensor],
    charges: Mapping[str, Tensor],
) -> FloatAgreement:
    """Compare the float QANN (what training sees) with the integer network on some images."""
    equal = total = 0

    def observe(layer: Any, activation: Tensor) -> None:
        nonlocal equal, total
        levels = (activation / (_spread(layer.clip, activation) / timesteps)).round()
        equal += int((levels.reshape(counts[layer.name].shape) == counts[layer.name]).sum())
        total += levels.numel()

    with torch.no_grad():
        outputs = qann(
            network.preprocessing.normalize(pixels),
            timesteps,
            offset=network.rounding_offset,
            observe=observe,
        )
    same = [
        (outputs[name].flatten(1).argmax(1) == charges[name].flatten(1).argmax(1)).double().mean()
        for name in charges
    ]
    return FloatAgreement(
        100 * equal / total if total else 100.0,
        100 * float(torch.stack(same).mean()) if same else 100.0,
    )
