from collections.abc import Callable

import pytest
import torch

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.losses import auxiliary_loss, balance_loss
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.router import Router, RoutingStats


def make(config: ModelConfig, routing: str = "ghost", resident: tuple[int, ...] = (1, 3, 4)) -> Router:
    router = Router(config, routing, resident)
    torch.nn.init.normal_(router.weight)
    return router


def test_sigmoid_gates_are_independent(make_config: Callable[..., ModelConfig]) -> None:
    router, x = make(make_config()), torch.randn(5, 32)
    gates, slots, _ = router(x)
    scores = (x @ router.weight.t()).sigmoid()
    best, ids = scores.topk(2)
    assert torch.allclose(gates, best)
    assert slots.tolist() == [[{1: 0, 3: 1, 4: 2}.get(i, 3) for i in row] for row in ids.tolist()]


@pytest.mark.parametrize("normalize", [False, True])
def test_softmax_is_over_all_scored(make_config: Callable[..., ModelConfig], normalize: bool) -> None:
    router, x = make(make_config(gate="softmax", normalize_gates=normalize)), torch.randn(5, 32)
    gates, _, _ = router(x)
    best = (x @ router.weight.t()).softmax(-1).topk(2).values
    assert torch.allclose(gates, best / best.sum(-1, keepdim=True) if normalize else best)


def test_ghosts_count_in_normalized_gates(make_config: Callable[..., ModelConfig]) -> None:
    config, x = make_config(normalize_gates=True), torch.randn(5, 32)
    partial, full = make(config), make(config, resident=(0, 1, 2, 3, 4, 5))
    full.load_state_dict(partial.state_dict())
    assert torch.equal(partial(x)[0], full(x)[0])


@pytest.mark.parametrize("resident", [(1, 3, 4), (2,)])
def test_partitioned_picks_among_residents(make_config: Callable[..., ModelConfig], resident: tuple[int, ...]) -> None:
    router, x = make(make_config(), "partitioned", resident), torch.randn(5, 32)
    gates, slots, stats = router(x)
    best, ids = (x @ router.weight.t()).sigmoid().topk(min(2, len(resident)))
    assert torch.allclose(gates, best)
    assert torch.equal(slots, ids)
    assert stats.picks == stats.live.item() == ids.numel()
    assert set(stats.load_E.nonzero().flatten().tolist()) <= set(resident)


def test_statistics(make_config: Callable[..., ModelConfig]) -> None:
    router, x = make(make_config()), torch.randn(40, 32)
    _, slots, stats = router(x)
    logits = x @ router.weight.t()
    ids = logits.sigmoid().topk(2).indices
    shares = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    assert stats.picks == 80
    assert stats.load_E.tolist() == [(ids == e).sum().item() for e in range(6)]
    assert stats.live.item() == sum(stats.load_E[e].item() for e in (1, 3, 4)) == (slots < 3).sum()
    torch.testing.assert_close(stats.importance_E, shares.mean(0))
    torch.testing.assert_close(stats.z, logits.exp().sum(-1).log().pow(2).mean())
    entropy = -(shares * shares.log()).sum(-1).mean() / torch.tensor(6.0).log()
    torch.testing.assert_close(stats.gate_entropy, entropy)
    assert [t.requires_grad for t in (stats.load_E, stats.live, stats.importance_E, stats.z, stats.gate_entropy)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_one_scored_expert_has_no_entropy(make_config: Callable[..., ModelConfig]) -> None:
    stats = make(make_config(), "partitioned", (2,))(torch.randn(5, 32))[2]
    assert stats.gate_entropy.item() == 0


def test_counts_do_not_follow_the_default_type(make_config: Callable[..., ModelConfig]) -> None:
    router = make(make_config(n_experts=2, top_k=2), resident=(0, 1))
    torch.set_default_dtype(torch.bfloat16)
    try:
        stats = router(torch.randn(301, 32, dtype=torch.float32))[2]
    finally:
        torch.set_default_dtype(torch.float32)
    # bfloat16 has no 301.
    assert stats.load_E.tolist() == [301, 301]


@pytest.mark.parametrize("mode", ["autocast", "true"])
def test_scores_are_float32_in_any_precision(make_config: Callable[..., ModelConfig], mode: str) -> None:
    router, x = make(make_config()), torch.randn(50, 32)
    if mode == "true":
        router, x = router.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        gates = router(x)[0]
    assert torch.equal(gates, (x.float() @ router.weight.float().t()).sigmoid().topk(2).values)


def stats_of(load: list[float], importance: list[float]) -> RoutingStats:
    zero = torch.zeros(())
    return RoutingStats(torch.tensor(load), zero, int(sum(load)), torch.tensor(importance), zero, zero, zero, zero)


def test_balance_loss_values(make_config: Callable[..., ModelConfig]) -> None:
    uniform, collapsed = stats_of([5, 5, 5, 5], [0.25] * 4), stats_of([20, 0, 0, 0], [1, 0, 0, 0])
    assert balance_loss(uniform, 4).item() == pytest.approx(1)
    assert balance_loss(collapsed, 4).item() == pytest.approx(4)
    # Two residents of four, uniform among themselves: the denominator is the residents.
    assert balance_loss(stats_of([10, 0, 10, 0], [0.5, 0, 0.5, 0]), 2).item() == pytest.approx(1)
    config = make_config(n_experts=4, aux_loss_weight=0.5)
    total = auxiliary_loss([uniform, collapsed], config, Residency.full(config))
    assert total.balance.item() == pytest.approx(2.5)
    assert total.total.item() == pytest.approx(1.25)


@pytest.mark.parametrize(("balance", "weight"), [("aux_loss", 0.01), ("bias", 0.0), ("none", 0.0)])
def test_auxiliary_weights(make_config: Callable[..., ModelConfig], balance: str, weight: float) -> None:
    config = make_config(balance=balance, z_loss_weight=0.1)
    router = make(config)
    stats = [router(torch.randn(9, 32))[2] for _ in range(2)]
    aux = auxiliary_loss(stats, config, Residency("ghost", ((1, 3, 4),) * 2))
    torch.testing.assert_close(aux.total, weight * aux.balance + 0.1 * aux.z)
    aux.total.backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_bias_update_is_a_sign_step(make_config: Callable[..., ModelConfig], routing: str) -> None:
    router = make(make_config(balance="bias"), routing)
    router.update_balance_bias(torch.tensor([9.0, 1, 0, 2, 3, 3]), 0.5)
    # Mean 3 over all; mean 2 over residents 1, 3, 4.
    expected = [-0.5, 0.5, 0.5, 0.5, 0, 0] if routing == "ghost" else [0.5, 0, -0.5]
    assert router.balance_bias.tolist() == expected


def test_bias_chooses_and_leaves_the_gate(make_config: Callable[..., ModelConfig]) -> None:
    router, x = make(make_config(balance="bias", top_k=1), resident=(0, 1, 2, 3, 4, 5)), torch.randn(5, 32)
    router.balance_bias[2] = 10
    gates, slots, _ = router(x)
    assert (slots == 2).all()
    torch.testing.assert_close(gates[:, 0], (x @ router.weight[2]).sigmoid())


def test_bias_balances_a_skewed_router(make_config: Callable[..., ModelConfig]) -> None:
    router = make(make_config(balance="bias"), resident=(0, 1, 2, 3, 4, 5))
    x = torch.randn(512, 32) + 0.3
    with torch.no_grad():
        router.weight.mul_(0.1)
        router.weight[0] += 0.1

    def worst() -> float:
        load_E = router(x)[2].load_E
        return (load_E.max() / load_E.mean()).item()

    before = worst()
    for _ in range(300):
        router.update_balance_bias(router(x)[2].load_E, 0.005)
    assert before > 1.5
    assert worst() < 1.15


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_bias_stays_float32(make_config: Callable[..., ModelConfig], cast: Callable) -> None:
    router = make(make_config(balance="bias"))
    router.balance_bias.fill_(1 + 2**-20)
    router = cast(torch.nn.Sequential(router))[0]
    assert router.weight.dtype != torch.float32
    assert router.balance_bias.dtype == torch.float32
    assert router.balance_bias[0].item() == 1 + 2**-20
    router.update_balance_bias(torch.arange(6.0), 2**-20)
    assert router.balance_bias[0].item() == 1 + 2**-19


def test_only_weight_and_bias_are_saved(make_config: Callable[..., ModelConfig]) -> None:
    assert set(make(make_config(balance="bias")).state_dict()) == {"weight", "balance_bias"}
    assert set(make(make_config()).state_dict()) == {"weight"}


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_random_routing_keeps_the_gates_and_draws_experts_evenly(
    make_config: Callable[..., ModelConfig], gate: str
) -> None:
    config = make_config(gate=gate)
    router = Router(config, "ghost", tuple(range(config.n_experts)))
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(4000, config.d_model) + 0.5  # so that learned picks are uneven
    gates_TK, _, learned = router(x_TD)
    with router.at_random(torch.Generator().manual_seed(0)):
        random_TK, slots_TK, stats = router(x_TD)
    assert torch.equal(random_TK, gates_TK)
    assert all(len(set(picks)) == config.top_k for picks in slots_TK.tolist())  # different experts
    assert torch.equal(stats.picks_TK, slots_TK)
    even = 4000 * config.top_k / config.n_experts
    assert (stats.load_E / even - 1).abs().max() < 0.1
    assert (learned.load_E / even - 1).abs().max() > 0.1
    assert torch.equal(router(x_TD)[2].picks_TK, learned.picks_TK)  # only for a while


def test_picks_are_told_as_expert_ids(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(top_k=1)
    resident = (1, 3)
    router = Router(config, "partitioned", resident)
    torch.nn.init.normal_(router.weight)
    _, _, stats = router(torch.randn(64, config.d_model))
    ids = router.expert_ids(stats.picks_TK)
    assert set(ids.flatten().tolist()) == set(resident)
    assert torch.equal(torch.bincount(ids.flatten(), minlength=config.n_experts).float(), stats.load_E)


@pytest.mark.parametrize("logit", [-1e4, -200.0, -104.0, -95.0, -60.0, 0.0, 200.0])
@pytest.mark.parametrize("balance", ["aux_loss", "bias"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_extreme_logits_have_finite_shares_and_gradients(
    make_config: Callable[..., ModelConfig], logit: float, balance: str, gate: str, normalize: bool, routing: str
) -> None:
    """Also where a bias chooses experts whose scores are nothing beside the others'."""
    config = make_config(gate=gate, balance=balance, normalize_gates=normalize, z_loss_weight=0.1)
    router = make(config, routing)
    n_scored = len(router.weight)
    with torch.no_grad():
        router.weight.fill_(logit / 32)
        router.weight[0] += 1 / 32
        router.weight[-1] -= 300 / 32
        if router.balance_bias is not None:
            router.balance_bias[-2:] = 10
    x = torch.ones(7, 32, requires_grad=True)
    gates, _, stats = router(x)
    assert gates.isfinite().all()
    assert stats.importance_E.sum().item() == pytest.approx(1, rel=1e-5)
    if normalize:
        torch.testing.assert_close(gates.sum(dim=-1), torch.ones(7))
    (gates.square().sum() + balance_loss(stats, n_scored) + 1e-6 * stats.z).backward()
    assert router.weight.grad.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shift", [-150.0, -70.0, -3.0])
def test_shares_are_those_of_exact_arithmetic(make_config: Callable[..., ModelConfig], shift: float) -> None:
    router, x = make(make_config(normalize_gates=True)), torch.zeros(9, 32)
    x[:, 0] = 1
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(-2, 2, len(router.weight)) + shift
    exact = router.weight.detach()[:, 0].double().sigmoid()
    gates, _, stats = router(x)
    torch.testing.assert_close(stats.importance_E.double(), exact / exact.sum(), rtol=1e-5, atol=0)
    top = exact.topk(router.top_k).values
    torch.testing.assert_close(gates[0].double(), top / top.sum(), rtol=1e-5, atol=0)
