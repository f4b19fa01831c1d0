"""M sites simulated in one process, parameter by parameter, in float64: what the real thing must equal.

Nothing of `fomoe_pl.federation` computes here but the placement. A key is (name, expert), expert None for dense.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fomoe_pl.federation.placement import Placement, PlacementKind, place

LAYERS, EXPERTS, SITES = 2, 4, 4
DENSE = {"embedding": (5, 3), "norm": (3,)}
DENSE_BUFFER = {"router.dense_bias": (4,)}
SPARSE = {"w_in": (3, 2), "w_out": (2, 3)}
SPARSE_BUFFER = {"expert_bias": ()}
LR, BETAS, EPS = 0.05, (0.9, 0.95), 1e-8

Key = tuple[str, int | None]


@dataclass(frozen=True)
class Case:
    """One setting of a federation; see `Federation` and `RowAdamW`."""

    overlap: int
    placement: PlacementKind = "fixed"
    rule: str = "average"
    lr: float = 1.0
    momentum: float = 0.9
    inner_moments: str = "keep"
    warmup: int = 5
    local_steps: int = 4
    rounds: int = 3
    reshuffle_rounds: int = 1
    untouched: int | None = None  # an expert that gets no gradient after the first round
    n_sites: int = SITES
    capacities: tuple[int, ...] | None = None
    weights: tuple[int, ...] | None = None
    on_host: bool = False  # anchors and momentum, which are copied for each use

    def place(self, epoch: int) -> Placement:
        return place(self.placement, n_layers=LAYERS, n_experts=EXPERTS, n_sites=self.n_sites, overlap=self.overlap,
                     seed=7, draw=epoch, capacities=self.capacities)  # fmt: skip


def shapes() -> dict[Key, tuple[int, ...]]:
    """All keys of the global model with the shape of their value."""
    sparse = {
        (f"layer{layer}.{name}", expert): shape
        for layer in range(LAYERS)
        for name, shape in (SPARSE | SPARSE_BUFFER).items()
        for expert in range(EXPERTS)
    }
    return {(name, None): shape for name, shape in (DENSE | DENSE_BUFFER).items()} | sparse


def is_buffer(name: str) -> bool:
    return name.endswith("_bias")


def layer_of(name: str) -> int:
    return int(name.removeprefix("layer").partition(".")[0])


def draw(*seed: object, shape: tuple[int, ...]) -> Tensor:
    """A float32 normal tensor that follows from `seed` alone."""
    generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(repr(seed))) % 2**63)
    return torch.randn(shape, generator=generator)


def initial(key: Key) -> Tensor:
    return draw("init", key, shape=shapes()[key])


def gradient(case: Case, site: int, step: int, key: Key, value: Tensor) -> Tensor:
    """The gradient of one value at one site and step: half the value plus this site's noise."""
    if case.untouched is not None and key[1] == case.untouched and step >= case.local_steps:
        return torch.zeros_like(value)
    return 0.5 * value + draw("noise", site, step, key, shape=tuple(value.shape)).to(value.dtype)


def buffer_change(site: int, step: int, key: Key) -> Tensor:
    return 0.01 * draw("buffer", site, step, key, shape=shapes()[key])


@dataclass
class Value:
    """One value at one site, with its AdamW state."""

    p: Tensor
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    steps: int = 0
    received: bool = False

    def __post_init__(self) -> None:
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)

    def adamw(self, g: Tensor, warmup: int) -> None:
        self.steps += 1
        lr = LR * min(1.0, self.steps / warmup) if self.received and warmup else LR
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        m_hat, v_hat = self.m / (1 - BETAS[0] ** self.steps), self.v / (1 - BETAS[1] ** self.steps)
        self.p = self.p - lr * m_hat / (v_hat.sqrt() + EPS)


def simulate(case: Case) -> list[dict[str, Any]]:
    """Run a case; returns for each round the anchors, momenta, and every site's values with their moments."""
    placement = case.place(0)
    anchor = {key: initial(key).double() for key in shapes()}
    momentum = {key: torch.zeros_like(value) for key, value in anchor.items()}
    sites = [{key: Value(anchor[key].clone()) for key in keys(placement, s)} for s in range(case.n_sites)]
    history = []
    for t in range(1, case.rounds + 1):
        for step in range((t - 1) * case.local_steps, t * case.local_steps):
            for s, values in enumerate(sites):
                for key, value in values.items():
                    if is_buffer(key[0]):
                        value.p = value.p + buffer_change(s, step, key).double()
                    else:
                        value.adamw(gradient(case, s, step, key, value.p), case.warmup)
        for key in anchor:
            held = [values[key] for values in sites if key in values]
            all_weights = case.weights or (1,) * case.n_sites
            weights = [weight for weight, values in zip(all_weights, sites, strict=True) if key in values]
            weighted = list(zip(weights, held, strict=True))
            delta = sum(weight * (anchor[key] - value.p) for weight, value in weighted) / sum(weights)
            if is_buffer(key[0]):
                anchor[key] = anchor[key] - delta
            elif case.rule == "average":
                anchor[key] = anchor[key] - case.lr * delta
            elif key[1] is None or bool((delta != 0).any()):
                momentum[key] = case.momentum * momentum[key] + delta
                anchor[key] = anchor[key] - case.lr * (delta + case.momentum * momentum[key])
            mean_m, mean_v = (
                sum(weight * getattr(value, n) for weight, value in weighted) / sum(weights) for n in ("m", "v")
            )
            for value in held:
                value.p = anchor[key].clone()
                if case.inner_moments == "average":
                    value.m, value.v = mean_m.clone(), mean_v.clone()
                elif case.inner_moments == "reset":
                    value.__post_init__()
                    value.steps, value.received = 0, False
        if case.placement == "random" and t % case.reshuffle_rounds == 0 and t < case.rounds:
            placement = case.place(t // case.reshuffle_rounds)
            for s, values in enumerate(sites):
                new = {}
                for key in keys(placement, s):
                    # With `reset` everybody is fresh, so a received expert is no different from a kept one.
                    fresh = Value(anchor[key].clone(), received=case.inner_moments != "reset")
                    new[key] = values.get(key, fresh)
                sites[s] = new
        history.append({
            "anchor": dict(anchor), "momentum": dict(momentum),
            "sites": [{key: (v.p, v.m, v.v) for key, v in values.items()} for values in sites],
        })  # fmt: skip
    return history


def keys(placement: Placement, site: int) -> list[Key]:
    """The keys of what `site` holds."""
    residents = placement.residents(site)
    return [key for key in shapes() if key[1] is None or key[1] in residents[layer_of(key[0])]]
