"""What a site takes over from a checkpoint of other sites: AdamW's state, tensor by tensor and row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoe_pl.federation.inner import RowAdamW, rearranged


def differences(written_by: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Settings of two federations that differ, `sites 4 -> 2, overlap 2 -> 1`; empty if none does."""
    keys = [k for k in sorted({*written_by, *now}) if written_by.get(k) != now.get(k)]
    return ", ".join(f"{k} {written_by.get(k)} -> {now.get(k)}" for k in keys)


def carry_over(
    own: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    expert_layer: Mapping[str, int],
    residents: Sequence[Sequence[int]],
    n_experts: int,
) -> str:
    """Give an inner optimizer the moments of another site's, as far as there are any.

    Rows of experts that the other site did not hold start as rows that a site receives: zero moments, a step count and
    a learning-rate warm-up of their own. Learning rates and other settings stay the optimizer's.

    Args:
        own: A site's file: `optimizer_states`, `optimizer_names`, `residents`, `expert_layer`.
        optimizer: The inner optimizer, which has not stepped.
        names: Names of its parameters, in order.
        expert_layer: Name -> layer of the stacked expert tensors here.
        residents: Per layer the experts that are held here.
        n_experts: Experts of a layer, E.

    Returns:
        What starts fresh, `3 of 8 experts`, or `everything`.
    """
    [saved] = own["optimizer_states"]
    before: dict[str, dict[str, Any]] = {}
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    for name, i in zip(own["optimizer_names"], ids, strict=True):
        before[name] = saved["state"].get(i, {})
    if not isinstance(optimizer, RowAdamW) or not any("exp_avg" in state for state in before.values()):
        return "everything"
    state_dict = optimizer.state_dict()
    fresh: set[tuple[int, int]] = set()
    held: set[tuple[int, int]] = set()
    for i, name in enumerate(names):
        state: dict[str, Tensor] = before.get(name, {})
        if "exp_avg" not in state:
            continue
        was, layer = own["expert_layer"].get(name), expert_layer.get(name)
        if was is not None or layer is not None:
            # A router is dense in ghost mode, and in partitioned mode its rows are with their experts.
            either = was if layer is None else layer
            old = list(range(n_experts) if was is None else own["residents"][was])
            new = list(range(n_experts) if layer is None else residents[layer])
            sources = [old.index(expert) if expert in old else None for expert in new]
            held |= {(either, expert) for expert in new}
            fresh |= {(either, expert) for expert, source in zip(new, sources, strict=True) if source is None}
            if sources != list(range(len(old))):
                state = rearranged(state, sources, optimizer.row_warmup_steps)
        state_dict["state"][i] = state
    optimizer.load_state_dict(state_dict)
    return f"{len(fresh)} of {len(held)} experts"
