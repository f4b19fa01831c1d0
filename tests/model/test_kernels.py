"""The kernels beside the backends' own tests: sorting of picks, cross entropy, precision, choice of the backend."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.backends import kernels, loop, rows
from fomoe_pl.model.backends.tuning import TUNED, tuned
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.experts import Experts, choose_backend
from fomoe_pl.model.losses import IGNORED

cuda = torch.cuda.is_available()
DEVICE = "cuda" if cuda else "cpu"
runnable = pytest.mark.skipif(
    kernels.triton is None or not (kernels.INTERPRETED or cuda),
    reason="triton is not installed, or was imported without TRITON_INTERPRET=1",
)


@runnable
@pytest.mark.parametrize(("tokens", "top_k", "resident"), [(1, 1, 1), (700, 2, 3), (300, 4, 64), (2100, 1, 5)])
def test_live_picks_are_sorted_by_expert_and_token(tokens: int, top_k: int, resident: int) -> None:
    slots = torch.randint(resident + 1, (tokens, top_k))
    order, place, offsets = (t.cpu() for t in kernels.index_picks(slots.to(DEVICE), resident))
    flat = slots.flatten()
    live = int((flat < resident).sum())
    expected = torch.sort(flat, stable=True).indices[:live]
    assert torch.equal(order[:live].long(), expected)
    counts = torch.bincount(flat, minlength=resident + 1)[:resident]
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert torch.equal(place[flat == resident], torch.full((tokens * top_k - live,), -1, dtype=torch.int32))
    assert torch.equal(place[expected].long(), torch.arange(live))


@runnable
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize(("vocab", "width"), [(50, 56), (64, 64), (9001, 9008)])  # more than one block of columns
def test_cross_entropy_is_torchs(vocab: int, width: int, with_gradient: bool) -> None:
    logits = 30 * torch.randn(6, width)
    targets = torch.randint(vocab, (6,))
    targets[2] = IGNORED
    reference = logits[:, :vocab].clone().requires_grad_()
    each = F.cross_entropy(reference, targets, reduction="none", ignore_index=IGNORED)
    each.sum().backward()
    given = logits.to(DEVICE, copy=True)
    losses = rows.cross_entropy(given, targets.to(DEVICE), vocab, with_gradient=with_gradient).cpu()
    torch.testing.assert_close(losses, each.detach(), rtol=1e-5, atol=1e-5)
    expected = F.pad(reference.grad, (0, width - vocab)) if with_gradient else logits
    torch.testing.assert_close(given.cpu(), expected, rtol=1e-4, atol=1e-6)


@runnable
@pytest.mark.parametrize(("tokens", "scored", "top_k"), [(1, 1, 1), (70, 6, 2), (33, 64, 8), (16, 5, 5), (5, 130, 3)])
def test_the_largest_scores_are_chosen_and_counted(tokens: int, scored: int, top_k: int) -> None:
    scores = torch.randn(tokens, scored)
    chosen, counts = (t.cpu() for t in rows.choose_experts(scores.to(DEVICE), top_k))
    assert torch.equal(chosen, scores.topk(top_k).indices)
    assert torch.equal(counts.sum(0), torch.bincount(chosen.flatten(), minlength=scored).int())


@runnable
def test_there_are_always_so_many_different_experts_to_choose() -> None:
    scores = torch.zeros(20, 7)  # all alike: the first ones
    scores[1, :] = torch.nan
    scores[2, 1:] = torch.nan
    scores[3, 4] = torch.inf
    scores[4, 0] = -torch.inf
    chosen, counts = (t.cpu() for t in rows.choose_experts(scores.to(DEVICE), 3))
    expected = torch.arange(3).repeat(20, 1)
    expected[3], expected[4] = torch.tensor([4, 0, 1]), torch.tensor([1, 2, 3])
    assert torch.equal(chosen, expected)
    assert counts.sum() == 60


@runnable
def test_float32_weights_have_float32_gradients_of_bfloat16_products() -> None:
    x, gates, slots = torch.randn(20, 16), torch.rand(20, 2), torch.randint(4, (20, 2))
    w_in, w_out = torch.randn(3, 16, 32), torch.randn(3, 16, 16)
    leaves = [t.to(DEVICE).requires_grad_() for t in (w_in, w_out)]
    y = kernels.dispatch(x.to(DEVICE, torch.bfloat16), gates.to(DEVICE), slots.to(DEVICE), *leaves, "swiglu")
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        # More digits than bfloat16 has: nothing was rounded on the way.
        assert not torch.equal(leaf.grad, leaf.grad.bfloat16().float())


@runnable
@pytest.mark.parametrize(("d_model", "d_expert", "by_descriptor"), [(64, 32, True), (256, 128, True), (48, 40, False)])
def test_tiles_by_descriptor_give_the_same(
    d_model: int, d_expert: int, by_descriptor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of no, one, few and many rows, and nobody's rows behind the last, which hold what the memory held."""
    if cuda and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no such GPU")
    low, top_k, n_tokens = (torch.bfloat16 if cuda else torch.float16), 2, 300
    slots = torch.full((n_tokens, top_k), 5)
    slots[:, 0], slots[::3, 1], slots[5, 1], slots[6:40, 1] = 4, 1, 0, 3
    given = [torch.randn(n_tokens, d_model).to(low), torch.rand(n_tokens, top_k)]
    given += [torch.randn(5, d_model, 2 * d_expert) / d_model**0.5, torch.randn(5, d_expert, d_model) / d_expert**0.5]
    taken = []

    def run(backend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        x, gates, *weights = leaves = [t.to(DEVICE).requires_grad_() for t in given]
        y = backend(x, gates, slots.to(DEVICE), *weights, "swiglu")
        y.float().square().sum().backward()
        return [y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]

    by = kernels._by_descriptor
    monkeypatch.setattr(kernels, "_by_descriptor", lambda *given: taken.append(by(*given)) or taken[-1])
    found = run(kernels.dispatch)
    assert taken == [by_descriptor] * 2
    monkeypatch.setattr(kernels, "_by_descriptor", lambda *given: False)
    for a, b, c in zip(found, run(kernels.dispatch), run(loop.dispatch), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert (a.float() - c.float()).norm() < 0.02 * c.float().norm()


SHARED = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024}
"""Bytes that a program may have on an A100, a 4090, an H100, a B200 and a 5090, by compute capability."""


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_sizes_and_shared_memory(itemsize: int, capability: tuple[int, int]) -> None:
    shared = SHARED[capability]
    for d_model, d_expert, rows_per_expert in ((1024, 512, 2048), (4096, 1024, 64), (16, 8, 1)):
        given = tuned(itemsize, d_model, d_expert, rows_per_expert, shared_bytes=shared, capability=capability)
        for name, tiles in given._asdict().items():
            blocks = (tiles.rows + tiles.columns * (2 if name == "up" else 1)) * tiles.depth * itemsize
            assert tiles.stages >= 2
            assert 2 * blocks <= shared
            assert all(n & (n - 1) == 0 and n >= 16 for n in tiles[:3])
    assert tuned(2, 1024, 512, 2048, shared_bytes=227 * 1024, capability=(9, 0)) == TUNED[2]


@pytest.mark.slow
@pytest.mark.skipif(not kernels.triton, reason="triton is not installed")
def test_what_is_compiled_fits_every_generation(tmp_path: Path) -> None:
    """For GPUs that are not here; the longest 20 seconds of these tests, and nobody has all of these."""
    script = Path(__file__).with_name("compiled_kernels.py")
    asked = [[*capability, shared] for capability, shared in SHARED.items()]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(asked)], capture_output=True, text=True, timeout=500,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [len(kernels_) for kernels_ in found] == [7] * len(SHARED)
    for capability, of_kernels in zip(SHARED, found, strict=True):
        for name, used in of_kernels.items():
            least = 0 if name == "coding" else 32 * 1024
            assert least < used <= SHARED[capability], (capability, name, used)


@runnable
def test_the_same_bits_again(make_config: Callable[..., ModelConfig]) -> None:
    experts = Experts(make_config(expert_backend="triton"), 3, device=torch.device(DEVICE))
    torch.nn.init.normal_(experts.w_in)
    torch.nn.init.normal_(experts.w_out)
    x, gates, slots = torch.randn(50, 32), torch.rand(50, 2), torch.randint(4, (50, 2))
    found = []
    for _ in range(2):
        experts.zero_grad()
        y = experts(x.to(DEVICE), gates.to(DEVICE), slots.to(DEVICE))
        y.square().sum().backward()
        found.append([y.detach(), experts.w_in.grad, experts.w_out.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_cpu_does_not_take_the_kernels_by_itself() -> None:
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 16, 32) == "grouped"


def test_why_the_kernels_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    for have, reason in ((object(), "triton does not run on cpu"), (None, "triton is not installed")):
        monkeypatch.setattr(kernels, "triton", have)
        with pytest.raises(ConfigError, match=f"expert_backend = 'triton': does not work here: {reason}"):
            choose_backend("triton", device, torch.float32, 16, 32)
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch.version, "hip", "6.4")  # where torch calls AMD's GPUs cuda
    assert kernels.unsupported(torch.device("cuda"), torch.bfloat16) == "they were written for NVIDIA's GPUs"


@pytest.mark.gpu
@pytest.mark.skipif(not cuda, reason="no CUDA device")
@pytest.mark.parametrize("resident", [64, 32, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 7e-3), (torch.float32, 3e-6)])
def test_close_to_float64_on_fresh_data(dtype: torch.dtype, tolerance: float, resident: int) -> None:
    x, gates = torch.randn(2048, 256, device="cuda").to(dtype), torch.rand(2048, 8, device="cuda")
    slots = torch.rand(2048, 64, device="cuda").topk(8).indices.clamp(max=resident)
    weights = (torch.randn(resident, 256, 256, device="cuda") / 16, torch.randn(resident, 128, 256, device="cuda") / 11)
    upstream = torch.randn(2048, 256, device="cuda").to(dtype)

    def run(backend: Callable[..., torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(kind if i == 0 or kind == torch.float64 else t.dtype).requires_grad_()
                  for i, t in enumerate((x, gates, *weights))]  # fmt: skip
        y = backend(leaves[0], leaves[1], slots, *leaves[2:], "swiglu")
        y.backward(upstream.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]

    for ours, exact in zip(run(kernels.dispatch, dtype), run(loop.dispatch, torch.float64), strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()
