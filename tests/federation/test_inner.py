"""RowAdamW: torch's AdamW where nothing was replaced, a fresh AdamW for each replaced row."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from torch import Tensor

from fomoe_pl.federation import adamw
from fomoe_pl.federation.inner import RowAdamW, moments
from fomoe_pl.optimizer import clip_next_step, norm_or_skip, skip_step_if

OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def start(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(1))


def grad(step: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(100 + step))


def steps(optimizer: torch.optim.Optimizer, param: Tensor, first: int, last: int, rows: Any = slice(None)) -> None:
    for step in range(first, last):
        param.grad = grad(step)[rows].clone()
        optimizer.step()


def test_without_replacement_it_is_torchs_adamw_to_the_bit() -> None:
    params = [start().requires_grad_() for _ in range(2)]
    for param, optimizer in zip(
        params, (RowAdamW([params[0]], row_warmup_steps=5, **OPTIONS), torch.optim.AdamW([params[1]], **OPTIONS)),
        strict=True,
    ):  # fmt: skip
        steps(optimizer, param, 0, 6)
    assert torch.equal(params[0], params[1])


def test_the_identity_is_no_replacement() -> None:
    param = start().requires_grad_()
    optimizer = RowAdamW([param], row_warmup_steps=5, **OPTIONS)
    steps(optimizer, param, 0, 2)
    optimizer.replace_rows(param, [0, 1, 2, 3])
    assert optimizer.state[param]["step"].dim() == 0


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_replaced_rows_start_fresh_and_the_others_go_on(warmup: int) -> None:
    param = start().requires_grad_()
    optimizer = RowAdamW([param], row_warmup_steps=warmup, **OPTIONS)
    reference = start().requires_grad_()
    undisturbed = torch.optim.AdamW([reference], **OPTIONS)
    steps(optimizer, param, 0, 3)
    steps(undisturbed, reference, 0, 3)
    optimizer.replace_rows(param, [0, None, 2, None])
    received = start()[[1, 3]] + 1.0
    with torch.no_grad():
        param[[1, 3]] = received
    fresh = received.clone().requires_grad_()
    warmed = torch.optim.AdamW([fresh], **OPTIONS)
    for step in range(3, 10):
        warmed.param_groups[0]["lr"] = OPTIONS["lr"] * (min(1.0, (step - 2) / warmup) if warmup else 1.0)
        steps(warmed, fresh, step, step + 1, [1, 3])
        steps(undisturbed, reference, step, step + 1)
        steps(optimizer, param, step, step + 1)
        torch.testing.assert_close(param[[0, 2]], reference[[0, 2]], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(param[[1, 3]], fresh, rtol=1e-6, atol=1e-7)
    assert optimizer.state[param]["step"].tolist() == [10, 7, 10, 7]
    assert optimizer.state[param]["warmup"].tolist() == [0, 0, 0, 0]


def test_kept_rows_may_change_places() -> None:
    param = start().requires_grad_()
    optimizer = RowAdamW([param], **OPTIONS)
    steps(optimizer, param, 0, 3)
    before = deepcopy(optimizer.state[param])
    optimizer.replace_rows(param, [2, None, 0, 1])
    state = optimizer.state[param]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][[0, 2, 3]], before[name][[2, 0, 1]])
        assert not state[name][1].any()
    optimizer.replace_rows(param, [2, 1, 0, None])
    assert state["step"].tolist() == [3, 0, 3, 0]
    assert torch.equal(state["exp_avg"][[0, 2]], before["exp_avg"][[0, 2]])


def test_other_parameters_and_learning_rate_groups_are_left_alone() -> None:
    params = [start().requires_grad_() for _ in range(4)]
    own = RowAdamW([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5, "eps": 0.1}], **OPTIONS)
    stock = torch.optim.AdamW([{"params": [params[2]]}, {"params": [params[3]], "lr": 0.5, "eps": 0.1}], **OPTIONS)
    for step in range(6):
        if step == 3:
            own.replace_rows(params[0], [None, 1, 2, 3])
        for p in params:
            p.grad = grad(step)
        own.step()
        stock.step()
    assert torch.equal(params[1], params[3])
    assert torch.equal(params[0][1:], params[2][1:])
    assert not torch.equal(params[0][0], params[2][0])


def test_a_parameter_that_took_no_step_yet_has_nothing_to_replace() -> None:
    param = start().requires_grad_()
    optimizer = RowAdamW([param], **OPTIONS)
    optimizer.replace_rows(param, [None, 1, 2, 3])
    assert not optimizer.state[param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_in_mid_warmup_survives_a_checkpoint(dtype: torch.dtype) -> None:
    warmup = 300  # more than bfloat16 can count
    param = start().to(dtype).requires_grad_()
    optimizer = RowAdamW([param], row_warmup_steps=warmup, **OPTIONS)

    def go(opt: torch.optim.Optimizer, p: Tensor, first: int, last: int) -> None:
        for step in range(first, last):
            p.grad = grad(step).to(dtype)
            opt.step()

    go(optimizer, param, 0, 3)
    optimizer.replace_rows(param, [0, None, 2, None])
    go(optimizer, param, 3, 6)
    copy = param.detach().clone().requires_grad_()
    resumed = RowAdamW([copy], row_warmup_steps=warmup, **OPTIONS)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert resumed.state[copy]["warmup"].tolist() == [0, 297, 0, 297]
    go(optimizer, param, 6, 9)
    go(resumed, copy, 6, 9)
    assert torch.equal(param, copy)


def test_closure_and_missing_gradients() -> None:
    param, idle = start().requires_grad_(), start().requires_grad_()
    optimizer = RowAdamW([param, idle], **OPTIONS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.replace_rows(param, [None, 1, 2, 3])
    assert optimizer.step(closure) < first
    assert param.grad is not None
    assert torch.equal(idle, start())


def test_moments_are_adamws_two_and_never_the_row_counters() -> None:
    flat = torch.zeros(4, requires_grad=True)  # one number for each row: its counters have the same shape
    optimizer = RowAdamW([flat], **OPTIONS)
    assert not moments(optimizer, flat)
    flat.grad = torch.ones(4)
    optimizer.step()
    optimizer.replace_rows(flat, [None, 1, 2, 3])
    state = optimizer.state[flat]
    found = moments(optimizer, flat)
    assert [m.data_ptr() for m in found.values()] == [state[name].data_ptr() for name in ("exp_avg", "exp_avg_sq")]


def test_sgd_without_momentum_has_no_moments() -> None:
    param = start().requires_grad_()
    optimizer = torch.optim.SGD([param], lr=0.1)
    steps(optimizer, param, 0, 1)
    assert not moments(optimizer, param)


def test_a_fused_step_lets_gradients_be_clipped() -> None:
    # Lightning asks this before it clips in mixed precision.
    assert not _optimizer_handles_unscaling(RowAdamW([torch.nn.Parameter(torch.ones(2))], fused=True))


def test_a_shorter_warmup_than_the_saved_one_never_turns_a_step_round() -> None:
    param = torch.nn.Parameter(start())
    long = RowAdamW([param], row_warmup_steps=16, **OPTIONS)
    param.grad = grad(0)
    long.step()
    long.replace_rows(param, [0, None, 2, 3])
    short = RowAdamW([param], row_warmup_steps=4, **{**OPTIONS, "weight_decay": 0.0})
    short.load_state_dict(long.state_dict())
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    short.step()
    assert (param[1] < before[1]).all()


@pytest.mark.parametrize("saved_fused", [None, True])
def test_state_of_another_device_leaves_the_kind_of_step_alone(saved_fused: bool | None) -> None:
    saved, found = torch.nn.Parameter(start()), torch.nn.Parameter(start())
    before = RowAdamW([saved], lr=0.1, fused=saved_fused)
    steps(before, saved, 0, 2)
    after = RowAdamW([found], lr=0.1, fused=not saved_fused or None)
    after.load_state_dict(before.state_dict())
    assert after.param_groups[0]["fused"] == (not saved_fused or None)
    assert before.param_groups[0]["fused"] == saved_fused
    if not saved_fused:  # a fused step is skipped on the device; any other refuses to be told so
        kept = found.detach().clone()
        found.grad, after.found_inf = grad(2), torch.ones(())
        after.step()
        assert torch.equal(found, kept)


def test_gradients_of_another_type_are_taken() -> None:
    """Of rows in warm-up and of others; and their norm is that of all."""
    found = []
    for cast in (torch.Tensor.bfloat16, lambda grad: grad.bfloat16().float()):
        params = [start().requires_grad_() for _ in range(3)]
        optimizer = RowAdamW(params, row_warmup_steps=3, **OPTIONS)
        norms = []
        for step in range(4):
            for i, p in enumerate(params):
                p.grad_dtype = None
                p.grad = grad(step) if i == 2 else cast(grad(10 * i + step))
            norms.append(norm_or_skip(optimizer))
            clip_next_step(optimizer, norms[-1], 2.0 * float(norms[-1]))
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                optimizer.replace_rows(params[0], [0, None, 2, 3])
        found.append([*params, *norms])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    expected = torch.stack([grad(10 * i + 3).bfloat16().float() if i < 2 else grad(3) for i in range(3)]).norm()
    assert found[0][-1].dtype == torch.float32
    torch.testing.assert_close(found[0][-1], expected)


@pytest.mark.parametrize("bad", [0, 2])
def test_a_step_without_finite_gradients_does_nothing(bad: int) -> None:
    params = [start().requires_grad_() for _ in range(3)]
    optimizer = RowAdamW(params, **OPTIONS)
    for i, p in enumerate(params):
        p.grad_dtype = None
        p.grad = grad(i).bfloat16() if i < 2 else grad(i)
    assert params[bad].grad is not None
    params[bad].grad[1, 2, 0] = torch.nan
    assert not norm_or_skip(optimizer).isfinite()
    optimizer.step()
    assert all(torch.equal(p, start()) for p in params)


def against_torch(device: str, weight_decay: float, n: int) -> None:
    """Steps of the kernel and of torch's AdamW on gradients scaled beforehand; one of them does nothing."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, n, device=device)) for _ in range(2))
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.9999), eps=1e-6, weight_decay=weight_decay)
    moments, steps = [torch.zeros(n, device=device) for _ in range(2)], torch.zeros((), device=device)
    for i in range(4):
        grad, found_inf = torch.randn(n, generator=generator).to(device), torch.tensor(float(i == 2), device=device)
        factor = torch.tensor(0.5, device=device)
        steps += 1 - found_inf
        with torch.no_grad():
            adamw.step(ours, None, grad, *moments, steps, factor, found_inf,
                       lr=0.1, betas=(0.9, 0.9999), eps=1e-6, weight_decay=weight_decay)  # fmt: skip
        if not found_inf:
            theirs.grad = grad * factor
            reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # a rate of 0.1
    state = reference.state[theirs]
    torch.testing.assert_close(moments, [state["exp_avg"], state["exp_avg_sq"]], rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not adamw.INTERPRETED, reason="triton is not installed, or was imported without TRITON_INTERPRET=1")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_kernel_is_torchs_adamw(weight_decay: float) -> None:
    against_torch("cpu", weight_decay, 2 * adamw.BLOCK + 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_large_and_small_parameters_take_the_same_step_on_a_gpu() -> None:
    """With clipping, a step that is skipped, and rows that were replaced; against the same on the CPU."""
    against_torch("cuda", 0.1, adamw.LARGE + 5)
    generator, found = torch.Generator().manual_seed(0), []
    shapes = [(4, adamw.LARGE), (adamw.LARGE + 1,), (3,)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(6)]
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(p.to(device, copy=True)) for p in start]
        optimizer = RowAdamW(params, lr=0.1, row_warmup_steps=2, fused=device == "cuda" or None)
        for i, values in enumerate(grads):
            if i == 3:
                optimizer.replace_rows(params[0], [1, None, 2, 3])
            for p, grad in zip(params, values, strict=True):
                p.grad = grad.to(device, copy=True)
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            skip_step_if(torch.tensor(i == 1, device=device), optimizer)
            if i != 1:
                clip_next_step(optimizer, norm, 1.0)
            optimizer.step()
        found.append([p.detach().cpu() for p in params])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_large_parameters_alone_are_clipped_too() -> None:
    param = torch.nn.Parameter(torch.zeros(adamw.LARGE, device="cuda"))
    optimizer = RowAdamW([param], lr=0.1, fused=True)
    param.grad = torch.ones_like(param)
    clip_next_step(optimizer, torch.nn.utils.get_total_norm([param.grad]), 1.0)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].norm().item() == pytest.approx(0.1, rel=1e-4)
