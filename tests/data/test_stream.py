from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fomoe_pl.data import Manifest
from fomoe_pl.data.partition import DomainSize, SplitKind, StreamPlan, partition
from fomoe_pl.data.shards import read_shard
from fomoe_pl.data.stream import DomainStream, PackedStream, SiteStream
from fomoe_pl.errors import ConfigError

S = 37


def plans(corpus: Manifest, n_sites: int, n_workers: int = 1, split: SplitKind = "iid") -> list[list[StreamPlan]]:
    sizes = [DomainSize(d.name, len(corpus.shards_of("train", d.name)), d.train.tokens) for d in corpus.domains]
    return partition(sizes, n_sites, n_workers, split)


def site_stream(corpus: Manifest, site: int = 0, n_sites: int = 2, n_workers: int = 1, seed: int = 0) -> SiteStream:
    return SiteStream(corpus, plans(corpus, n_sites, n_workers)[site], S, seed, site)


def rows(stream: SiteStream, n: int) -> list[list[int]]:
    return [[int(s["domain"]), *s["inputs"].tolist(), *s["targets"].tolist()] for s in islice(stream, n)]


def documents(tokens: np.ndarray, eod: int) -> list[bytes]:
    """The documents in a piece of stream that begins and ends at a document's edge."""
    assert tokens[-1] == eod
    return [part.astype(np.int64).tobytes() for part in np.split(tokens, np.flatnonzero(tokens == eod) + 1)[:-1]]


def test_an_epoch_has_every_document_once(corpus: Manifest) -> None:
    shards = (1, 4, 6)
    every = corpus.shards_of("train", "farm")
    expected = Counter(
        tokens.astype(np.int64).tobytes() for number in shards for tokens in read_shard(corpus, every[number])
    )
    stream = DomainStream(corpus, 0, shards, seed=0)
    epochs = [documents(stream.take(stream.tokens_per_epoch), corpus.eod_id) for _ in range(3)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("piece", [1, 5, 64, 1000, 5000])
def test_pieces_do_not_change_the_stream(corpus: Manifest, piece: int) -> None:
    n = 10_000 // piece
    whole = DomainStream(corpus, 1, (0, 3), seed=0).take(n * piece)
    stream = DomainStream(corpus, 1, (0, 3), seed=0)
    assert np.array_equal(np.concatenate([stream.take(piece) for _ in range(n)]), whole)


def test_seek(corpus: Manifest) -> None:
    whole = DomainStream(corpus, 1, (0, 3), seed=0).take(10_000)
    stream = DomainStream(corpus, 1, (0, 3), seed=0)
    per_epoch = stream.tokens_per_epoch
    for position in (0, 1, 250, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch, 9_000):
        stream.seek(position)
        assert np.array_equal(stream.take(900), whole[position : position + 900])


def test_packing_loses_no_target(corpus: Manifest) -> None:
    """The targets of each domain are its stream, and the inputs are the stream one token earlier."""
    (plan,) = plans(corpus, 2)[1]
    sequences = list(islice(PackedStream(corpus, plan, S, seed=0, site=1, worker=0), 400))
    for i, domain in enumerate(plan.domains):
        own = [sequence for sequence in sequences if sequence["domain"] == domain]
        targets = torch.cat([sequence["targets"] for sequence in own])
        inputs = torch.cat([sequence["inputs"] for sequence in own])
        expected = DomainStream(corpus, domain, plan.shards[i], seed=0).take(len(own) * S)
        assert len(targets) > DomainStream(corpus, domain, plan.shards[i], seed=0).tokens_per_epoch
        assert np.array_equal(targets.numpy(), expected)
        assert inputs[0] == corpus.eod_id
        assert torch.equal(inputs[1:], targets[:-1])


def test_domains_come_by_weight(corpus: Manifest) -> None:
    (plan,) = plans(corpus, 1)[0]
    drawn = Counter(int(s["domain"]) for s in islice(PackedStream(corpus, plan, 4, 0, 0, 0), 6000))
    for domain, weight in zip(plan.domains, plan.weights, strict=True):
        assert drawn[domain] / 6000 == pytest.approx(weight, abs=0.025)  # four standard deviations


def test_same_seed_same_stream(corpus: Manifest) -> None:
    assert rows(site_stream(corpus), 50) == rows(site_stream(corpus), 50)
    assert rows(site_stream(corpus), 50) != rows(site_stream(corpus, seed=1), 50)


def test_sites_and_workers_draw_their_domains_apart(corpus: Manifest) -> None:
    drawn = [
        [int(s["domain"]) for s in islice(PackedStream(corpus, plan, S, 0, site, worker), 60)]
        for site, workers in enumerate(plans(corpus, 2, 2))
        for worker, plan in enumerate(workers)
    ]
    assert len(set(map(tuple, drawn))) == 4


def test_sites_and_workers_read_different_documents(corpus: Manifest) -> None:
    """Each document begins with its number: no two readers ever see the same (domain, number)."""
    seen: dict[bytes, tuple[int, int]] = {}
    for site, workers in enumerate(plans(corpus, 2, 2)):
        for worker, plan in enumerate(workers):
            for i, domain in enumerate(plan.domains):
                stream = DomainStream(corpus, domain, plan.shards[i], seed=0)
                for document in documents(stream.take(stream.tokens_per_epoch), corpus.eod_id):
                    assert seen.setdefault(document, (site, worker)) == (site, worker)
    assert len(seen) == sum(domain.train.documents for domain in corpus.domains)


@pytest.mark.parametrize("taken", [0, 1, 30, 700, 4096, 4100])
def test_state_round_trip(corpus: Manifest, taken: int) -> None:
    stream = site_stream(corpus)
    iterator = iter(stream)
    for _ in range(taken):
        next(iterator)
    restored = site_stream(corpus)
    restored.load_state_dict(stream.state_dict())
    assert restored.state_dict() == stream.state_dict()
    expected = [next(iterator) for _ in range(40)]
    for sequence, wanted in zip(restored, expected, strict=False):
        assert all(torch.equal(sequence[key], wanted[key]) for key in wanted)
    assert stream.state_dict() == {**restored.state_dict(), "sequences": [taken + 40]}


@pytest.mark.parametrize("n_workers", [0, 2])
def test_position_of_a_loader(corpus: Manifest, n_workers: int) -> None:
    """A loader over a stream put behind b batches goes on with the batches that follow the b-th."""

    def batches(stream: SiteStream, n: int) -> list[torch.Tensor]:
        return [batch["targets"] for batch in islice(DataLoader(stream, batch_size=3, num_workers=n_workers), n)]

    workers = max(1, n_workers)
    whole = batches(site_stream(corpus, n_workers=workers), 12)
    stream = site_stream(corpus, n_workers=workers)
    stream.load_state_dict({**stream.state_dict(), "sequences": [8 * 3 // workers] * workers})
    assert all(map(torch.equal, batches(stream, 4), whole[8:]))
    assert len({tuple(row.tolist()) for batch in whole for row in batch}) == 36


def test_state_of_another_stream_is_refused(corpus: Manifest) -> None:
    state = site_stream(corpus, site=1, seed=5).state_dict()
    with pytest.raises(ConfigError, match=r"data \(seed, site, plans\)"):
        site_stream(corpus).load_state_dict(state)
