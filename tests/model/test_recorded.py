"""Recorded passes: the same numbers as passes that are not, whatever changes between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.passes import TrainingPass, training_pass
from fomoe_pl.model.recorded import WARM_UP, RecordedPass
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.optimizer import OptimizerConfig, inner_optimizer

FIRST, SECOND = ((0, 1, 2), (3, 4, 5)), ((1, 3, 5), (0, 2, 4))


def batch(seed: int, device: str, size: int = 3) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(50, (size, 13), generator=torch.Generator().manual_seed(seed)).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Graph:
    """Stands in for a CUDA graph where there is no GPU: runs the pass again, into the tensors that were recorded."""

    owner: RecordedPass

    def replay(self) -> None:
        owner, made = self.owner, self.owner._gradients
        for parameter, _ in made:
            parameter.grad = None
        done = owner.run(*owner._inputs)
        done.total.backward()
        for parameter, kept in made:
            assert parameter.grad is not None
            kept.copy_(parameter.grad)
            parameter.grad = None
        for value, kept in zip(done, owner._result, strict=True):
            if isinstance(kept, Tensor):
                assert isinstance(value, Tensor)
                kept.copy_(value.detach())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs without a GPU."""

    @contextmanager
    def recording(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "graph", recording)


def recorded_pass(model: Transformer) -> RecordedPass:
    recorded = RecordedPass(partial(training_pass, model), model)
    Graph.owner = recorded
    return recorded


def numbers(done: TrainingPass) -> list[Any]:
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in done]


def train(model: Transformer, batches: list[tuple[Tensor, Tensor]], recorded: RecordedPass | None) -> list[Any]:
    """Steps on the batches, as a Trainer takes them; returns what each pass said, and the parameters at the end."""
    optimizer = inner_optimizer(model, OptimizerConfig(lr=0.01, warmup_steps=0))
    said = []
    for inputs_BS, targets_BS in batches:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False, enabled=inputs_BS.is_cuda):
            done = (recorded or partial(training_pass, model))(inputs_BS, targets_BS)
        said.append(numbers(done))
        optimizer.zero_grad()
        if recorded is None or not recorded.backward():
            done.total.backward()
        del done  # what an earlier pass leaves behind lies on another stream
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return [*said, [p.detach().clone() for p in model.parameters()]]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_steps_are_those_of_passes_that_are_not_recorded(make_config: Callable[..., ModelConfig], on_cpu: None) -> None:
    config = make_config(expert_backend="loop", z_loss_weight=1e-3)
    batches = [batch(i, "cpu") for i in range(WARM_UP + 4)]
    plain, model = (Transformer(config, Residency("ghost", FIRST), seed=1) for _ in range(2))
    recorded = recorded_pass(model)
    assert_same(train(model, batches, recorded), train(plain, batches, None))
    assert recorded.recordings == 1


def test_what_changes_the_pass_is_recorded_anew(make_config: Callable[..., ModelConfig], on_cpu: None) -> None:
    model = Transformer(make_config(expert_backend="loop"), Residency("ghost", FIRST))
    recorded = recorded_pass(model)

    def recordings(*given: Any) -> int:
        """How often it records in so many passes as are needed."""
        before = recorded.recordings
        for _ in range(WARM_UP + 2):
            recorded(*given)
            recorded.backward()
        return recorded.recordings - before

    assert recordings(*batch(0, "cpu")) == 1
    assert recordings(*batch(1, "cpu")) == 0
    assert recordings(*batch(1, "cpu", size=2)) == 1
    assert recordings(*batch(1, "cpu", size=2), "measures entropy") == 1
    model.set_residency(Residency("ghost", SECOND))  # in place: the same graph serves
    assert recordings(*batch(1, "cpu", size=2), "measures entropy") == 0
    model.layers[0].moe.router.weight.data = model.layers[0].moe.router.weight.data.clone()
    assert recordings(*batch(1, "cpu", size=2), "measures entropy") == 1
    recorded.release()
    recorded(*batch(1, "cpu", size=2), "measures entropy")  # warm already
    assert recorded.backward()


def test_gradients_come_from_the_pass_before_it_is_recorded(
    make_config: Callable[..., ModelConfig], on_cpu: None
) -> None:
    model = Transformer(make_config(expert_backend="loop"))
    recorded = recorded_pass(model)
    for i in range(WARM_UP):
        done = recorded(*batch(i, "cpu"))
        assert not recorded.backward()
        assert done.total.requires_grad
    done = recorded(*batch(0, "cpu"))
    assert not done.total.requires_grad
    assert recorded.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_be_recorded_says_how_to_go_without(make_config: Callable[..., ModelConfig], on_cpu: None) -> None:
    model = Transformer(make_config(expert_backend="loop"))
    passes = iter(range(WARM_UP))

    def waits(inputs_BS: Tensor, targets_BS: Tensor) -> TrainingPass:
        if next(passes, None) is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return training_pass(model, inputs_BS, targets_BS)

    recorded = RecordedPass(waits, model)
    for i in range(WARM_UP):
        recorded(*batch(i, "cpu"))
    with pytest.raises(RuntimeError, match="cuda_graphs: false goes without"):
        recorded(*batch(0, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpointing", ["none", "experts", "blocks"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_graph_gives_the_same_bits(
    make_config: Callable[..., ModelConfig], backend: str, compiled: bool, checkpointing: Any
) -> None:
    config = make_config(expert_backend=backend, activation_checkpointing=checkpointing, z_loss_weight=1e-3)
    batches = [batch(i, "cuda", size=16) for i in range(WARM_UP + 4)]
    found = []
    for is_recorded in (True, False):
        torch._dynamo.reset()
        model = Transformer(config, Residency("ghost", FIRST), seed=1).cuda()
        if compiled:
            model.compile_blocks()
        recorded = recorded_pass(model) if is_recorded else None
        first = train(model, batches, recorded)
        assert recorded is None or recorded.recordings == 1
        model.set_residency(Residency("ghost", SECOND))
        found.append([*first, *train(model, batches, recorded)])
        assert recorded is None or recorded.recordings == 1
    assert_same(*found)
