"""Rung 2 of the ladder (ghosts), evaluation layer by layer, precision, checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.model.attention import rotary_tables, rotate
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parts import Norm
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

RESIDENT = ((0, 2, 5), (1, 2, 3))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 9))


def train_loss(model: Transformer, tokens: Tensor) -> Tensor:
    return training_pass(model, tokens[:, :-1], tokens[:, 1:]).total


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    train_loss(model, tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_shared_experts": 1, "expert": "swiglu", "gate": "softmax", "normalize_gates": True},
    {"norm": "rmsnorm", "norm_placement": "pre", "qk_norm": "head", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    {"balance": "bias", "tie_embeddings": False, "parametrization": "standard", "qk_norm": "full"},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: ",".join(changes) or "default")
def test_all_resident_is_the_full_model_in_both_modes(
    make_config: Callable[..., ModelConfig], tokens: Tensor, changes: dict[str, Any]
) -> None:
    config = make_config(**changes)
    everything = ((0, 1, 2, 3, 4, 5),) * 2
    found = [
        gradients(Transformer(config, residency), tokens)
        for residency in (None, Residency("ghost", everything), Residency("partitioned", everything))
    ]
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name
        assert torch.equal(found[2][name], expected), name


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: ",".join(changes) or "default")
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_ghosts_are_experts_whose_output_is_zero(
    make_config: Callable[..., ModelConfig], tokens: Tensor, changes: dict[str, Any], backend: str
) -> None:
    config = make_config(expert_backend=backend, **changes)
    part, full = Transformer(config, Residency("ghost", RESIDENT)), Transformer(config)
    for block, resident in zip(full.layers, RESIDENT, strict=True):
        with torch.no_grad():
            block.moe.experts.w_out[[e for e in range(6) if e not in resident]] = 0
    torch.testing.assert_close(part(tokens)[0], full(tokens)[0])
    part_grads, full_grads = gradients(part, tokens), gradients(full, tokens)
    rows = part.expert_tensors()
    for name, gradient in part_grads.items():
        expected = full_grads[name][list(RESIDENT[rows[name]])] if name in rows else full_grads[name]
        torch.testing.assert_close(gradient, expected, msg=name)


def test_a_token_of_ghosts_alone_passes_unchanged(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(top_k=1)
    block = Transformer(config, Residency("ghost", ((0,),) * 2)).layers[0]
    with torch.no_grad():
        # A router that never picks the only resident.
        block.moe.router.weight.zero_()
        block.moe.router.balance_bias = torch.tensor([-1.0, 0, 0, 0, 0, 0])
    x = torch.randn(2, 5, 32, requires_grad=True)
    y, stats = block.moe(x)
    assert stats.live.item() == 0
    assert torch.equal(block.moe_out_norm(y), torch.zeros_like(y))
    block(x)[0].sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in block.moe.experts.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("balance", ["aux_loss", "bias"])
@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_layer_by_layer_evaluation_is_the_full_model(
    make_config: Callable[..., ModelConfig], tokens: Tensor, routing: str, balance: str
) -> None:
    config = make_config(balance=balance)
    full, part = Transformer(config), Transformer(config, Residency(routing, RESIDENT))
    whole = dict(full.named_parameters()) | dict(full.named_buffers())
    rotary_tables.cache_clear()
    before = {name: tensor.clone() for name, tensor in (*part.named_parameters(), *part.named_buffers())}
    with torch.inference_mode():
        x = part.embed(tokens)
        for layer, block in enumerate(part.layers):
            names = [name for name, of in part.expert_tensors().items() if of == layer]
            tensors = {name.removeprefix(f"layers.{layer}.moe."): whole[name].detach() for name in names}
            with block.moe.with_all_experts(tensors):
                assert block.moe.experts.w_in.data_ptr() == tensors["experts.w_in"].data_ptr()
                x, stats = block(x)
            assert stats.live.item() == stats.picks
        assert torch.equal(part.finish(x), full(tokens)[0])
    after = dict(part.named_parameters()) | dict(part.named_buffers())
    assert list(before) == [name for name, _ in (*part.named_parameters(), *part.named_buffers())]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in part.parameters())
    # Tables cached during evaluation serve training.
    part.loss(part(tokens)[0], tokens).backward()


def test_experts_return_when_evaluation_fails(make_config: Callable[..., ModelConfig]) -> None:
    moe = Transformer(make_config(), Residency("ghost", RESIDENT)).layers[0].moe
    kept = moe.experts.w_in
    everything = {"experts.w_in": torch.ones(6, 32, 16), "experts.w_out": torch.ones(6, 16, 32)}
    # A token of the wrong width.
    with pytest.raises(RuntimeError), moe.with_all_experts(everything):
        moe(torch.ones(1, 1, 31))
    assert moe.experts.w_in is kept
    assert moe.router.resident_ids.tolist() == [0, 2, 5]


@pytest.mark.parametrize("routing", ["ghost", "partitioned"])
def test_new_residents_with_their_rows_are_a_new_model(
    make_config: Callable[..., ModelConfig], tokens: Tensor, routing: str
) -> None:
    config, other = make_config(balance="bias"), ((1, 3, 4), (0, 2, 5))
    model, expected = (Transformer(config, Residency(routing, experts)) for experts in (RESIDENT, other))
    lookups = [block.moe.router.slot_of_expert for block in model.layers]
    model.set_residency(Residency(routing, other))
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(tokens)[0], expected(tokens)[0])
    assert all(block.moe.router.slot_of_expert is kept for block, kept in zip(model.layers, lookups, strict=True))
    assert model.residency.experts == other


def test_expert_tensors(make_config: Callable[..., ModelConfig]) -> None:
    config = make_config(balance="bias")
    ghost = Transformer(config, Residency("ghost", RESIDENT)).expert_tensors()
    model = Transformer(config, Residency("partitioned", RESIDENT))
    partitioned = model.expert_tensors()
    assert set(partitioned) - set(ghost) == {
        f"layers.{layer}.moe.router.{name}" for layer in (0, 1) for name in ("weight", "balance_bias")
    }
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(tensors[name].shape[0] == 3 and f"layers.{layer}." in name for name, layer in partitioned.items())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("mode", ["experts", "blocks"])
def test_checkpointing_changes_nothing(
    make_config: Callable[..., ModelConfig], tokens: Tensor, mode: str, backend: str, compiled: bool
) -> None:
    torch._dynamo.reset()
    models = [
        Transformer(make_config(activation_checkpointing=m, expert_backend=backend), Residency("ghost", RESIDENT))
        for m in ("none", mode)
    ]
    if compiled:
        for block in (block for model in models for block in model.layers):
            block.compiled = torch.compile(block.plain, backend="aot_eager")
    plain, recomputed = (gradients(model, tokens) for model in models)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: ",".join(changes) or "default")
@pytest.mark.parametrize("mode", ["autocast", "true"])
def test_bfloat16_is_near_float32(
    make_config: Callable[..., ModelConfig], tokens: Tensor, changes: dict[str, Any], mode: str
) -> None:
    model = Transformer(make_config(**changes), Residency("ghost", RESIDENT))
    exact = train_loss(model, tokens).item()
    if mode == "true":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss = train_loss(model, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.01)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == parameter.dtype, name


def test_losses_agree_and_ignore(make_config: Callable[..., ModelConfig], tokens: Tensor) -> None:
    model = Transformer(make_config(loss_chunk_bytes=50 * 4 * 7))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    hidden, _ = model(tokens)
    each = model.token_losses(hidden, targets)
    assert each.shape == targets.shape
    assert (each[:, -1] == 0).all()
    torch.testing.assert_close(model.loss(hidden, targets), each.sum() / 24)
    expected = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(hidden, targets), expected)


def test_later_tokens_do_not_matter(make_config: Callable[..., ModelConfig], tokens: Tensor) -> None:
    model = Transformer(make_config())
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    a, b = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_rotation_keeps_lengths_and_shows_distances() -> None:
    cos, sin = rotary_tables(12, 16, 10000.0, torch.device("cpu"))
    q, k = torch.randn(16).expand(12, 16), torch.randn(16).expand(12, 16)
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = turned_q @ turned_k.t()
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_a_norm_keeps_its_float32_weight_in_mixed_precision(make_config: Callable[..., ModelConfig], kind: str) -> None:
    norm = Norm(4, make_config(norm=kind))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.tensor([1.0, 1.001, 1.002, 1.003])  # bfloat16 has nothing between 1 and 1.0078
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        norm.weight.fill_(1.0)
        plain = norm(x).float()
        norm.weight.copy_(weight)
        torch.testing.assert_close(norm(x).float(), plain * weight, rtol=1e-5, atol=1e-6)


def test_state_is_weights_alone(make_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(make_config(balance="bias"))
    extra = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    assert extra == {f"layers.{layer}.moe.router.balance_bias" for layer in (0, 1)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: ",".join(changes) or "default")
def test_a_step_on_cuda_never_waits_for_the_device(
    make_config: Callable[..., ModelConfig], tokens: Tensor, changes: dict[str, Any]
) -> None:
    config = make_config(expert_backend="grouped", **changes)
    on_cpu = Transformer(config, Residency("ghost", RESIDENT))
    model = Transformer(config, Residency("ghost", RESIDENT)).cuda()
    expected = train_loss(on_cpu, tokens).item()
    tokens = tokens.cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = train_loss(model, tokens)
        loss.backward()
        return loss

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(expected, rel=0.01)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_rms_norm_on_a_cpu_is_torchs_in_values_and_gradients(make_config: Callable[..., ModelConfig]) -> None:
    norm = Norm(16, make_config(norm="rmsnorm"), dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    along = torch.randn(2, 3, 16, dtype=torch.float64)
    ours, theirs = norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, norm.eps)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (x, norm.weight), along) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
