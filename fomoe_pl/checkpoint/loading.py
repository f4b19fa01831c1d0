"""The global model of a checkpoint, for one process that has room for all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fomoe_pl.checkpoint.format import read_manifest, read_state, read_weights
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer


def hyper_parameters(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint's run gave its module: architecture, optimizer and seed, as plain values.

    Args:
        checkpoint: folder that a run has saved.

    Raises:
        ConfigError: if it is no complete checkpoint.
    """
    return dict(read_state(Path(checkpoint), "trainer.pt")["hyper_parameters"])


def load_global_model(checkpoint: str | Path) -> Transformer:
    """The global model of a checkpoint, whole, in float32 on the CPU.

    Args:
        checkpoint: folder that `fomoe fit` has written.

    Raises:
        ConfigError: if it is no complete checkpoint.
    """
    folder = Path(checkpoint)
    config = ModelConfig(**read_manifest(folder)["architecture"])
    model = Transformer(config, device=torch.device("meta")).to_empty(device="cpu")
    layout = ParameterLayout.of(model, model.expert_tensors())
    residents = model.residency.experts
    layout.fill(read_weights(folder, list(layout.tensors), layout.expert_layer, residents, config.n_experts))
    for block, ids in zip(model.layers, residents, strict=True):
        block.moe.router.set_resident(ids)  # lookups are no weights, and are not in the checkpoint
    return model.eval()
