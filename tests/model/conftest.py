from collections.abc import Callable, Iterator

import pytest
import torch

from fomoe_pl.model.config import ModelConfig

SMALL = {
    "vocab_size": 50,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_experts": 6,
    "top_k": 2,
    "d_expert": 16,
    "base_width": 32,
    "base_depth": 2,
}


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    """A small architecture with some fields changed."""
    return lambda **changes: ModelConfig(**{**SMALL, **changes})


@pytest.fixture(autouse=True)
def fresh_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
