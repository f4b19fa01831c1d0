"""RoutingStability on four real sites: against brute force, and with planted faults."""

import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from fomoe_pl.callbacks import RoutingStability
from fomoe_pl.federation.observer import RoundObserver
from fomoe_pl.metrics.probe import pick_overlap
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as

pytestmark = pytest.mark.timeout(300)  # a fixture trains eight runs of four sites
SITES, K, STEPS = 4, 3, 9
DEAD = (1, 2)  # layer, expert


class Brute(L.Callback, RoundObserver):
    """Keeps what brute force needs of the last round."""

    def __init__(self, stability: RoutingStability) -> None:
        self.stability = stability

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.strategy: Any = trainer.strategy
        self.strategy.observers.append(self)

    def before_synchronization(self) -> None:
        federation = self.strategy.federation
        self.started = {name: t.clone() for name, t in federation.anchors.items()}
        self.local = {name: t.detach().clone() for name, t in federation.layout.tensors.items()}

    def statistics(self) -> Tensor:
        assert self.stability._before is not None
        assert self.stability._after is not None
        self.before, self.after = self.stability._before, self.stability._after
        self.last = self.stability._last_picks
        return super().statistics()


class DeadExpert(L.Callback):
    """Its bias for being chosen is so low that no token ever picks it."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        layer, expert = DEAD
        module.transformer.layers[layer].moe.router.balance_bias[expert] = -100


class ShuffledRouter(L.Callback):
    """Site 2 starts every round with the rows of its routers in another order."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % K == 0 and trainer.global_rank == 2:
            for block in module.transformer.layers:
                block.moe.router.weight.data = block.moe.router.weight.data.roll(1, dims=0)


class InterchangeableExperts(L.Callback):
    """From the start and after every step, all experts of a layer are one: their mean. Routers train as ever."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        for block in module.transformer.layers:
            for tensor in (block.moe.experts.w_in, block.moe.experts.w_out):
                tensor.data[:] = tensor.data.mean(dim=0)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        self.on_train_start(trainer, module)


FAULTS: dict[str, Any] = {
    "healthy": None, "dead": DeadExpert, "shuffled": ShuffledRouter, "interchangeable": InterchangeableExperts,
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"overlap": 2}) for name in ("healthy", "dead", "shuffled")},
    # Where each site has all experts, what it makes equal is equal on all sites after averaging too.
    "full": ("healthy", {"overlap": SITES}),
    "interchangeable": ("interchangeable", {"overlap": SITES}),
    "one_holder": ("healthy", {"overlap": 1}),
    "partitioned": ("healthy", {"overlap": 1, "routing": "partitioned"}),
    "random": ("healthy", {"overlap": 2, "placement": "random", "reshuffle_rounds": 1}),
}


def _fit_all(rank: int, root: str, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    with launched_as(rank, SITES, folder):
        for name, (fault, settings) in RUNS.items():
            stability = RoutingStability(1, 1, 6, 7, other_views_every=1)
            brute = Brute(stability)
            planted = [] if FAULTS[fault] is None else [FAULTS[fault]()]
            run = Run(
                root=root, folder=folder, settings={"local_steps": K, **settings},
                architecture={"n_experts": 8, "balance": "bias", "bias_update_rate": 0.02},
                optimizer={"lr": 0.003},
                trainer={"max_steps": STEPS, "val_check_interval": STEPS, "limit_val_batches": None},
            )  # fmt: skip
            trainer = fit(run, rank, SITES, [*planted, stability, brute])
            assert stability.view is not None
            found[name] = {
                "values": stability.view.values,
                "drift": stability.view.drift_LE,
                "load": stability.view.health.load_LE,
                "validation": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
                "holders": trainer.strategy.federation.placement.holders,
                "brute": (brute.started, brute.local, brute.before.picks_LTK, brute.after.picks_LTK, brute.last),
                "history": stability._history.looks(),
            }
    return found


@pytest.fixture(scope="module")
def found(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(_fit_all, SITES, root, str(tmp_path_factory.mktemp("stability")))


@pytest.mark.parametrize("name", RUNS)
def test_all_sites_have_the_same_keys_and_the_same_sums(found: list[Any], name: str) -> None:
    first = found[0][name]["values"]
    for rank in range(1, SITES):
        values = found[rank][name]["values"]
        assert values.keys() == first.keys()
        differing = {key for key, value in values.items() if value != first[key] and not math.isnan(value)}
        assert all("gate_q" in key for key in differing)  # of the site's own look


def test_loads_are_those_of_all_sites(found: list[Any]) -> None:
    picks_of_a_round = SITES * K * 3 * 16 * 2  # batches of 3 sequences of 16 tokens, 2 picks each
    assert found[0]["healthy"]["load"].sum(dim=1).tolist() == [picks_of_a_round] * 2
    assert found[0]["partitioned"]["load"].sum(dim=1).tolist() == [picks_of_a_round] * 2


def test_agreement_jump_and_churn_by_brute_force(found: list[Any]) -> None:
    sites = [found[rank]["healthy"]["brute"] for rank in range(SITES)]
    values = found[0]["healthy"]["values"]
    pairs = [pick_overlap(a[2], b[2]) for a, b in itertools.combinations(sites, 2)]
    agreement_L = torch.stack(pairs).mean(dim=0)
    jump_L = torch.stack([1 - pick_overlap(before, after) for _, _, before, after, _ in sites]).mean(dim=0)
    churn_L = torch.stack([1 - pick_overlap(last, after) for _, _, _, after, last in sites]).mean(dim=0)
    for layer in range(2):
        assert values[f"routing/site_agreement/layer_{layer:02d}"] == pytest.approx(float(agreement_L[layer]))
        assert values[f"routing/sync_jump/layer_{layer:02d}"] == pytest.approx(float(jump_L[layer]))
        assert values[f"routing/churn/layer_{layer:02d}"] == pytest.approx(float(churn_L[layer]))
    assert 0 < values["routing/site_agreement/mean"] < 1
    assert values["routing/sync_jump/mean"] > 0


def test_drift_by_brute_force(found: list[Any]) -> None:
    holders = found[0]["healthy"]["holders"]
    for layer, expert in ((0, 0), (0, 5), (1, 3)):
        rows = []
        for site in holders[layer][expert]:
            started, local = found[site]["healthy"]["brute"][:2]
            row = [e for e, sites in enumerate(holders[layer]) if site in sites].index(expert)
            names = [f"layers.{layer}.moe.experts.{part}" for part in ("w_in", "w_out")]
            rows.append(torch.cat([local[name][row].flatten() for name in names]))
            agreed = torch.cat([started[name][row].flatten() for name in names])
        stacked = torch.stack(rows)
        distance = (stacked - stacked.mean(dim=0)).square().sum(dim=1).mean().sqrt()
        expected = float(distance / agreed.norm())
        assert float(found[0]["healthy"]["drift"][layer, expert]) == pytest.approx(expected, rel=1e-4)
        assert expected > 0


def test_dense_pseudo_gradient_by_brute_force(found: list[Any]) -> None:
    started, local = (
        [{n: t for n, t in found[rank]["healthy"]["brute"][i].items() if "experts." not in n} for rank in range(SITES)]
        for i in (0, 1)
    )
    names = [name for name in started[0] if "balance_bias" not in name]  # a buffer, moved by no gradient
    flat = [torch.cat([(started[r][n] - local[r][n]).flatten() for n in names]) for r in range(SITES)]
    mean = torch.stack(flat).mean(dim=0)
    assert found[0]["healthy"]["values"]["pseudo_gradient/dense_norm"] == pytest.approx(float(mean.norm()), rel=1e-4)


def test_an_expert_with_one_holder_has_no_drift(found: list[Any]) -> None:
    values = found[0]["one_holder"]["values"]
    assert not [key for key in values if key.startswith("routing/drift")]
    assert values["pseudo_gradient/dense_drift"] > 0
    assert values["routing/site_agreement/mean"] > 0
    # No two sites can pick the same expert.
    assert not [key for key in found[0]["partitioned"]["values"] if key.startswith("routing/site_agreement")]


def test_ghosts_are_measured_against_even_routing(found: list[Any]) -> None:
    for name, ideal in (("healthy", 1 / 2), ("one_holder", 3 / 4), ("partitioned", 0)):
        values = found[0][name]["values"]
        excess = values["routing/ghost_fraction/mean"] - ideal
        assert values["routing/ghost_excess/mean"] == pytest.approx(excess, abs=1e-9)


def test_saturation_is_kept_at_round_ends(found: list[Any]) -> None:
    history = found[0]["healthy"]["history"]
    assert [step for step, _ in history] == [3, 6, 9]
    assert torch.equal(history[-1][1].long(), found[0]["healthy"]["brute"][3])
    assert found[1]["healthy"]["history"] == []  # only who writes it keeps it


def test_a_dead_expert_is_told_apart(found: list[Any]) -> None:
    layer, expert = DEAD
    healthy, dead = found[0]["healthy"], found[0]["dead"]
    assert dead["load"][layer, expert] == 0
    assert healthy["load"][layer, expert] > 0
    tag = f"routing/starved_experts/layer_{layer:02d}"
    assert dead["values"][tag] >= healthy["values"][tag] + 1
    assert dead["values"][tag.replace("starved", "live_starved")] >= 1
    assert dead["validation"][f"val/starved_experts/layer_{layer:02d}"] >= 1


def test_a_site_with_a_shuffled_router_is_told_apart(found: list[Any]) -> None:
    healthy, shuffled = found[0]["healthy"]["values"], found[0]["shuffled"]["values"]
    # Three of six pairs of sites have the shuffled one in them.
    assert shuffled["routing/site_agreement/mean"] < healthy["routing/site_agreement/mean"] - 0.15
    assert shuffled["routing/sync_jump/mean"] > healthy["routing/sync_jump/mean"]
    assert shuffled["pseudo_gradient/dense_drift"] > 1.1 * healthy["pseudo_gradient/dense_drift"]


def test_interchangeable_experts_are_told_apart_by_necessity_alone(found: list[Any]) -> None:
    healthy, same = found[0]["full"], found[0]["interchangeable"]
    assert healthy["validation"]["val/routing_necessity_nats"] > 2e-3
    assert abs(same["validation"]["val/routing_necessity_nats"]) < 1e-6
    for run in (healthy, same):  # everything else looks as it should
        assert run["values"]["routing/starved_experts/mean"] == 0
        assert run["values"]["routing/load_entropy/mean"] > 0.95
        assert 0.4 < run["values"]["routing/site_agreement/mean"] < 0.9  # by chance 0.25
        assert run["values"]["routing/churn/mean"] > 0.3  # the rate is at its peak
        assert run["validation"]["val/domain_information_bits"] > 0.005


def test_own_view_gap_is_only_where_experts_are_missing(found: list[Any]) -> None:
    for name in ("healthy", "one_holder", "partitioned"):
        assert math.isfinite(found[0][name]["validation"]["val/own_view_gap_nats"])


def test_a_probe_that_cannot_be_is_refused(root: str, tmp_path: Path) -> None:
    for settings in ({"every_n_rounds": 0}, {"probe_sequences": -1}, {"probe_tokens": 0}, {"other_views_every": -1}):
        with pytest.raises(ValueError, match="at least"):
            RoutingStability(**settings)
