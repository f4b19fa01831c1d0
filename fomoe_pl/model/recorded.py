"""A forward and backward pass as a CUDA graph: recorded once, then replayed with one call.

A step of a small model, or of one with few resident experts, ends on the GPU before the host has launched its thousand
kernels. A replay launches them all at once, in the same order on the same addresses: results are those of the pass that
was recorded, to the bit. The passes fit into a graph: no shape depends on values on the device, and nothing
waits for it (`backends/kernels.py`).

Memory: the graph's activations and gradients have a pool of their own, as large as the pass's peak. It stays reserved
between passes: what a round of averaging needs comes on top of it. `release` gives it back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fomoe_pl.model.passes import TrainingPass
from fomoe_pl.model.transformer import Transformer

WARM_UP = 3
"""Passes before recording: kernels are compiled in them, workspaces and tables are made."""


class RecordedPass:
    """Forward passes; once recorded, they compute gradients too.

    Recorded again, after some passes that are not, when batches change shape, parameters move in memory, or autocast or
    the caller's `variant` changes.

    Args:
        run: The forward pass, of int64 inputs and targets (B,S). It must not wait for the device.
        model: Whose parameters get the gradients, on a GPU.

    Attributes:
        recordings: How often passes were recorded.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], TrainingPass], model: Transformer) -> None:
        self.run = run
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._memory = [*model.parameters(), *model.buffers()]
        self.recordings = 0
        self._key: Hashable = None
        self._passes = 0  # with this key
        self._replayed = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self.release()

    def __call__(self, inputs_BS: Tensor, targets_BS: Tensor, variant: Hashable = None) -> TrainingPass:
        """Run forward, and backward too if it is recorded; `backward` has to follow.

        Args:
            inputs_BS: On the model's device.
            targets_BS: Likewise.
            variant: What else changes which operations `run` consists of.

        Returns:
            Tensors that the next call overwrites.
        """
        key = self._now(inputs_BS, variant)
        if key != self._key:
            self.release()
            self._key, self._passes = key, 0
        self._replayed = self._passes >= WARM_UP
        self._passes += 1
        if not self._replayed:
            return self.run(inputs_BS, targets_BS)
        if self._graph is None:
            self._graph = self._record(inputs_BS, targets_BS)
        for own_BS, given_BS in zip(self._inputs, (inputs_BS, targets_BS), strict=True):
            own_BS.copy_(given_BS, non_blocking=True)
        self._graph.replay()
        return self._result

    def backward(self) -> bool:
        """Give the parameters the gradients of the last call, in the place of any that are there.

        Returns:
            Whether it did. If not, the pass was not recorded, and its `total` has the gradients.
        """
        if self._replayed:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        return self._replayed

    def release(self) -> None:
        """Give the graph's memory back; the next call records again. Parameters keep their gradients."""
        recorded, self._graph = self._graph is not None, None
        self._inputs: tuple[Tensor, ...] = ()
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._result: Any = None
        if recorded:
            torch.cuda.empty_cache()  # other allocations, and other processes on the GPU, cannot use its pool otherwise

    def _now(self, inputs_BS: Tensor, variant: Hashable) -> Hashable:
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return variant, autocast, inputs_BS.shape, tuple(t.data_ptr() for t in self._memory)

    def _record(self, inputs_BS: Tensor, targets_BS: Tensor) -> torch.cuda.CUDAGraph:
        self._inputs = inputs_BS.clone(), targets_BS.clone()
        for parameter in self.parameters:
            parameter.grad = None  # so that the pass makes them, in the graph's own memory
        gc.collect()  # what is left of earlier passes would have the backward pass wait for another stream
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads go on: they copy batches to pinned memory, or watch over collectives.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self.run(*self._inputs)
                with torch.autocast("cuda", enabled=False):
                    result.total.backward()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves the one that it recorded on
            # The end of a recording that ran out of memory fails too, and hides it.
            full = any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))
            reason = (
                "the GPU's memory is full"
                if full
                else "something in it waits for the GPU, the loss of an earlier step is still held, or see above"
            )
            raise RuntimeError(
                f"A training step could not be recorded as a CUDA graph: {reason}. "
                "model.cuda_graphs: false goes without"
            ) from error
        self._gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self._result = result._replace(total=result.total.detach())
        self.recordings += 1
        return graph
