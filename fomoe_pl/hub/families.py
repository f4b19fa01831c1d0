"""Published architectures: how their tensors map to ours, and which settings make the computation identical.

A target tensor is made of pieces of ours: a dense tensor, an expert's matrix, or some of its columns, perhaps
transposed. The same table is read in both directions, for export and for import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer

OWN = "fomoe"
FamilyName = Literal["fomoe", "olmoe", "qwen3_moe", "mixtral", "dots1", "glm4_moe", "minimax_m2"]


@dataclass(frozen=True)
class Piece:
    """A part of one of our tensors.

    Attributes:
        key: As in a checkpoint: `<tensor>`, or `<tensor>#<expert>`.
        columns: First and one past the last column of it; None is all.
        transposed: Whether the target has it transposed.
    """

    key: str
    columns: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Target:
    """A tensor of another implementation.

    Attributes:
        name: There.
        shape: There.
        pieces: One, or with `stacked` one for each row along axis 0; none where it is zero for all of our models.
        stacked: Whether its rows are pieces.
        keeps_float32: Whether it stays float32 in files of another type.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    stacked: bool = False
    keeps_float32: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture of transformers that some settings of ours give exactly.

    Attributes:
        model_type: As in `config.json`.
        architecture: The class.
        settings: Settings of ours that it needs; a tuple where there is a choice.
        keys: Our settings -> keys of its configuration, besides those common to all.
        fixed: Keys of its configuration that must have these values.
        norms: Name of a block's norms there, and of the router, by ours.
        experts: Names of an expert's gate, up and down projection; `{}` is its number.
        shared: Prefix of shared experts; None where it has none.
        bias: Name of the balance bias; None where it has none.
    """

    model_type: str
    architecture: str
    settings: Mapping[str, Any]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    router: str = "mlp.gate.weight"
    experts: tuple[str, str, str] = tuple(f"mlp.experts.{{}}.{p}_proj.weight" for p in ("gate", "up", "down"))  # type: ignore[assignment]
    shared: str | None = None
    bias: str | None = None


_LLAMA: dict[str, Any] = {
    "expert": "swiglu", "norm_placement": "pre", "norm": "rmsnorm", "embedding_norm": False,
    "parametrization": "standard",
}  # fmt: skip
_SOFTMAX: dict[str, Any] = {**_LLAMA, "gate": "softmax", "balance": ("aux_loss", "none"), "n_shared_experts": 0}
_GROUPED: dict[str, Any] = {
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "attention_bias": False,
}  # fmt: skip
_NO_WINDOW = {"sliding_window": None}
_MIXTRAL_EXPERTS = tuple(f"block_sparse_moe.experts.{{}}.{w}.weight" for w in ("w1", "w3", "w2"))

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "olmoe", "OlmoeForCausalLM", {**_SOFTMAX, "qk_norm": "full"},
            {"n_experts": "num_experts", "d_expert": "intermediate_size", "normalize_gates": "norm_topk_prob"},
            {"clip_qkv": None, "attention_bias": False},
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM", {**_SOFTMAX, "qk_norm": "head"},
            {"n_experts": "num_experts", "d_expert": "moe_intermediate_size", "normalize_gates": "norm_topk_prob"},
            {"decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "use_sliding_window": False},
        ),
        Family(
            "mixtral", "MixtralForCausalLM", {**_SOFTMAX, "qk_norm": "none", "normalize_gates": True},
            {"n_experts": "num_local_experts", "d_expert": "intermediate_size"},
            _NO_WINDOW, "block_sparse_moe.gate.weight", _MIXTRAL_EXPERTS,  # type: ignore[arg-type]
        ),
        Family(
            "dots1", "Dots1ForCausalLM", {**_LLAMA, "gate": "sigmoid", "qk_norm": "head"},
            {"n_experts": "n_routed_experts", "d_expert": "moe_intermediate_size",
             "normalize_gates": "norm_topk_prob", "n_shared_experts": "n_shared_experts"},
            _GROUPED, shared="mlp.shared_experts", bias="mlp.gate.e_score_correction_bias",
        ),
        Family(
            "glm4_moe", "Glm4MoeForCausalLM", {**_LLAMA, "gate": "sigmoid", "qk_norm": ("none", "head")},
            {"n_experts": "n_routed_experts", "d_expert": "moe_intermediate_size",
             "normalize_gates": "norm_topk_prob", "n_shared_experts": "n_shared_experts"},
            _GROUPED, shared="mlp.shared_experts", bias="mlp.gate.e_score_correction_bias",
        ),
        Family(
            "minimax_m2", "MiniMaxM2ForCausalLM",
            {**_LLAMA, "gate": "sigmoid", "qk_norm": "full", "normalize_gates": True, "n_shared_experts": 0},
            {"n_experts": "num_local_experts", "d_expert": "intermediate_size"},
            router="block_sparse_moe.gate.weight", experts=_MIXTRAL_EXPERTS,  # type: ignore[arg-type]
            bias="block_sparse_moe.e_score_correction_bias",
        ),
    )
}  # fmt: skip


def obstacles(family: Family, config: ModelConfig) -> list[str]:
    """Return which settings stand in the way, `norm 'layernorm', not 'rmsnorm'`; none if the family is exact."""
    found = []
    for key, wanted in family.settings.items():
        valid = wanted if isinstance(wanted, tuple) else (wanted,)
        if getattr(config, key) not in valid:
            found.append(f"{key} {getattr(config, key)!r}, not {' or '.join(map(repr, valid))}")
    if family.model_type == "olmoe" and config.head_size * config.n_heads != config.d_model:
        found.append(f"head_dim {config.head_dim}, not d_model / n_heads")
    return found


def exact_families(config: ModelConfig) -> list[str]:
    """Return the families that compute exactly what an architecture does."""
    return [name for name, family in FAMILIES.items() if not obstacles(family, config)]


def check_exact(name: str, config: ModelConfig) -> None:
    """Refuse a family that computes something else.

    Raises:
        ConfigError: Naming every setting that stands in the way.
    """
    if name != OWN and (found := obstacles(FAMILIES[name], config)):
        exact = ", ".join(exact_families(config)) or "no native class"
        rule = f"computes something else than this architecture: {'; '.join(found)}"
        raise ConfigError("format", name, rule, f"use {OWN}, which is always exact; exact here: {exact}")


# -- tensors ----------------------------------------------------------------------------------------------------------


def shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the shape of each of our tensors by name, and which of them have a row for each expert."""
    model = Transformer(config, device=torch.device("meta"))
    stacked = model.expert_tensors()
    tensors = ParameterLayout.of(model, stacked).tensors
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, [
        name for name in tensors if name in stacked
    ]


_OWN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_out_norm.weight": "post_attention_layernorm.weight",
    "moe_norm.weight": "pre_feedforward_layernorm.weight",
    "moe_out_norm.weight": "post_feedforward_layernorm.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.router.balance_bias": "mlp.gate.e_score_correction_bias",
}
_ATTENTION = {f"attention.{part}.weight": f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")} | {
    f"attention.{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in ("q", "k")
}
_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "embedding_norm.weight": "model.embedding_norm.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def targets(name: str, config: ModelConfig) -> list[Target]:
    """Return all tensors of a family's model, in the order of our own.

    Args:
        name: Of the family.
        config: An architecture that the family computes exactly.
    """
    ours, stacked = shapes(config)
    experts: Callable[[str, str, ModelConfig], list[Target]]
    if name == OWN:
        block, shared, experts = _OWN_BLOCK, "mlp.shared_experts", _own_experts
    else:
        family = FAMILIES[name]
        block = {
            "attention_norm.weight": "input_layernorm.weight",
            "moe_norm.weight": "post_attention_layernorm.weight",
            "moe.router.weight": family.router,
            "moe.router.balance_bias": family.bias or "",
        }
        shared, experts = family.shared or "", _experts_of(family)
    found = []
    for key, shape in ours.items():
        layer, _, rest = key.removeprefix("layers.").partition(".")
        if not key.startswith("layers."):
            found.append(Target(_TOP[key], shape, (Piece(key),)))
        elif key in stacked:
            found += experts(f"model.layers.{layer}.", key, config)
        elif rest.startswith("moe.shared."):
            found += _shared(f"model.layers.{layer}.{shared}.", key, shape, config)
        else:
            there = f"model.layers.{layer}.{(block | _ATTENTION)[rest]}"
            found.append(Target(there, shape, (Piece(key),), keeps_float32=rest.endswith("balance_bias")))
    if name != OWN and FAMILIES[name].bias and config.balance != "bias":
        for layer_id in range(config.n_layers):
            there = f"model.layers.{layer_id}.{FAMILIES[name].bias}"
            found.append(Target(there, (config.n_experts,), (), keeps_float32=True))
    return found


def _own_experts(prefix: str, key: str, config: ModelConfig) -> list[Target]:
    n, d, f = config.n_experts, config.d_model, config.d_expert
    pieces = tuple(Piece(f"{key}#{expert}") for expert in range(n))
    if key.endswith("w_out"):
        return [Target(f"{prefix}mlp.experts.down_proj", (n, f, d), pieces, stacked=True)]
    name = "gate_up_proj" if config.expert == "swiglu" else "up_proj"
    return [Target(f"{prefix}mlp.experts.{name}", (n, d, config.expert_in_width), pieces, stacked=True)]


def _experts_of(family: Family) -> Callable[[str, str, ModelConfig], list[Target]]:
    def experts(prefix: str, key: str, config: ModelConfig) -> list[Target]:
        d, f = config.d_model, config.d_expert
        gate, up, down = (prefix + name for name in family.experts)
        found = []
        for e in range(config.n_experts):
            of = f"{key}#{e}"
            if key.endswith("w_out"):
                found.append(Target(down.format(e), (d, f), (Piece(of, None, True),)))
            else:
                found.append(Target(gate.format(e), (f, d), (Piece(of, (0, f), True),)))
                found.append(Target(up.format(e), (f, d), (Piece(of, (f, 2 * f), True),)))
        return found

    return experts


def _shared(prefix: str, key: str, shape: tuple[int, ...], config: ModelConfig) -> list[Target]:
    rows, columns = shape
    if key.endswith("w_out"):
        return [Target(f"{prefix}down_proj.weight", (columns, rows), (Piece(key, None, True),))]
    if config.expert == "silu":
        return [Target(f"{prefix}up_proj.weight", (columns, rows), (Piece(key, None, True),))]
    half = columns // 2
    return [
        Target(f"{prefix}gate_proj.weight", (half, rows), (Piece(key, (0, half), True),)),
        Target(f"{prefix}up_proj.weight", (half, rows), (Piece(key, (half, columns), True),)),
    ]


# -- configurations ---------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "top_k": "num_experts_per_tok", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
OWN_KEYS = {
    "n_experts": "num_experts", "d_expert": "moe_intermediate_size", "normalize_gates": "norm_topk_prob",
    "init_std": "initializer_range", "aux_loss_weight": "router_aux_loss_coef",
    **{key: key for key in (
        "n_shared_experts", "gate", "expert", "norm_placement", "norm", "norm_eps", "embedding_norm", "qk_norm",
        "parametrization", "base_width", "base_depth", "balance",
    )},
}  # fmt: skip
# Irrelevant to a finished model, needed to train on. The rest depends on the machine.
TRAINING = ("init_std", "balance", "aux_loss_weight", "z_loss_weight", "bias_update_rate")


def config_of(name: str, config: ModelConfig) -> dict[str, Any]:
    """Return what transformers needs to build a family's model, without what is known of its training.

    Args:
        name: Of the family.
        config: An architecture that the family computes exactly.
    """
    keys = SIZES | (OWN_KEYS if name == OWN else dict(FAMILIES[name].keys))
    architecture = {there: getattr(config, ours) for ours, there in keys.items()}
    architecture |= {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "use_cache": True,
    }
    if name == OWN:
        module = "modeling_fomoe"
        return {
            "architectures": ["FomoeForCausalLM"], "model_type": OWN,
            "auto_map": {
                "AutoConfig": f"{module}.FomoeConfig", "AutoModel": f"{module}.FomoeModel",
                "AutoModelForCausalLM": f"{module}.FomoeForCausalLM",
            },
            **architecture,
        }  # fmt: skip
    family = FAMILIES[name]
    architecture |= dict(family.fixed) | {"rms_norm_eps": config.norm_eps}
    if name in ("glm4_moe", "minimax_m2"):
        architecture["rope_parameters"]["partial_rotary_factor"] = 1.0
    if name == "glm4_moe":
        architecture |= {"use_qk_norm": config.qk_norm == "head", "num_nextn_predict_layers": 0}
    if name == "dots1":
        architecture["layer_types"] = ["full_attention"] * config.n_layers
    if "n_shared_experts" in family.keys and not config.n_shared_experts:
        architecture["n_shared_experts"] = 0
    if family.settings["gate"] == "softmax":
        architecture["router_aux_loss_coef"] = config.aux_loss_weight
    return {"architectures": [family.architecture], "model_type": name, **architecture}


def training_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that an import needs to train on as before, and that no model class has a name for."""
    return {key: value for key, value in asdict(config).items() if key in TRAINING}
