"""`fomoe import`: a Hugging Face folder as a checkpoint, from which `fomoe fit` trains on, federated.

Tensors are read and written one by one. A tensor that is missing, that nothing here stands for, or that has another
shape than the configuration says is an error: nothing is guessed.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning import __version__ as lightning_version
from torch import Tensor

from fomoe_pl.checkpoint import format as files
from fomoe_pl.errors import ConfigError, check_range, check_seed
from fomoe_pl.federation.ledger import Ledger
from fomoe_pl.files import prepare_folder
from fomoe_pl.hub import needs
from fomoe_pl.hub.families import (
    FAMILIES,
    OWN,
    OWN_KEYS,
    SIZES,
    TRAINING,
    Piece,
    Target,
    check_exact,
    shapes,
    targets,
)
from fomoe_pl.hub.shards import FolderTensors, Output, read_json, some, write_one
from fomoe_pl.hub.source import IMPORTED, UNKNOWN_LENGTH
from fomoe_pl.hub.tokenizer import SETTINGS, TOKENIZER
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.init import dense_generator, expert_generator
from fomoe_pl.model.residency import Residency

DENSE = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense models -> the family that they become, with copies of their feed-forward networks for experts."""
ARCHITECTURE = "model.yaml"
MACHINE = ("expert_backend", "activation_checkpointing", "loss_chunk_bytes")
"""Settings of how, not of what is computed."""
FLOATS = ("F32", "BF16", "F16")
"""Types of a safetensors file that float32 has every value of."""


class Upcycling(NamedTuple):
    """Upcycling of a dense model: number of experts, top-k, and the noise that makes experts different."""

    n_experts: int
    top_k: int
    noise: float
    seed: int
    router_std: float = 0.02


def import_model(
    source: str,
    output: str,
    n_experts: int | None = None,
    top_k: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> None:
    """Write a Hugging Face folder as a checkpoint for `fomoe fit --ckpt_path`.

    Args:
        source: Folder with `config.json` and safetensors: of an export, of transformers' OLMoE, Qwen3-MoE, Mixtral,
            dots1, GLM-4-MoE or MiniMax-M2, or of a dense Llama, Mistral or Qwen3, whose feed-forward networks become
            experts.
        output: New checkpoint, such as `runs/imported.ckpt`.
        n_experts: Of a dense model alone: experts of each layer. Each begins as a copy of the feed-forward network, so
            the model computes what the dense one does (sparse upcycling, arXiv 2212.05055, with gates that sum to 1).
        top_k: Of a dense model alone: experts of a token.
        noise: Of a dense model alone: what is added to each expert's matrices, as a share of their standard deviation.
        seed: Of the routers and the noise of a dense model.

    Raises:
        ConfigError: If the architecture has no exact counterpart here, or tensors are missing, unknown or of another
            shape.
    """
    folder, given = Path(output), Path(source)
    prepare_folder("output", folder)
    check_seed("seed", seed)
    about = read_json("source", given, "config.json")
    family: Any = about.get("model_type")
    upcycling = None
    if family in DENSE:
        if n_experts is None or top_k is None:
            rule = f"is a dense {family}, which becomes experts"
            raise ConfigError("source", source, rule, "say how many: --n_experts 8 --top_k 2")
        check_range("noise", noise, "0 makes exact copies", least=0)
        upcycling = Upcycling(n_experts, top_k, noise, seed, about.get("initializer_range", 0.02))
    elif n_experts is not None or top_k is not None or noise:
        given_keys = "n_experts, top_k and noise"
        raise ConfigError("source", source, f"has its own experts: {given_keys} are of dense models", "leave them out")
    config = architecture(family, about, upcycling, str(given))
    name = DENSE.get(family, family)
    check_exact(name, config)
    tensors = FolderTensors(given)
    wanted = targets(name, config)
    _check(tensors, wanted, upcycling, str(given))
    files.begin(folder)
    try:
        length = about.get("max_position_embeddings", UNKNOWN_LENGTH)
        _write(folder, config, tensors, wanted, upcycling, length)
    except BaseException:
        files.give_up(folder)
        raise
    for file in (TOKENIZER, SETTINGS):
        if (given / file).is_file():
            shutil.copyfile(given / file, folder / file)
    # Defaults too: the file may come behind one that sets something else.
    settings = {key: value for key, value in asdict(config).items() if key not in MACHINE}
    text = yaml.safe_dump({"model": {"architecture": settings}}, sort_keys=False)
    (folder / ARCHITECTURE).write_text(f"# The architecture of this checkpoint, for `fomoe fit -c`\n{text}")
    print(f"{folder}: {len(wanted)} tensors; train on with -c {folder / ARCHITECTURE} --ckpt_path {folder}")


# -- configuration ----------------------------------------------------------------------------------------------------


def architecture(
    family: str | None, about: Mapping[str, Any], upcycling: Upcycling | None = None, source: str = ""
) -> ModelConfig:
    """Return our settings of a published model's configuration.

    Args:
        family: Its `model_type`.
        about: Its `config.json`.
        upcycling: Of a dense model.
        source: Folder, for messages.

    Raises:
        ConfigError: If nothing here computes the same, naming what stands in the way.
    """
    if family == OWN:
        keys = SIZES | OWN_KEYS
        lacking = sorted({*keys.values(), "num_key_value_heads", "head_dim", "rope_parameters"} - about.keys())
        if lacking:
            hint = "copy the whole folder again"
            raise ConfigError("source", source, f"is damaged: its config.json lacks {', '.join(lacking)}", hint)
        rope = about["rope_parameters"].get("rope_type", "default")
        if rope != "default":
            rule = f"computes something else: rope_type {rope!r}, not 'default'"
            raise ConfigError("source", source, rule, "it cannot be imported")
        values = {ours: about[there] for ours, there in keys.items()}
        kept = {key: value for key, value in (about.get("fomoe") or {}).items() if key in TRAINING}
        values |= {"n_kv_heads": about["num_key_value_heads"], "head_dim": about["head_dim"]}
        return ModelConfig(**{**values, "rope_theta": about["rope_parameters"]["rope_theta"], **kept})
    name = DENSE.get(str(family), str(family))
    if name not in FAMILIES:
        known = ", ".join([OWN, *FAMILIES, *DENSE])
        raise ConfigError("source", source, f"is of model_type {family!r}, which has no counterpart", f"known: {known}")
    needs("transformers", "import")
    from transformers import AutoConfig

    plain = {key: value for key, value in about.items() if key not in ("fomoe", "auto_map")}
    theirs = AutoConfig.for_model(**plain)  # with the class's own defaults
    full = theirs.to_dict() | {alias: getattr(theirs, alias) for alias in theirs.attribute_map}
    return _of_family(name, full, about.get("fomoe") or {}, upcycling, source)


def _of_family(
    name: str, full: Mapping[str, Any], kept: Mapping[str, Any], upcycling: Upcycling | None, source: str
) -> ModelConfig:
    family = FAMILIES[name]
    rope = full.get("rope_parameters") or {}
    found = {
        **full,
        "rope_type": rope.get("rope_type", "default"),
        "partial_rotary_factor": rope.get("partial_rotary_factor") or 1.0,
    }
    needed = {"hidden_act": "silu", "rope_type": "default", "partial_rotary_factor": 1.0}
    if upcycling is None:
        needed |= dict(family.fixed)
        if name == "dots1":
            needed["layer_types"] = ["full_attention"] * full["num_hidden_layers"]
    else:
        needed |= {"attention_bias": False, "mlp_bias": False}
        needed["layer_types"] = ["full_attention"] * full["num_hidden_layers"]
        if full.get("sliding_window") and "layer_types" not in full:
            needed["sliding_window"] = None
    other = [f"{key} {found[key]!r}, not {value!r}" for key, value in needed.items() if found.get(key, value) != value]
    if other:
        raise ConfigError("source", source, f"computes something else: {'; '.join(other)}", "it cannot be imported")
    values: dict[str, Any] = {key: _only(value) for key, value in family.settings.items()}
    sizes = {ours: full[there] for ours, there in SIZES.items() if there in full}
    values |= sizes
    if upcycling is None:
        values |= {ours: full[there] for ours, there in family.keys.items()}
    else:
        values |= {"n_experts": upcycling.n_experts, "top_k": upcycling.top_k, "normalize_gates": True,
                   "d_expert": full["intermediate_size"]}  # fmt: skip
    if name == "glm4_moe":
        values["qk_norm"] = "head" if full["use_qk_norm"] else "none"
    values["n_shared_experts"] = values.get("n_shared_experts") or 0
    values["balance"] = "bias" if family.bias else "aux_loss"
    head_dim = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    values |= {"n_kv_heads": full["num_key_value_heads"], "head_dim": head_dim, "norm_eps": full["rms_norm_eps"],
               "rope_theta": float(rope["rope_theta"]), "init_std": full.get("initializer_range", 0.02)}  # fmt: skip
    if full.get("router_aux_loss_coef"):
        values["aux_loss_weight"] = full["router_aux_loss_coef"]
    return ModelConfig(**{**values, **{key: value for key, value in kept.items() if key in TRAINING}})


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


# -- tensors ----------------------------------------------------------------------------------------------------------

_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight$")
_DENSE_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _there(target: Target, upcycling: Upcycling | None) -> str | None:
    """The name of a tensor in the source; None of a router that a dense model does not have."""
    if upcycling is None:
        return target.name
    if target.name.endswith(".gate.weight"):
        return None
    return _EXPERT.sub(lambda m: f"mlp.{_DENSE_NAMES.get(m[1], m[1])}.weight", target.name)


def _check(tensors: FolderTensors, wanted: list[Target], upcycling: Upcycling | None, source: str) -> None:
    expected = {there: target.shape for target in wanted if (there := _there(target, upcycling)) is not None}
    found = {*tensors.names()}
    hint = "copy the whole folder again, or see whether its config.json belongs to it"
    if missing := sorted(expected.keys() - found):
        raise ConfigError("source", source, f"lacks tensors: {some(missing)}", hint)
    if unknown := sorted(found - expected.keys()):
        raise ConfigError("source", source, f"has tensors without a counterpart here: {some(unknown)}", hint)
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            seems = ", as if transposed" if tensors.shape(name) == shape[::-1] else ""
            rule = f"{name} is {list(tensors.shape(name))}, not {list(shape)}{seems}"
            raise ConfigError("source", source, rule, hint)
        if tensors.dtype(name) not in FLOATS:
            rule = f"{name} is {tensors.dtype(name)}, not one of {', '.join(FLOATS)}"
            raise ConfigError("source", source, rule, "give a model that is not quantised")
    for target in wanted:  # a bias that is not trained on must not be lost
        if not target.pieces and tensors.read(target.name).any():
            rule = f"{target.name} is not zero, but its config.json says balance without a bias"
            raise ConfigError("source", source, rule, 'set "balance": "bias" in its "fomoe"')


def _write(
    folder: Path,
    config: ModelConfig,
    tensors: FolderTensors,
    wanted: list[Target],
    upcycling: Upcycling | None,
    sequence_length: int,
) -> None:
    found: dict[str, list[tuple[Target, int | None, Piece]]] = defaultdict(list)
    for target in wanted:
        for row, piece in enumerate(target.pieces):
            found[piece.key].append((target, row if target.stacked else None, piece))
    sizes, stacked = shapes(config)
    dense = [Output(name, shape, torch.float32, partial(_values, tensors, found[name], name, shape, upcycling))
             for name, shape in sizes.items() if name not in stacked]  # fmt: skip
    rows = {f"{name}#{expert}": sizes[name][1:] for name in stacked for expert in range(config.n_experts)}
    experts = [Output(key, shape, torch.float32, partial(_values, tensors, found[key], key, shape, upcycling))
               for key, shape in rows.items()]  # fmt: skip
    names = [files.dense_name(), files.experts_name(0), files.site_name(0), "trainer.pt"]
    write_one(files.partial(folder) / names[0], dense)
    write_one(files.partial(folder) / names[1], experts)
    no_state: dict[str, Any] = {
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "optimizer_names": [],
        "expert_layer": {},
    }
    files.write(folder, names[2], {
        **no_state, "residents": Residency.full(config).experts, "rng": {}, "losses": (0.0, 0.0),
        "strategy": {"ledger": Ledger().state_dict(), "sync_seconds": 0.0},
    })  # fmt: skip
    files.write(folder, names[3], {
        "pytorch-lightning_version": lightning_version, "epoch": 0, "global_step": 0, "lr_schedulers": [],
        "callbacks": {}, "tokens_seen": 0, "tokens_of_all_sites": 0,
    })  # fmt: skip
    files.seal(folder, 0, names)
    files.finish(folder, {
        "architecture": asdict(config), "n_sites": 1, "rounds": 0, "redraws": 0, "optimizer_steps": 0,
        "identity": {"strategy": IMPORTED, "sites": 1}, "sequence_length": sequence_length,
    })  # fmt: skip


def _values(
    tensors: FolderTensors,
    sources: list[tuple[Target, int | None, Piece]],
    key: str,
    shape: tuple[int, ...],
    upcycling: Upcycling | None,
) -> Iterator[Tensor]:
    parts = []
    for target, row, piece in sorted(sources, key=lambda source: source[2].columns or (0, 0)):
        there = _there(target, upcycling)
        if there is None:  # a router that a dense model does not have
            assert upcycling is not None
            yield torch.empty(shape).normal_(0.0, upcycling.router_std, generator=dense_generator(upcycling.seed, key))
            return
        tensor = tensors.read(there, row).float()
        parts.append(tensor.T if piece.transposed else tensor)
    value = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if upcycling is not None and upcycling.noise and "#" in key:
        layer, expert = int(key.split(".")[1]), int(key.partition("#")[2])
        draw = torch.empty(shape).normal_(generator=expert_generator(upcycling.seed, layer, expert))
        value = value + upcycling.noise * value.std() * draw
    yield value
