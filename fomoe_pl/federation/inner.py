"""AdamW whose expert rows can be replaced one by one.

Experts of a layer are stacked in one parameter, row r being one resident expert. Under random placement a row may be
handed to another expert in mid-training: it then starts with zero moments, its own step count for bias correction and
a learning-rate warm-up of its own, while the other rows go on (FoMoE, arXiv 2606.19025, random placement). The
arithmetic is torch's: parameters without replaced rows take the stock path, or if they are large on a GPU our kernel
(`adamw.py`); rows of the others are handed to torch's functional AdamW as views, grouped by learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fomoe_pl.federation import adamw as adamw_kernel

ROW_COUNTERS = ("step", "warmup")
SECOND_MOMENT = "exp_avg_sq"


class RowAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with row-wise replacement of stacked expert parameters.

    State of a parameter whose rows were replaced: `step` has shape (R,) instead of (), and `warmup` (R,) counts the
    steps of learning-rate warm-up that each row still has to go.

    Args:
        params: As for AdamW.
        row_warmup_steps: Length of a received row's warm-up, optimizer steps; 0 for none.
        **kwargs: As for AdamW.
    """

    def __init__(self, params: Any, *, row_warmup_steps: int = 0, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        # Fused AdamW says that it takes a gradient scaler's factor itself, and Lightning then refuses to clip. Rows do
        # not take it, so a scaler has to divide before.
        self._step_supports_amp_scaling = False
        self.row_warmup_steps = row_warmup_steps
        # For the next step, of fused steps alone.
        self.found_inf: Tensor | None = None  # not zero: it does nothing
        self.grad_factor: Tensor | None = None  # float32 (), by which it scales gradients; none is 1
        # Of parameters: a step writes these too, or counts a version of the parameter (`Tensor._version`).
        self.copies: Mapping[Tensor, Tensor] = {}

    def replace_rows(self, param: Tensor, sources: Sequence[int | None]) -> None:
        """Rearrange the state's rows: new row r takes the state of old row `sources[r]`, or starts fresh for None.

        Args:
            param: Stacked parameter (R, ...), its own rows are moved by the caller.
            sources: One old row or None for each of the R rows.
        """
        state = self.state[param]
        if not state or list(sources) == list(range(len(sources))):
            return
        state |= rearranged(state, sources, self.row_warmup_steps)

    def start_state(self, param: Tensor) -> None:
        """Give a parameter that has not been stepped yet the state that its first step would start from."""
        if not self.state[param]:
            on_device = self.defaults["fused"] or self.defaults["capturable"]
            self.state[param] |= {
                "step": torch.zeros((), device=param.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for AdamW; the row counters stay float32 on the CPU, where torch would cast them like moments.

        Whether steps are fused is of this device, not of the one that the state was saved on.
        """
        fused = [{"fused": group["fused"]} for group in self.param_groups]
        groups = [saved | own for saved, own in zip(state_dict["param_groups"], fused, strict=False)]
        super().load_state_dict({**state_dict, "param_groups": groups})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i, {})
            if "warmup" in saved:
                self.state[p] |= {name: saved[name].to("cpu", torch.float32, copy=True) for name in ROW_COUNTERS}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One AdamW step; rows in warm-up take a part of the learning rate."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stock, rowwise, large = self._by_way_of_stepping()
        for _, p in (*stock, *rowwise):
            if p.grad.dtype != p.dtype:
                p.grad = p.grad.to(p.dtype)  # torch's steps take no other
        if self.grad_factor is not None and (scaled := [p.grad for _, p in (*stock, *rowwise)]):
            torch._foreach_mul_(scaled, self.grad_factor)
        grads: dict[Tensor, Tensor] = {p: p.grad for _, p in (*rowwise, *large)}
        for p in grads:  # hidden from the stock step, which skips parameters without a gradient
            p.grad = None
        super().step()
        if stale := [p for _, p in stock if p in self.copies]:
            torch.autograd.graph.increment_version(stale)  # fused steps do not count themselves
        self._large_steps(large, grads)
        for p, grad in grads.items():
            p.grad = grad
        if rowwise and not (self.found_inf is not None and self.found_inf.any()):
            for group, p in rowwise:
                self._row_step(group, p, grads[p])
        self.found_inf = self.grad_factor = None
        return loss

    def _by_way_of_stepping(self) -> tuple[list[tuple[dict[str, Any], Any]], ...]:
        """Parameters with gradients, each with its group: torch's own step, rows one by one, our kernel."""
        stock: list[tuple[dict[str, Any], Any]] = []
        rowwise, large = stock.copy(), stock.copy()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    way = rowwise if "warmup" in self.state[p] else large if _in_kernel(group, p) else stock
                    way.append((group, p))
        return stock, rowwise, large

    def _large_steps(self, large: list[tuple[dict[str, Any], Tensor]], grads: dict[Tensor, Tensor]) -> None:
        if not large:
            return
        device = large[0][1].device
        factor = torch.ones((), device=device) if self.grad_factor is None else self.grad_factor
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        for _, p in large:
            self.start_state(p)
        steps = [self.state[p]["step"] for _, p in large]
        torch._foreach_add_(steps, 1)
        torch._foreach_sub_(steps, [found_inf] * len(steps))  # as a list: of a single tensor the host reads the value
        for group, p in large:
            state = self.state[p]
            adamw_kernel.step(
                p, self.copies.get(p), grads[p], state["exp_avg"], state["exp_avg_sq"],
                state["step"], factor, found_inf,
                lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
            )  # fmt: skip

    def _row_step(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        # On the host, where a resumed run may not find it: the loop below must not wait for the device.
        warmup = state["warmup"].cpu().clamp(max=self.row_warmup_steps)
        length = max(self.row_warmup_steps, 1)
        scales = (1.0 - (warmup - 1.0).clamp(min=0.0) / length).where(warmup > 0, torch.ones(()))
        for scale in scales.unique().tolist():
            rows = (scales == scale).nonzero().flatten().tolist()
            adamw(
                [param[r] for r in rows],
                [grad[r] for r in rows],
                [state["exp_avg"][r] for r in rows],
                [state["exp_avg_sq"][r] for r in rows],
                [],
                [state["step"][r] for r in rows],
                foreach=group["foreach"] or param.is_cuda,
                capturable=False,
                differentiable=False,
                fused=False,
                grad_scale=None,
                found_inf=None,
                has_complex=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"] * scale,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
        state["warmup"] = (warmup - 1.0).clamp(min=0.0)


def _in_kernel(group: dict[str, Any], param: Tensor) -> bool:
    return group["fused"] and not group["maximize"] and not group["amsgrad"] and adamw_kernel.takes(param)


def rearranged(state: Mapping[str, Tensor], sources: Sequence[int | None], warmup_steps: int) -> dict[str, Tensor]:
    """AdamW's state of a stacked parameter whose rows are others now.

    Args:
        state: `exp_avg`, `exp_avg_sq` with a first dimension of rows, `step` (one for all, or one a row), `warmup`.
        sources: For each new row the old row that it goes on from, None for one that starts fresh.
        warmup_steps: Learning-rate warm-up of a row that starts fresh.

    Returns:
        The state of the new rows: moments zero, step 0 and the whole warm-up to go where they start fresh.
    """
    kept = torch.tensor([r for r, source in enumerate(sources) if source is not None], dtype=torch.long)
    old = torch.tensor([source for source in sources if source is not None], dtype=torch.long)
    rows = state["exp_avg"].shape[0]
    before = dict(state)
    if state["step"].dim() == 0:
        before |= {"step": state["step"].detach().cpu().float().repeat(rows), "warmup": torch.zeros(rows)}
    after = {}
    for name in ("exp_avg", "exp_avg_sq", *ROW_COUNTERS):
        value = before[name]
        moved = value.new_full((len(sources), *value.shape[1:]), float(warmup_steps) if name == "warmup" else 0.0)
        moved[kept.to(value.device)] = value[old.to(value.device)]
        after[name] = moved
    return after


def moments(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The moment buffers of a parameter: its state but the counters, in a fixed order (empty before a step)."""
    state = optimizer.state.get(param, {})
    return {name: value for name, value in sorted(state.items())
            if isinstance(value, Tensor) and name not in ROW_COUNTERS}  # fmt: skip
