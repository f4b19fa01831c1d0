"""A run's training passes, with its shortcuts: CUDA graphs, and bfloat16 copies of experts' weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.model.backends import backend_of
from fomoe_pl.model.copies import ExpertCopies
from fomoe_pl.model.experts import choose_backend
from fomoe_pl.model.parts import compute_dtype
from fomoe_pl.model.passes import TrainingPass, training_pass
from fomoe_pl.model.recorded import WARM_UP, RecordedPass
from fomoe_pl.model.statistic import Statistic
from fomoe_pl.model.transformer import Transformer


class Passes:
    """Forward passes, and backward passes where they are recorded, as `FoMoEModule`'s settings want them.

    Args:
        trainer: Of the run, about to start.
        module: What it trains.
        model: The transformer in it, on its device.
        graphs: Record passes, on a GPU, where possible.
        bf16_gradients: Use copies of experts' weights where possible.
        statistics: Summed over the tokens of each pass.
        sum_loads: As for `training_pass`, which is then not recorded.

    Attributes:
        recorded: What records them.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, model: Transformer, *, graphs: bool, bf16_gradients: bool,
        statistics: Sequence[Statistic] = (), sum_loads: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self._run = partial(training_pass, model, statistics=statistics, sum_loads=sum_loads)
        self.copies = expert_copies(trainer, module, model) if bf16_gradients else None
        self.recorded: RecordedPass | None = None
        if graphs and model.output_weight.is_cuda and sum_loads is not None:
            rank_zero_info("model.cuda_graphs: this run's steps are not recorded: their balance loss adds the loads of "
                           "all ranks of the site")  # fmt: skip
        elif graphs and model.output_weight.is_cuda:
            self.recorded = recorded_pass(trainer, module, model, statistics)

    def __call__(self, inputs_BS: Tensor, targets_BS: Tensor) -> TrainingPass:
        """Run forward on a micro-batch of int64 token ids."""
        if self.copies is not None:
            self.copies.refresh()
        if self.recorded is None:
            return self._run(inputs_BS, targets_BS)
        return self.recorded(inputs_BS, targets_BS, variant=self.model.layers[0].moe.router.measures_entropy)

    def backward(self) -> bool:
        """As `RecordedPass.backward`."""
        return self.recorded is not None and self.recorded.backward()

    def release(self) -> None:
        """Release memory until the next pass."""
        if self.recorded is not None:
            self.recorded.release()

    def close(self) -> None:
        """Take no more."""
        self.recorded = None
        if self.copies is not None:
            self.copies.remove()


class ReportedPass(RecordedPass):
    """Reports once how long the first steps took, which compile kernels and blocks."""

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


def recorded_pass(
    trainer: Trainer, module: LightningModule, model: Transformer, statistics: Sequence[Statistic] = ()
) -> RecordedPass | None:
    """Return the recorder of a run's passes; None where that is not possible, with a message.

    Args:
        trainer: Of the run, about to start.
        module: What it trains.
        model: The transformer in it, on its device.
        statistics: Summed over the tokens of each pass.
    """
    reason = _why_not(trainer, module, model)
    if reason is None:
        return ReportedPass(partial(training_pass, model, statistics=statistics), model)
    rank_zero_info(f"model.cuda_graphs: this run's steps are not recorded: {reason}")
    return None


def expert_copies(trainer: Trainer, module: LightningModule, model: Transformer) -> ExpertCopies | None:
    """Return bfloat16 copies of the experts' weights; None where their gradients stay float32.

    Args:
        trainer: Of the run, about to start.
        module: What it trains.
        model: The transformer in it, on its device.
    """
    adamw = trainer.optimizers[0]
    weight_RFD = model.layers[0].moe.experts.w_out
    if not isinstance(adamw, RowAdamW) or weight_RFD.dtype != torch.float32:
        return None
    backend, dtype = _experts_run(trainer, model)
    if not backend_of(backend).fused or dtype != torch.bfloat16 or _more_than_one_backward_pass(trainer, module):
        return None
    copies = ExpertCopies(model, dtype)
    adamw.copies = copies.of
    return copies


def _why_not(trainer: Any, module: LightningModule, model: Transformer) -> str | None:
    if reason := _more_than_one_backward_pass(trainer, module):
        return reason
    if isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None:
        return "float16 changes the loss scale during training"
    if torch.is_anomaly_enabled():
        return "anomaly detection reads gradients on the host"
    backend, _ = _experts_run(trainer, model)
    if backend_of(backend).waits_for_device:
        return f"expert_backend {backend} waits for the device"
    return None


def _more_than_one_backward_pass(trainer: Any, module: LightningModule) -> str | None:
    if isinstance(cast(Any, module).model, FSDPModule):
        return "the ranks of a site gather each layer's weights while they compute"
    if trainer.strategy.model is not module:
        return "its strategy averages gradients during the backward pass"
    several = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
    if several or trainer.accumulate_grad_batches > 1:
        return "gradients of several micro-batches are added up"
    return None


def _experts_run(trainer: Any, model: Transformer) -> tuple[str, torch.dtype]:
    """By which backend, in which type of products."""
    weight_RFD = model.layers[0].moe.experts.w_out
    with trainer.precision_plugin.train_step_context():
        dtype = compute_dtype(weight_RFD)
    return choose_backend(model.config.expert_backend, weight_RFD.device, dtype, *weight_RFD.shape[1:]), dtype
