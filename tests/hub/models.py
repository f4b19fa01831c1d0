"""Small models of every architecture, and checkpoints of them that nobody had to train."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fomoe_pl.checkpoint import format as files
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer

TINY: dict[str, Any] = {
    "vocab_size": 257, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_experts": 6, "top_k": 3, "d_expert": 24,
    "base_width": 16, "base_depth": 2,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "expert": "swiglu", "norm_placement": "pre", "norm": "rmsnorm", "embedding_norm": False,
    "parametrization": "standard", "tie_embeddings": False,
}  # fmt: skip
SOFTMAX = {**LLAMA, "gate": "softmax"}
# Each setting that changes what is computed, alone and in company.
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "standard": {"parametrization": "standard"},
    "one expert of a token": {"top_k": 1},
    "all experts of a token": {"top_k": 6},
    "grouped queries, wide heads": {"n_kv_heads": 2, "head_dim": 16},
    "shared": {"n_shared_experts": 2},
    "shared swiglu": {"n_shared_experts": 2, "expert": "swiglu"},
    "softmax": {"gate": "softmax"},
    "softmax, gates sum to 1": {"gate": "softmax", "normalize_gates": True},
    "sigmoid, gates sum to 1": {"normalize_gates": True},
    "swiglu": {"expert": "swiglu"},
    "pre": {"norm_placement": "pre"},
    "rmsnorm": {"norm": "rmsnorm", "norm_eps": 1e-3},
    "no embedding norm": {"embedding_norm": False},
    "norm of all queries": {"qk_norm": "full", "n_kv_heads": 2},
    "norm of each head": {"qk_norm": "head", "norm": "rmsnorm"},
    "rope": {"rope_theta": 500.0},
    "untied": {"tie_embeddings": False},
    "bias": {"balance": "bias"},
    "bias, softmax, gates sum to 1": {"balance": "bias", "gate": "softmax", "normalize_gates": True},
    "no balance": {"balance": "none", "z_loss_weight": 0.1},
    "one layer, one head, one expert": {"n_layers": 1, "n_heads": 1, "n_experts": 1, "top_k": 1},
}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "olmoe": {**SOFTMAX, "qk_norm": "full"},
    "qwen3_moe": {**SOFTMAX, "qk_norm": "head", "head_dim": 16, "n_kv_heads": 2, "normalize_gates": True},
    "mixtral": {**SOFTMAX, "normalize_gates": True, "n_kv_heads": 2},
    "dots1": {**LLAMA, "qk_norm": "head", "balance": "bias", "n_shared_experts": 2},
    "glm4_moe": {**LLAMA, "n_shared_experts": 1, "normalize_gates": True, "head_dim": 16},
    "minimax_m2": {**LLAMA, "qk_norm": "full", "normalize_gates": True, "balance": "bias"},
}


def make_model(settings: dict[str, Any], seed: int = 0) -> Transformer:
    """A model whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("balance_bias"):
                buffer.normal_(0.0, 0.2)
    return model


def write_checkpoint(folder: Path, model: Transformer, run: FederationConfig | None = None, n_sites: int = 1) -> Path:
    """Write a checkpoint as a run of those settings does, with all experts of all layers in one file."""
    layout = ParameterLayout.of(model, model.expert_tensors())
    config = model.config
    of_run: dict[str, Any] = {"identity": {"strategy": "FederatedStrategy", "sites": n_sites}}
    if run is not None:
        of_run["identity"] |= run.identity(n_sites)
        of_run["placement"] = run.place(config.n_layers, config.n_experts, n_sites).record()
    rows = {*layout.expert_layer}
    if run is not None and run.routing == "partitioned":
        rows |= {name for name in layout.tensors if ".router." in name}
    files.begin(folder)
    files.write(folder, files.dense_name(), {name: t for name, t in layout.tensors.items() if name not in rows})
    files.write(
        folder,
        files.experts_name(0),
        {f"{name}#{e}": layout.tensors[name][e] for name in rows for e in range(config.n_experts)},
    )
    files.write(folder, files.site_name(0), {
        "optimizer_states": [{"state": {}, "param_groups": []}], "optimizer_names": [], "expert_layer": {},
        "residents": model.residency.experts, "strategy": {"ledger": Ledger().state_dict(), "sync_seconds": 0.0},
    })  # fmt: skip
    files.seal(folder, 0, [files.dense_name(), files.experts_name(0), files.site_name(0)])
    files.finish(folder, {
        "architecture": asdict(config), "n_sites": n_sites, "rounds": 4, "redraws": 0, "optimizer_steps": 12, **of_run,
    })  # fmt: skip
    return folder
