from collections.abc import Callable
from typing import Any

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.model.config import ModelConfig


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"top_k": 7}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"n_heads": 3}, "d_model"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"n_heads": 32}, "head_dim"),
        ({"n_layers": 0}, "n_layers"),
        ({"d_expert": -1}, "d_expert"),
        ({"loss_chunk_bytes": 0}, "loss_chunk_bytes"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"gate": "relu"}, "gate"),
    ],
)
def test_bad_settings_name_their_key(make_config: Callable[..., ModelConfig], changes: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        make_config(**changes)


def test_derived_sizes(make_config: Callable[..., ModelConfig]) -> None:
    assert make_config().head_size == 16
    assert make_config().kv_heads == 2
    # With an explicit head size the width need not be divisible by the heads.
    assert make_config(n_heads=3, head_dim=8).head_size == 8
    assert make_config(n_heads=4, n_kv_heads=2).kv_heads == 2
    assert make_config(expert="swiglu").expert_in_width == 32
