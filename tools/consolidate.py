"""The global model of a checkpoint as plain safetensors: `python tools/consolidate.py CHECKPOINT OUTPUT`.

Writes `config.json` and `model.safetensors`, or several files with an index as Hugging Face has them, into a new
folder. Tensors are copied expert by expert: the model need not fit into memory. `--names olmoe` writes what
transformers' OLMoE reads, for architectures that it covers.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.checkpoint import AVERAGE, WeightFiles, dense_name
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}
# What OLMoE is (arXiv 2409.02060): these settings of ours and no others give its computation.
OLMOE: dict[str, Any] = {
    "gate": "softmax", "expert": "swiglu", "norm_placement": "pre", "norm": "rmsnorm", "embedding_norm": False,
    "qk_norm": "full", "parametrization": "standard", "n_shared_experts": 0, "balance": "aux_loss",
}  # fmt: skip
OLMOE_NAMES = {
    "embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight", "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight", "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight", "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight", "attention_norm.weight": "input_layernorm.weight",
    "moe_norm.weight": "post_attention_layernorm.weight", "moe.router.weight": "mlp.gate.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One tensor that is written: its name, its shape, and its values in parts, one after the other."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    def n_bytes(self, dtype: torch.dtype) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * dtype.itemsize


def own_names(files: WeightFiles, config: ModelConfig) -> list[Output]:
    """All tensors under the names of `Transformer`, whose stacked experts are (E, ...)."""
    model = Transformer(config, device=torch.device("meta"))
    layout = ParameterLayout.of(model, model.expert_tensors())

    def parts(name: str) -> Iterator[Tensor]:
        if name in files:
            yield files.read(name)
        else:  # a row for each expert
            for expert in range(config.n_experts):
                yield files.read(f"{name}#{expert}")

    return [Output(name, tuple(t.shape), partial(parts, name)) for name, t in layout.tensors.items()]


def olmoe_names(files: WeightFiles, config: ModelConfig) -> list[Output]:
    """All tensors under the names of transformers' `OlmoeForCausalLM`, expert by expert."""
    width = config.d_expert
    shape_in, shape_out = (width, config.d_model), (config.d_model, width)
    outputs = []

    def transposed(key: str, start: int | None = None, end: int | None = None) -> Iterator[Tensor]:
        yield files.read(key)[:, start:end].T

    for own in own_names(files, config):
        layer, _, rest = own.name.removeprefix("layers.").partition(".")
        prefix = f"model.layers.{layer}." if own.name.startswith("layers.") else ""
        name = rest if prefix else own.name
        if name in OLMOE_NAMES:
            outputs.append(Output(prefix + OLMOE_NAMES[name], own.shape, own.parts))
            continue
        for expert in range(config.n_experts):
            columns = partial(transposed, f"{own.name}#{expert}")
            target = f"{prefix}mlp.experts.{expert}"
            if name == "moe.experts.w_out":
                outputs.append(Output(f"{target}.down_proj.weight", shape_out, columns))
            else:
                assert name == "moe.experts.w_in", name
                outputs.append(Output(f"{target}.gate_proj.weight", shape_in, partial(columns, end=width)))
                outputs.append(Output(f"{target}.up_proj.weight", shape_in, partial(columns, start=width)))
    return outputs


def olmoe_config(config: ModelConfig, checkpoint: str) -> dict[str, Any]:
    """What transformers needs to build the model.

    Raises:
        ConfigError: if OLMoE computes something else.
    """
    other = [f"{key} {getattr(config, key)!r}, not {value!r}" for key, value in OLMOE.items()
             if getattr(config, key) != value]  # fmt: skip
    if config.head_dim not in (None, config.d_model // config.n_heads):
        other.append(f"head_dim {config.head_dim}, not d_model / n_heads")
    if other:
        rule = f"is no OLMoE: {'; '.join(other)}"
        raise ConfigError("names", checkpoint, rule, "leave out --names, which writes this project's own names")
    return {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": config.vocab_size,
        "hidden_size": config.d_model, "intermediate_size": config.d_expert, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "num_experts": config.n_experts, "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.normalize_gates, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "attention_bias": False, "clip_qkv": None,
        "router_aux_loss_coef": config.aux_loss_weight, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def shards(outputs: list[Output], dtype: torch.dtype, limit: float) -> list[list[Output]]:
    """Tensors file by file, in order, none above the limit but for a tensor that is larger by itself."""
    files: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if files[-1] and size + output.n_bytes(dtype) > limit:
            files.append([])
            size = 0
        files[-1].append(output)
        size += output.n_bytes(dtype)
    return files


def write(path: Path, outputs: list[Output], dtype: Literal["float32", "bfloat16"]) -> None:
    """Write a safetensors file part by part, which the library does for tensors in memory alone.

    The format: eight bytes with the header's length, the header as JSON, and the values one after the other.
    """
    kind, code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        start, end = end, end + output.n_bytes(kind)
        header[output.name] = {"dtype": code, "shape": list(output.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            for part in output.parts():
                file.write(part.to(kind).reshape(-1).view(torch.uint8).numpy().data)


def consolidate(
    checkpoint: str,
    output: str,
    names: Literal["own", "olmoe"] = "own",
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_gb: float = 5.0,
    average: bool = False,
) -> None:
    """Write the global model.

    Args:
        checkpoint: Folder that `fomoe fit` has written.
        output: New folder.
        names: `own` are this project's, `olmoe` those of Hugging Face's OLMoE.
        dtype: Of the values; checkpoints have float32.
        max_shard_gb: Size above which there are several files, 10^9 bytes.
        average: Write the moving average that `GlobalEMA` has kept, not the model itself.

    Raises:
        ConfigError: if the checkpoint is incomplete or damaged, the output exists, or OLMoE computes something else.
    """
    if max_shard_gb <= 0:
        raise ConfigError("max_shard_gb", max_shard_gb, "must be positive", "5 is the default")
    folder, unfinished = Path(output), Path(f"{output.rstrip('/')}.partial")
    if folder.exists():
        raise ConfigError("output", output, "is there already", "give a new folder, or remove it")
    files = WeightFiles(Path(checkpoint), AVERAGE if average else "")
    if average and dense_name(AVERAGE) not in files.manifest["files"]:
        rule = "has no average of the global model"
        raise ConfigError("average", checkpoint, rule, "leave it out, or train with fomoe_pl.callbacks.GlobalEMA")
    config = ModelConfig(**files.manifest["architecture"])
    if names == "olmoe":
        about, outputs = olmoe_config(config, checkpoint), olmoe_names(files, config)
    else:
        about, outputs = {"model_type": "fomoe_pl", **files.manifest["architecture"]}, own_names(files, config)
    about |= {"dtype": dtype, "optimizer_steps": files.manifest["optimizer_steps"]}
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        groups = shards(outputs, DTYPES[dtype][0], max_shard_gb * 1e9)
        weight_map: dict[str, str] = {}
        for i, group in enumerate(groups, 1):
            name = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            write(unfinished / name, group, dtype)
            weight_map |= {tensor.name: name for tensor in group}
        if len(groups) > 1:
            total = sum(tensor.n_bytes(DTYPES[dtype][0]) for tensor in outputs)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (unfinished / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(outputs)} tensors in {len(groups)} files, {n_bytes / 1e6:,.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write."""
    parser = ArgumentParser(description="The global model of a checkpoint as plain safetensors.")
    parser.add_function_arguments(consolidate, as_positional=True)
    options = parser.parse_args(arguments)
    try:
        consolidate(**options.as_dict())
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
