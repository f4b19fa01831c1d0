"""The endless training stream of a site: shards to packed sequences, at a position that is one number a worker."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fomoe_pl.data.manifest import Manifest, ShardInfo
from fomoe_pl.data.partition import StreamPlan
from fomoe_pl.data.repair import ShardReader
from fomoe_pl.data.shards import Tokens

_DRAWS = 4096  # domains drawn at a time
# Keep the generators of the different orders apart.
_SHARD_ORDER, _DOCUMENT_ORDER, _MIXTURE, _SEQUENCE_ORDER = range(4)
Consumed = Sequence[Sequence[int]]  # tokens read of each training shard of each domain, all epochs counted


class DomainStream:
    """The tokens of some shards of a domain, without end.

    Each epoch has every document of the shards once: the shards in an order of their own, and within a shard, which is
    held in memory whole, the documents in an order of their own. The documents' order follows from seed, shard and
    epoch alone, so that another reader can go on where this one stopped: what others have read of a shard is left out.

    Args:
        manifest: The corpus.
        domain: Index of the domain.
        shards: Numbers of the training shards.
        seed: Seed of the orders.
        consumed: Tokens that were read of each shard before, all epochs counted; shards that are missing: none.
        max_bad_shards: Damaged shards that are replaced by others; one more is an error.
        order: Number that keeps the orders of different domains apart; None: the domain's index.
    """

    def __init__(
        self,
        manifest: Manifest,
        domain: int,
        shards: Sequence[int],
        seed: int,
        consumed: Mapping[int, int] | None = None,
        max_bad_shards: int = 0,
        order: int | None = None,
    ) -> None:
        self._order = domain if order is None else order
        self._numbers = tuple(shards)
        every = manifest.shards_of("train", manifest.domain_names[domain])
        self._shards: dict[int, ShardInfo] = {number: every[number] for number in shards}
        self._reader = ShardReader(manifest, max_bad_shards)
        self._seed = seed
        self._before = {number: (consumed or {}).get(number, 0) for number in shards}
        self.seek(0)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self._shards.values())

    def seek(self, position: int) -> None:
        """Go to the token that is number `position` since the start, counting from 0."""
        epochs = [divmod(self._before[number], shard.tokens) for number, shard in self._shards.items()]
        self._epoch = min(epoch for epoch, _ in epochs)
        whole = max(epoch + (rest > 0) for epoch, rest in epochs)  # from this epoch on nothing is left out
        while self._epoch < whole and position >= (left := sum(map(self._left, self._numbers))):
            position -= left
            self._epoch += 1
        if self._epoch >= whole:
            epochs_later, position = divmod(position, self.tokens_per_epoch)
            self._epoch += epochs_later
        order = self._shard_order()
        self._place = 0
        while position >= self._left(order[self._place]):
            position -= self._left(order[self._place])
            self._place += 1
        self._documents: list[Tokens] | None = None  # read when they are needed
        # Among the tokens of the shard, until the shard is read; then in the document.
        self._offset = position + self._left_out(order[self._place])

    def consumed_at(self, position: int) -> dict[int, int]:
        """Tokens that are read of each shard before a position, all epochs and readers counted; goes there."""
        self.seek(position)
        consumed = {}
        for place, number in enumerate(self._shard_order()):
            epochs = self._epoch + (place < self._place)
            consumed[number] = max(self._before[number], epochs * self._shards[number].tokens)
            if place == self._place:
                consumed[number] = epochs * self._shards[number].tokens + self._offset
        return consumed

    def _left_out(self, number: int) -> int:
        """Tokens of a shard that were read in the present epoch before the start."""
        tokens = self._shards[number].tokens
        return min(tokens, max(0, self._before[number] - self._epoch * tokens))

    def _left(self, number: int) -> int:
        return self._shards[number].tokens - self._left_out(number)

    def take(self, n: int) -> NDArray[np.int64]:
        """The next `n` tokens."""
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
        while self._place == len(self._numbers) or not self._left(self._shard_order()[self._place]):
            self._place += 1
            if self._place >= len(self._numbers):
                self._epoch += 1
                self._place = 0
        self._offset = self._left_out(self._shard_order()[self._place])

    def _shard_order(self) -> list[int]:
        generator = np.random.default_rng([self._seed, _SHARD_ORDER, self._order, self._epoch, *self._numbers])
        return [self._numbers[i] for i in generator.permutation(len(self._numbers))]

    def _read(self) -> list[Tokens]:
        """The documents of the present shard from the present offset on, the next one last."""
        order = self._shard_order()
        number = order[self._place]
        spares = [self._shards[other] for other in (*order[self._place + 1 :], *order[: self._place])]
        stored = self._reader.read(self._shards[number], spares)
        generator = np.random.default_rng([self._seed, _DOCUMENT_ORDER, self._order, self._epoch, number])
        documents = [stored[i] for i in reversed(generator.permutation(len(stored)))]
        while self._offset >= len(documents[-1]):
            self._offset -= len(documents.pop())
        return documents


def draw_domains(plan: StreamPlan, seed: int, site: int, worker: int, block: int) -> NDArray[np.int64]:
    """The domains of a worker's sequences number `block` · 4096 and on, 4096 of them, as indices into its plan."""
    generator = np.random.default_rng([seed, _MIXTURE, site, worker, block])
    return generator.choice(len(plan.domains), size=_DRAWS, p=plan.weights)


def count_domains(plan: StreamPlan, seed: int, site: int, worker: int, sequences: int) -> list[int]:
    """How many of a worker's first `sequences` sequences each domain of its plan had."""
    counts = np.zeros(len(plan.domains), np.int64)
    for block in range(-(-sequences // _DRAWS)):
        draws = draw_domains(plan, seed, site, worker, block)[: sequences - block * _DRAWS]
        counts += np.bincount(draws, minlength=len(counts))
    return counts.tolist()


class PackedStream:
    """One worker's sequences: domains drawn by weight, the tokens of each domain packed without loss.

    A sequence has S+1 tokens, and begins with the last token of the domain's sequence before, so that every token is a
    target once. The first sequence of a domain begins with an end of document. With `shuffle` above 1, so many
    sequences of a domain at a time come in an order of their own.

    Args:
        manifest: The corpus.
        plan: What the worker reads.
        sequence_length: S.
        seed: Seed of all orders.
        site: Index of the site.
        worker: Index of the worker.
        start: Number of sequences that were already taken.
        consumed: For each domain of the corpus, tokens that were read of each shard before the first sequence.
        max_bad_shards: As for :class:`DomainStream`.
        orders: For each domain of the corpus, the number of its orders; None: its index.
        labels: For each domain of the corpus, its index in the batches; None: that in the corpus.
        shuffle: Sequences of a domain that are read, and shuffled, at a time.
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
        consumed: Consumed | None = None,
        max_bad_shards: int = 0,
        orders: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
        shuffle: int = 1,
    ) -> None:
        self._plan = plan
        self._labels = [domain if labels is None else labels[domain] for domain in plan.domains]
        self._length = sequence_length
        self._shuffle = shuffle
        self._place = (seed, site, worker)
        self._taken = start
        self._streams = []
        self._last_token = []
        self._blocks: list[NDArray[np.int64]] = []  # of each domain, (shuffle, S+1)
        self._given = count_domains(plan, *self._place, start)
        for i, count in enumerate(self._given):
            before = count - count % shuffle
            domain = plan.domains[i]
            read = dict(enumerate(consumed[domain])) if consumed else None
            order = None if orders is None else orders[domain]
            stream = DomainStream(manifest, domain, plan.shards[i], seed, read, max_bad_shards, order)
            if before:
                stream.seek(before * sequence_length - 1)
            self._streams.append(stream)
            self._last_token.append(int(stream.take(1)[0]) if before else manifest.eod_id)
            self._blocks.append(self._read_block(i) if count > before else np.empty((0, 0), np.int64))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield `inputs` (S,), `targets` (S,) and `domain` (), all int64, without end."""
        while True:
            block, offset = divmod(self._taken, _DRAWS)
            for i in draw_domains(self._plan, *self._place, block)[offset:]:
                tokens = torch.from_numpy(self._next_sequence(i))
                self._taken += 1
                yield {
                    "inputs": tokens[:-1],
                    "targets": tokens[1:],
                    "domain": torch.tensor(self._labels[i]),
                }

    def _next_sequence(self, i: int) -> NDArray[np.int64]:
        """S+1 tokens of a domain of the plan."""
        place = self._given[i] % self._shuffle
        if not place:
            self._blocks[i] = self._read_block(i)
        self._given[i] += 1
        return self._blocks[i][place]

    def _read_block(self, i: int) -> NDArray[np.int64]:
        """The next sequences of a domain of the plan, in the order in which they are given."""
        tokens = np.append(self._last_token[i], self._streams[i].take(self._shuffle * self._length))
        self._last_token[i] = int(tokens[-1])
        sequences = np.lib.stride_tricks.sliding_window_view(tokens, self._length + 1)[:: self._length]
        block = self._given[i] // self._shuffle
        generator = np.random.default_rng([*self._place, _SEQUENCE_ORDER, self._plan.domains[i], block])
        return sequences[generator.permutation(self._shuffle)]


class SiteStream(IterableDataset[dict[str, Tensor]]):
    """A site's training data: one endless epoch, which each DataLoader worker reads by its own plan.

    Its position is the number of batches that a DataLoader over it has handed out, the workers in turn; everything
    else (epoch, shard, document, offset, mixture) follows from that number and the seed.

    Args:
        manifest: The corpus.
        plans: What each worker reads; a DataLoader without workers needs one.
        sequence_length: S, tokens of a sequence.
        seed: Seed of all orders.
        site: Index of the site.
        batches: Number of batches that were already handed out.
        batch_size: Sequences of a batch.
        consumed: As for :class:`PackedStream`.
        max_bad_shards: As for :class:`DomainStream`.
        orders: As for :class:`PackedStream`.
        labels: As for :class:`PackedStream`.
        shuffle: As for :class:`PackedStream`.
    """

    def __init__(
        self,
        manifest: Manifest,
        plans: Sequence[StreamPlan],
        sequence_length: int,
        seed: int,
        site: int,
        *,
        batches: int = 0,
        batch_size: int = 1,
        consumed: Consumed | None = None,
        max_bad_shards: int = 0,
        orders: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
        shuffle: int = 1,
    ) -> None:
        self._manifest = manifest
        self._orders, self._labels, self._shuffle = orders, labels, shuffle
        self._plans = tuple(plans)
        self._length = sequence_length
        self._seed = seed
        self._site = site
        self._batches = batches
        self._batch_size = batch_size
        self._consumed = consumed
        self._max_bad_shards = max_bad_shards

    def start_at(self, batches: int) -> None:
        """Begin, from the next iterator on, after so many batches."""
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield `inputs` (S,), `targets` (S,) and `domain` (), all int64, without end."""
        info = get_worker_info()
        # A DataLoader begins with its worker 0, which here stands in for the one whose turn it is.
        worker = ((0 if info is None else info.id) + self._batches) % len(self._plans)
        taken = batches_of_worker(self._batches, len(self._plans), worker) * self._batch_size
        yield from PackedStream(
            self._manifest, self._plans[worker], self._length, self._seed, self._site, worker,
            taken, self._consumed, self._max_bad_shards, self._orders, self._labels, self._shuffle,
        )  # fmt: skip


def batches_of_worker(batches: int, n_workers: int, worker: int) -> int:
    """How many of a loader's first `batches` batches come from a worker; the workers take turns."""
    return (batches - worker + n_workers - 1) // n_workers


def consumption(
    manifest: Manifest,
    plans: Sequence[Sequence[StreamPlan]],
    sequence_length: int,
    seed: int,
    *,
    batches: int,
    batch_size: int | Sequence[int],
    consumed: Consumed | None = None,
    sites: Sequence[int] | None = None,
    orders: Sequence[int] | None = None,
    shuffle: int = 1,
) -> Consumed:
    """What all sites of a corpus together have read of each shard when each has been given some batches.

    Sequences that a reader has shuffled, but not given yet, count as read: none is given twice in an epoch.

    Args:
        manifest: The corpus.
        plans: `plans[i][worker]`, for each of the sites.
        sequence_length: S.
        seed: Seed of all orders.
        batches: Batches that each site was given.
        batch_size: Sequences of a batch, of all sites or by the site's number.
        consumed: What had been read before.
        sites: Numbers of the sites that read the corpus; None: from 0 on.
        orders: As for :class:`PackedStream`.
        shuffle: As for :class:`PackedStream`.

    Returns:
        For each domain, the tokens that were read of each of its training shards, all epochs counted.
    """
    sizes = [len(manifest.shards_of("train", name)) for name in manifest.domain_names]
    read = [list(domain) for domain in consumed] if consumed else [[0] * size for size in sizes]
    for site, workers in zip(range(len(plans)) if sites is None else sites, plans, strict=True):
        size = batch_size if isinstance(batch_size, int) else batch_size[site]
        for worker, plan in enumerate(workers):
            sequences = batches_of_worker(batches, len(workers), worker) * size
            for i, count in enumerate(count_domains(plan, seed, site, worker, sequences)):
                domain, whole = plan.domains[i], -(-count // shuffle) * shuffle
                order = None if orders is None else orders[domain]
                before = dict(enumerate(read[domain]))
                stream = DomainStream(manifest, domain, plan.shards[i], seed, before, order=order)
                for number, tokens in stream.consumed_at(whole * sequence_length).items():
                    read[domain][number] = tokens
    return read
