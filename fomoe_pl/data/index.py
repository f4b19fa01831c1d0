"""Where each document of a domain goes, decided from hashes and sizes before its text is encoded."""

import hashlib
import heapq
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.data.documents import Ids, ReadOptions, documents_of, read_documents
from fomoe_pl.data.long_text import LongText, Text
from fomoe_pl.data.manifest import Split
from fomoe_pl.data.sources import FileKind, Source, kind_of
from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath

_log = logging.getLogger(__name__)
_HASHED = 1 << 20  # characters hashed at a time
_TOLD_EVERY = 1_000_000  # bytes of text between two calls of a progress
Progress = Callable[[str, int, int], None]


def unseen(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class DomainIndex:
    """Where each document of a domain goes; the arrays are in reading order.

    Attributes:
        source: The domain and its files.
        options: How they are read.
        sizes: Bytes of text of each document.
        shard: Number of each document's shard; those of the validation split count on from the training shards.
        rank: Place of each document in the domain's shuffled order.
        n_train_shards: Number of training shards.
        n_val_shards: Number of validation shards.
        documents_sha256: Hash of all documents in reading order.
        file_hashes: Hash of each file's documents; of those alone that have more than one.
        left_out: Number of records that were left out, by why.
        keys: Beginning of each document's hash.
    """

    source: Source
    options: ReadOptions
    sizes: NDArray[np.int64]
    shard: NDArray[np.int64]
    rank: NDArray[np.int64]
    n_train_shards: int
    n_val_shards: int
    documents_sha256: str
    file_hashes: dict[AnyPath, bytes]
    left_out: Counter[str]
    keys: NDArray[np.uint64]

    def documents(self) -> Iterator[Text | Ids]:
        """Read the documents again."""
        return read_documents(self.source, self.options)

    def shard_name(self, shard: int) -> tuple[str, Split]:
        """File name and split of a shard."""
        split: Split = "train" if shard < self.n_train_shards else "val"
        number = shard if split == "train" else shard - self.n_train_shards
        return f"{split}-{self.source.domain}-{number:05d}.tar", split


def index_domain(
    source: Source,
    options: ReadOptions,
    val_fraction: float,
    shards_per_domain: int,
    max_shard_bytes: float,
    seed: int,
    only: Split | None = None,
    progress: Progress = unseen,
    token_bytes: NDArray[np.int64] | None = None,
) -> DomainIndex:
    """Read a domain once and decide split, order and shard of each document.

    Args:
        source: The domain and its files.
        options: How they are read.
        val_fraction: Share of the validation split.
        shards_per_domain: Least number of training shards.
        max_shard_bytes: Most text in a shard.
        seed: Of the order.
        only: The split that all documents are in; None: by their hashes.
        progress: Is called now and then.
        token_bytes: Bytes of text that each id stands for, where the files hold ids.

    The split follows from the document's hash alone: the same text is in the same split wherever and however often it
    occurs. The order is a seeded shuffle; along it each document goes to the shard with the least text so far, so that
    a split's shards are about equal and exchangeable.

    Raises:
        ConfigError: There are too few documents for the shards, or none for validation.
    """
    whole = hashlib.sha256()
    sizes = array("q")
    keys = array("Q")
    file_hashes: dict[AnyPath, bytes] = {}
    left_out: Counter[str] = Counter()
    n_bytes = told = 0
    for path in source.files:
        own, before = hashlib.sha256(), len(sizes)
        for text in documents_of(source, path, options, left_out):
            hashed, size = hashlib.blake2b(digest_size=16), 0
            for start in range(0, len(text), _HASHED):  # in parts: a long text is not held twice
                part = text[start : start + _HASHED]
                raw = part.encode() if isinstance(part, str) else part.astype("<u4").tobytes()
                hashed.update(raw)
                size += len(raw) if token_bytes is None or isinstance(part, str) else int(token_bytes[part].sum())
            digest = hashed.digest()
            whole.update(digest)
            own.update(digest)
            sizes.append(size)
            keys.append(int.from_bytes(digest[:8], "big"))
            n_bytes += size
            if n_bytes - told >= _TOLD_EVERY:
                told = n_bytes
                progress(f"{source.domain}: reading", n_bytes, 0)
        if len(sizes) - before > 1:  # of one document there may well be copies, of files of many there are not
            file_hashes[path] = own.digest()
    kinds = {} if source.tokens else {path: cast(FileKind, kind_of(path)) for path in source.files}
    texts = [path for path, kind in kinds.items() if kind.format == ".txt"]
    if options.separator is not None and texts and not any(path in file_hashes for path in texts):
        _log.warning("%s: %r stands in none of the .txt files: each is one document", source.domain, options.separator)
    size_N = np.array(sizes, np.int64)
    key_N = np.array(keys, np.uint64)
    is_val_N = key_N < np.uint64(int(val_fraction * 2**64)) if only is None else np.full(len(key_N), only == "val")
    n_train = int((~is_val_N).sum())
    n_val = len(size_N) - n_train
    n_train_shards = max(shards_per_domain, math.ceil(size_N[~is_val_N].sum() / max_shard_bytes))
    n_val_shards = max(1, math.ceil(size_N[is_val_N].sum() / max_shard_bytes))
    if only == "val":
        n_train_shards, n_val_shards = 0, min(n_val, n_val_shards)
    elif only == "train":
        n_val_shards = 0
    name = source.domain
    if not len(size_N):
        why = ", ".join(f"{count} with {what}" for what, count in left_out.items())
        raise ConfigError("source", name, f"this domain has no documents{f' ({why})' if why else ''}",
                          "Name other files, or another --text_field")  # fmt: skip
    if n_train < n_train_shards and n_train >= shards_per_domain:
        raise ConfigError("max_shard_mb", max_shard_bytes / 1e6,
                          f"domain {name!r} has {n_train} training documents, fewer than its {n_train_shards} shards "
                          "of that size", "Give a larger one; the default is 16")  # fmt: skip
    if n_train < n_train_shards:
        raise ConfigError(
            "shards_per_domain",
            shards_per_domain,
            f"domain {name!r} has {n_train} training documents, fewer than its {n_train_shards} shards",
            "Give a --separator if its files hold several documents, write NAME=FOLDER if the files of a folder are "
            "one domain, or give fewer shards",
        )
    if n_val < n_val_shards:
        raise ConfigError(
            "val_fraction",
            val_fraction,
            f"domain {name!r} has {n_val} validation documents among {len(size_N)}, at least {n_val_shards} needed",
            "Give a larger fraction, or cut long documents into parts",
        )
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(size_N))
    rank_N = np.empty_like(order)
    rank_N[order] = np.arange(len(order))
    shard_N = np.empty(len(size_N), np.int64)
    shard_N[order[~is_val_N[order]]] = _deal(size_N[order[~is_val_N[order]]], n_train_shards)
    shard_N[order[is_val_N[order]]] = _deal(size_N[order[is_val_N[order]]], n_val_shards) + n_train_shards
    return DomainIndex(
        source,
        options,
        size_N,
        shard_N,
        rank_N,
        n_train_shards,
        n_val_shards,
        whole.hexdigest(),
        file_hashes,
        left_out,
        key_N,
    )


def _deal(sizes: NDArray[np.int64], n_shards: int) -> NDArray[np.int64]:
    """Give each document in turn to the shard with the least text so far; the first ones open the shards."""
    shards = np.empty(len(sizes), np.int64)
    filled = [(0, shard) for shard in range(n_shards)]
    for document, size in enumerate(sizes.tolist()):
        held, shard = filled[0]
        shards[document] = shard
        heapq.heapreplace(filled, (held + size, shard))
    return shards


def training_share(index: DomainIndex, n_bytes: int) -> Iterator[str]:
    """The first `n_bytes` of text of a domain's shuffled training split, in reading order."""
    in_order = np.argsort(index.rank)
    in_order = in_order[index.shard[in_order] < index.n_train_shards]
    before = np.cumsum(index.sizes[in_order]) - index.sizes[in_order]
    wanted = {int(document): n_bytes - int(b) for document, b in zip(in_order, before, strict=True) if b < n_bytes}
    for document, text in enumerate(index.documents()):
        if document in wanted and isinstance(text, str | LongText):
            yield text[: wanted[document]].encode()[: wanted[document]].decode("utf-8", "ignore")


def training_bytes(index: DomainIndex) -> int:
    """Bytes of text in a domain's training split."""
    return int(index.sizes[index.shard < index.n_train_shards].sum())
