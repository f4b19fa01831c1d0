"""Writing and reading webdataset shards: one document a sample, its token ids as ``.npy``.

Samples of the validation split have a second array, ``.bytes.npy``: the bytes of text that each token stands for.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from fomoe_pl.data.manifest import Manifest, ShardInfo

Tokens = NDArray[np.unsignedinteger]
_SPILL_BYTES = 64_000_000  # tokens held in memory before they go to the shards' temporary files


class ShardSpill:
    """Documents on their way to their shards, which they reach in any order: one temporary file a shard.

    Args:
        folder: Folder of the temporary files.
        dtype: Type of the tokens, or of what else there is of each.
        name: Ending of the temporary files.
    """

    def __init__(self, folder: Path, dtype: type[np.uint16] | type[np.uint32], name: str = "tokens") -> None:
        self._folder = folder
        self._dtype = dtype
        self._name = name
        self._waiting: dict[int, list[Tokens]] = {}
        self._waiting_bytes = 0
        self._entries: dict[int, list[tuple[int, int]]] = {}

    def add(self, shard: int, rank: int, tokens: Tokens) -> None:
        """Give a document to a shard; ``rank`` is its place among the shard's documents."""
        self._waiting.setdefault(shard, []).append(tokens)
        self._entries.setdefault(shard, []).append((rank, len(tokens)))
        self._waiting_bytes += tokens.nbytes
        if self._waiting_bytes > _SPILL_BYTES:
            self._flush()

    def take(self, shard: int) -> list[Tokens]:
        """The documents of a shard by rank; its temporary file is deleted."""
        self._flush()
        path = self._path(shard)
        tokens = np.fromfile(path, self._dtype)
        path.unlink()
        ranks, lengths = zip(*self._entries.pop(shard), strict=True)
        documents = np.split(tokens, np.cumsum(lengths)[:-1])
        return [documents[i] for i in np.argsort(ranks)]

    def _flush(self) -> None:
        for shard, documents in self._waiting.items():
            with self._path(shard).open("ab") as file:
                for tokens in documents:
                    tokens.astype(self._dtype, copy=False).tofile(file)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard}.{self._name}"


def write_shard(path: Path, documents: Iterable[Tokens], sizes: Iterable[Tokens] | None = None) -> str:
    """Write a webdataset tar, the same bytes for the same documents, and return its SHA-256.

    Args:
        path: The tar.
        documents: Tokens of each document.
        sizes: Bytes of text of each token of each document, for the validation split.
    """
    with path.open("wb") as file, wds.TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
        for number, (tokens, size) in enumerate(zip(documents, repeat(None) if sizes is None else sizes)):  # noqa: B905
            sample = {"__key__": f"{number:08d}", "npy": _npy(tokens)}
            if size is not None:
                sample["bytes.npy"] = _npy(size.astype(np.min_scalar_type(size.max())))
            writer.write(sample)
    with path.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def _npy(array: Tokens) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
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
    look at environment variables of the process (``RANK``) and have no position that could be saved, nor through its
    opener, which takes a path with a colon for a URL.
    """
    path = manifest.root / shard.file
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in its manifest")
        file.seek(0)
        documents = tokens = 0
        members = wds.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        for sample in wds.tariterators.group_by_keys(members):
            document = np.load(io.BytesIO(sample["npy"]))
            documents += 1
            tokens += len(document)
            yield document, np.load(io.BytesIO(sample["bytes.npy"])) if "bytes.npy" in sample else None
    if (documents, tokens) != (shard.documents, shard.tokens):
        raise ValueError(
            f"{path} is damaged: it has {documents} documents and {tokens} tokens, "
            f"its manifest says {shard.documents} and {shard.tokens}"
        )
