"""Copies of experts' weights: the same training but for the rounding of gradients, whatever changes the weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.federation import adamw
from fomoe_pl.federation.inner import RowAdamW
from fomoe_pl.model.backends import kernels
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.copies import ExpertCopies
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

cuda = torch.cuda.is_available()
DEVICE = torch.device("cuda" if cuda else "cpu")
# In the interpreter products of bfloat16 are wrong, and rounding to it is truncation.
LOW = torch.bfloat16 if cuda else torch.float16
pytestmark = pytest.mark.skipif(
    kernels.triton is None or not (kernels.INTERPRETED or cuda),
    reason="triton is not installed, or was imported without TRITON_INTERPRET=1",
)
MODES = ["none", "experts", "blocks"]
RESIDENCY = Residency("ghost", ((0, 1, 2), (3, 4, 5)))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(50, (3, 13), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def backward(model: Transformer, seed: int = 0) -> Tensor:
    with torch.autocast(DEVICE.type, LOW):
        total = training_pass(model, *batch(seed)).total
    total.backward()
    return total.detach()


def expert_weights(model: Transformer) -> list[Tensor]:
    return [w for block in model.layers for w in (block.moe.experts.w_in, block.moe.experts.w_out)]


def build(config: ModelConfig) -> Transformer:
    return Transformer(config, RESIDENCY, seed=1, device=DEVICE)


def in_step(copies: ExpertCopies, model: Transformer) -> bool:
    return bool(copies.of) and all(torch.equal(copies.of[w], w.to(LOW)) for w in expert_weights(model))


@pytest.mark.parametrize("mode", ["none", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES if m != "none")])
def test_gradients_are_rounded_and_nothing_else_changes(make_config: Callable[..., ModelConfig], mode: Any) -> None:
    plain, model = build(make_config(expert_backend="triton")), build(
        make_config(expert_backend="triton", activation_checkpointing=mode)
    )  # fmt: skip
    copies = ExpertCopies(model, LOW)
    copies.refresh()
    assert torch.equal(backward(model), backward(plain))
    for name, (ours, theirs) in zip(
        dict(model.named_parameters()), zip(model.parameters(), plain.parameters(), strict=True), strict=True
    ):
        assert ours.grad is not None
        assert theirs.grad is not None
        rounded = ".experts." in name
        assert ours.grad.dtype == (LOW if rounded else torch.float32)
        assert ours.grad.is_contiguous()
        assert torch.equal(ours.grad, theirs.grad.to(ours.grad.dtype)), name
    assert bool(copies.of) == (mode == "none")
    of = copies.of
    copies.remove()
    assert not of  # which an optimizer has
    assert all(w.grad is None for w in expert_weights(model))
    model.zero_grad()
    backward(model)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_gives_the_same_float32_gradients(make_config: Callable[..., ModelConfig], mode: Any) -> None:
    plain, model = (build(make_config(expert_backend="triton", activation_checkpointing=m)) for m in ("none", mode))
    assert torch.equal(backward(model), backward(plain))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_two_passes_add_up(make_config: Callable[..., ModelConfig]) -> None:
    model = build(make_config(expert_backend="triton"))
    ExpertCopies(model, LOW).refresh()
    each = []
    for seed in (0, 1):
        backward(model, seed)
        each.append([w.grad for w in expert_weights(model)])
        model.zero_grad()
    backward(model, 0)
    backward(model, 1)
    for w, first, second in zip(expert_weights(model), *each, strict=True):
        assert torch.equal(w.grad, first + second)  # type: ignore[arg-type, operator]


def test_changed_weights_are_copied_anew(make_config: Callable[..., ModelConfig]) -> None:
    model = build(make_config(expert_backend="triton"))
    copies = ExpertCopies(model, LOW)
    copies.refresh()
    assert in_step(copies, model)
    with torch.no_grad():
        model.layers[1].moe.experts.w_in[2].copy_(torch.ones(()))  # a row that another site sent
        model.layers[0].moe.experts.w_out.mul_(2)  # what sites agreed on
    assert not in_step(copies, model)
    copies.refresh()
    assert in_step(copies, model)
    model.load_state_dict(build(make_config(expert_backend="triton", init_std=0.1)).state_dict())
    assert not in_step(copies, model)
    copies.refresh()
    assert in_step(copies, model)


def test_a_layer_with_all_experts_does_not_read_them(make_config: Callable[..., ModelConfig]) -> None:
    model = build(make_config(expert_backend="triton"))
    other = Transformer(model.config, seed=2, device=DEVICE)
    ExpertCopies(model, LOW).refresh()
    x = torch.randn(2, 5, 32, device=DEVICE)
    experts = other.layers[0].moe.experts
    expected = other.layers[0].moe
    expected.router.load_state_dict(model.layers[0].moe.router.state_dict(), strict=False)
    with torch.no_grad(), torch.autocast(DEVICE.type, LOW):
        with model.layers[0].moe.with_all_experts({"experts.w_in": experts.w_in, "experts.w_out": experts.w_out}):
            found = model.layers[0].moe(x)[0]
        assert torch.equal(found, expected(x)[0])


def test_the_optimizer_writes_them(make_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in the kernel, and of torch's for rows in warm-up; against the same without copies."""
    if not cuda and not adamw.INTERPRETED:
        pytest.skip("the kernel does not run here")
    model, plain = (build(make_config(expert_backend="triton")) for _ in range(2))
    monkeypatch.setattr(adamw, "takes", lambda param: param.dim() == 3)
    copies = ExpertCopies(model, LOW)
    optimizers = [RowAdamW(m.parameters(), lr=0.01, fused=True, row_warmup_steps=2) for m in (model, plain)]
    optimizers[0].copies = copies.of
    for step in range(5):
        copies.refresh()
        if step == 3:
            for m, optimizer in zip((model, plain), optimizers, strict=True):
                optimizer.replace_rows(m.layers[0].moe.experts.w_in, [0, None, 2])
        for m in (model, plain):
            backward(m, step)
        for w in expert_weights(plain):
            w.grad = w.grad.to(LOW).float()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        # A row's steps are seen by the next refresh.
        assert in_step(copies, model) == (step < 3)
    copies.refresh()
    assert in_step(copies, model)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_torch_are_seen(make_config: Callable[..., ModelConfig], fused: bool) -> None:
    """Experts too small for the kernel; torch's fused step changes them without counting a version."""
    model = build(make_config(expert_backend="triton"))
    copies = ExpertCopies(model, LOW)
    optimizer = RowAdamW(model.parameters(), lr=0.01, fused=fused)
    optimizer.copies = copies.of
    for step in range(2):
        copies.refresh()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        assert not in_step(copies, model)
    copies.refresh()
    assert in_step(copies, model)
