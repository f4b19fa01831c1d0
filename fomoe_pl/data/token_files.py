"""Token files that are there already: a plain array of ids, in which one id ends every document."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath, file_size

TokensDtype = Literal["uint16", "uint32"]
_CHUNK = 1 << 20  # ids read at a time


def read_token_file(path: AnyPath, dtype: TokensDtype, end: int, vocab_size: int) -> Iterator[NDArray[np.uint32]]:
    """The documents of a token file that are not empty, without their ends.

    Args:
        path: The file: little-endian ids and nothing else.
        dtype: Their type.
        end: Id that ends a document; where it begins documents instead, they are the same.
        vocab_size: Ids are below it.

    Raises:
        ConfigError: The file is cut, or has an id that is not in the vocabulary.
    """
    width = np.dtype(dtype).itemsize
    if file_size(path) % width:
        raise ConfigError("source", str(path), f"has {file_size(path)} bytes, no whole number of {dtype} ids",
                          "Copy it again, or give its own --tokens_dtype")  # fmt: skip
    begun: list[NDArray[np.uint32]] = []
    first = 0
    with path.open("rb") as file:
        while content := file.read(_CHUNK * width):
            ids = np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(np.uint32)
            wrong = np.flatnonzero((ids >= vocab_size) & (ids != end))
            if len(wrong):
                raise ConfigError(
                    "source", str(path),
                    f"token {first + int(wrong[0])} is {int(ids[wrong[0]])}, and the tokenizer has {vocab_size} ids",
                    "Give the tokenizer that it was made with, and its own --tokens_dtype",
                )  # fmt: skip
            pieces = np.split(ids, np.flatnonzero(ids == end))
            begun.append(pieces[0])
            for piece in pieces[1:]:
                if sum(map(len, begun)):
                    yield np.concatenate(begun)
                begun = [piece[1:]]
            first += len(ids)
    if sum(map(len, begun)):
        yield np.concatenate(begun)
