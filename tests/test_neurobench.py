"""NeuroBench, the accepted counter, counts the same accumulates; needs the extra `neurobench`.

Its SynapticOperations looks at every input of every convolution and linear layer: an input of only
-1, 0 and 1 makes accumulates of those that are not 0 times the weights that are not 0, borders
exact, biases left out.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import converted, images
from test_energy import course
from torch import Tensor, nn

from snnconv.engine import simulate
from snnconv.network import Image, Population, Readout, SpikingNetwork, Synapse
from snnconv.plan import Relay
from snnconv.schedule import Schedule
from snnconv.workload import count_operations

models = pytest.importorskip("neurobench.models", reason="needs the extra neurobench")
metrics = pytest.importorskip("neurobench.metrics.workload")

COUNT = 4


def layer_of(synapse: Synapse) -> nn.Module:
    """Return a synapse's weights as a layer of torch's, in float64."""
    weight, a = synapse.weight.double(), synapse.attributes
    if synapse.kind == "scale":
        weight = weight.view(-1, 1, 1, 1)
        a = {"stride": 1, "padding": (0,) * 4, "dilation": 1, "groups": len(weight)}
    layer: nn.Module
    if synapse.kind == "linear":
        layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.float64)
    else:
        layer = nn.Conv2d(
            weight.shape[1] * a["groups"], len(weight), tuple(weight.shape[2:]), a["stride"], 0,
            a["dilation"], a["groups"], bias=False, dtype=torch.float64,
        )  # fmt: skip
    layer.weight = nn.Parameter(weight)
    return layer


def key(node: Population | Readout, branch: int) -> str:
    return f"{node.name}/{branch}".replace(".", "_")


def rows(vector: Tensor, like: Tensor) -> Tensor:
    """View a number per row so that it broadcasts over currents."""
    return vector.double().view(-1, *[1] * (like.ndim - 2))


def passed_on(node: Relay, events: list[Tensor]) -> list[Tensor]:
    """Return spikes behind a map: several tensors where a pool's window has several."""
    a = node.attributes
    if node.op == "slice":
        return [x[(slice(None), *(slice(*s) for s in a["slices"]))] for x in events]
    if node.op == "pad":
        return [F.pad(x, a["padding"]) for x in events]
    if node.op == "flatten":
        return [x.flatten(1) for x in events]
    assert node.op == "sum_pool"
    ((top, bottom, _),), ((left, right, _),) = a["pool"].h, a["pool"].w
    places = itertools.product(range(top, bottom), range(left, right))
    return [x[:, :, i : i + 1, j : j + 1] for i, j in places for x in events]


class StepByStep(nn.Module):
    """A spiking network whose layers are torch's and get nothing but unit spikes."""

    def __init__(self, network: SpikingNetwork, schedule: Schedule, steps: int) -> None:
        super().__init__()
        self.network, self.schedule, self.steps = network, schedule, steps
        self.layers = nn.ModuleDict(
            {
                key(node, i): layer_of(synapse)
                for node in (*network.populations, *network.readouts)
                for i, synapse in enumerate(node.branches)
            }
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the final charges of the readouts."""
        membranes: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for t in range(1, self.steps + 1):
            spikes: dict[str, list[Tensor]] = {}
            for node in self.network.nodes:
                if isinstance(node, Relay):
                    spikes[node.name] = passed_on(node, spikes[node.inputs[0]])
                elif not isinstance(node, Image):
                    current = self.current(node, t, spikes, pixels)
                    if node.name not in membranes:
                        membranes[node.name] = torch.zeros_like(current)
                        if isinstance(node, Population):
                            membranes[node.name] += rows(node.threshold // 2, current)
                            counts[node.name] = torch.zeros_like(current)
                    membranes[node.name] += current
                    if isinstance(node, Population):
                        fired = self.fire(node, t, membranes[node.name], counts[node.name])
                        spikes[node.name] = [fired]
        return {r.name: membranes[r.name].flatten(1) for r in self.network.readouts}

    def rise(self, t: int, depth: int) -> int:
        before = self.schedule.bias_steps(t - 1, depth) if t > 1 else 0
        return self.schedule.bias_steps(t, depth) - before

    def current(
        self, node: Population | Readout, t: int, spikes: dict[str, list[Tensor]], pixels: Tensor
    ) -> Tensor:
        total = torch.zeros(())
        for i, synapse in enumerate(node.branches):
            layer, a = self.layers[key(node, i)], synapse.attributes
            around = list(a.get("padding", (0,) * 4)) if synapse.kind != "linear" else [0, 0]
            if synapse.source in spikes:
                arriving = sum(layer(F.pad(x, around)) for x in spikes[synapse.source])
            else:
                # Pixels are no spikes, and this is done once: NeuroBench is not to see it.
                zero = torch.tensor(self.network.preprocessing.zero_point).view(-1, 1, 1)
                x = F.pad(pixels.double() - zero, around)
                how = (a["stride"], 0, a["dilation"], a["groups"])
                arriving = self.rise(t, 0) * F.conv2d(x, layer.weight, None, *how)
            assert isinstance(arriving, Tensor)
            total = total + arriving * rows(2**synapse.shift, arriving)
        return total + self.rise(t, node.depth) * rows(node.bias, total)

    def fire(self, node: Population, t: int, membrane: Tensor, counts: Tensor) -> Tensor:
        """Return the spikes of a step; change membranes and counts."""
        threshold, highest = rows(node.threshold, membrane), self.schedule.timesteps
        up = (membrane >= threshold) & (counts < highest)
        down = (membrane < 0) & (counts > (-highest if node.two_sided else 0))
        fired = (up.double() - down.double()) * self.schedule.fires(t, node.depth)
        membrane -= threshold * fired
        counts += fired
        return fired


@pytest.mark.parametrize("schedule", ["drain", "wait"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "two_outputs"])
def test_neurobench_counts_the_same_accumulates(name: str, schedule: str) -> None:
    network = converted(name, seed=1, timesteps=3).network
    timetable = network.timetable(name=schedule)
    pixels = images(COUNT, 3)
    events, nonzero, steps = course(network, pixels, timetable)
    found = count_operations(network, timetable, events, nonzero, COUNT, steps)["total"]
    model = models.TorchModel(StepByStep(network, timetable, steps))
    model.register_hooks()
    with torch.no_grad():
        charges = model(pixels)
    wanted = simulate(network, pixels, timetable)
    for readout, charge in charges.items():
        assert torch.equal(charge.long(), wanted.charges[readout][-1].flatten(1).long())
    counter = metrics.SynapticOperations()
    counter.reset()
    told = counter(model, charges, (pixels, torch.zeros(COUNT)))
    model.cleanup_hooks()
    assert told["Effective_MACs"] == 0
    assert told["Effective_ACs"] == found["effective_operations"] > 0
    assert found["effective_operations"] < found["synaptic_operations"]
