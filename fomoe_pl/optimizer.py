"""The inner optimizer of every site and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fomoe_pl.errors import check_range
from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.model.parametrization import parameter_groups
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.slices import local_of
from fomoe_pl.training.elastic import Pace


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Inner optimizer (FoMoE, arXiv 2606.19025, Table 7) and its learning-rate schedule, in local optimizer steps.

    Attributes:
        kind: `adamw`, or `sgd` without momentum (for comparisons with data parallelism).
        lr: Peak learning rate at CompleteP's base width; above 0.
        betas: Decay rates of AdamW's moments, in [0, 1).
        eps: AdamW's epsilon; above 0.
        weight_decay: Decoupled weight decay, 0 or more; the paper uses none.
        warmup_steps: Steps of linear warm-up.
        cooldown_steps: Steps of linear decay to 0 at the end of the run; the paper uses none.
        received_warmup_steps: Warm-up of an expert's learning rate after a site received it (random placement).
    """

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 160
    cooldown_steps: int = 0
    received_warmup_steps: int = 16

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: For a number out of its range.
        """
        key = "model.optimizer."
        check_range(f"{key}lr", self.lr, "0.01 is the paper's value", above=0)
        for beta in self.betas:
            check_range(f"{key}betas", beta, "the paper has [0.9, 0.95]", least=0, below=1)
        check_range(f"{key}eps", self.eps, "1e-8 is the default; 0 would divide by moments that are 0", above=0)
        check_range(f"{key}weight_decay", self.weight_decay, "0 is none", least=0)
        for name in ("warmup_steps", "cooldown_steps", "received_warmup_steps"):
            check_range(key + name, getattr(self, name), "0 is none", least=0)


def learning_rate_factor(step: float, *, warmup: int, cooldown: int, last: int | None) -> float:
    """Factor on the peak learning rate: linear warm-up, constant, linear cooldown.

    Args:
        step: Optimizer steps already taken; of a run without all its sites, the planned steps that these amount to.
        warmup: Steps of the warm-up.
        cooldown: Steps of the cooldown; 0 for none.
        last: The run's number of steps; None if it is open, then there is no cooldown.
    """
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if cooldown and last is not None:
        factor = min(factor, max(0.0, (last - step) / cooldown))
    return factor


def inner_optimizer(model: Transformer, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The inner optimizer, with CompleteP's factors on rate, epsilon and decay; fused on a GPU.

    Args:
        model: The transformer, on its device.
        config: The settings.
    """
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(model):
        entry: dict[str, Any] = {"params": [local_of(p) for p in group["params"]], "lr": config.lr * group["lr_scale"]}
        entry["weight_decay"] = config.weight_decay * group["weight_decay_scale"] if group["decay"] else 0.0
        if config.kind == "adamw":
            entry["eps"] = config.eps * group["eps_scale"]
        groups.append(entry)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    fused = model.output_weight.is_cuda or None
    return RowAdamW(
        groups, lr=config.lr, betas=config.betas, fused=fused, row_warmup_steps=config.received_warmup_steps
    )


def norm_or_skip(optimizer: torch.optim.Optimizer, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Norm of all gradients, float32 (); if it is not finite, the next step is skipped.

    Args:
        optimizer: The inner optimizer, of parameters on one device; their gradients may be of several types.
        total: Adds a number over ranks that have slices of the gradients; None where this rank has them whole.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                by_type.setdefault(p.grad.dtype, []).append(p.grad)
    norms = [norm for grads in by_type.values() for norm in torch._foreach_norm(grads, 2, dtype=torch.float32)]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    if total is not None:
        norm = total(norm.square()).sqrt()
    skip_step_if(~norm.isfinite(), optimizer)
    return norm


def skip_step_if(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's next step a no-op for parameters, moments and step counts.

    Args:
        bad: bool (), whether gradients are not finite. The host does not wait for it.
        optimizer: The inner optimizer.
    """
    if bad.is_cuda and isinstance(optimizer, RowAdamW):
        optimizer.found_inf = bad.float()  # read by the fused step on the device
    elif bad:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None


def clip_next_step(optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
    """Clip gradients by their norm in an optimizer's next step, which drops them afterwards.

    On a GPU the step scales them itself: some in place, those of large parameters while it reads them.

    Args:
        optimizer: The inner optimizer.
        norm: float32 (), norm of all its gradients.
        max_norm: Upper bound.
    """
    if norm.is_cuda and isinstance(optimizer, RowAdamW):
        optimizer.grad_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def inner_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, last: int | None, pace: Pace | None = None
) -> LambdaLR:
    """The inner optimizer's learning-rate schedule; advance it after each step.

    Args:
        optimizer: From `inner_optimizer`.
        config: The settings.
        last: As for `learning_rate_factor`.
        pace: Of a run that may have fewer sites than planned: its plan's length is the schedule's, not `last`.
    """
    warmup, cooldown = config.warmup_steps, config.cooldown_steps

    def factor(step: int) -> float:
        done, end = (float(step), last) if pace is None else (pace.at(step), pace.planned)
        return learning_rate_factor(done, warmup=warmup, cooldown=cooldown, last=end)

    return LambdaLR(optimizer, factor)
