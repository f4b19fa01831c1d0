"""What sites make of each other's summaries, without any process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fomoe_pl.data import FoMoEData, Manifest
from fomoe_pl.data.corpora import Corpora, Summary, failure, folder_of, has_own, plans_of, read_texts
from fomoe_pl.data.partition import partition
from fomoe_pl.errors import ConfigError
from tests.data.test_module import at_site, data_of


@pytest.fixture(scope="module")
def summary(corpus: Manifest) -> Summary:
    return Summary.of(corpus)


def renamed(summary: Summary, names: dict[str, str], fingerprint: str, **changes: Any) -> Summary:
    """Another corpus: some of the domains, under new names."""
    domains = tuple(replace(d, name=names[d.name]) for d in summary.domains if d.name in names)
    return replace(summary, fingerprint=fingerprint, domains=domains, shards=(), **changes)


def test_a_summary_travels_without_text_and_paths(corpus: Manifest, summary: Summary) -> None:
    text = summary.text()
    assert read_texts([text, text]) == [summary, summary]
    assert str(corpus.root) not in text
    assert ".tar" not in text
    assert summary.domains[0].train == (corpus.domains[0].train.documents, corpus.domains[0].train.bytes,
                                        corpus.domains[0].train.tokens)  # fmt: skip


def test_where_a_sites_corpus_is() -> None:
    assert [folder_of("runs/{site}/text", site) for site in (0, 11)] == ["runs/0/text", "runs/11/text"]
    assert folder_of({0: "a", 7: "b"}, 7) == "b"
    assert folder_of("runs/data", 3) == "runs/data"
    assert [has_own(root) for root in ("runs/{site}", {0: "a"}, "runs/data")] == [True, True, False]
    with pytest.raises(ConfigError, match=r"data\.root .* names no folder for site 1\. Add a line: 1: "):
        folder_of({0: "a"}, 1)


def test_domains_of_all_sites(summary: Summary) -> None:
    second = renamed(summary, {"farm": "law", "sea": "sea"}, "b")
    corpora = Corpora((summary, second))
    assert corpora.domains == ["farm", "sea", "sky", "law"]
    assert [corpora.labels(site) for site in (0, 1)] == [[0, 1, 2], [3, 1]]
    assert [corpora.sites_of(name) for name in ("sea", "law")] == [[0, 1], [1]]
    assert not corpora.alike
    corpora.check({0: "a", 1: "b"})
    with pytest.raises(ConfigError, match=r"site 1 has another corpus \(b\) than site 0 .*data\.root: \{1: FOLDER\}"):
        corpora.check("runs/data")


def test_another_tokenizer_is_refused_by_name(summary: Summary) -> None:
    other = renamed(summary, {"sea": "sea"}, "b", tokenizer="f" * 64, vocab_size=300)
    rule = rf"site 0 has tokenizer {'f' * 16} \(vocabulary 300\), site 1 has {summary.tokenizer[:16]} .*--tokenizer"
    with pytest.raises(ConfigError, match=rule):
        Corpora((other, summary, summary)).check("{site}")


def test_a_corpus_that_cannot_be_read_is_told_by_all(summary: Summary) -> None:
    lost = failure(ConfigError("data.root", "b", "there is no b/manifest.json", "Prepare a corpus"))
    with pytest.raises(ConfigError, match=r"data\.root = 'b': site 1: there is no b/manifest\.json"):
        read_texts([summary.text(), lost])
    for broken in ("", "[]", "{}", "1", json.dumps({"error": 3}), json.dumps({"domains": [{}]}), "[" * 100_000):
        with pytest.raises(ConfigError, match=r"site 1 tells nothing of its corpus"):
            read_texts([summary.text(), broken])


def test_a_corpus_without_training_text_is_named(summary: Summary) -> None:
    empty = replace(summary, fingerprint="e", domains=(replace(summary.domains[0], train=(0, 0, 0), shards=0),))
    with pytest.raises(ConfigError, match="the corpus of site 1 has no training text"):
        Corpora((summary, empty)).check("{site}")


def test_what_is_told_at_the_start(summary: Summary) -> None:
    overlapping = replace(summary, fingerprint="b", shards=summary.shards[:3])
    first, *rest = summary.domains
    unseen = renamed(summary, {}, "c")
    unseen = replace(unseen, domains=(replace(first, name="law", val=(0, 0, 0)), *rest))
    assert Corpora((summary, summary)).warnings() == []
    assert Corpora((summary, overlapping, unseen)).warnings() == [
        "sites 0 and 1 have 3 shards with the same documents: their text counts twice",
        "domain law has no validation text: no val/loss/law",
    ]


def test_sites_with_copies_divide_what_they_have(summary: Summary) -> None:
    alone = renamed(summary, {"sky": "law"}, "b")
    corpora = Corpora((summary, alone, summary))
    division = {"corpora": corpora.fingerprints, "trained": corpora.trained, "readers": 2, "split": "iid",
                "dirichlet_alpha": 0.3, "weights": None, "seed": 0}  # fmt: skip
    sizes = [d.size for d in summary.domains]
    assert plans_of(summary.fingerprint, sizes, division) == dict(zip((0, 2), partition(sizes, 2, 2), strict=True))
    own = plans_of("b", [d.size for d in alone.domains], division)
    assert sorted(n for plan in own[1] for n in plan.shards[0]) == list(range(alone.domains[0].shards))
    assert plans_of("nobody's", sizes, division) == {}
    drawn = plans_of("b", [d.size for d in alone.domains], {**division, "split": "dirichlet"})
    assert drawn[1][0].weights == (1.0,)


def test_validation_sequences_of_different_corpora(summary: Summary) -> None:
    alone = renamed(summary, {"sky": "law", "sea": "sea"}, "b")
    corpora = Corpora((summary, summary, alone))
    counts = corpora.validation_counts(16, None)
    assert counts[summary.fingerprint] == [-(-d.val[2] // 16) for d in summary.domains]
    assert corpora.validation_length(counts) == max(-(-sum(counts[summary.fingerprint]) // 2), sum(counts["b"]))
    # Four domains get three each; the sea's are of two corpora.
    assert corpora.validation_counts(16, 12) == {summary.fingerprint: [3, 2, 3], "b": [1, 3]}
    assert Corpora((summary,) * 3).validation_counts(16, 12) == {summary.fingerprint: [4, 4, 4]}


def test_weights_choose_what_is_read(corpus: Manifest) -> None:
    data = data_of(corpus, weights={"farm": 90, "sea": 10, "sky": 0})
    data.check(2)
    [plan] = data._plans(2)[1]
    assert (plan.domains, plan.weights) == ((0, 1), (0.9, 0.1))
    drawn = [int(d) for _, batch in zip(range(200), at_site(data, 1, 2).train_dataloader(), strict=False)
             for d in batch["domain"]]  # fmt: skip
    assert 0.05 < drawn.count(1) / len(drawn) < 0.15
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"farm": 1, "sea": 1}}, r"data\.weights = .*sky has none\. Give one for each of farm, sea, sky"),
        ({"weights": {"farm": 1, "sea": 1, "sky": 1, "law": 1}}, "there is no domain law"),
        ({"weights": {"farm": -1, "sea": 1, "sky": 1}}, r"data\.weights\.farm = -1"),
        ({"weights": {"farm": float("nan"), "sea": 1, "sky": 1}}, r"data\.weights\.farm = nan"),
        ({"weights": {"farm": 0, "sea": 0, "sky": 0}}, "leave site 0 nothing to read"),
        ({"weights": {"farm": 1, "sea": 1, "sky": 1}, "split": "dirichlet"}, "both say how domains are mixed"),
    ],
)
def test_weights_that_cannot_work(corpus: Manifest, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_of(corpus, **settings).check(2)


def test_a_position_of_an_earlier_version(corpus: Manifest) -> None:
    """Its division named one corpus, and what had been read before it."""
    # Nothing yet; and all of one shard, by a division before.
    consumed = [[0] * d.shards for d in Summary.of(corpus).domains]
    division = {"corpus": corpus.fingerprint, "seed": 0, "n_sites": 2, "readers": 1, "split": "iid",
                "dirichlet_alpha": 0.3, "sequence_length": 20, "batch_size": 3}  # fmt: skip
    batches = []
    advanced = [list(domain) for domain in consumed]
    for domain, name in enumerate(corpus.domain_names):
        advanced[domain][1] = corpus.shards_of("train", name)[1].tokens - 1
    for read in (None, consumed, advanced):
        saved = None if read is None else {"division": division, "consumed": read, "since": 0, "batches": 0}
        data = at_site(data_of(corpus), 1, 2)
        if saved is not None:
            data.load_state_dict(saved)
        loader = data.train_dataloader()
        batches.append([batch["targets"].tolist() for _, batch in zip(range(40), loader, strict=False)])
    assert batches[0] == batches[1] != batches[2]


def test_corpora_of_sites_that_have_not_met(corpus: Manifest, tmp_path: Path) -> None:
    shutil.copytree(corpus.root, tmp_path / "0")
    data = FoMoEData(str(tmp_path / "{site}"), sequence_length=16)
    data.check(2)  # and opens nothing: there is no folder of site 1
    data.check_vocabulary(3)
    with pytest.raises(RuntimeError, match="have not met"):
        at_site(data, 0, 2).train_dataloader()
