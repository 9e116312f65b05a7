"""The network in training: the float parameters, seen as the integers they would be stored as."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from snnconv.calibrate import SMALLEST_SHARE
from snnconv.folding import Folder
from snnconv.graph import Traced
from snnconv.network import count_values
from snnconv.neuron import rounding_offset
from snnconv.normalize import (
    LEARNT_BELOW_BITS,
    layer_bits,
    rounded,
    row_scale,
    times_inputs,
)
from snnconv.plan import ConversionPlan
from snnconv.preprocess import Preprocessing
from snnconv.quant import Branch, Layer, Observer, Qann
from snnconv.train.batch_norm import BatchNorms

# Smallest upper end of weights of few bits, as a share of a row's largest weight.
SMALLEST_WEIGHT_CLIP = 1e-3
LARGEST_LOG = 30.0


class _Through(torch.autograd.Function):
    """Another value in the forward pass, the gradient of the first argument in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Student(nn.Module):
    """The network in training: parameters in, outputs of its quantised self out.

    `qann` is the QANN the parameters amount to; it follows them at every forward pass.
    """

    qann: Qann

    def __init__(
        self,
        traced: Traced,
        plan: ConversionPlan,
        qann: Qann,
        preprocessing: Preprocessing,
        timesteps: int,
        weight_bits: int = 8,
        initial_membrane: str = "half",
    ) -> None:
        """Start from a traced network, its plan, and its QANN with calibrated clips.

        Clips that are alike in a layer stay one parameter.
        """
        super().__init__()
        self.network = traced.module.requires_grad_(True)
        self.preprocessing, self.timesteps = preprocessing, timesteps
        self.weight_bits, self.initial_membrane = weight_bits, initial_membrane
        self.folders = {
            dtype: Folder(traced, plan, dtype) for dtype in (torch.float32, torch.float64)
        }
        self.norms = BatchNorms(self.folders[torch.float32])
        # Whether BatchNorm takes a batch's own mean and variance.
        self.batch_statistics = False
        # No submodule: its tensors follow from this module's parameters.
        object.__setattr__(self, "qann", qann)
        self.log_clips = nn.ParameterList(
            nn.Parameter(log[:1] if bool((log == log[0]).all()) else log)
            for log in (layer.clip.detach().log() for layer in qann.populations())
        )
        self.log_shares = nn.ParameterDict()
        bits = layer_bits(qann, weight_bits)
        # A plain list, so that the layers do not become submodules.
        self.layers = [(layer, bits[layer.name]) for layer in qann.weighted()]
        self.numbers = {layer: i for i, (layer, _) in enumerate(self.layers)}
        for index, (layer, few) in enumerate(self.layers):
            if few < LEARNT_BELOW_BITS:
                self._learn_weight_clips(index, layer, few)
        self._freeze_unused()

    def _learn_weight_clips(self, index: int, layer: Layer, bits: int) -> None:
        """Make the upper ends of a layer's weights parameters, from the least squared error."""
        values = count_values(self.qann.nodes, self.preprocessing)
        for j, (branch, weight) in enumerate(zip(layer.branches, layer.weights, strict=True)):
            if branch.kind != "scale":
                rows = times_inputs(branch, weight.detach().double(), values[branch.source][0])
                largest = rows.flatten(1).abs().amax(1).clamp_min(1e-300)
                share = row_scale(rows, bits) * (2 ** (bits - 1) - 1) / largest
                log = share.clamp(SMALLEST_WEIGHT_CLIP, 1).log().float()
                self.log_shares[f"{index}_{j}"] = nn.Parameter(log)

    def _freeze_unused(self) -> None:
        """Take parameters out of training on which no output depends."""
        shape = (1, *self.preprocessing.input_size)
        device = next(self.parameters()).device
        outputs = self(torch.zeros(shape, dtype=torch.uint8, device=device))
        named = [p for p in self.parameters() if p.requires_grad]
        total = sum(o.sum() for o in outputs.values())
        for parameter, grad in zip(
            named, torch.autograd.grad(total, named, allow_unused=True), strict=True
        ):
            parameter.requires_grad_(grad is not None)

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that training moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def state(self) -> list[Tensor]:
        """Return all that training changes: the parameters, and the statistics of BatchNorm."""
        return [*(p.detach() for p in self.trained()), *self.norms.statistics()]

    def bound_(self) -> None:
        """Bring clips back within their bounds, after a step has moved them."""
        with torch.no_grad():
            for layer, log in zip(self.qann.populations(), self.log_clips, strict=True):
                highest = LARGEST_LOG if layer.cap is None else math.log(layer.cap)
                log.clamp_(-LARGEST_LOG, highest)
                log.clamp_(min=log.amax() + math.log(SMALLEST_SHARE))
            for log in self.log_shares.values():
                log.clamp_(math.log(SMALLEST_WEIGHT_CLIP), 0.0)

    def refresh(self, dtype: torch.dtype = torch.float64) -> list[tuple[list[Tensor], Tensor]]:
        """Let the QANN follow the parameters; return the folded tensors, with gradients."""
        folded = list(self.folders[dtype].tensors())
        with torch.no_grad():
            for (layer, _), (weights, bias) in zip(self.layers, folded, strict=True):
                layer.assign_(weights, bias)
            for layer, log in zip(self.qann.populations(), self.log_clips, strict=True):
                layer.clip.copy_(log.exp())
            for readout in self.qann.readouts():
                readout.clip.fill_(math.nan)  # the range of its outputs is not known any more
            for key, log in self.log_shares.items():
                index, j = map(int, key.split("_"))
                self.layers[index][0].clip_shares[j] = log.exp()
        return folded

    def forward(self, pixels: Tensor, observe: Observer | None = None) -> dict[str, Tensor]:
        """Return every readout for uint8 pixels `[N, C, H, W]`, as the integers would give it.

        `observe` sees each population's output.
        """
        self.folders[torch.float32].held = self.norms.modules() if self.batch_statistics else set()
        folded = self.refresh(torch.float32)
        with torch.no_grad():
            integers = list(
                rounded(
                    self.qann, self.preprocessing, self.timesteps, self.weight_bits, torch.float32
                )
            )
        values = count_values(self.qann.nodes, self.preprocessing, torch.float32)
        logs = iter(self.log_clips)
        tensors: dict[str, Tensor] = {}
        for i, (layer, bits) in enumerate(self.layers):
            (weights, bias), stored = folded[i], integers[i]
            for j, (weight, value) in enumerate(zip(weights, stored.weights, strict=True)):
                if f"{i}_{j}" in self.log_shares:
                    log_share = self.log_shares[f"{i}_{j}"]
                    branch = layer.branches[j]
                    worth, scale = values[branch.source][0], stored.scales[j]
                    weight = _clipped(branch, weight, worth, log_share, scale, bits)
                weight = _Through.apply(weight, value)
                if self.batch_statistics:
                    weight = self.norms.unfolded(i, j, weight)
                tensors[f"layers.{i}.weights.{j}"] = weight
            tensors[f"layers.{i}.bias"] = _Through.apply(bias, stored.bias)
            if not layer.readout:
                tensors[f"layers.{i}.clip"] = next(logs).exp()
        images = laid_out(self.preprocessing.center(pixels))
        outputs: dict[str, Tensor] = functional_call(
            self.qann,
            tensors,
            (images, self.timesteps),
            {
                "offset": rounding_offset(self.initial_membrane),
                "observe": observe,
                "normalize": self._normalize if self.batch_statistics else None,
            },
        )
        return outputs

    def _normalize(self, layer: Layer, branch: int, current: Tensor) -> Tensor:
        return self.norms.normalize(self.numbers[layer], branch, current)


def laid_out(images: Tensor) -> Tensor:
    """Return images with channels last on a CPU, whose convolutions are then twice as fast."""
    if images.is_cuda or images.ndim != 4:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _clipped(
    branch: Branch, weight: Tensor, worth: Tensor, log_share: Tensor, scale: Tensor, bits: int
) -> Tensor:
    """Round weights of few bits so that their upper end gets a gradient (section 1).

    `worth` is that of the branch's source, `[C_in]`, `scale` the one the weights are stored with,
    `[C]`; it moves as the upper end does.
    """
    top = 2 ** (bits - 1) - 1
    rows = times_inputs(branch, weight, worth)
    moving = (scale * (log_share - log_share.detach()).exp()).view(-1, *[1] * (rows.ndim - 1))
    inside = (rows / moving).clamp(-top, top)
    inverse = torch.where(worth > 0, 1 / worth, 0.0)
    return times_inputs(branch, _Through.apply(inside, inside.round()) * moving, inverse)
