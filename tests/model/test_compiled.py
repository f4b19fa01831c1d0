"""Compiled blocks: the same numbers, and one compilation for all layers, placements and ghosts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fomoe_pl.model.backends import kernels
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.passes import training_pass
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer

FIRST, SECOND = ((0, 1, 2), (3, 4, 5)), ((1, 3, 5), (0, 2, 4))


def step(model: Transformer, batch: int = 3) -> list[Tensor]:
    """Loss and gradients of the same tokens each time."""
    device = model.embedding.weight.device
    tokens = torch.randint(50, (batch, 13), generator=torch.Generator().manual_seed(0)).to(device)
    model.zero_grad()
    loss = training_pass(model, tokens[:, :-1], tokens[:, 1:]).total
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.skipif(
    not kernels.INTERPRETED, reason="triton is not installed, or was imported without TRITON_INTERPRET=1"
)
def test_one_graph_serves_layers_and_placements(
    make_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    config = make_config(expert_backend="triton")
    model = Transformer(config, Residency("ghost", FIRST))
    expected = {experts: [] for experts in (FIRST, SECOND)}
    for experts in expected:
        model.set_residency(Residency("ghost", experts))
        expected[experts] = step(model)
    model.compile_blocks()
    for experts, values in expected.items():
        model.set_residency(Residency("ghost", experts))
        torch.testing.assert_close(step(model), values, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    step(model, batch=4)  # which makes code for any batch
    step(model, batch=5)
    assert counter.frame_count == 2
    # Routing at random draws from a generator, which no graph can hold: these passes are not compiled.
    with torch.no_grad(), model.layers[0].moe.router.at_random(torch.Generator().manual_seed(0)):
        model.layers[0](torch.randn(2, 12, 32))
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpointing", ["none", "experts", "blocks"])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_compiled_is_plain_on_a_gpu(make_config: Callable[..., ModelConfig], backend: str, checkpointing: Any) -> None:
    config = make_config(expert_backend=backend, activation_checkpointing=checkpointing)
    residency = replace(Residency.full(config), experts=((0, 2, 3), (1, 4, 5)))
    model = Transformer(config, residency, device=torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        expected = step(model)
        model.compile_blocks()
        found = step(model)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-6
