from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fomoe_pl.data import Manifest
from fomoe_pl.data.partition import DomainSize, SplitKind, StreamPlan, partition
from fomoe_pl.data.shards import read_shard
from fomoe_pl.data.stream import DomainStream, PackedStream, SiteStream, consumption

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


@pytest.mark.parametrize("n_workers", [0, 2, 3])
@pytest.mark.parametrize("taken", [0, 1, 7, 8, 33])
def test_a_loader_goes_on_behind_any_batch(corpus: Manifest, n_workers: int, taken: int) -> None:
    workers = max(1, n_workers)

    def batches(n: int, start: int = 0) -> list[torch.Tensor]:
        stream = SiteStream(corpus, plans(corpus, 2, workers)[0], S, 0, 0, batches=start, batch_size=3)
        return [batch["targets"] for batch in islice(DataLoader(stream, batch_size=3, num_workers=n_workers), n)]

    whole = batches(taken + 5)
    assert all(map(torch.equal, batches(5, start=taken), whole[taken:]))
    assert len({tuple(row.tolist()) for batch in whole for row in batch}) == 3 * (taken + 5)


@pytest.mark.parametrize("taken", [30, 4096, 4100])
def test_a_stream_goes_on_behind_many_sequences(corpus: Manifest, taken: int) -> None:
    (plan,) = plans(corpus, 2)[0]
    whole = list(islice(PackedStream(corpus, plan, S, 0, 0, 0), taken + 20))[taken:]
    again = PackedStream(corpus, plan, S, 0, 0, 0, start=taken)
    for sequence, wanted in zip(again, whole, strict=False):
        assert all(torch.equal(sequence[key], wanted[key]) for key in wanted)


# Sites and workers before, batches of each site, sites and workers afterwards.
DIVISIONS = [(4, 1, 3, 2, 1), (4, 1, 3, 8, 1), (4, 1, 11, 1, 1), (2, 2, 7, 4, 2), (1, 1, 30, 2, 1)]


@pytest.mark.parametrize(("sites", "workers", "batches", "new_sites", "new_workers"), DIVISIONS)
def test_another_division_reads_the_rest_of_the_epoch_once(
    corpus: Manifest, sites: int, workers: int, batches: int, new_sites: int, new_workers: int
) -> None:
    """What was read before and what new readers have left of the epoch make up every token of every shard once."""
    sizes, length = [2, 1, 2, 1][:sites], 16  # of sites with unlike GPUs
    before = plans(corpus, sites, workers)
    read: dict[tuple[int, int], list[np.ndarray]] = {}
    for site, own in enumerate(before):
        for worker, plan in enumerate(own):
            n = len(range(worker, batches, workers)) * sizes[site]
            sequences = list(islice(PackedStream(corpus, plan, length, 0, site, worker), n))
            for i, domain in enumerate(plan.domains):
                tokens = [s["targets"].numpy() for s in sequences if s["domain"] == domain]
                stream = DomainStream(corpus, domain, plan.shards[i], 0)
                assert len(tokens) * length < stream.tokens_per_epoch, "the test is of one epoch"
                read.setdefault((domain, 0), []).extend(tokens)
    consumed = consumption(corpus, before, length, 0, batches=batches, batch_size=sizes)
    for domain, name in enumerate(corpus.domain_names):
        shards = corpus.shards_of("train", name)
        assert sum(consumed[domain]) == sum(map(len, read[domain, 0]))
        tokens = list(read[domain, 0])
        for own in plans(corpus, new_sites, new_workers):
            for plan in own:
                numbers = plan.shards[plan.domains.index(domain)]
                left = sum(shards[n].tokens - consumed[domain][n] for n in numbers)
                stream = DomainStream(corpus, domain, numbers, 0, dict(enumerate(consumed[domain])))
                tokens.append(stream.take(left))
                if left:
                    assert stream.consumed_at(left) == {n: shards[n].tokens for n in numbers}
        everything = np.concatenate([t for shard in shards for t in read_shard(corpus, shard)])
        assert np.array_equal(np.bincount(np.concatenate(tokens)), np.bincount(everything))


def test_an_epoch_behind_a_division_is_whole_again(corpus: Manifest) -> None:
    every = corpus.shards_of("train", "sea")
    # The first shard is an epoch and a half ahead, the second has not been touched.
    ahead = {0: every[0].tokens + every[0].tokens // 2, 3: 0}
    stream = DomainStream(corpus, 1, (0, 3), 0, ahead)
    stream.take(every[3].tokens + every[0].tokens - every[0].tokens // 2 + every[3].tokens)  # ends of both epochs
    expected = Counter(t.astype(np.int64).tobytes() for n in (0, 3) for t in read_shard(corpus, every[n]))
    assert Counter(documents(stream.take(stream.tokens_per_epoch), corpus.eod_id)) == expected
    again = DomainStream(corpus, 1, (0, 3), 0, ahead)
    whole = again.take(3 * again.tokens_per_epoch)
    for position in (0, 5, every[3].tokens, 2 * again.tokens_per_epoch, 2 * again.tokens_per_epoch + 77):
        again.seek(position)
        assert np.array_equal(again.take(50), whole[position : position + 50])


def test_shuffled_sequences_are_the_same_ones_in_another_order(corpus: Manifest) -> None:
    (plan,) = plans(corpus, 2)[1]
    apart, mixed = (
        list(islice(PackedStream(corpus, plan, S, seed=0, site=1, worker=0, shuffle=shuffle), 400))
        for shuffle in (1, 8)
    )
    assert [int(s["domain"]) for s in mixed] == [int(s["domain"]) for s in apart]
    for domain in plan.domains:
        before, after = (
            [tuple(s["inputs"].tolist()) for s in some if s["domain"] == domain] for some in (apart, mixed)
        )
        whole = len(before) // 8 * 8
        assert before[:whole] != after[:whole]
        for block in range(0, whole, 8):
            assert sorted(before[block : block + 8]) == sorted(after[block : block + 8])


@pytest.mark.parametrize("start", [0, 1, 7, 8, 100, 333])
def test_a_shuffled_stream_goes_on_where_it_was(corpus: Manifest, start: int) -> None:
    (plan,) = plans(corpus, 2)[0]
    whole, later = (
        [[int(s["domain"]), *s["targets"].tolist()] for s in islice(PackedStream(
            corpus, plan, S, seed=3, site=0, worker=0, start=begin, shuffle=16), n)]
        for begin, n in ((0, 400), (start, 400 - start))
    )  # fmt: skip
    assert whole[start:] == later


def test_what_was_shuffled_is_not_read_again_by_others(corpus: Manifest) -> None:
    """Sequences of a block that was begun count as read, up to the block's end."""
    many = plans(corpus, 2)
    kept = {"batches": 50, "batch_size": 1}
    read = consumption(corpus, many, S, 0, **kept, shuffle=16)
    exact = consumption(corpus, many, S, 0, **kept)
    counted = sum(map(sum, read)) - sum(map(sum, exact))
    assert 0 < counted <= 2 * len(corpus.domains) * 15 * S
    assert counted % S == 0
    assert consumption(corpus, many, S, 0, **kept, shuffle=1) == exact
