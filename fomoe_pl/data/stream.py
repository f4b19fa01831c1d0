"""The endless training stream of a site: shards to packed sequences, at a position that is one number a worker."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fomoe_pl.data.manifest import Manifest, ShardInfo
from fomoe_pl.data.partition import StreamPlan
from fomoe_pl.data.shards import Tokens, read_shard
from fomoe_pl.errors import ConfigError

_DRAWS = 4096  # domains drawn at a time
# Keep the generators of the different orders apart.
_SHARD_ORDER, _DOCUMENT_ORDER, _MIXTURE = range(3)


class DomainStream:
    """The tokens of some shards of a domain, for ever.

    Each epoch has every document of the shards once: the shards in an order of their own, and within a shard, which is
    held in memory whole, the documents in an order of their own. The orders follow from seed, shard and epoch alone.

    Args:
        manifest: The corpus.
        domain: Index of the domain.
        shards: Numbers of the training shards.
        seed: Seed of the orders.
    """

    def __init__(self, manifest: Manifest, domain: int, shards: Sequence[int], seed: int) -> None:
        self._manifest = manifest
        self._domain = domain
        self._numbers = tuple(shards)
        every = manifest.shards_of("train", manifest.domain_names[domain])
        self._shards: dict[int, ShardInfo] = {number: every[number] for number in shards}
        self._seed = seed
        self.seek(0)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self._shards.values())

    def seek(self, position: int) -> None:
        """Go to the token that is number ``position`` since the start, counting from 0."""
        self._epoch, offset = divmod(position, self.tokens_per_epoch)
        order = self._shard_order()
        self._place = 0
        while offset >= (tokens := self._shards[order[self._place]].tokens):
            offset -= tokens
            self._place += 1
        self._documents: list[Tokens] | None = None  # read when they are needed
        self._offset = offset  # among the tokens of the shard, until the shard is read; then in the document

    def take(self, n: int) -> NDArray[np.int64]:
        """The next ``n`` tokens."""
        taken: list[Tokens] = []
        while n > 0:
            if self._documents is None:
                self._documents = self._read()
            document = self._documents[-1]
            piece = document[self._offset : self._offset + n]
            taken.append(piece)
            n -= len(piece)
            self._offset += len(piece)
            if self._offset == len(document):
                self._documents.pop()
                self._offset = 0
            if not self._documents:
                self._next_shard()
        return np.concatenate(taken).astype(np.int64)

    def _next_shard(self) -> None:
        self._documents = None
        self._place += 1
        if self._place == len(self._numbers):
            self._epoch += 1
            self._place = 0

    def _shard_order(self) -> list[int]:
        generator = np.random.default_rng([self._seed, _SHARD_ORDER, self._domain, self._epoch, *self._numbers])
        return [self._numbers[i] for i in generator.permutation(len(self._numbers))]

    def _read(self) -> list[Tokens]:
        """The documents of the present shard from the present offset on, the next one last."""
        number = self._shard_order()[self._place]
        stored = list(read_shard(self._manifest, self._shards[number]))
        generator = np.random.default_rng([self._seed, _DOCUMENT_ORDER, self._domain, self._epoch, number])
        documents = [stored[i] for i in reversed(generator.permutation(len(stored)))]
        while self._offset >= len(documents[-1]):
            self._offset -= len(documents.pop())
        return documents


class PackedStream:
    """One worker's sequences: domains drawn by weight, the tokens of each domain packed without loss.

    A sequence has S+1 tokens, and begins with the last token of the domain's sequence before, so that every token is a
    target once. The first sequence of a domain begins with an end of document.

    Args:
        manifest: The corpus.
        plan: What the worker reads.
        sequence_length: S.
        seed: Seed of all orders.
        site: Index of the site.
        worker: Index of the worker.
        start: Number of sequences that were already taken.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: StreamPlan,
        sequence_length: int,
        seed: int,
        site: int,
        worker: int,
        start: int = 0,
    ) -> None:
        self._plan = plan
        self._length = sequence_length
        self._mixture_seed = (seed, _MIXTURE, site, worker)
        self._taken = start
        self._streams = []
        self._last_token = []
        for i, before in enumerate(self._counts_before(start)):
            stream = DomainStream(manifest, plan.domains[i], plan.shards[i], seed)
            if before:
                stream.seek(before * sequence_length - 1)
            self._streams.append(stream)
            self._last_token.append(stream.take(1)[0] if before else manifest.eod_id)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield ``inputs`` (S,), ``targets`` (S,) and ``domain`` (), all int64, for ever."""
        while True:
            block, offset = divmod(self._taken, _DRAWS)
            for i in self._draws(block)[offset:]:
                sequence = np.append(self._last_token[i], self._streams[i].take(self._length))
                self._last_token[i] = sequence[-1]
                tokens = torch.from_numpy(sequence)
                self._taken += 1
                yield {
                    "inputs": tokens[:-1],
                    "targets": tokens[1:],
                    "domain": torch.tensor(self._plan.domains[i]),
                }

    def _draws(self, block: int) -> NDArray[np.int64]:
        """The domains of _DRAWS sequences, as indices into the plan."""
        generator = np.random.default_rng([*self._mixture_seed, block])
        return generator.choice(len(self._plan.domains), size=_DRAWS, p=self._plan.weights)

    def _counts_before(self, sequences: int) -> list[int]:
        """How many of the first ``sequences`` sequences each domain had."""
        counts = np.zeros(len(self._plan.domains), np.int64)
        for block in range(-(-sequences // _DRAWS)):
            draws = self._draws(block)[: sequences - block * _DRAWS]
            counts += np.bincount(draws, minlength=len(counts))
        return counts.tolist()


class SiteStream(IterableDataset[dict[str, Tensor]]):
    """A site's training data: one endless epoch, which each DataLoader worker reads by its own plan.

    Its position is the number of sequences that each worker has handed out; everything else (epoch, shard, document,
    offset, mixture) follows from that number and the seed. In a DataLoader with workers it is the workers' copies that
    advance: a position that the DataLoader's user counts can be given to :meth:`load_state_dict`.

    Args:
        manifest: The corpus.
        plans: What each worker reads; a DataLoader without workers needs one.
        sequence_length: S, tokens of a sequence.
        seed: Seed of all orders.
        site: Index of the site.
    """

    def __init__(
        self, manifest: Manifest, plans: Sequence[StreamPlan], sequence_length: int, seed: int, site: int
    ) -> None:
        self._manifest = manifest
        self._plans = tuple(plans)
        self._length = sequence_length
        self._seed = seed
        self._site = site
        self._taken = [0] * len(plans)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield ``inputs`` (S,), ``targets`` (S,) and ``domain`` (), all int64, for ever."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for sequence in PackedStream(
            self._manifest, self._plans[worker], self._length, self._seed, self._site, worker, self._taken[worker]
        ):
            self._taken[worker] += 1
            yield sequence

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"stream": self._identity(), "sequences": list(self._taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; iterators that are made afterwards start there.

        Raises:
            ConfigError: It is a position in another stream.
        """
        identity = self._identity()
        if state["stream"] != identity:
            differing = [key for key in identity if state["stream"].get(key) != identity[key]]
            raise ConfigError(
                f"data ({', '.join(differing)})",
                {key: identity[key] for key in differing},
                "the position was saved in another stream",
                f"It had { ({key: state['stream'].get(key) for key in differing}) }",
            )
        self._taken = list(state["sequences"])

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self._manifest.fingerprint,
            "sequence_length": self._length,
            "seed": self._seed,
            "site": self._site,
            "plans": hashlib.sha256(repr(self._plans).encode()).hexdigest(),
        }
