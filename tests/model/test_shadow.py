"""Copies of absent experts: every backend against the definition, the model against the full model, new copies."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe_pl.codec import codec_of
from fomoe_pl.errors import ConfigError
from fomoe_pl.model.backends import grouped, kernels, loop
from fomoe_pl.model.backends.frozen import Frozen, unpack, unpack_copies
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.copies import ExpertCopies
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.recorded import WARM_UP, RecordedPass
from fomoe_pl.model.residency import Residency, Shadow
from fomoe_pl.model.router import lookup
from fomoe_pl.model.transformer import Transformer

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


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(16, 24), (7, 10), (64, 200)])  # groups that are cut; more groups than a program has
def test_copies_are_unpacked_as_the_codec_does(shape: tuple[int, int], bits: int) -> None:
    codec = codec_of(bits)
    packed = codec.encode(torch.randn(3, shape[0] * shape[1]))
    for dtype in (torch.float32, torch.bfloat16 if cuda else torch.float16):
        expected = codec.decode(packed, shape[0] * shape[1], dtype).view(3, *shape)
        for in_kernel in (True, False):
            found = unpack(packed.to(DEVICE), torch.Size(shape), bits, dtype, in_kernel=in_kernel)
            assert torch.equal(found.cpu(), expected)
        one = unpack(packed[1].to(DEVICE), torch.Size(shape), bits, dtype, in_kernel=False)
        assert torch.equal(one.cpu(), expected[1])
        operation = unpack_copies(packed.to(DEVICE), *shape, bits, dtype, True)
        assert torch.equal(operation.cpu(), expected)


@needs_kernels
@pytest.mark.parametrize("input_gradient", [True, False])
def test_tiles_by_descriptor_give_the_same(input_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets' tiles by the copy engine; the copies' offsets do not begin at a multiple of 16 bytes."""
    if cuda and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no such GPU")
    low, n_tokens, width, depth = (torch.bfloat16 if cuda else torch.float16), 150, 64, 32
    weights = [torch.randn(5, width, 2 * depth) / 8, torch.randn(5, depth, width) / 6]
    packed = [codec_of(4).encode(w[3:].flatten(1)).to(DEVICE) for w in weights]
    frozen = Frozen(*packed, 4, input_gradient, torch.arange(5, device=DEVICE))
    given = [torch.randn(n_tokens, width).to(low), torch.rand(n_tokens, 2), *(w[:3] for w in weights)]
    slots = torch.rand(n_tokens, 5).topk(2).indices.to(DEVICE)
    taken = []

    def run(backend: Callable[..., Tensor]) -> list[Tensor]:
        x, gates, *own = leaves = [t.to(DEVICE).requires_grad_() for t in given]
        y = backend(x, gates, slots, *own, "swiglu", frozen)
        y.float().square().sum().backward()
        return [y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]

    by = kernels._by_descriptor
    monkeypatch.setattr(kernels, "_by_descriptor", lambda *given: taken.append(by(*given)) or taken[-1])
    dirty_memory(DEVICE)
    found = run(kernels.dispatch)
    assert taken == [True] * (4 if input_gradient else 3)
    for a, b in zip(found, run(loop.dispatch), strict=True):
        assert a.isfinite().all()
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


HERE = ((0, 2, 5), (1, 2, 3))
OTHER = ((0, 1, 5), (2, 3, 4))


def build(
    make_config: Callable[..., ModelConfig], bits: int | None, *, input_gradient: bool = True, **changes: Any
) -> Transformer:
    """A model with copies, or without bits a whole one."""
    config = make_config(**{"top_k": 3, **changes})
    residency = None if bits is None else Residency("shadow", HERE, Shadow(bits, input_gradient))  # type: ignore[arg-type]
    return Transformer(config, residency, seed=1, device=torch.device(DEVICE))


def batch(seed: int = 0, size: int = 3) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(50, (size, 13), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def step(model: Transformer, **autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a step minimises, and all gradients."""
    model.zero_grad()
    with torch.autocast(DEVICE, **autocast) if autocast else nullcontext():
        total = training_pass(model, *batch()).total
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_copies_of(full: Transformer, part: Transformer) -> None:
    """Put into the whole model's experts what the copies stand for."""
    for layer, block in enumerate(part.layers):
        assert block.moe.shadow is not None
        for name in ("w_in", "w_out"):
            weight = getattr(full.layers[layer].moe.experts, name).data
            rows = part.residency.shadow.codec.decode(getattr(block.moe.shadow, name), weight[0].numel())
            weight[list(part.residency.absent(layer, part.config))] = rows.view(-1, *weight.shape[1:])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_shared_experts": 1, "expert": "swiglu", "gate": "softmax", "normalize_gates": True},
    {"norm": "rmsnorm", "norm_placement": "pre", "balance": "bias", "z_loss_weight": 1e-3, "tie_embeddings": False},
]


@pytest.mark.skipif(cuda, reason="bits are compared on the CPU")
@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: ",".join(changes) or "default")
def test_32_bits_are_the_whole_model_bit_for_bit(
    make_config: Callable[..., ModelConfig], changes: dict[str, Any]
) -> None:
    full, part = (build(make_config, bits, expert_backend="loop", **changes) for bits in (None, 32))
    (expected, all_gradients), (found, gradients) = step(full), step(part)
    assert torch.equal(found, expected)
    rows = part.expert_tensors()
    assert list(gradients) == list(all_gradients)
    for name, gradient in gradients.items():
        of = all_gradients[name]
        assert torch.equal(gradient, of[list(HERE[rows[name]])] if name in rows else of), name


@pytest.mark.parametrize(
    ("backend", "bits", "checkpointing"),
    [
        ("loop", 4, "none"), ("loop", 2, "experts"), ("loop", 8, "blocks"),
        ("grouped", 4, "none"), ("grouped", 16, "experts"), ("grouped", 2, "blocks"),
        pytest.param("triton", 4, "none", marks=needs_kernels),
        pytest.param("triton", 2, "experts", marks=[needs_kernels, pytest.mark.slow]),
    ],
)  # fmt: skip
def test_copies_are_experts_that_do_not_learn(
    make_config: Callable[..., ModelConfig], backend: str, bits: int, checkpointing: str
) -> None:
    part = build(make_config, bits, expert_backend=backend, activation_checkpointing=checkpointing, expert="swiglu")
    full = build(make_config, None, expert_backend="loop", expert="swiglu")
    with_copies_of(full, part)
    how = {"dtype": torch.bfloat16} if cuda and backend != "loop" else {}
    (expected, all_gradients), (found, gradients) = step(full, **how), step(part, **how)
    tolerance: dict[str, float] = {"rtol": 0.1, "atol": 1e-3} if how else {}
    torch.testing.assert_close(found, expected, **tolerance)
    rows = part.expert_tensors()
    for name, gradient in gradients.items():
        of = all_gradients[name]
        of = of[list(HERE[rows[name]])] if name in rows else of
        torch.testing.assert_close(gradient, of, **tolerance, msg=name)
    stats = part(batch()[0])[1]
    own = sum(float(s.load_E[list(here)].sum()) for s, here in zip(stats, HERE, strict=True))
    assert own == sum(int(s.live) for s in stats) < sum(s.picks for s in stats)


@pytest.mark.parametrize("backend", ["loop", "grouped", pytest.param("triton", marks=needs_kernels)])
def test_without_input_gradients_tokens_learn_from_residents_and_gates_from_all(
    make_config: Callable[..., ModelConfig], backend: str
) -> None:
    """Of a token whose picks are all of copies the gates' gradients are those of the whole model, its own are none."""
    moe = [build(make_config, 8, input_gradient=g, expert_backend=backend).layers[0].moe for g in (True, False)]
    x = torch.randn(40, 32, device=DEVICE)
    slots = torch.rand(40, 6, device=DEVICE).topk(3).indices
    slots[:5] = torch.tensor([3, 5, 4])
    found = []
    for each in moe:
        leaves = [x.clone().requires_grad_(), torch.ones(40, 3, device=DEVICE).requires_grad_()]
        assert each.shadow is not None
        dirty_memory(DEVICE)
        y = each.experts(*leaves, slots, each.shadow.frozen(each.router.slot_of_expert))
        y.square().sum().backward()
        found.append([y.detach(), *[leaf.grad for leaf in leaves]])
    (y, dx, dgates), (other_y, other_dx, other_dgates) = found
    torch.testing.assert_close(other_y, y)
    torch.testing.assert_close(other_dgates, dgates)
    assert dx is not None
    assert other_dx is not None
    assert other_dx.isfinite().all()
    assert (other_dx[:5] == 0).all()
    assert (dx[:5] != 0).any()
    alone = (slots < 3).all(dim=1)
    assert alone.any()
    torch.testing.assert_close(other_dx[alone], dx[alone])


@pytest.mark.parametrize("bits", BITS)
def test_initial_copies_are_of_the_whole_models_experts(make_config: Callable[..., ModelConfig], bits: int) -> None:
    full, part = build(make_config, None), build(make_config, bits)
    buffers, weights = dict(part.named_buffers()), dict(full.named_parameters())
    assert len(part.shadow_tensors()) == 4
    for name, layer in part.shadow_tensors().items():
        weight = weights[name.replace(".shadow.", ".experts.")]
        expected = part.residency.shadow.codec.encode(
            weight[list(part.residency.absent(layer, part.config))].flatten(1)
        )
        assert torch.equal(buffers[name], expected)
    assert not set(part.state_dict()) & set(part.shadow_tensors())
    before = {name: buffers[name].clone() for name in part.shadow_tensors()}
    part.bfloat16()
    assert all(torch.equal(dict(part.named_buffers())[name], data) for name, data in before.items())


def test_with_all_experts_there_are_no_copies(make_config: Callable[..., ModelConfig]) -> None:
    full = build(make_config, None, expert_backend="loop")
    for residency in (Residency("shadow", ((0, 1, 2, 3, 4, 5),) * 2), Residency("ghost", ((0, 1, 2, 3, 4, 5),) * 2)):
        model = Transformer(full.config, residency, seed=1, device=torch.device(DEVICE))
        assert model.shadow_tensors() == {}
        assert all(block.moe.shadow is None for block in model.layers)
        (expected, all_gradients), (found, gradients) = step(full), step(model)
        assert torch.equal(found, expected)
        assert all(torch.equal(gradient, all_gradients[name]) for name, gradient in gradients.items())


def test_a_layer_is_evaluated_with_all_experts(make_config: Callable[..., ModelConfig]) -> None:
    full, part = (build(make_config, bits, expert_backend="loop") for bits in (None, 2))
    names = [name for name, _ in part.named_buffers()]
    moe, x = part.layers[0].moe, torch.randn(2, 5, 32, device=DEVICE)
    shadow = moe.shadow
    with torch.no_grad():
        approximate = moe(x)[0]
        whole = {f"experts.{name}": getattr(full.layers[0].moe.experts, name) for name in ("w_in", "w_out")}
        with moe.with_all_experts(whole):
            found, stats = moe(x)
        assert torch.equal(found, full.layers[0].moe(x)[0])
        assert stats.live == stats.picks
        assert moe.shadow is shadow
        assert torch.equal(moe(x)[0], approximate)
        assert not torch.equal(found, approximate)
    assert [name for name, _ in part.named_buffers()] == names


def test_new_residents_keep_the_copies_that_are_left(make_config: Callable[..., ModelConfig]) -> None:
    full, model = build(make_config, None), build(make_config, 4)
    expected = Transformer(model.config, Residency("shadow", OTHER, Shadow(4)), seed=1, device=torch.device(DEVICE))
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    model.set_residency(expected.residency)
    model.load_state_dict(expected.state_dict())
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    assert model.residency.absent(0, model.config) == (2, 3, 4)
    assert not training_pass(model, *batch()).loss.isfinite()  # 2 of layer 0 and 1 of layer 1 have no copies yet
    codec, weights = model.residency.shadow.codec, dict(full.named_parameters())
    with model.refreshing() as staged:
        for layer, expert, row in ((0, 2, 0), (1, 1, 1)):
            for name in ("w_in", "w_out"):
                value = weights[f"layers.{layer}.moe.experts.{name}"][expert].detach()
                staged[f"layers.{layer}.moe.shadow.{name}"][row] = codec.encode(value.flatten())
    for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    assert torch.equal(step(model)[0], step(expected)[0])


def test_a_refresh_that_fails_changes_nothing(make_config: Callable[..., ModelConfig]) -> None:
    model = build(make_config, 4)
    before = [buffer.clone() for buffer in model.buffers()]

    def refresh() -> None:
        with model.refreshing() as staged:
            next(iter(staged.values())).zero_()
            raise RuntimeError("the connection broke")

    with pytest.raises(RuntimeError, match="broke"):
        refresh()
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("grouped", "none"),
        ("grouped", "blocks"),
        pytest.param("triton", "experts", marks=[needs_kernels, pytest.mark.slow]),
    ],
)
def test_compiled_blocks_give_the_same(make_config: Callable[..., ModelConfig], backend: str, mode: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = [build(make_config, 4, expert_backend=backend, activation_checkpointing=mode) for _ in range(2)]
    for block in models[0].layers:
        block.compiled = torch.compile(block.plain, backend="aot_eager", fullgraph=backend == "triton")
    graphs = []
    for _ in range(2):
        (expected, all_gradients), (found, gradients) = step(models[1]), step(models[0])
        torch.testing.assert_close(found, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, all_gradients[name], msg=name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for model in models:
            model.set_residency(Residency("shadow", OTHER, Shadow(4)))
            with model.refreshing() as staged:
                for data in staged.values():
                    data[:] = torch.where(data == 0xFF, 0, data)  # those that have none are zeros
    assert graphs[0] == graphs[1] > 0  # what was compiled for one placement serves others


@needs_kernels
@pytest.mark.parametrize("mode", ["none", pytest.param("experts", marks=pytest.mark.slow)])
def test_residents_gradients_are_rounded_and_nothing_else_changes(
    make_config: Callable[..., ModelConfig], mode: str
) -> None:
    low = torch.bfloat16 if cuda else torch.float16
    plain, model = (build(make_config, 4, expert_backend="triton", activation_checkpointing=m) for m in ("none", mode))
    ExpertCopies(model, low).refresh()
    (expected, exact), (found, gradients) = (step(m, dtype=low) for m in (plain, model))
    assert torch.equal(found, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == (low if ".experts." in name else torch.float32)
        assert torch.equal(gradient, exact[name].to(gradient.dtype)), name


def test_bits_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match=r"shadow_bits = 3: is not one of the choices. Use 2, 4, 8, 16, 32"):
        Shadow(3)  # type: ignore[arg-type]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_definition_on_cuda(
    backend: Callable[..., Tensor], case: str, kind: str, bits: int, input_gradient: bool
) -> None:
    expected = run(None, case, kind, bits, torch.bfloat16, "cpu", input_gradient)
    dirty_memory("cuda")
    found = run(backend, case, kind, bits, torch.bfloat16, "cuda", input_gradient)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.3)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("checkpointing", ["none", "experts", "blocks"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_graph_gives_the_same_bits(
    make_config: Callable[..., ModelConfig], backend: str, compiled: bool, checkpointing: str
) -> None:
    """Before and after other residents and new copies, which the graph reads where the old ones were."""
    found = []
    for is_recorded in (True, False):
        torch._dynamo.reset()
        model = build(make_config, 4, expert_backend=backend, activation_checkpointing=checkpointing)
        if compiled:
            model.compile_blocks()
        run = partial(training_pass, model)
        recorded = RecordedPass(run, model) if is_recorded else None
        said = []
        for i in range(WARM_UP + 6):
            if i == WARM_UP + 3:
                model.set_residency(Residency("shadow", OTHER, Shadow(4)))
                with model.refreshing() as staged:
                    for data in staged.values():
                        data.copy_(torch.arange(data.numel(), device="cuda").view_as(data) % 61)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                done = (recorded or run)(*batch(i, size=16))
            said.append(done.loss.clone())
            if recorded is None or not recorded.backward():
                done.total.backward()
            del done
            said += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        assert recorded is None or recorded.recordings == 1
        found.append(said)
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("input_gradient", [True, False])
def test_a_step_never_waits_for_the_device_and_keeps_no_second_copy(
    make_config: Callable[..., ModelConfig], input_gradient: bool
) -> None:
    """Memory between forward and backward pass is that of ghosts; at most, one layer's copies more."""
    sizes = {"d_model": 256, "d_expert": 512, "n_layers": 4, "n_experts": 16, "top_k": 2, "base_depth": 4}
    config, here = make_config(**sizes, expert_backend="triton", expert="swiglu"), (tuple(range(8)),) * 4
    given, kept, most = batch(size=8), [], []  # a copy to the device makes the host wait
    for residency in (Residency("ghost", here), Residency("shadow", here, Shadow(4, input_gradient))):
        model = Transformer(config, residency, device=torch.device("cuda"))
        copies = ExpertCopies(model, torch.bfloat16)
        for i in range(3):
            model.zero_grad()
            copies.refresh()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                with torch.autocast("cuda", torch.bfloat16):
                    total = training_pass(model, *given).total
                between = torch.cuda.memory_allocated() - before
                total.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            del total
        kept.append(between)
        most.append(torch.cuda.max_memory_allocated() - before)
        copies.remove()
        del model, copies
    layer = 8 * 256 * 512 * 3 * 2
    assert abs(kept[1] - kept[0]) < layer / 8
    assert most[1] - most[0] < 1.1 * layer
