"""Say what would become of a network, before anything is converted.

Shapes are enough: a model on torch's `meta` device has no numbers, and the largest is planned in
seconds. What numbers decide is then left open, and `Examination.to_dict` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snnconv.analog import LARGEST, width
from snnconv.choices import DEFAULT_TIMESTEPS
from snnconv.engine.counts import BLOCK_STEPS
from snnconv.errors import NotConvertibleError
from snnconv.folding import fold
from snnconv.graph import on_meta, trace
from snnconv.network import count_dtype
from snnconv.pipeline import check_fold
from snnconv.plan import ConversionPlan, Island, Neurons, Output, Source, inputs_of, make_plan
from snnconv.schedule import check_timesteps

MIB = 2**20


@dataclass(frozen=True)
class Examination:
    """What `examine` found out; `problems` are against conversion, with remedies.

    `weights_known` tells a model with numbers from one that has shapes only.
    """

    plan: ConversionPlan
    problems: list[str]
    parameters: int
    timesteps: int
    weights_known: bool

    @property
    def neurons(self) -> int:
        """Return the number of neurons."""
        return sum(math.prod(n.shape) for n in self.plan.nodes if isinstance(n, Neurons))

    @property
    def depth(self) -> int:
        """Return how many neuron layers the longest path has."""
        after: dict[str, int] = {}
        for node in self.plan.nodes:
            before = max((after[name] for name in inputs_of(node)), default=0)
            after[node.name] = before + isinstance(node, Neurons)
        return max(after.values(), default=0)

    @property
    def ann_macs(self) -> int:
        """Return the multiply-accumulates the float network takes for an image."""
        return sum(e.macs for e in self.plan.entries)

    @property
    def step_macs(self) -> int:
        """Return the additions that T steps take at most, each weight for each count of each step.

        What an image brings its neurons is summed once, and so is what islands read and compute.
        """
        sources = {n.name for n in self.plan.nodes if isinstance(n, Source)}
        terms = [t for n in self.plan.nodes if isinstance(n, Neurons | Output) for t in n.terms]
        of_images = {step for t in terms if t.source in sources for step in t.key[:1]}
        once = sum(e.macs for e in self.plan.entries if e.node in of_images)
        return once + self.timesteps * (self.ann_macs - once)

    def memory(self) -> dict[str, float]:
        """Estimate the memory of a simulation: weights, and what each image adds, in MiB.

        An image takes a count for every neuron, and the counts of a block of steps for the nodes
        that are still to be read at its fullest moment. An island at work adds the largest tensor
        it computes, in float64.
        """
        nodes = self.plan.nodes
        count = count_dtype(0, self.timesteps).itemsize
        most = LARGEST * self.timesteps
        emitted = count_dtype(-most, most).itemsize
        last: dict[str, int] = {}
        for position, node in enumerate(nodes):
            for name in (node.name, *inputs_of(node)):
                last[name] = position
        fullest = now = 0
        sizes = {
            n.name: math.prod(n.shape) * (emitted if isinstance(n, Island) else count)
            for n in nodes
            if not isinstance(n, Output)
        }
        for position, node in enumerate(nodes):
            now += sizes.get(node.name, 0)
            working = 0
            if isinstance(node, Island):
                working = width(node.function, node.attributes, node.input_shapes)
            fullest = max(fullest, now + working * torch.float64.itemsize)
            now -= sum(sizes.get(name, 0) for name, at in last.items() if at == position)
        image = self.neurons * count + min(self.timesteps, BLOCK_STEPS) * fullest
        weights = sum(e.weights for e in self.plan.entries if e.role == "synapse")
        return {"weights_mib": weights / MIB, "image_mib": image / MIB}

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain JSON values."""
        return {
            **self.plan.to_dict(),
            "verdict": "not convertible" if self.problems else "convertible",
            "problems": self.problems,
            "weights_known": self.weights_known,
            "parameters": self.parameters,
            "neurons": self.neurons,
            "depth": self.depth,
            "ann_macs": self.ann_macs,
            "estimate": {
                "timesteps": self.timesteps,
                "macs": self.step_macs,
                "times_ann": round(self.step_macs / self.ann_macs, 3) if self.ann_macs else None,
                **{key: round(value, 3) for key, value in self.memory().items()},
            },
        }


def examine(
    model: nn.Module,
    input_size: tuple[int, int, int],
    *,
    timesteps: int = DEFAULT_TIMESTEPS,
    strict: bool = False,
) -> Examination:
    """Plan the conversion of a model for images of `input_size` `(C, H, W)`.

    What is in the way is no error but among the `problems`; a `strict` conversion has analog
    islands among them. Estimates are for `timesteps`. Raises UsageError for a T out of range.
    """
    check_timesteps(timesteps)
    plan = ConversionPlan([], [], {})
    problems: list[str] = []
    known = not on_meta(model)
    try:
        traced = trace(model, input_size)
        plan = make_plan(traced)
        plan.require_convertible(strict=strict)
        if known:
            check_fold(traced, plan, fold(traced, plan))
    except NotConvertibleError as error:
        problems = error.problems or [error.message]
    parameters = sum(p.numel() for p in model.parameters())
    return Examination(plan, problems, parameters, timesteps, known)
