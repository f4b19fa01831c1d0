import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.model import losses

N, D, V = 37, 8, 21


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    targets = torch.randint(0, V, (N,))
    targets[::5] = losses.IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


# One chunk; chunks of 5 tokens, which do not divide N; one token each, because none fits.
@pytest.mark.parametrize("max_bytes", [10**9, 5 * V * 4 + 3, 1])
def test_is_cross_entropy(max_bytes: int) -> None:
    hidden, weight, targets = inputs()
    expected = reference(hidden, weight, targets)
    expected_grads = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = losses.linear_cross_entropy(hidden, weight, targets, max_bytes)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(3 * loss, (hidden, weight)), expected_grads, strict=True):
        torch.testing.assert_close(a, b)
    each = losses.token_losses(hidden, weight, targets, max_bytes)
    torch.testing.assert_close(each, F.cross_entropy(hidden @ weight.t(), targets, reduction="none"))
    assert not each.requires_grad


@pytest.mark.parametrize("mode", ["autocast", "true"])
def test_in_bfloat16(mode: str) -> None:
    hidden, weight, targets = inputs(torch.bfloat16 if mode == "true" else torch.float32)
    exact = reference(hidden.float(), weight.float(), targets)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss = losses.linear_cross_entropy(hidden, weight, targets, 5 * V * 4)
        each = losses.token_losses(hidden, weight, targets, 5 * V * 4)
    assert loss.dtype == each.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(each.sum() / (targets >= 0).sum(), loss)
    for a, b, leaf in zip(torch.autograd.grad(loss, (hidden, weight)), exact_grads, (hidden, weight), strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


def test_many_chunks_add_up_in_bfloat16() -> None:
    hidden, weight = (
        torch.ones(2000, D, dtype=torch.bfloat16),
        torch.zeros(2, D, dtype=torch.bfloat16, requires_grad=True),
    )
    losses.linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.int64), 1).backward()
    # Every token pulls by 1/2 in the same direction; a bfloat16 sum stops growing at 128.
    torch.testing.assert_close(weight.grad[1].float(), torch.full((D,), 0.5))


def test_nothing_counts() -> None:
    hidden, weight, targets = inputs()
    targets[:] = losses.IGNORED
    loss = losses.linear_cross_entropy(hidden, weight, targets, 10**9)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = inputs()
    loss = losses.linear_cross_entropy(1e4 * hidden, weight, targets, 10**9)
    torch.testing.assert_close(loss, reference(1e4 * hidden, weight, targets))


class Largest(torch.overrides.TorchFunctionMode):
    """The largest tensor that any operation returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("evaluation", [False, True])
def test_no_tensor_is_larger_than_a_chunk(evaluation: bool) -> None:
    # Logits of all tokens would be 160 kB, the inputs and their gradients are 4 kB at most.
    tokens, vocab, bound = 200, 200, 20_000
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with Largest() as largest:
        if evaluation:
            losses.token_losses(hidden, weight, targets, bound)
        else:
            losses._LinearCrossEntropy.forward(torch.autograd.function.FunctionCtx(), hidden, weight, targets, bound)
    assert bound / 2 < largest.bytes <= bound
