"""Count the operations of a spiking network, and of the ANN it came from.

What is counted is what NeuroBench (Yik et al., 2025) calls synaptic operations: every spike times
the synapses it reaches, each one an addition to a membrane. Borders, strides, groups and dilation
are counted exactly, neuron by neuron. What the image brings is no spikes but held currents: their
multiply-accumulates (MACs) are done once per inference, whatever T, and their injection counts as
that of a bias. `snnconv.energy` puts a price on all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnconv import program
from snnconv.analog import FUNCTIONS
from snnconv.network import NONLINEAR, Image, Island, Population, Readout, SpikingNetwork, Synapse
from snnconv.ops import Pool, convolve, per_channel, window_sum
from snnconv.plan import Relay
from snnconv.quant import apply_weight, relay
from snnconv.schedule import Schedule

# What every layer and the total tell.
KEYS = (
    "neurons",
    "macs",
    "wide_macs",
    "image_macs",
    "island_macs",
    "synaptic_operations",
    "effective_operations",
    "qann_nonzero_macs",
    "bias_additions",
    "membrane_updates",
    "resets",
)
# Operations of an island's program that only move numbers.
MOVES = ("concat", "expand", "permute", "reshape", "slice")


@dataclass(frozen=True)
class _Flow:
    """What leaves every neuron of a node over all images, int64 `[*shape]` each.

    `held` and `analog` are 1 where numbers come from the image or an analog island, not as spikes.
    """

    events: Tensor
    nonzero: Tensor
    held: Tensor
    analog: Tensor


def count_operations(
    network: SpikingNetwork,
    schedule: Schedule,
    events: Mapping[str, Tensor],
    nonzero: Mapping[str, Tensor],
    images: int,
    steps: int,
) -> dict[str, Any]:
    """Return the operations of every layer per image, as plain JSON values.

    `events` are, per population, max_pool and clamp, every neuron's unit events (positive and
    negative spikes) over all `images`, `nonzero` on how many of them its final count was not 0;
    both int64 `[*shape]`. What other maps pass on follows from these. `steps` were simulated.

    `macs` are the ANN's, of all inputs; an identity shortcut has one per number, and a convolution
    that several layers read is counted in the first. `wide_macs` are those of them that read pixels
    or islands, and no activations of few bits. `image_macs` the spiking network does once per
    inference, since their current is held; `island_macs`, which read integers of analog islands, in
    every step; both hold for each layer that has such weights. Where a pool follows a convolution,
    a spike has as many synapses as it has ways into neurons. Behind a sum_pool, every event in a
    window is one, and the numbers of images with a count that is not 0 have a lower bound: that
    of the window's neuron with most of them. `analog_macs` of islands are estimates: one per
    number of an operation, but all those of a matrix product. Raises ValueError if a node's
    events are missing.
    """
    shapes = {node.name: node.shape for node in network.nodes}
    flows: dict[str, _Flow] = {}
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    pooling, analog = 0, 0
    for node in network.nodes:
        if isinstance(node, Image | Island):
            none, all_of_it = (torch.full(node.shape, i, dtype=torch.int64) for i in (0, 1))
            image = isinstance(node, Image)
            flows[node.name] = _Flow(
                none, none, all_of_it if image else none, none if image else all_of_it
            )
            if isinstance(node, Island):
                analog += _island_macs(node, [shapes[name] for name in node.inputs])
        elif isinstance(node, Relay):
            inputs = [flows[name] for name in node.inputs]
            flows[node.name] = _relayed(node, inputs, events, nonzero)
            if node.op in ("sum_pool", *NONLINEAR):
                windows = _windows(node, inputs[0])
                pooling += _total(inputs[0].events, windows)
                pooling += images * _total(inputs[0].held, windows)
                analog += _total(inputs[0].analog, windows)
        else:
            rows.append(_layer(node, flows, seen, schedule, images, steps))
            if isinstance(node, Population):
                spikes = _given(events, node.name)
                none = torch.zeros_like(spikes)
                flows[node.name] = _Flow(spikes, _given(nonzero, node.name), none, none)
                rows[-1] |= _of_neurons(node, spikes, schedule, images, steps)
    total = {key: sum(row[key] for row in rows) for key in KEYS}
    apart = {"pooling": pooling / images, "analog_macs": analog}
    return {"images": images, "layers": rows, **apart, "total": {**total, **apart}}


def fan_out(
    synapse: Synapse, shape: tuple[int, ...], *, effective: bool = False, pooled: bool = True
) -> Tensor:
    """Return how many synapses each neuron of a source of `shape` has, int64 `[*shape]`.

    `effective` leaves out weights that are 0; not `pooled` are those before the synapse's pools.
    """
    weight = synapse.weight.cpu()
    present = ((weight != 0) if effective else torch.ones_like(weight)).double()
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
        if synapse.kind == "conv":
            # The outputs of a group lie alike: how many have a tap is the weight of one for all.
            taps = present.unflatten(0, (synapse.attributes["groups"], -1)).sum(1)
            taps = taps.flatten(0, 1)[:, None]
            reached = convolve(x, taps, **synapse.attributes | {"groups": len(taps)})
        elif synapse.kind == "linear":
            reached = x * present.sum(0)
        else:
            reached = x * per_channel(present, x.ndim)
        for pool in synapse.pools if pooled else ():
            reached = window_sum(reached, pool)
        (found,) = torch.autograd.grad(reached.sum(), x)
    return found[0].round().long()


def _layer(
    node: Population | Readout,
    flows: dict[str, _Flow],
    seen: set[tuple[str, str]],
    schedule: Schedule,
    images: int,
    steps: int,
) -> dict[str, Any]:
    """Count what arrives at a layer; `seen` are the ANN's weighted layers counted already."""
    row: dict[str, Any] = {
        "layer": node.path if isinstance(node, Population) else node.name,
        "kind": "neurons" if isinstance(node, Population) else "readout",
        **dict.fromkeys(KEYS, 0),
    }
    sums = dict.fromkeys(("synaptic_operations", "effective_operations", "qann_nonzero_macs"), 0)
    rows = len(node.bias)
    from_image = torch.zeros(rows, math.prod(node.shape) // rows, dtype=torch.bool)
    for synapse in node.branches:
        flow = flows[synapse.source]
        shape = tuple(flow.events.shape)
        reached = fan_out(synapse, shape)
        in_ann = fan_out(synapse, shape, pooled=False) if synapse.pools else reached
        sums["synaptic_operations"] += _total(flow.events, reached)
        if bool((synapse.weight == 0).any()):
            reached = fan_out(synapse, shape, effective=True)
        sums["effective_operations"] += _total(flow.events, reached)
        row["image_macs"] += _total(flow.held, in_ann)
        row["island_macs"] += _total(flow.analog, in_ann)
        if (synapse.source, synapse.key[0]) not in seen:
            seen.add((synapse.source, synapse.key[0]))
            wide = _total(flow.held | flow.analog, in_ann)
            row["macs"] += int(in_ann.sum())
            row["wide_macs"] += wide
            sums["qann_nonzero_macs"] += _total(flow.nonzero, in_ann) + images * wide
        if bool(flow.held.any()):
            from_image |= _reached(synapse, flow.held).view_as(from_image)
    row |= {key: value / images for key, value in sums.items()}
    row["bias_additions"] = float(_injections(node, from_image, schedule, steps))
    return row


def _of_neurons(
    node: Population, spikes: Tensor, schedule: Schedule, images: int, steps: int
) -> dict[str, Any]:
    """Count what a population's neurons do themselves."""
    neurons = math.prod(node.shape)
    awake = sum(schedule.fires(t, node.depth) for t in range(1, steps + 1))
    return {
        "neurons": neurons,
        "membrane_updates": float(neurons * awake),
        "resets": int(spikes.sum()) / images,
    }


def _injections(
    node: Population | Readout, from_image: Tensor, schedule: Schedule, steps: int
) -> int:
    """Return how many additions bring neurons their bias and what they hold of the image.

    In a step that brings both, they are one number. `from_image` is bool `[C, numbers]`.
    """
    with_bias = (node.bias.cpu() != 0)[:, None].expand_as(from_image)
    bias, image = (_injecting(schedule, depth, steps) for depth in (node.depth, 0))
    return (
        int((with_bias & ~from_image).sum()) * len(bias)
        + int((from_image & ~with_bias).sum()) * len(image)
        + int((from_image & with_bias).sum()) * len(bias | image)
    )


def _injecting(schedule: Schedule, depth: int, steps: int) -> set[int]:
    """Return the steps that inject a bias at a depth; under `wait` one, with all of it."""
    by_step = [0, *(schedule.bias_steps(t, depth) for t in range(1, steps + 1))]
    return {t for t in range(1, steps + 1) if by_step[t] > by_step[t - 1]}


def _reached(synapse: Synapse, held: Tensor) -> Tensor:
    """Return which numbers of a synapse's current depend on the image, bool `[C, ...]`."""
    present = (synapse.weight.cpu() != 0).double()
    current = apply_weight(synapse.kind, synapse.attributes, present, held[None].double())
    for pool in synapse.pools:
        current = window_sum(current, pool)
    return current[0].detach() > 0.5


def _relayed(
    node: Relay, inputs: list[_Flow], events: Mapping[str, Tensor], nonzero: Mapping[str, Tensor]
) -> _Flow:
    """Return what a map passes on."""

    def linear(of: str) -> Tensor:
        return relay(node, [getattr(flow, of)[None] for flow in inputs], 0)[0]

    flow = inputs[0]
    if node.op == "sum_pool":
        pool = node.attributes["pool"]
        largest = (_window_max(x, pool) for x in (flow.nonzero, flow.held, flow.analog))
        return _Flow(window_sum(flow.events[None], pool)[0], *largest)
    if node.op not in NONLINEAR:
        return _Flow(linear("events"), linear("nonzero"), linear("held"), linear("analog"))
    if node.op == "max_pool":
        held, analog = linear("held"), linear("analog")
    else:
        held, analog = flow.held, flow.analog
    spiking = 1 - (held | analog)
    if not bool(spiking.any()):
        return _Flow(spiking, spiking, held, analog)
    arrived = _given(events, node.name), _given(nonzero, node.name)
    return _Flow(arrived[0] * spiking, arrived[1] * spiking, held, analog)


def _given(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the events of {name} are missing")
    return tensors[name].long().cpu()


def _windows(node: Relay, flow: _Flow) -> Tensor:
    """Return in how many windows of a pool each number is, int64 `[*shape]`; 1 for a clamp."""
    shape = flow.events.shape
    if node.op == "clamp":
        return torch.ones(shape, dtype=torch.int64)
    a = node.attributes
    if node.op == "sum_pool":
        spans = [[range(start, end) for start, end, _ in w] for w in (a["pool"].h, a["pool"].w)]
    else:
        before = (a["padding"][2], a["padding"][0])
        spans = [
            [
                range(first, first + kernel * dilation, dilation)
                for first in range(-lead, count * stride - lead, stride)
            ]
            for count, kernel, stride, lead, dilation in zip(
                node.shape[1:], a["kernel"], a["stride"], before, a["dilation"], strict=True
            )
        ]
    rows, columns = (
        torch.bincount(torch.tensor([i for s in axis for i in s if 0 <= i < n]), minlength=n)
        for axis, n in zip(spans, shape[1:], strict=True)
    )
    return (rows[:, None] * columns).expand(shape)


def _window_max(x: Tensor, pool: Pool) -> Tensor:
    """Return the largest number of every window of `[C, H, W]`."""
    for axis, windows in ((1, pool.h), (2, pool.w)):
        parts = [x.narrow(axis, a, b - a).amax(axis, keepdim=True) for a, b, _ in windows]
        x = torch.cat(parts, axis)
    return x


def _island_macs(node: Island, shapes: list[tuple[int, ...]]) -> int:
    """Estimate from shapes what one computation of an island takes."""
    if node.function != "program":
        return math.prod(node.shape)
    sizes = {f"x{i}": torch.Size((1, *shape)) for i, shape in enumerate(shapes)}
    sizes |= {f"c{i}": c.shape for i, c in enumerate(node.attributes["constants"])}
    results: list[torch.Size] = []
    program.run(
        [torch.empty(1, *shape, device="meta") for shape in shapes],
        **node.attributes,
        functions=FUNCTIONS,
        notice=lambda result: results.append(result.shape),
    )
    total = 0
    for i, (operation, operands, _) in enumerate(node.attributes["steps"]):
        sizes[f"s{i}"] = results[i]
        read = [sizes[name] for name in operands]
        if operation == "matmul":
            total += results[i].numel() * read[0][-1]
        elif operation == "convolve":
            total += results[i].numel() * read[1][1:].numel()
        elif operation not in MOVES:
            total += max(results[i].numel(), *(size.numel() for size in read))
    return total


def _total(numbers: Tensor, times: Tensor) -> int:
    return int((numbers * times).sum())
