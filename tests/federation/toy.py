"""The simulation's model as real tensors of one rank, trained through `Federation` and `RowAdamW`."""

from typing import Any

import torch
from torch import Tensor

from fomoe_pl.federation.agreement import fingerprints
from fomoe_pl.federation.federation import Federation
from fomoe_pl.federation.inner import RowAdamW, moments
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.federation.placement import Placement, all_holder_sets
from fomoe_pl.federation.topology import Topology
from fomoe_pl.federation.transport import Transport
from tests.federation.simulation import (
    BETAS,
    DENSE,
    DENSE_BUFFER,
    EPS,
    EXPERTS,
    LAYERS,
    LR,
    SPARSE,
    SPARSE_BUFFER,
    Case,
    Key,
    buffer_change,
    gradient,
    initial,
    is_buffer,
    layer_of,
)


def toy_layout(placement: Placement, site: int) -> ParameterLayout:
    """This site's tensors with their initial values."""
    residents = placement.residents(site)
    tensors: dict[str, Tensor] = {name: initial((name, None)) for name in DENSE | DENSE_BUFFER}
    for layer in range(LAYERS):
        for name in SPARSE | SPARSE_BUFFER:
            full = f"layer{layer}.{name}"
            tensors[full] = torch.stack([initial((full, expert)) for expert in residents[layer]])
    for name, tensor in tensors.items():
        tensor.requires_grad_(not is_buffer(name))
    expert_layer = {name: layer_of(name) for name in tensors if name.startswith("layer")}
    return ParameterLayout(tensors, expert_layer, frozenset(name for name in tensors if not is_buffer(name)))


def make(
    case: Case, rank: int, options: dict[str, Any] | None = None, **wire_options: Any
) -> tuple[Federation, RowAdamW]:
    """The federation of one rank, with further options, and its inner optimizer."""
    placement = case.place(0)
    layout = toy_layout(placement, rank)
    arcs = all_holder_sets(EXPERTS, LAYERS, case.n_sites, case.overlap, capacities=case.capacities)
    wire = Transport(Topology(case.n_sites, 1, rank), arcs, Ledger(), device=torch.device("cpu"),
                     weights=case.weights, **wire_options)  # fmt: skip
    federation = Federation(
        layout, placement, wire,
        outer=Average(case.lr) if case.rule == "average" else Nesterov(case.lr, case.momentum),
        inner_moments=case.inner_moments, state_on_host=case.on_host, **(options or {}),
    )  # fmt: skip
    trained = [layout.tensors[name] for name in sorted(layout.trained)]
    return federation, RowAdamW(trained, row_warmup_steps=case.warmup, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


@torch.no_grad()
def local_step(case: Case, federation: Federation, optimizer: RowAdamW, step: int) -> None:
    """One inner step with the simulation's gradients."""
    for name, tensor in federation.layout.tensors.items():
        if is_buffer(name):
            tensor += by_row(federation, name, lambda key, _: buffer_change(federation.site, step, key))
        else:
            tensor.grad = by_row(federation, name, lambda key, value: gradient(case, federation.site, step, key, value))
    optimizer.step()


def by_row(federation: Federation, name: str, fn: Any) -> Tensor:
    """`fn(key, value)` of a dense tensor, or of each expert's row, stacked."""
    tensor = federation.layout.tensors[name].detach()
    if name not in federation.layout.expert_layer:
        return fn((name, None), tensor)
    ids = federation.placement.residents(federation.site)[layer_of(name)]
    return torch.stack([fn((name, expert), tensor[row]) for row, expert in enumerate(ids)])


def rows(federation: Federation, tensors: dict[str, Tensor]) -> dict[Key, Tensor]:
    """Key -> copy of its value, from tensors that have the layout's shapes."""
    ids = federation.placement.residents(federation.site)
    found: dict[Key, Tensor] = {}
    for name, tensor in tensors.items():
        if name in federation.layout.expert_layer:
            found |= {(name, e): tensor[r].detach().clone() for r, e in enumerate(ids[layer_of(name)])}
        else:
            found[name, None] = tensor.detach().clone()
    return found


def digest(federation: Federation) -> tuple[int, ...]:
    """Hashes of the agreed dense values."""
    return tuple(int(fingerprints(federation.anchors[name], rows=False)) for name in federation.layout.dense)


def run_case(case: Case, rank: int, **wire_options: Any) -> tuple[list[dict[str, Any]], Federation, RowAdamW]:
    """Train a case on this rank; returns what it had after each round (and its migration)."""
    federation, optimizer = make(case, rank, **wire_options)
    history = []
    for t in range(1, case.rounds + 1):
        for step in range((t - 1) * case.local_steps, t * case.local_steps):
            local_step(case, federation, optimizer, step)
        federation.synchronize(optimizer)
        if case.placement == "random" and t % case.reshuffle_rounds == 0 and t < case.rounds:
            federation.adopt(case.place(t // case.reshuffle_rounds), optimizer)
        trained = {name: federation.layout.tensors[name] for name in federation.layout.trained}
        pairs = {name: moments(optimizer, p) for name, p in trained.items()}
        history.append({
            "anchor": rows(federation, federation.anchors),
            "momentum": rows(federation, federation.state.slots.get("momentum", {})),
            "local": rows(federation, dict(federation.layout.tensors)),
            "m": rows(federation, {name: pair["exp_avg"] for name, pair in pairs.items() if pair}),
            "v": rows(federation, {name: pair["exp_avg_sq"] for name, pair in pairs.items() if pair}),
            "digest": digest(federation),
        })  # fmt: skip
        federation.check_agreement()
    return history, federation, optimizer
