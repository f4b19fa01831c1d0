"""Safetensors files, written piece by piece and read tensor by tensor: neither ever holds a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fomoe_pl.checkpoint.format import TensorFiles
from fomoe_pl.errors import ConfigError

CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Output:
    """One tensor that is written.

    Attributes:
        name: In the file.
        shape: Of the whole tensor.
        dtype: In the file.
        parts: Its values, one part after the other in the order of memory; a part is freed before the next is read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterator[Tensor]]

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(folder: Path, outputs: Sequence[Output], limit: float) -> int:
    """Write one file, or several with an index as Hugging Face has them.

    Args:
        folder: Where; it exists.
        outputs: All tensors.
        limit: Size above which there are several files, bytes; a tensor that is larger has a file of its own.

    Returns:
        The number of files.
    """
    groups = _groups(outputs, limit)
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        name = ONE_FILE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_one(folder / name, group)
        weight_map |= {output.name: name for output in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(output.n_bytes for output in outputs)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return len(groups)


def _groups(outputs: Sequence[Output], limit: float) -> list[list[Output]]:
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.n_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.n_bytes
    return groups


def write_one(path: Path, outputs: Sequence[Output]) -> None:
    """Write one file part by part, which the library does for tensors in memory alone.

    The format: eight bytes with the header's length, the header as JSON, and the values one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in outputs:
        start, end = end, end + output.n_bytes
        code = CODES[output.dtype]
        header[output.name] = {"dtype": code, "shape": list(output.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            written = 0
            for part in output.parts():
                written += part.numel()
                file.write(part.to(output.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            assert written == torch.Size(output.shape).numel(), output.name


class FolderTensors:
    """The tensors of a Hugging Face folder by name, read one by one.

    Args:
        folder: With `model.safetensors`, or several files and their index.

    Raises:
        ConfigError: If there are no safetensors, one is missing or cut, or the index names a tensor that no file has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = TensorFiles()
        self._where: dict[str, Path] = {}
        if (folder / INDEX).is_file():
            named: dict[str, str] = read_json("source", folder, INDEX).get("weight_map", {})
            files = sorted({*named.values()})
        elif (folder / ONE_FILE).is_file():
            named, files = {}, [ONE_FILE]
        else:
            rule = f"has neither {ONE_FILE} nor {INDEX}"
            raise ConfigError("source", str(folder), rule, "give a Hugging Face folder with safetensors")
        for name in files:
            try:
                keys = self._files.file(folder / name).keys()
            except (OSError, SafetensorError) as error:
                rule = f"is damaged: {name} cannot be read ({error})"
                raise ConfigError("source", str(folder), rule, "copy the folder again") from None
            self._where |= dict.fromkeys(keys, folder / name)
        missing = sorted({*named} - {*self._where})
        if missing:
            rule = f"is damaged: its index names tensors that no file has ({some(missing)})"
            raise ConfigError("source", str(folder), rule, "copy the folder again")

    def names(self) -> list[str]:
        """All names."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._about(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as safetensors names it, from the header."""
        code: str = self._about(name).get_dtype()
        return code

    def read(self, name: str, row: int | None = None) -> Tensor:
        """One tensor, or one row (axis 0) of it; of the type that the file has."""
        return self._files.read(self._where[name], name, row)

    def _about(self, name: str) -> Any:
        return self._files.file(self._where[name]).get_slice(name)


def read_json(key: str, folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object out of a Hugging Face folder.

    Args:
        key: What the folder is called in messages.
        folder: The folder.
        name: Of the file.

    Raises:
        ConfigError: If there is no such file, or something else is in it.
    """
    if not (folder / name).is_file():
        raise ConfigError(key, str(folder), f"has no {name}", "give a Hugging Face folder")
    try:
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        content.keys()
    except (ValueError, AttributeError):
        rule = f"is damaged: {name} is no JSON object"
        raise ConfigError(key, str(folder), rule, "copy the folder again") from None
    return content


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
