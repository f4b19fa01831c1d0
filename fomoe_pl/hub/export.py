"""`fomoe export`: the global model of a checkpoint as a Hugging Face folder, expert by expert.

No tensor is in memory longer than it takes to write it: at most one dense tensor, or one matrix of one expert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fomoe_pl.checkpoint.format import WeightFiles
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import prepare_folder
from fomoe_pl.hub.card import card
from fomoe_pl.hub.families import (
    OWN,
    FamilyName,
    Target,
    check_exact,
    config_of,
    exact_families,
    shapes,
    targets,
    training_settings,
)
from fomoe_pl.hub.joined import joined, local_of
from fomoe_pl.hub.pieces import target_parts
from fomoe_pl.hub.shards import Output, write_shards
from fomoe_pl.hub.source import Source, read_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELING = "modeling_fomoe.py"
PLAIN = "plain"


def export(
    checkpoint: str | list[str],
    output: str,
    format: Literal[FamilyName, "plain"] = "fomoe",
    dtype: Literal["float32", "bfloat16"] = "float32",
    data: str | None = None,
    license: str | None = None,
    max_shard_gb: float = 5.0,
    average: bool = False,
) -> None:
    """Write the global model of a checkpoint into a new folder.

    Args:
        checkpoint: Folder that `fomoe fit` has written, or its URL; where sites have disks of their own, the folders
            of one step of all sites.
        output: New folder.
        format: `fomoe` is always exact, and loads with `trust_remote_code=True`; `olmoe`, `qwen3_moe`, `mixtral`,
            `dots1`, `glm4_moe` and `minimax_m2` are transformers' own classes, for architectures that they compute
            exactly; `plain` has weights under this project's names, and no tokenizer.
        dtype: Of the weights; checkpoints have float32.
        data: Folder of the corpus whose tokenizer the model has; null is the one that the run's settings name.
        license: Name for the model card, such as `apache-2.0`.
        max_shard_gb: Size above which there are several files, 10^9 bytes.
        average: Write the moving average that `GlobalEMA` has kept, not the model itself.

    Raises:
        ConfigError: If the checkpoint is incomplete or damaged, the output exists, the format computes something
            else, or the tokenizer is not found.
    """
    if max_shard_gb <= 0:
        raise ConfigError("max_shard_gb", max_shard_gb, "must be positive", "5 is the default")
    folder, unfinished = Path(output), Path(f"{output.rstrip('/')}.partial")
    prepare_folder("output", folder)
    with joined(checkpoint, folder) as whole:
        source = read_source(whole, data, average=average, lies_in=local_of(checkpoint))
        _write(source, folder, unfinished, format, dtype, license, max_shard_gb)


def _write(
    source: Source, folder: Path, unfinished: Path, format: str, dtype: str, license: str | None, max_shard_gb: float
) -> None:
    if format == PLAIN:
        outputs = _plain(source, DTYPES[dtype])
    else:
        check_exact(format, source.config)
        if source.tokenizer is None:
            rule = "has no tokenizer: the corpus that it was trained on is not found"
            raise ConfigError("checkpoint", str(source.files.folder), rule, "name the corpus: --data runs/data/sample")
        outputs = [_output(source.files, target, DTYPES[dtype]) for target in targets(format, source.config)]
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        n_files = write_shards(unfinished, outputs, max_shard_gb * 1e9)
        _write_json(unfinished / "config.json", _config(source, format, dtype))
        if format != PLAIN:
            _write_description(unfinished, source, format, folder.name, license)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(outputs)} tensors in {n_files} files, {n_bytes / 1e6:,.1f} MB")
    if format == OWN and (exact := exact_families(source.config)):
        print(f"also exact as --format {' or '.join(exact)}, which needs no code in the folder")


def _plain(source: Source, dtype: torch.dtype) -> list[Output]:
    """All tensors under the names of `Transformer`, whose stacked experts are (E, ...)."""
    sizes, _ = shapes(source.config)
    n_experts = source.config.n_experts
    return [Output(name, shape, dtype, partial(_whole, source.files, name, n_experts)) for name, shape in sizes.items()]


def _whole(files: WeightFiles, name: str, n_experts: int) -> Iterator[Tensor]:
    if name in files:
        yield files.read(name)
    else:  # a row for each expert
        for expert in range(n_experts):
            yield files.read(f"{name}#{expert}")


def _output(files: WeightFiles, target: Target, dtype: torch.dtype) -> Output:
    dtype = torch.float32 if target.keeps_float32 else dtype
    return Output(target.name, target.shape, dtype, partial(target_parts, files, target))


def _config(source: Source, format: str, dtype: str) -> dict[str, Any]:
    if format == PLAIN:
        about = {
            "model_type": "fomoe_pl",
            **asdict(source.config),
            "optimizer_steps": source.manifest["optimizer_steps"],
        }
        return about | {"dtype": dtype}
    assert source.tokenizer is not None
    eod_id = source.tokenizer.eod_id
    return config_of(format, source.config) | {
        "dtype": dtype,
        "max_position_embeddings": source.sequence_length,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "pad_token_id": eod_id,
        "fomoe": training_settings(source.config) | source.training(),
    }


def _write_description(folder: Path, source: Source, format: str, name: str, license: str | None) -> None:
    assert source.tokenizer is not None
    if format == OWN:
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    eod_id = source.tokenizer.eod_id
    ends = {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}
    _write_json(folder / "generation_config.json", ends)
    source.tokenizer.save(folder, source.sequence_length)
    (folder / "README.md").write_text(card(source, format, name, license), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
