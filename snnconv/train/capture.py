"""A training step recorded once as a CUDA graph: small networks are done before Python is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Passes before the recording, in which libraries make their choices and take their memory.
WARMING = 3

Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CapturedStep:
    """Forward and backward pass of batches of one size, replayed without Python.

    `compute` gives the loss and another tensor for pixels and labels, and must not wait for the
    GPU. A call leaves the gradients in the parameters, in tensors that the next one writes over.
    `update`, if any, is recorded behind it: what it changes must be there already, since making it
    would be recorded, too.
    """

    def __init__(
        self,
        compute: Compute,
        parameters: Iterable[nn.Parameter],
        pixels: Tensor,
        labels: Tensor,
        update: Callable[[], None] | None = None,
    ) -> None:
        """Record. Raises RuntimeError for a network that cannot be recorded."""
        self.pixels, self.labels = pixels.clone(), labels.clone()
        self.parameters = list(parameters)
        aside = torch.cuda.Stream(pixels.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMING):
                self._forget()
                compute(self.pixels, self.labels)[0].backward()
        torch.cuda.current_stream().wait_stream(aside)
        self._forget()
        self.graph = torch.cuda.CUDAGraph()
        # Where recording fails, torch leaves its own stream as the current one.
        # Other threads of the process, such as another training's, may go on meanwhile.
        recording = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            loss, self.hits = compute(self.pixels, self.labels)
            loss.backward()
            if update is not None:
                update()
        self.updates = update is not None
        self.loss = loss.detach()
        self.gradients = [parameter.grad for parameter in self.parameters]

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Replay for a batch of the same size; return the loss and the other tensor."""
        self.pixels.copy_(pixels)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss, self.hits

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
