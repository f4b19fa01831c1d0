"""Writing and reading webdataset shards: one document a sample, its token ids as `.npy`.

Samples of the validation split have a second array, `.bytes.npy`: the bytes of text that each token stands for.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from fomoe_pl.data.manifest import Manifest, ShardInfo
from fomoe_pl.data.segments import LongArray
from fomoe_pl.remote import RemotePath

Tokens = NDArray[np.unsignedinteger]


def write_shard(
    path: Path, documents: Iterable[Tokens | LongArray], sizes: Iterable[Tokens | LongArray] | None = None
) -> str:
    """Write a webdataset tar, the same bytes for the same documents, and return its SHA-256.

    The bytes are those of webdataset's TarWriter, which takes some ten times as long for short documents.

    Args:
        path: The tar.
        documents: Tokens of each document.
        sizes: Bytes of text of each token of each document, for the validation split.
    """
    digest, length = hashlib.sha256(), 0
    with path.open("wb") as file:
        for number, (tokens, size) in enumerate(zip(documents, repeat(None) if sizes is None else sizes)):  # noqa: B905
            members: list[tuple[str, Tokens | LongArray]] = [("npy", tokens)]
            if size is not None:
                members.insert(0, ("bytes.npy", size.astype(np.min_scalar_type(size.max()))))
            for ending, array in members:
                header = _npy_header(array.dtype.str, len(array))
                content = len(header) + array.nbytes
                filling = bytes(-content % tarfile.BLOCKSIZE)
                values = array.parts() if isinstance(array, LongArray) else [array]
                arrays = (np.ascontiguousarray(part).data for part in values)
                pieces: Iterable[Any] = chain((_tar_header(ending, content, number), header), arrays, (filling,))
                for part in pieces:
                    digest.update(part)
                    file.write(part)
                length += tarfile.BLOCKSIZE + content + len(filling)
        end = bytes(2 * tarfile.BLOCKSIZE)
        end += bytes(-(length + len(end)) % tarfile.RECORDSIZE)
        digest.update(end)
        file.write(end)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _tar_header(ending: str, size: int, number: int) -> bytes:
    """Header of the file `NUMBER.ENDING`, which differs from that of file 0 in digits and their sum."""
    if number >= 10**8:
        raise ValueError("a shard has at most 10^8 documents")
    plain, total = _plain_header(ending, size)
    digits = b"%08d" % number
    total += sum(digits) - 8 * ord("0")
    return digits + plain[8:148] + b"%06o\0 " % total + plain[156:]


@lru_cache(maxsize=1 << 14)
def _plain_header(ending: str, size: int) -> tuple[bytes, int]:
    member = tarfile.TarInfo(f"00000000.{ending}")
    member.size, member.mode, member.mtime = size, 0o444, 0
    header = member.tobuf()
    if len(header) != tarfile.BLOCKSIZE:
        raise ValueError(f"a document of {size} bytes of tokens is too large for a tar")
    return header, int(header[148:154], 8)


@lru_cache(maxsize=1 << 14)
def _npy_header(dtype: str, length: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    return buffer.getvalue()


def read_shard(manifest: Manifest, shard: ShardInfo) -> Iterator[Tokens]:
    """Read the documents of a shard, in the order in which they are stored.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The shard is damaged.
    """
    for tokens, _ in _read(manifest, shard):
        yield tokens


def read_validation_shard(manifest: Manifest, shard: ShardInfo) -> Iterator[tuple[Tokens, Tokens]]:
    """Read the tokens of each document of a validation shard, and the bytes of text of each token.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The shard is damaged.
    """
    text = 0
    for tokens, size in _read(manifest, shard):
        if size is None or len(size) != len(tokens):
            raise ValueError(f"{manifest.root / shard.file} is damaged: a document lacks the bytes of its tokens")
        text += int(size.sum(dtype=np.int64))
        yield tokens, size
    if text != shard.bytes:
        raise ValueError(
            f"{manifest.root / shard.file} is damaged: it has {text} bytes of text, its manifest says {shard.bytes}"
        )


def _read(manifest: Manifest, shard: ShardInfo) -> Iterator[tuple[Tokens, Tokens | None]]:
    """The arrays of each sample.

    The samples go through webdataset's reader of one open tar alone, not through its splitters and shufflers, which
    look at environment variables of the process (`RANK`) and have no position that could be saved, nor through its
    opener, which takes a path with a colon for a URL.
    """
    path = manifest.root / shard.file
    whole = io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path.open("rb")
    with whole as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in its manifest")
        file.seek(0)
        documents = tokens = 0
        members = wds.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        for sample in wds.tariterators.group_by_keys(members):
            document = _array(sample["npy"])
            documents += 1
            tokens += len(document)
            yield document, _array(sample["bytes.npy"]) if "bytes.npy" in sample else None
    if (documents, tokens) != (shard.documents, shard.tokens):
        raise ValueError(
            f"{path} is damaged: it has {documents} documents and {tokens} tokens, "
            f"its manifest says {shard.documents} and {shard.tokens}"
        )


def _array(content: bytes) -> Tokens:
    """An array of ids.

    Raises:
        ValueError: The bytes are none.
    """
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python would, and raises what Python's reader does
        raise ValueError(f"an array cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "u":
        raise ValueError("an array has no ids")
    return found
