"""The global model of a checkpoint, for one process that has room for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fomoe_pl.checkpoint.format import check_shapes, read_manifest, read_state, read_weights
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts
from fomoe_pl.model.transformer import Transformer


def hyper_parameters(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint's run gave its module: architecture, optimizer and seed, as plain values.

    Args:
        checkpoint: Folder that a run has saved.

    Raises:
        ConfigError: If it is no complete checkpoint.
    """
    return dict(read_state(Path(checkpoint), "trainer.pt")["hyper_parameters"])


def architecture(folder: Path, manifest: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a manifest names.

    Args:
        folder: The checkpoint, for messages.
        manifest: Its manifest.

    Raises:
        ConfigError: If it names none that there can be.
    """
    try:
        given = manifest["architecture"]
        config = ModelConfig(**given)
        kinds = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(ModelConfig)}
        for name, value in given.items():
            whole = kinds[name] in ("int", "int | None")
            no_number = isinstance(value, bool) or not isinstance(value, int | None)
            if (value is None and "None" not in kinds[name]) or (whole and no_number):
                raise ValueError(f"{name} is {value!r}")
        tensors = [about["bytes"] for name, about in manifest["files"].items() if name.endswith(".safetensors")]
        if 4 * parameter_counts(config).total > sum(tensors):
            raise ValueError("its files are too small for it")
        return config
    except (TypeError, KeyError, ValueError, ArithmeticError) as error:
        raise ConfigError("ckpt_path", str(folder), f"is damaged: its architecture is none ({error})",
                          "use another checkpoint") from None  # fmt: skip


def load_global_model(checkpoint: str | Path) -> Transformer:
    """The global model of a checkpoint, whole, in float32 on the CPU.

    Args:
        checkpoint: Folder that `fomoe fit` has written.

    Raises:
        ConfigError: If it is no complete checkpoint.
    """
    folder = Path(checkpoint)
    config = architecture(folder, read_manifest(folder))
    model = Transformer(config, device=torch.device("meta")).to_empty(device="cpu")
    layout = ParameterLayout.of(model, model.expert_tensors())
    residents = model.residency.experts
    weights = read_weights(folder, list(layout.tensors), layout.expert_layer, residents, config.n_experts)
    check_shapes(folder, weights, layout.tensors)
    layout.fill(weights)
    for block, ids in zip(model.layers, residents, strict=True):
        block.moe.router.set_resident(ids)  # lookups are no weights, and are not in the checkpoint
    return model.eval()
