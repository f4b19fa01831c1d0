"""Rung 1 of the ladder: grouped = loop = one pick after the other, forward and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.model import experts as experts_module
from fomoe_pl.model.backends import grouped, kernels, loop
from fomoe_pl.model.backends.loop import Loop
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.experts import Experts
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

D, W = 16, 8
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
R = 4

# Slots of every token's picks; R is a ghost.
CASES = {
    "all live": [[0, 1], [2, 3], [3, 0], [1, 2], [1, 0]],
    "some ghosts": [[0, R], [R, R], [3, 0], [R, 2], [1, 0]],
    "empty experts": [[2, R], [2, R], [R, 2], [2, R], [R, R]],
    "no live pick": [[R, R], [R, R], [R, R]],
    "one token": [[3, 1]],
    "one ghost token": [[R, R]],
    "one pick each": [[3], [R], [0]],
}


BACKENDS = [
    pytest.param(loop.dispatch, id="loop"),
    pytest.param(grouped.dispatch, id="grouped"),
    pytest.param(
        kernels.dispatch,
        id="triton",
        marks=pytest.mark.skipif(
            kernels.triton is None or not (kernels.INTERPRETED or torch.cuda.is_available()),
            reason="triton is not installed, or was imported without TRITON_INTERPRET=1",
        ),
    ),
]


def one_by_one(x: Tensor, gates: Tensor, slots: Tensor, w_in: Tensor, w_out: Tensor, kind: str) -> Tensor:
    """The definition, one pick after the other."""
    y = []
    for t in range(slots.shape[0]):
        # So that everything has a gradient, as in the backends.
        total = 0 * (x[t] + gates[t].sum() + w_in.sum() + w_out.sum())
        for k in range(slots.shape[1]):
            if slots[t, k] < R:
                h = x[t] @ w_in[slots[t, k]]
                h = F.silu(h[:W]) * h[W:] if kind == "swiglu" else F.silu(h)
                total = total + gates[t, k] * (h @ w_out[slots[t, k]])
        y.append(total)
    return torch.stack(y)


def run(backend: Callable[..., Tensor], case: str, kind: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output, and the gradients of tokens, gates and both weights, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    slots = torch.tensor(CASES[case])
    shapes = [(len(slots), D), slots.shape, (R, D, W * (2 if kind == "swiglu" else 1)), (R, W, D)]
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    x, gates, w_in, w_out = leaves
    leaves = [x.to(dtype), gates, w_in.to(dtype), w_out.to(dtype)]
    for leaf in leaves:
        leaf.requires_grad_()
    x, gates, w_in, w_out = leaves
    y = backend(x, gates, slots.to(device), w_in, w_out, kind)
    y.backward(torch.randn(y.shape, generator=generator).to(device, dtype))
    return [tensor.detach().float().cpu() for tensor in (y, *(leaf.grad for leaf in leaves))]


def dirty_memory(device: str) -> None:
    """Make it likely that unwritten rows hold NaN."""
    blocks = [torch.full((n,), float("nan"), device=device) for n in (64, 256, 1024, 4096) for _ in range(50)]
    del blocks


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_definition(backend: Callable[..., Tensor], case: str, kind: str) -> None:
    expected = run(one_by_one, case, kind, torch.float32, "cpu")
    dirty_memory("cpu")
    found = run(backend, case, kind, torch.float32, "cpu")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Poison(torch.autograd.Function):
    """What grouped_mm may do to the rows behind the last offset, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int) -> Tensor:
        ctx.end = end
        return Poison.spoil(x, end)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return Poison.spoil(grads[0], ctx.end), None

    @staticmethod
    def spoil(x: Tensor, end: int) -> Tensor:
        x = x.clone()
        x[end:] = float("nan")
        return x


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("case", CASES)
def test_unwritten_rows_never_leak(monkeypatch: pytest.MonkeyPatch, case: str, kind: str) -> None:
    expected = run(one_by_one, case, kind, torch.float32, "cpu")
    real = F.grouped_mm

    def spoiling(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        end = int(offs[-1])
        return Poison.apply(real(Poison.apply(x, end), weight, offs=offs), end)

    # The accelerator's path: all picks are laid out, ghosts too.
    monkeypatch.setattr(grouped, "_rows_to_lay_out", lambda ends, n_picks: n_picks)
    monkeypatch.setattr(F, "grouped_mm", spoiling)
    for a, b in zip(run(grouped.dispatch, case, kind, torch.float32, "cpu"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_definition_on_cuda(backend: Callable[..., Tensor], case: str, kind: str) -> None:
    expected = run(one_by_one, case, kind, torch.bfloat16, "cpu")
    dirty_memory("cuda")
    found = run(backend, case, kind, torch.bfloat16, "cuda")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["no live pick", "one ghost token"])
def test_ghosts_alone_give_exact_zeros(backend: Callable[..., Tensor], case: str) -> None:
    dirty_memory("cpu")
    for tensor in run(backend, case, "silu", torch.float32, "cpu"):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_bfloat16_grouped_is_loop() -> None:
    for a, b in zip(
        *(run(f, "some ghosts", "swiglu", torch.bfloat16, "cpu") for f in (loop.dispatch, grouped.dispatch)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_in_any_order(backend: Callable[..., Tensor]) -> None:
    slots = torch.tensor(CASES["some ghosts"])
    x, gates = torch.randn(len(slots), D), torch.rand(slots.shape)
    w_in, w_out = torch.randn(R, D, W), torch.randn(R, W, D)
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.cat((order.argsort(), torch.tensor([R])))[slots]
    torch.testing.assert_close(
        backend(x, gates, renamed, w_in[order], w_out[order], "silu"),
        backend(x, gates, slots, w_in, w_out, "silu"),
        rtol=1e-6,
        atol=1e-6,
    )


def layer(config: ModelConfig) -> Experts:
    experts = Experts(config, 2)
    torch.nn.init.normal_(experts.w_in)
    torch.nn.init.normal_(experts.w_out)
    return experts


SLOTS, GATES = torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2)


def test_explicit_grouped_says_why_it_does_not_work(make_config: Callable[..., ModelConfig]) -> None:
    experts = layer(make_config(expert_backend="grouped", d_expert=6))
    with pytest.raises(ConfigError, match=r"expert_backend = 'grouped': .*d_expert \(6\) must be multiples of 4"):
        experts(torch.randn(2, 32), GATES, SLOTS)


def test_auto_falls_back_with_one_message(make_config: Callable[..., ModelConfig]) -> None:
    experts_module._tell_fallback.cache_clear()
    auto, reference = (layer(make_config(expert_backend=name, d_expert=6)) for name in ("auto", "loop"))
    reference.load_state_dict(auto.state_dict())
    x = torch.randn(2, 32)
    with pytest.warns(UserWarning, match="does not take grouped") as told:
        found = [auto(x, GATES, SLOTS) for _ in range(2)]
    assert len(told) == 1
    assert torch.equal(found[0], reference(x, GATES, SLOTS))


def test_experts_follow_autocast(make_config: Callable[..., ModelConfig]) -> None:
    experts = layer(make_config())
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(torch.randn(2, 32), GATES, SLOTS)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert experts.w_in.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("fast", "is not one of the choices"),
        ("nowhere.Backend", "cannot be imported: No module named 'nowhere'"),
        ("fomoe_pl.model.moe.Nothing", "cannot be imported"),
        ("fomoe_pl.model.moe.MoELayer", "is no subclass of fomoe_pl.model.backends.Backend"),
        (".Backend", "cannot be imported"),
    ],
)
def test_what_is_no_backend_is_refused(make_config: Callable[..., ModelConfig], name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rf"expert_backend = '{name}': {rule}"):
        make_config(expert_backend=name)


class NoCopies(Loop):
    computes_copies = False


def test_shadow_routing_needs_a_backend_that_computes_copies(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(n_experts=2, n_layers=1, expert_backend=f"{__name__}.NoCopies")
    with pytest.raises(ConfigError, match="computes no copies of absent experts"):
        Transformer(config, Residency("shadow", ((0,),)))
