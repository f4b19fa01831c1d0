import pytest
import torch

from fomoe_pl.data import Manifest
from fomoe_pl.data.shards import read_shard
from fomoe_pl.data.validation import IGNORED, ValidationSequences, available_sequences, sequence_counts

S = 50


def rows(sequences: ValidationSequences) -> list[tuple[int, ...]]:
    items = [sequences[i] for i in range(len(sequences))]
    return [(int(x["domain"]), *x["inputs"].tolist(), *x["targets"].tolist()) for x in items]


def is_filling(row: tuple[int, ...]) -> bool:
    return all(token == IGNORED for token in row[1 + S :])


def test_every_token_is_a_target_once(corpus: Manifest) -> None:
    sequences = ValidationSequences(corpus, S, None, n_sites=1)
    for domain, info in enumerate(corpus.domains):
        own = [sequences[i] for i in range(len(sequences)) if sequences[i]["domain"] == domain]
        targets = torch.cat([item["targets"] for item in own])
        inputs = torch.cat([item["inputs"] for item in own])
        counted = targets != IGNORED
        stored = [
            torch.from_numpy(t.astype("int64"))
            for s in corpus.shards_of("val", info.name)
            for t in read_shard(corpus, s)
        ]
        assert torch.equal(targets[counted], torch.cat(stored))
        assert bool(counted[: info.val.tokens].all())
        assert inputs[0] == corpus.eod_id
        assert torch.equal(inputs[1:][counted[1:]], targets[:-1][counted[1:]])
        sizes = torch.cat([item["bytes"] for item in own])
        assert torch.equal(sizes, ((targets != corpus.eod_id) & counted).long())
        assert int(sizes.sum()) == info.val.bytes
        assert int((~counted).sum()) == -info.val.tokens % S


@pytest.mark.parametrize("limit", [None, 10])
def test_the_set_does_not_depend_on_the_number_of_sites(corpus: Manifest, limit: int | None) -> None:
    whole = rows(ValidationSequences(corpus, S, limit, n_sites=1))
    assert not any(map(is_filling, whole))
    for n_sites in (2, 3, 4, 7, 8):
        sequences = rows(ValidationSequences(corpus, S, limit, n_sites))
        assert sequences[: len(whole)] == whole
        assert len(sequences) == -(-len(whole) // n_sites) * n_sites
        assert all(is_filling(row) and set(row[1 : 1 + S]) == {corpus.eod_id} for row in sequences[len(whole) :])


def test_limit_gives_equal_shares() -> None:
    assert sequence_counts([10, 10, 10], None) == [10, 10, 10]
    assert sequence_counts([10, 10, 10], 8) == [3, 3, 2]
    assert sequence_counts([10, 2, 10], 9) == [3, 2, 3]
    assert sequence_counts([10, 10], 100) == [10, 10]


def test_limited_set_is_the_beginning_of_each_domain(corpus: Manifest) -> None:
    whole = rows(ValidationSequences(corpus, S, None, n_sites=1))
    limited = rows(ValidationSequences(corpus, S, 9, n_sites=1))
    by_domain = [[row for row in whole if row[0] == domain][:3] for domain in range(3)]
    assert limited == [row for own in by_domain for row in own]


def test_sequence_longer_than_all_text(corpus: Manifest) -> None:
    assert available_sequences(corpus, 10**6) == [1, 1, 1]
    item = ValidationSequences(corpus, 10**6, None, n_sites=1)[1]
    assert int((item["targets"] != IGNORED).sum()) == corpus.domains[1].val.tokens
