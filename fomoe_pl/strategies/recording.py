"""Whether a run's training steps can be recorded as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fomoe_pl.model.experts import choose_backend
from fomoe_pl.model.parts import compute_dtype
from fomoe_pl.model.passes import TrainingPass, training_pass
from fomoe_pl.model.recorded import WARM_UP, RecordedPass
from fomoe_pl.model.transformer import Transformer


class ReportedPass(RecordedPass):
    """Says once how long after its start a run got there: it compiles kernels and blocks in these steps."""

    def __init__(self, run: Callable[[Tensor, Tensor], TrainingPass], model: Transformer) -> None:
        super().__init__(run, model)
        self._began = time.perf_counter()

    def _record(self, inputs_BS: Tensor, targets_BS: Tensor) -> torch.cuda.CUDAGraph:
        graph = super()._record(inputs_BS, targets_BS)
        if self.recordings == 1:
            seconds = time.perf_counter() - self._began
            rank_zero_info(f"The first {WARM_UP} steps, with all that they compile and wait for, and recording took "
                           f"{seconds:.1f} s; from here on steps are replayed")  # fmt: skip
        return graph


def recorded_pass(trainer: Trainer, module: LightningModule, model: Transformer) -> RecordedPass | None:
    """Return what records a run's passes; None where it cannot be, which a line says.

    Args:
        trainer: Of the run, about to start.
        module: What it trains.
        model: The transformer in it, on its device.
    """
    reason = _why_not(trainer, module, model)
    if reason is None:
        return ReportedPass(partial(training_pass, model), model)
    rank_zero_info(f"model.cuda_graphs: this run's steps are not recorded: {reason}")
    return None


def _why_not(trainer: Any, module: LightningModule, model: Transformer) -> str | None:
    if trainer.strategy.model is not module:
        return "its strategy averages gradients during the backward pass"
    several = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
    if several or trainer.accumulate_grad_batches > 1:
        return "gradients of several micro-batches are added up"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "float16 scales the loss by another factor now and then"
    if torch.is_anomaly_enabled():
        return "the search for anomalies reads gradients on the host"
    weight_RFD = model.layers[0].moe.experts.w_out
    with trainer.precision_plugin.train_step_context():
        dtype = compute_dtype(weight_RFD)
    if choose_backend(model.config.expert_backend, weight_RFD.device, dtype, *weight_RFD.shape[1:]) == "loop":
        return "expert_backend loop waits for the device"
    return None
