"""Where each document of a domain goes, decided from hashes and sizes before its text is encoded."""

import hashlib
import heapq
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.data.documents import Source, read_documents
from fomoe_pl.data.manifest import Split
from fomoe_pl.errors import ConfigError


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents: see :func:`fomoe_pl.data.documents.read_documents`."""

    text_field: str
    separator: str | None


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
    """

    source: Source
    options: ReadOptions
    sizes: NDArray[np.int64]
    shard: NDArray[np.int64]
    rank: NDArray[np.int64]
    n_train_shards: int
    n_val_shards: int
    documents_sha256: str

    def documents(self) -> Iterator[str]:
        """Read the documents again."""
        return read_documents(self.source, self.options.text_field, self.options.separator)

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
) -> DomainIndex:
    """Read a domain once and decide split, order and shard of each document.

    The split follows from the document's hash alone: the same text is in the same split wherever and however often it
    occurs. The order is a seeded shuffle; along it each document goes to the shard with the least text so far, so that
    a split's shards are about equal and exchangeable.

    Raises:
        ConfigError: There are too few documents for the shards, or none for validation.
    """
    whole = hashlib.sha256()
    sizes = array("q")
    keys = array("Q")
    for text in read_documents(source, options.text_field, options.separator):
        raw = text.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        whole.update(digest)
        sizes.append(len(raw))
        keys.append(int.from_bytes(digest[:8], "big"))
    size_N = np.array(sizes, np.int64)
    is_val_N = np.array(keys, np.uint64) < np.uint64(int(val_fraction * 2**64))
    n_train = int((~is_val_N).sum())
    n_val = len(size_N) - n_train
    n_train_shards = max(shards_per_domain, math.ceil(size_N[~is_val_N].sum() / max_shard_bytes))
    n_val_shards = max(1, math.ceil(size_N[is_val_N].sum() / max_shard_bytes))
    name = source.domain
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
    return DomainIndex(source, options, size_N, shard_N, rank_N, n_train_shards, n_val_shards, whole.hexdigest())


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
    """The first ``n_bytes`` of text of a domain's shuffled training split, in reading order."""
    in_order = np.argsort(index.rank)
    in_order = in_order[index.shard[in_order] < index.n_train_shards]
    before = np.cumsum(index.sizes[in_order]) - index.sizes[in_order]
    wanted = {int(document): n_bytes - int(b) for document, b in zip(in_order, before, strict=True) if b < n_bytes}
    for document, text in enumerate(index.documents()):
        if document in wanted:
            yield text.encode()[: wanted[document]].decode("utf-8", "ignore")


def training_bytes(index: DomainIndex) -> int:
    """Bytes of text in a domain's training split."""
    return int(index.sizes[index.shard < index.n_train_shards].sum())
