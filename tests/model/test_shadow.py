"""Copies of absent experts: every backend against the definition, the model against the full model, new copies."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.codec import codec_of
from fomoe_pl.model.backends import grouped, kernels, loop
from fomoe_pl.model.backends.frozen import Frozen
from fomoe_pl.model.router import lookup

cuda = torch.cuda.is_available()
DEVICE = "cuda" if cuda else "cpu"
runnable = kernels.triton is not None and (kernels.INTERPRETED or cuda)
needs_kernels = pytest.mark.skipif(
    not runnable, reason="triton is not installed, or was imported without TRITON_INTERPRET=1"
)
needs_cuda = pytest.mark.skipif(not cuda, reason="no CUDA device")
BACKENDS = [
    pytest.param(loop.dispatch, id="loop"),
    pytest.param(grouped.dispatch, id="grouped"),
    pytest.param(kernels.dispatch, id="triton", marks=needs_kernels),
]
D, W = 16, 24
RESIDENT = (1, 3, 4)
N, R = 6, len(RESIDENT)
BITS = [2, 4, 8, 16, 32]

# Experts that each token picks; 6 is nobody.
CASES = {
    "mixed": [[0, 1], [2, 3], [3, 0], [5, 2], [1, 0], [4, 1]],
    "nobody too": [[0, 6], [6, 6], [3, 0], [6, 5], [1, 0]],
    "residents alone": [[1, 3], [4, 1], [3, 4]],
    "copies alone": [[0, 2], [5, 0], [5, 2]],
    "empty experts": [[0, 1], [1, 0], [0, 1]],
    "one token": [[5, 3]],
    "one pick each": [[3], [2], [0]],
}


def definition(
    x: Tensor, gates: Tensor, picks: Tensor, w_in: Tensor, w_out: Tensor, kind: str, *, input_gradient: bool
) -> Tensor:
    """One pick after the other; w_in and w_out are of all experts."""
    y = []
    for t in range(picks.shape[0]):
        # So that everything has a gradient, as in the backends.
        total = 0 * (x[t] + gates[t].sum() + w_in.sum() + w_out.sum())
        for k in range(picks.shape[1]):
            expert = int(picks[t, k])
            if expert == N:
                continue
            own = expert in RESIDENT
            h = (x[t] if own or input_gradient else x[t].detach()) @ (w_in[expert] if own else w_in[expert].detach())
            h = F.silu(h[:W]) * h[W:] if kind == "swiglu" else F.silu(h)
            total = total + gates[t, k] * (h @ (w_out[expert] if own else w_out[expert].detach()))
        y.append(total)
    return torch.stack(y)


def run(
    backend: Callable[..., Tensor] | None, case: str, kind: str, bits: int, dtype: torch.dtype, device: str,
    input_gradient: bool = True,
) -> list[Tensor]:  # fmt: skip
    """Output, and the gradients of tokens, gates and the residents' weights; without a backend of the definition."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.tensor(CASES[case])
    shapes = [(len(picks), D), picks.shape, (N, D, W * (2 if kind == "swiglu" else 1)), (N, W, D)]
    x, gates, w_in, w_out = (0.5 * torch.randn(shape, generator=generator).to(device) for shape in shapes)
    codec, resident = codec_of(bits), list(RESIDENT)
    absent = [e for e in range(N) if e not in resident]
    packed = [codec.encode(w[absent].flatten(1)) for w in (w_in, w_out)]
    x = x.to(dtype).requires_grad_()
    gates.requires_grad_()
    if backend is None:
        for w, rows in zip((w_in, w_out), packed, strict=True):
            w[absent] = codec.decode(rows, w[0].numel()).view(len(absent), *w.shape[1:])
        leaves = [w.to(dtype).requires_grad_() for w in (w_in, w_out)]
        y = definition(x, gates, picks, *leaves, kind, input_gradient=input_gradient)
    else:
        leaves = [w[resident].to(dtype).requires_grad_() for w in (w_in, w_out)]
        slot_of_expert = lookup(N, RESIDENT, copied=True)[1]
        frozen = Frozen(*packed, bits, input_gradient, slot_of_expert.to(device))
        slots = torch.cat((slot_of_expert, torch.tensor([N])))[picks].to(device)
        y = backend(x, gates, slots, *leaves, kind, frozen)
    y.backward(torch.randn(y.shape, generator=generator).to(device, dtype))
    found = [y.detach(), *(leaf.grad for leaf in (x, gates, *leaves))]
    if backend is None:
        found[3:] = [gradient[resident] for gradient in found[3:]]  # type: ignore[index]
    return [tensor.float().cpu() for tensor in found]  # type: ignore[union-attr]


def dirty_memory(device: str) -> None:
    """Make it likely that unwritten rows hold NaN."""
    blocks = [torch.full((n,), float("nan"), device=device) for n in (64, 256, 1024, 4096) for _ in range(50)]
    del blocks


KINDS = [("silu", 2), ("swiglu", 4), ("silu", 8), ("swiglu", 16), ("silu", 32)]


@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize(
    ("case", "kind", "bits"), [*[(case, "swiglu", 4) for case in CASES], *[("mixed", *kind) for kind in KINDS[::2]]]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_definition(
    backend: Callable[..., Tensor], case: str, kind: str, bits: int, input_gradient: bool
) -> None:
    expected = run(None, case, kind, bits, torch.float32, "cpu", input_gradient)
    dirty_memory("cpu")
    found = run(backend, case, kind, bits, torch.float32, "cpu", input_gradient)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
