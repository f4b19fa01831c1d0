"""Reading a checkpoint's tensors as the pieces of other implementations' tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fomoe_pl.checkpoint.format import WeightFiles
from fomoe_pl.hub.families import Target


def target_parts(files: WeightFiles, target: Target) -> Iterator[Tensor]:
    """Read a tensor of another implementation part by part, float32; each part's memory is free before the next.

    Args:
        files: A checkpoint's tensors.
        target: Which one.
    """
    if not target.pieces:
        yield torch.zeros(target.shape)
    for piece in target.pieces:
        tensor = read_piece(files, piece.key)
        if piece.columns is not None:
            tensor = tensor[:, slice(*piece.columns)]
        yield tensor.T if piece.transposed else tensor


def read_piece(files: WeightFiles, key: str) -> Tensor:
    """Read a tensor, or one expert's row of it, whether the checkpoint has it whole or row by row.

    A router is whole where it was trained with ghosts, and in rows where sites route among their residents.

    Args:
        files: A checkpoint's tensors.
        key: `<tensor>` or `<tensor>#<expert>`.
    """
    if key in files or "#" in key:
        return files.read(key)
    n_experts = files.manifest["architecture"]["n_experts"]
    return torch.stack([files.read(f"{key}#{number}") for number in range(n_experts)])
