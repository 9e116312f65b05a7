"""Random networks: every operation that converts, in any order, with awkward weights."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = (3, 9, 10)


class RandomNetwork(nn.Module):
    """A network drawn from a seed; forward is one straight line of calls."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.steps: list[tuple] = []
        # Shape of every value so far; a step reads some and appends one.
        self.shapes: list[tuple[int, int, int]] = [SIZE]
        self._conv(0)
        for _ in range(self.draw.randint(3, 9)):
            self._grow()
        self._head()
        self._spoil()
        del self.draw
        self.eval()

    def _append(self, step: tuple, shape: tuple[int, int, int]) -> int:
        self.steps.append(step)
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _module(self, module: nn.Module, source: int) -> int:
        self.layers.append(module)
        with torch.no_grad():
            shape = module.eval()(torch.zeros(1, *self.shapes[source])).shape[1:]
        return self._append(("module", source, len(self.layers) - 1), tuple(shape))

    def _conv(self, source: int, outputs: int = 0, stride: int = 0, kernel: int = 0) -> int:
        draw, (channels, height, width) = self.draw, self.shapes[source]
        outputs = outputs or draw.choice([2, 3, 4, 6])
        kernel = kernel or draw.choice([1, 2, 3])
        stride = stride or (draw.choice([1, 1, 2]) if min(height, width) > 3 else 1)
        groups = draw.choice(
            [g for g in (1, 1, 2, 3, channels) if not (channels % g or outputs % g)]
        )
        padding = kernel // 2 if kernel != 2 else draw.choice([0, 1])
        dilation = draw.choice([1, 1, 2]) if kernel == 3 and min(height, width) > 4 else 1
        if kernel > min(height, width):
            kernel, padding, dilation = 1, 0, 1
        conv = nn.Conv2d(
            channels, outputs, kernel, stride, padding * dilation, dilation, groups,
            bias=draw.random() < 0.5,
        )  # fmt: skip
        here = self._module(conv, source)
        return self._norm(here) if draw.random() < 0.7 else here

    def _norm(self, source: int) -> int:
        norm = nn.BatchNorm2d(self.shapes[source][0])
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.3, 2)
        nn.init.normal_(norm.weight, 0.6, 0.7)
        nn.init.normal_(norm.bias, 0.1, 0.3)
        return self._module(norm, source)

    def _activation(self, source: int) -> int:
        kind = self.draw.choice(["relu", "relu", "relu", "relu6", "clamp", "hardtanh", "leaky"])
        return self._append((kind, source), self.shapes[source])

    def _grow(self) -> None:
        draw = self.draw
        source = draw.choice(range(1, len(self.shapes))[-3:])
        channels, height, width = self.shapes[source]
        kind = draw.choice(
            ["conv", "conv", "conv", "residual", "residual", "concat", "max", "average", "norm",
             "option_a", "act", "drop", "border", "upsample", "scaled", "half", "shuffle"]
        )  # fmt: skip
        if kind == "conv":
            here = self._conv(source)
            if draw.random() < 0.8:
                self._activation(here)
        elif kind == "residual":
            left = self._conv(source, channels, 1, draw.choice([1, 3]))
            right = self._conv(source, channels, 1, 1) if draw.random() < 0.3 else source
            if self.shapes[left] == self.shapes[right]:
                here = self._append(("add", left, right), self.shapes[left])
                if draw.random() < 0.7:
                    self._activation(here)
        elif kind == "concat":
            same = [i for i in range(1, len(self.shapes)) if self.shapes[i][1:] == (height, width)]
            other = draw.choice(same)
            total = channels + self.shapes[other][0]
            if total <= 12:
                self._append(("concat", source, other), (total, height, width))
        elif kind == "max" and min(height, width) >= 3:
            kernel, padding, ceil = draw.choice([2, 3]), draw.choice([0, 1]), draw.random() < 0.3
            self._module(nn.MaxPool2d(kernel, draw.choice([1, 2]), padding, 1, False, ceil), source)
        elif kind == "average" and min(height, width) >= 3:
            pool = nn.AvgPool2d(
                draw.choice([2, 3]), draw.choice([1, 2]), draw.choice([0, 1]),
                draw.random() < 0.3, draw.random() < 0.5,
            )  # fmt: skip
            self._module(pool, source)
        elif kind == "norm":
            self._activation(self._norm(source))
        elif kind == "option_a" and min(height, width) > 3:
            shape = (channels + 2, -(-height // 2), -(-width // 2))
            self._append(("option_a", source), shape)
        elif kind == "act":
            self._activation(source)
        elif kind == "drop":
            self._module(nn.Dropout(0.5), source)
        elif kind == "border" and min(height, width) > 2:
            kinds = [nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d]
            self._module(draw.choice(kinds)((1, 2, 0, 1)), source)
        elif kind == "upsample" and max(height, width) < 7:
            self._module(nn.Upsample((2 * height, width + 1)), source)
        elif kind == "scaled":
            self._append(("scaled", source, draw.uniform(-1, 1)), self.shapes[source])
        elif kind == "shuffle" and channels % 2 == 0:
            self._module(nn.ChannelShuffle(2), source)
        elif kind == "half" and channels > 1:
            half = channels - channels // 2  # chunk gives the first part the odd channel
            self._append(("half", source), (half, height, width))

    def _head(self) -> None:
        source, draw = len(self.shapes) - 1, self.draw
        channels, height, width = self.shapes[source]
        size = draw.choice([1, 2]) if min(height, width) > 1 else 1
        kind = draw.choice(["adaptive", "mean", "flatten", "map"])
        if kind == "map":
            self._module(nn.Conv2d(channels, 3, 1), source)
            return
        if kind == "adaptive":
            source = self._module(nn.AdaptiveAvgPool2d(size), source)
            features = channels * size * size
        else:
            features = channels if kind == "mean" else channels * height * width
        if kind == "mean":
            source = self._append(("mean", source), (channels, 1, 1))
        else:
            source = self._append(("flatten", source), (features, 1, 1))
        self.layers.append(nn.Linear(features, 4))
        self._append(("module", source, len(self.layers) - 1), (4, 1, 1))

    def _spoil(self) -> None:
        """Plant zero rows, and zero and negative gains."""
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.data[0] *= self.draw.choice([0, -1, 1])
            elif isinstance(layer, nn.Conv2d) and self.draw.random() < 0.3:
                layer.weight.data[-1] = 0

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, source, *more in self.steps:
            y = values[source]
            if kind == "module":
                y = self.layers[more[0]](y)
            elif kind == "add":
                y = y + values[more[0]]
            elif kind == "concat":
                y = torch.cat([y, values[more[0]]], 1)
            elif kind == "relu":
                y = F.relu(y)
            elif kind == "relu6":
                y = F.relu6(y)
            elif kind == "clamp":
                y = y.clamp(0, 1.5)
            elif kind == "leaky":
                y = F.leaky_relu(y, 0.3)
            elif kind == "hardtanh":
                y = F.hardtanh(y, -2, 2)
            elif kind == "option_a":
                y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
            elif kind == "scaled":
                y = more[0] - y * 2
            elif kind == "half":
                y, _ = y.chunk(2, dim=1)
            elif kind == "mean":
                y = y.mean((2, 3))
            elif kind == "flatten":
                y = y.flatten(1)
            values.append(y)
        return values[-1]
