"""Writing and reading webdataset shards: one document a sample, its token ids as ``.npy``."""

import hashlib
import io
from collections.abc import Iterable, Iterator
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
        dtype: Type of the tokens.
    """

    def __init__(self, folder: Path, dtype: type[np.uint16] | type[np.uint32]) -> None:
        self._folder = folder
        self._dtype = dtype
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
                    tokens.tofile(file)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard}.tokens"


def write_shard(path: Path, documents: Iterable[Tokens]) -> str:
    """Write documents as a webdataset tar, the same bytes for the same documents, and return its SHA-256."""
    with path.open("wb") as file, wds.TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
        for number, tokens in enumerate(documents):
            buffer = io.BytesIO()
            np.save(buffer, tokens, allow_pickle=False)
            writer.write({"__key__": f"{number:08d}", "npy": buffer.getvalue()})
    with path.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def read_shard(manifest: Manifest, shard: ShardInfo) -> Iterator[Tokens]:
    """Read the documents of a shard, in the order in which they are stored.

    A list of one shard goes through webdataset's reader alone, not through its splitters and shufflers: those look at
    environment variables of the process (``RANK``), and have no position that could be saved.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The shard is damaged.
    """
    path = manifest.root / shard.file
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in its manifest")
    pipeline = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples(handler=wds.reraise_exception))
    documents = tokens = 0
    for sample in pipeline:
        document = np.load(io.BytesIO(sample["npy"]))
        documents += 1
        tokens += len(document)
        yield document
    if (documents, tokens) != (shard.documents, shard.tokens):
        raise ValueError(
            f"{path} is damaged: it has {documents} documents and {tokens} tokens, "
            f"its manifest says {shard.documents} and {shard.tokens}"
        )
