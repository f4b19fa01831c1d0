"""One tokenizer for sites whose text does not move, and validation text of its own."""

import json
from pathlib import Path

import pytest

from fomoe_pl.data import FoMoEData, Manifest
from fomoe_pl.data.command import main
from fomoe_pl.data.prepare import collect_statistics, prepare
from fomoe_pl.data.statistics import count_words, read_statistics, write_statistics
from fomoe_pl.data.tokenizer import train_bpe, train_bpe_from_counts
from fomoe_pl.data.validation import available_sequences
from fomoe_pl.errors import ConfigError
from tests.data.test_module import at_site
from tests.data.test_prepare import stored

ODD = ["it's  two\n\n lines\t", "'s 't  don''t ?'s", "naïve 空\u00a0\u2028x \x85", "", " ", "12 345 ... --- \r\n"] * 3


def test_counts_train_what_the_text_trains(texts: dict[str, list[str]]) -> None:
    documents = [*texts["farm"], *ODD, *texts["sea"]]
    expected = train_bpe(documents, 400)
    assert train_bpe_from_counts(count_words(documents), 400).sha256 == expected.sha256
    parts = count_words(documents[40:]) + count_words(documents[:40])
    assert train_bpe_from_counts(parts, 400).sha256 == expected.sha256


def test_sites_end_with_one_tokenizer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, common = [], {"val_fraction": 0.2, "tokenizer_mb": 0.002}
    for name in ("farm", "sea"):
        files.append(str(tmp_path / f"{name}.json"))
        about = collect_statistics([str(source / f"{name}.jsonl")], files[-1], min_count=1, **common)
        assert about["words_left_out"] == 0
    prepared = [
        prepare([str(source / f"{name}.jsonl")], str(tmp_path / name), tokenizer="bpe:300", from_statistics=given,
                val_fraction=0.2, shards_per_domain=2)
        for name, given in (("farm", files), ("sea", files[::-1]))
    ]  # fmt: skip
    assert prepared[0].tokenizer.sha256 == prepared[1].tokenizer.sha256
    assert prepared[0].vocab_size == 300
    counts = read_statistics(files[:1])
    assert sum(len(word.encode()) * n for word, n in counts.items()) >= 1900  # nearly all of the sample
    rare = write_statistics(tmp_path / "rare.json", counts, 5)
    assert rare["words"] == sum(n >= 5 for n in counts.values()) > 3
    words = ["--source", str(source / "farm.jsonl"), "--statistics", str(tmp_path / "by_command.json")]
    main([*words, "--val_fraction", "0.2", "--tokenizer_mb", "0.002"])
    assert (tmp_path / "by_command.json").read_text() == (tmp_path / "rare.json").read_text()
    assert "words left out that occur less than 5 times" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="either a corpus is prepared or statistics are written"):
        main([*words, "--output", str(tmp_path / "corpus")])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "fomoe-pl word statistics 1"}', "[" * 100_000,
     '{"format": "fomoe-pl word statistics 1", "counts": {"a b": 1}}',
     '{"format": "fomoe-pl word statistics 1", "counts": {"ab": 0}}',
     '{"format": "fomoe-pl word statistics 1", "counts": {"ab": true}}',
     '{"format": "another", "counts": {"ab": 2}}'],
)  # fmt: skip
def test_files_without_counts_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"from_statistics = '.*a\.json': holds no word counts"):
        read_statistics([str(tmp_path / "a.json")])


def test_counts_that_cannot_be_used(source: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "a.json")
    collect_statistics([str(source)], file, val_fraction=0.2)
    with pytest.raises(ConfigError, match="is the same as"):
        read_statistics([file, file])
    with pytest.raises(ConfigError, match="trains a BPE, and the tokenizer is another"):
        prepare([str(source)], str(tmp_path / "out"), from_statistics=[file])
    with pytest.raises(ConfigError, match="min_count = 0"):
        collect_statistics([str(source)], file, min_count=0)


def test_a_validation_corpus_of_its_own(
    source: Path, tmp_path: Path, texts: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Domains that are trained on, are validated, and both; the last have no document in common here but one."""
    held = tmp_path / "held"
    held.mkdir()
    for name, documents in (("sea", ["unseen waves", texts["sea"][3]]), ("web", ["a page", "and another one"])):
        (held / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    manifest = prepare([str(source)], str(tmp_path / "out"), shards_per_domain=4, validation_source=[str(held)])
    assert manifest.domain_names == ["farm", "sea", "sky", "web"]
    for name, documents in texts.items():
        assert sorted(t for shard in stored(manifest, "train", name) for t in shard) == sorted(documents)
    assert {t for shard in stored(manifest, "val", "web") for t in shard} == {"a page", "and another one"}
    assert "sea: 1 of 2 validation documents are in the training text too" in caplog.text
    assert prepare([str(source)], str(tmp_path / "out"), shards_per_domain=4, validation_source=[str(held)]) == manifest
    with pytest.raises(ConfigError, match="other val_fraction"):
        prepare([str(source)], str(tmp_path / "out"), shards_per_domain=4)
    assert [bool(count) for count in available_sequences(manifest, 8)] == [False, True, False, True]
    for split in ("iid", "domain", "dirichlet"):
        data = FoMoEData(str(manifest.root), sequence_length=8, split=split, val_sequences=2)  # type: ignore[arg-type]
        data.check(2)
        batches = list(at_site(data, 0, 2).val_dataloader())
        assert {int(d) for batch in batches for d in batch["domain"]} == {1}
        seen = {int(d) for _, batch in zip(range(9), data.train_dataloader(), strict=False) for d in batch["domain"]}
        assert seen <= {0, 1, 2}


def test_a_manifest_without_them_is_as_before(corpus: Manifest) -> None:
    assert set(corpus.settings) == {
        "tokenizer", "tokenizer_sha256", "tokenizer_mb", "eod_id", "val_fraction", "shards_per_domain", "max_shard_mb",
        "seed", "documents_sha256",
    }  # fmt: skip
