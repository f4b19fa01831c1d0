import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_pl.data import Manifest, load_manifest
from fomoe_pl.data.documents import find_sources
from fomoe_pl.data.index import ReadOptions, index_domain, training_share
from fomoe_pl.data.manifest import Split
from fomoe_pl.data.prepare import prepare
from fomoe_pl.data.shards import read_shard
from fomoe_pl.errors import ConfigError


def stored(manifest: Manifest, split: Split, domain: str) -> list[list[str]]:
    """Texts of a split of a byte corpus by shard."""
    shards = []
    for shard in manifest.shards_of(split, domain):
        documents = list(read_shard(manifest, shard))
        assert all(tokens[-1] == manifest.eod_id for tokens in documents)
        shards.append([tokens[:-1].astype(np.uint8).tobytes().decode() for tokens in documents])
    return shards


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_document_is_in_one_shard(corpus: Manifest, texts: dict[str, list[str]]) -> None:
    for domain, expected in texts.items():
        train, val = stored(corpus, "train", domain), stored(corpus, "val", domain)
        assert sorted(text for shard in train + val for text in shard) == sorted(expected)
        assert len(train) >= 8


def test_documents_are_shuffled_within_shards(source: Path, tmp_path: Path, texts: dict[str, list[str]]) -> None:
    orders = []
    for seed in (0, 1):
        manifest = prepare([str(source)], str(tmp_path / str(seed)), shards_per_domain=1, val_fraction=0.2, seed=seed)
        (shard,) = stored(manifest, "train", "farm")
        orders.append([texts["farm"].index(text) for text in shard])
    assert sorted(orders[0]) == sorted(orders[1])
    assert len({tuple(sorted(orders[0])), *map(tuple, orders)}) == 3


def test_counts_of_the_manifest(corpus: Manifest) -> None:
    for domain in corpus.domains:
        for split, size in (("train", domain.train), ("val", domain.val)):
            shards = [shard for shard in corpus.shards if (shard.split, shard.domain) == (split, domain.name)]
            contents = stored(corpus, shards[0].split, domain.name)
            texts = [text for shard in contents for text in shard]
            assert [shard.documents for shard in shards] == [len(content) for content in contents]
            assert [shard.bytes for shard in shards] == [sum(len(t.encode()) for t in c) for c in contents]
            assert (size.documents, size.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
            assert size.tokens == size.bytes + size.documents == sum(shard.tokens for shard in shards)


def test_shards_are_about_equal_and_as_small_as_asked(corpus: Manifest) -> None:
    for domain in corpus.domains:
        sizes = [shard.bytes for shard in corpus.shards_of("train", domain.name)]
        assert max(sizes) <= 500 + 400  # the limit of 0.0005 MB, and a document
        assert len(sizes) == max(8, -(-domain.train.bytes // 500))


def test_same_input_gives_the_same_bytes(corpus: Manifest, source: Path, tmp_path: Path) -> None:
    again = prepare([str(source)], str(tmp_path / "a"), shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005)
    assert digests(again.root) == digests(corpus.root)
    other = prepare(
        [str(source)], str(tmp_path / "b"), shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005, seed=1
    )
    assert other.fingerprint != corpus.fingerprint
    assert [domain.val for domain in other.domains] == [domain.val for domain in corpus.domains]


def test_spilling_changes_nothing(
    corpus: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fomoe_pl.data.shards._SPILL_BYTES", 700)
    monkeypatch.setattr("fomoe_pl.data.prepare._BATCH_BYTES", 500)
    again = prepare([str(source)], str(tmp_path / "a"), shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005)
    assert digests(again.root) == digests(corpus.root)


def test_split_follows_from_the_document(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    """Whatever stands around a document, in whichever domain and order: its split is the same."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts["farm"]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text(
        "".join(reversed(lines * 2 + [json.dumps({"text": t}) + "\n" for t in texts["sea"]]))
    )
    manifest = prepare([f"{tmp_path}"], str(tmp_path / "out"), shards_per_domain=4, val_fraction=0.3, seed=3)
    val = {domain: {t for shard in stored(manifest, "val", domain) for t in shard} for domain in ("a", "b")}
    train = {domain: {t for shard in stored(manifest, "train", domain) for t in shard} for domain in ("a", "b")}
    assert len(val["a"]) > 5
    assert val["a"] == val["b"] & set(texts["farm"])
    assert not (val["a"] | val["b"]) & (train["a"] | train["b"])


def test_bpe_corpus(source: Path, tmp_path: Path) -> None:
    manifest = prepare([str(source)], str(tmp_path / "a"), tokenizer="bpe:300", shards_per_domain=2, val_fraction=0.2)
    again = prepare([str(source)], str(tmp_path / "b"), tokenizer="bpe:300", shards_per_domain=2, val_fraction=0.2)
    assert manifest.fingerprint == again.fingerprint
    assert (manifest.vocab_size, manifest.tokenizer.kind) == (300, "bpe")
    lengths = manifest.token_bytes().numpy()
    for shard in manifest.shards:
        assert sum(int(lengths[tokens].sum()) for tokens in read_shard(manifest, shard)) == shard.bytes
    reused = prepare(
        [str(source)],
        str(tmp_path / "c"),
        tokenizer=str(manifest.root / "tokenizer.json"),
        shards_per_domain=2,
        val_fraction=0.2,
    )
    assert [shard.sha256 for shard in reused.shards] == [shard.sha256 for shard in manifest.shards]


def test_tokenizer_sees_an_equal_share_of_training_text(source: Path) -> None:
    for part in find_sources([str(source)]):
        index = index_domain(part, ReadOptions("text", None), 0.2, 4, 1e6, seed=0)
        share = list(training_share(index, 1000))
        in_training = {t for t, shard in zip(index.documents(), index.shard, strict=True) if shard < 4}
        assert 996 < sum(len(text.encode()) for text in share) <= 1000  # a character may be cut
        assert all(any(text.startswith(part) for text in in_training) for part in share)
        assert sum(text in in_training for text in share) >= len(share) - 1


def test_existing_corpus(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "corpus"
    first = prepare([str(source)], str(output), shards_per_domain=2, val_fraction=0.2)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with caplog.at_level(logging.INFO):
        assert prepare([str(source)], str(output), shards_per_domain=2, val_fraction=0.2) == first
    assert "already holds this corpus" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(ConfigError, match=r"other shards_per_domain, seed.*--overwrite"):
        prepare([str(source)], str(output), shards_per_domain=3, val_fraction=0.2, seed=1)
    with pytest.raises(ConfigError, match="other documents_sha256"):
        prepare([f"farm={source}"], str(output), shards_per_domain=2, val_fraction=0.2)
    replaced = prepare([str(source)], str(output), shards_per_domain=3, val_fraction=0.2, overwrite=True)
    assert len(load_manifest(output).shards_of("train", "sea")) == 3 == len(replaced.shards_of("train", "sea"))
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_something_else_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="folder of something else"):
        prepare([str(source)], str(tmp_path), overwrite=True)
    assert (tmp_path / "mine").exists()


def test_an_interrupted_run_leaves_the_output_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fomoe_pl.data.prepare.write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(source)], str(tmp_path / "out"), shards_per_domain=2, val_fraction=0.2)
    assert not (tmp_path / "out").exists()
    prepare([str(source)], str(tmp_path / "out"), shards_per_domain=2, val_fraction=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_settings(source: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="fewer than its 100 shards"):
        prepare([str(source)], output, shards_per_domain=100)
    with pytest.raises(ConfigError, match="0 validation documents among 60"):
        prepare([str(source)], output, val_fraction=1e-9)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        prepare([str(source)], output, val_fraction=1.0)
    with pytest.raises(ConfigError, match="unknown tokenizer"):
        prepare([str(source)], output, tokenizer="words")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"shards_per_domain": 0}, "shards_per_domain"),
        ({"max_shard_mb": 0.0}, "max_shard_mb"),
        ({"eod": "<end>"}, "eod"),
    ],
)
def test_senseless_settings_are_refused(source: Path, tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = "):
        prepare([str(source)], str(tmp_path / "out"), **settings)
