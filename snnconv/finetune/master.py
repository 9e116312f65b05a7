"""Integers that learn: a layer in float whose weights are rounded in every pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snnconv.network import Image, Population, Readout, SpikingNetwork, Synapse
from snnconv.normalize import times_inputs
from snnconv.ops import average_pool, per_channel
from snnconv.quant import FakeQuantize, apply_weight


class Master(nn.Module):
    """Weights and bias of one population, or readout, as floats in place of its integers.

    A weight of 1 is worth `units`, a bias of 1 `unit`, in the values of the quantised ANN.
    Shortcuts never learn, the other `weights` and the `bias` may be told not to.
    """

    def __init__(
        self,
        node: Population | Readout,
        values: dict[str, Tensor],
        bits: int,
        *,
        weights: bool = True,
        bias: bool = True,
    ) -> None:
        """Begin at the integers; `values` are what a count of each source is worth, `[C]`."""
        super().__init__()
        self.node: Any = node
        self.top = 2 ** (bits - 1) - 1
        if isinstance(node, Readout):
            unit = torch.full_like(node.bias, node.unit, dtype=torch.float64)
        else:
            unit = node.clip / node.threshold
        self.unit = unit.float()
        self.units: list[Tensor] = []
        self.weights = nn.ParameterList()
        for synapse in node.branches:
            rows = unit * torch.exp2(synapse.shift.double())
            rows = rows * math.prod(pool.lcm for pool in synapse.pools)
            worth = values[synapse.source]
            ones = torch.ones(synapse.weight.shape, dtype=worth.dtype, device=worth.device)
            units = times_inputs(synapse, ones, torch.where(worth > 0, 1 / worth, 0.0))
            self.units.append((units * rows.view(-1, *[1] * (units.ndim - 1))).float())
            learns = weights and synapse.kind != "scale"
            self.weights.append(nn.Parameter(synapse.weight.float(), requires_grad=learns))
        self.bias = nn.Parameter(node.bias.float(), requires_grad=bias)

    def integers(self) -> Any:
        """Return the population or readout with the rounded weights and bias."""
        branches = [
            replace(synapse, weight=self._whole(weight).to(synapse.weight.dtype))
            if weight.requires_grad
            else synapse
            for synapse, weight in zip(self.node.branches, self.weights, strict=True)
        ]
        bias = self.bias.detach().round().to(torch.int32)
        return replace(self.node, branches=tuple(branches), bias=bias)

    def _whole(self, weight: Tensor) -> Tensor:
        return weight.detach().round().clamp(-self.top, self.top)

    def quantised(self, inputs: list[Tensor], timesteps: int, offset: float) -> Tensor:
        """Return what the quantised ANN makes of mean spike values, with its gradients."""
        current: Tensor = self(inputs)
        if isinstance(self.node, Readout):
            return current
        clip, two_sided = self.node.clip.float(), self.node.two_sided
        result: Tensor = FakeQuantize.apply(current, clip, timesteps, two_sided, offset)
        return result

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Return the current that mean spike values bring; gradients pass the rounding straight."""
        bias = straight(self.bias, self.bias.detach().round()) * self.unit
        total = per_channel(bias, inputs[0].ndim)
        for synapse, weight, units, x in zip(
            self.node.branches, self.weights, self.units, inputs, strict=True
        ):
            whole = straight(weight, self._whole(weight)) if weight.requires_grad else weight
            current = apply_weight(synapse.kind, synapse.attributes, whole * units, x)
            for pool in synapse.pools:
                current = average_pool(current, pool)
            total = total + current
        return total


def straight(parameter: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded values with the gradient of the parameter."""
    return parameter + (rounded - parameter).detach()


class Means:
    """Turns the counts of a network's nodes at T into mean spike values, and images into theirs."""

    def __init__(self, network: SpikingNetwork, device: torch.device | str) -> None:
        """Take what one count of each node is worth, `values`, `[C]`."""
        self.timesteps = network.timesteps
        self.images = {node.name for node in network.nodes if isinstance(node, Image)}
        self.values = {name: value.to(device) for name, value in network.worths.items()}

    def __call__(self, name: str, counted: Tensor) -> Tensor:
        """Return the means of counts `[N, C, ...]`; an image's are of one step."""
        mean = counted.float() * per_channel(self.values[name].float(), counted.ndim)
        return mean if name in self.images else mean / self.timesteps


def moved(node: Any, device: torch.device | str) -> Any:
    """Return a population or readout with its tensors on a device."""

    def synapse(s: Synapse) -> Synapse:
        return replace(s, weight=s.weight.to(device), shift=s.shift.to(device))

    names = ("bias",) if isinstance(node, Readout) else ("threshold", "bias", "row_unit", "clip")
    return replace(
        node,
        branches=tuple(synapse(s) for s in node.branches),
        **{name: getattr(node, name).to(device) for name in names},
    )


def learnt(nodes: Sequence[Any], positions: Sequence[int]) -> dict[str, list[Tensor]]:
    """Return bias and weights of the nodes at some positions, by name."""
    return {
        nodes[k].name: [nodes[k].bias, *(synapse.weight for synapse in nodes[k].branches)]
        for k in positions
    }


def with_learnt(nodes: Sequence[Any], tensors: dict[str, list[Tensor]]) -> list[Any]:
    """Return the nodes with the biases and weights that `learnt` returned."""
    result = list(nodes)
    for k, node in enumerate(nodes):
        if node.name in tensors:
            bias, *weights = tensors[node.name]
            branches = tuple(
                replace(synapse, weight=weight)
                for synapse, weight in zip(node.branches, weights, strict=True)
            )
            result[k] = replace(node, bias=bias, branches=branches)
    return result
