import gzip
import hashlib
import io
import json
import logging
import math
import multiprocessing as mp
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fomoe_pl.data import Manifest, load_manifest
from fomoe_pl.data.documents import ReadOptions
from fomoe_pl.data.index import index_domain, training_share
from fomoe_pl.data.manifest import Split
from fomoe_pl.data.prepare import prepare
from fomoe_pl.data.shards import read_shard, read_validation_shard, write_shard
from fomoe_pl.data.sources import find_sources
from fomoe_pl.data.validation import IGNORED, ValidationSequences
from fomoe_pl.errors import ConfigError
from fomoe_pl.metrics import LanguageModelMetric


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


def test_segments_change_nothing(
    corpus: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fomoe_pl.data.segments.SEGMENT_BYTES", 700)
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
    reused = prepare(
        [str(source)],
        str(tmp_path / "c"),
        tokenizer=str(manifest.root / "tokenizer.json"),
        shards_per_domain=2,
        val_fraction=0.2,
    )
    assert [shard.sha256 for shard in reused.shards] == [shard.sha256 for shard in manifest.shards]


def test_tokenizer_sees_an_equal_share_of_training_text(source: Path) -> None:
    for part in find_sources([str(source)])[0]:
        index = index_domain(part, ReadOptions(), 0.2, 4, 1e6, seed=0)
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
    prepare([str(source)], str(tmp_path / "out"), shards_per_domain=2, val_fraction=0.2, seed=1)
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
        ({"max_shard_mb": float("nan")}, "max_shard_mb"),
        ({"max_shard_mb": float("inf")}, "max_shard_mb"),
        ({"max_shard_mb": 1e-7}, "max_shard_mb"),
        ({"tokenizer_mb": -1.0}, "tokenizer_mb"),
        ({"tokenizer_mb": float("nan"), "tokenizer": "bpe:300"}, "tokenizer_mb"),
        ({"seed": -1}, "seed"),
        ({"val_fraction": float("nan")}, "val_fraction"),
        ({"separator": ""}, "separator"),
        ({"output": "s3://bucket/corpus"}, "output"),
        ({"output": "/dev/null"}, "output"),
        ({"output": "/dev/null/corpus"}, "output"),
        ({"eod": "<end>"}, "eod"),
    ],
)
def test_senseless_settings_are_refused(source: Path, tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = "):
        prepare([str(source)], **{"output": str(tmp_path / "out"), **settings})


def normalizing(path: Path, kind: str) -> str:
    """A tokenizer that changes or drops text before it encodes it."""
    characters = {c: i for i, c in enumerate(["[UNK]", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789"])}
    if kind == "nfkc":
        tokenizer = Tokenizer(models.BPE(characters, [], unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.NFKC()
    elif kind == "wordpiece":
        marked = {f"##{c}": i + 40 for c, i in characters.items()}
        tokenizer = Tokenizer(models.WordPiece({**characters, **marked}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        tokenizer = Tokenizer(models.WordLevel(characters, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["nfkc", "wordpiece", "whitespace"])
def test_bytes_are_those_of_the_text(source: Path, tmp_path: Path, texts: dict[str, list[str]], kind: str) -> None:
    """Of each validation document, and so of a validation, whatever the tokenizer makes of the text."""
    odd = ["  ﬁ½ Ｗide\x00\t", " \n\n", "e\u0301\u3000空 "]
    (tmp_path / "odd.jsonl").write_text(
        "".join(json.dumps({"text": f"{odd[i % 3]} {i} {odd[i % 2]}"}) + "\n" for i in range(90))
    )
    specs = [str(source / "farm.jsonl"), str(tmp_path / "odd.jsonl")]
    tokenizer = normalizing(tmp_path / "tokenizer.json", kind)
    manifest = prepare(specs, str(tmp_path / "out"), tokenizer=tokenizer, shards_per_domain=2, val_fraction=0.3)
    metric = LanguageModelMetric(manifest.domain_names)
    sequences = ValidationSequences(manifest, 7, None, n_sites=1)
    for i in range(len(sequences)):
        row = {key: value[None] for key, value in sequences[i].items()}
        counted = row["targets"] != IGNORED
        metric.update(math.log(2) * counted, row["targets"], row["domain"], row["bytes"])
    sizes = [domain.val.bytes for domain in manifest.domains]
    tokens = [domain.val.tokens for domain in manifest.domains]
    assert metric.bytes.tolist() == sizes
    assert metric.compute()["bits_per_byte"].item() == pytest.approx(sum(tokens) / sum(sizes))
    for domain, size in zip(manifest.domain_names, sizes, strict=True):
        shards = manifest.shards_of("val", domain)
        assert sum(int(of.sum()) for shard in shards for _, of in read_validation_shard(manifest, shard)) == size
    # A part of them has the text up to its last token.
    limited = ValidationSequences(manifest, 7, 4, n_sites=1)
    whole = [sequences[i]["bytes"] for i in range(len(sequences)) if sequences[i]["domain"] == 0]
    assert all(torch.equal(limited[i]["bytes"], whole[i]) for i in range(2))


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {i}"}) for i in range(80)]
    (folder / "a.jsonl").write_text("\n".join([*lines, "", '{"text": null}', '{"id": 3}', '{"text": ""}']) + "\n")
    (folder / "notes.md").touch()
    settings: dict[str, Any] = {"shards_per_domain": 2, "val_fraction": 0.2}
    with pytest.raises(ConfigError, match="notes.md"):  # noqa: RUF043
        prepare([str(tmp_path)], str(tmp_path / "out"), **settings)
    with pytest.raises(ConfigError, match="line 81 of"):
        prepare([str(tmp_path)], str(tmp_path / "out"), skip_unreadable=True, **settings)
    manifest = prepare([str(folder)], str(tmp_path / "out"), skip_unreadable=True, skip_empty=True, **settings)
    assert "notes.md is of no readable kind: left out" in caplog.text
    assert "a: 3 records with no text left out" in caplog.text
    assert "a: 1 records with empty text left out" in caplog.text
    assert sum(len(shard) for split in ("train", "val") for shard in stored(manifest, split, "a")) == 80
    with pytest.raises(ConfigError, match=r"this domain has no documents.*84 with no text"):
        prepare(
            [str(folder)], str(tmp_path / "b"), skip_unreadable=True, skip_empty=True, text_field="body", **settings
        )


@pytest.mark.parametrize("copy", ["b.jsonl", "b.json.gz", "b.txt", "web/deep.ndjson"])
def test_a_copy_of_a_file_is_refused_by_its_documents(tmp_path: Path, copy: str) -> None:
    documents = [f"document {i}" for i in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    path = tmp_path / "source" / copy
    path.parent.mkdir(parents=True)
    (tmp_path / "source" / "a.jsonl").write_text(lines)
    content = "\n".join(documents) if copy.endswith(".txt") else lines.replace('{"text', '{"n": 1, "text')
    path.write_bytes(gzip.compress(content.encode()) if copy.endswith(".gz") else content.encode())
    for spec in (str(tmp_path / "source"), f"one={tmp_path / 'source'}"):
        with pytest.raises(ConfigError, match="has the same documents as"):
            prepare([spec], str(tmp_path / "out"), separator=r"\n", shards_per_domain=2, val_fraction=0.2)


def test_single_documents_may_be_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "web").mkdir()
    for i in range(40):
        (tmp_path / "web" / f"{i}.txt").write_text(f"document {i % 20}")
    manifest = prepare([f"web={tmp_path}"], str(tmp_path / "out"), shards_per_domain=2, val_fraction=0.2)
    assert manifest.domains[0].train.documents + manifest.domains[0].val.documents == 40
    assert "stands in none" not in caplog.text
    prepare([f"web={tmp_path / 'web'}"], str(manifest.root), separator="¶", shards_per_domain=2, val_fraction=0.2)
    assert "web: '¶' stands in none of the .txt files: each is one document" in caplog.text


@pytest.mark.slow
def test_memory_does_not_follow_the_longest_document(tmp_path: Path) -> None:
    """A document of 4 MB among short ones: some twenty times its size, where encoding it whole takes 220 times."""
    words = "the tide and the harbour sinks of storms "
    for name, text in (("long", words * 100_000), *((f"short{i}", f"{i} {words}") for i in range(40))):
        path = tmp_path / "web" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    command = f"""
import resource, sys
from fomoe_pl.data.prepare import prepare
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = used()
for tokenizer in ("bpe:400", "{tmp_path}/bpe:400/tokenizer.json"):
    prepare(["web={tmp_path}/web"], "{tmp_path}/" + tokenizer.split("/")[-1], tokenizer=tokenizer,
            shards_per_domain=2, val_fraction=0.2, max_shard_mb=100)
print(used() - before)
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 * len(words) * 100_000


def test_a_link_to_the_output_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "store")
    for shards in (2, 3):
        prepare([str(source)], str(tmp_path / "out"), shards_per_domain=shards, val_fraction=0.2, overwrite=True)
        assert len(load_manifest(tmp_path / "store").shards_of("train", "sea")) == shards
    assert (tmp_path / "out").is_symlink()


def test_several_processes_write_the_same(
    corpus: Manifest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fomoe_pl.data.prepare.WORTH_WORKERS", 0)
    monkeypatch.setattr("fomoe_pl.data.prepare._WORKER_BATCH_BYTES", 500)
    monkeypatch.setattr("fomoe_pl.data.prepare.n_cores", lambda: 3)
    told: list[tuple[str, int, int]] = []
    again = prepare(
        [str(source)], str(tmp_path / "a"), shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    assert digests(again.root) == digests(corpus.root)
    farm = corpus.domains[0].train.bytes + corpus.domains[0].val.bytes
    encoding = [(done, total) for what, done, total in told if what == "farm: encoding"]
    assert len(encoding) > 3
    assert encoding == sorted(encoding)
    assert encoding[-1] == (farm, farm)


def _killed(source: str, output: str, place: str, after: int) -> None:
    """A preparation that is ended from outside at the call of a function."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the threads of this library
    calls = 0
    module = import_module(f"fomoe_pl.data.{place.rpartition('.')[0]}")
    whole = getattr(module, place.rpartition(".")[2])

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    setattr(module, place.rpartition(".")[2], counted)
    prepare([source], output, tokenizer="bpe:300", **INTERRUPTED)


INTERRUPTED: dict[str, Any] = {"shards_per_domain": 4, "val_fraction": 0.2}


@pytest.mark.parametrize(("place", "after"), [("prepare.write_shard", 7), ("segments.write_whole", 4)])
def test_a_preparation_that_was_killed_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str,
    after: int,
) -> None:  # fmt: skip
    """Between two shards, and between two segments: what is finished is kept, and the corpus is the same."""
    monkeypatch.setattr("fomoe_pl.data.segments.SEGMENT_BYTES", 700)
    monkeypatch.setattr("fomoe_pl.data.prepare._BATCH_BYTES", 500)
    whole = prepare([str(source)], str(tmp_path / "whole"), tokenizer="bpe:300", **INTERRUPTED)
    output = str(tmp_path / "out")
    process = mp.get_context("fork").Process(target=_killed, args=(str(source), output, place, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    described = [path for path in partial.rglob("*.json") if path.parent.parent.name == ".work"]
    before = {path: path.stat().st_mtime_ns for path in (*partial.glob("*.tar"), *described)}
    done = sum(path.suffix == ".tar" for path in before), sum(path.name[:5].isdecimal() for path in before)
    assert (done[0] if place == "prepare.write_shard" else done[1]) >= after
    kept: dict[Path, int] = {}

    def look(what: str, *_: int) -> None:
        if "sky: writing" in what and not kept:
            kept.update({path: path.stat().st_mtime_ns for path in before if path.is_file()})

    with caplog.at_level(logging.INFO):
        again = prepare([str(source)], output, tokenizer="bpe:300", progress=look, **INTERRUPTED)
    assert "going on with a preparation that was interrupted" in caplog.text
    assert digests(again.root) == digests(whole.root)
    assert kept == before
    assert not partial.exists()


def test_a_shard_that_was_damaged_meanwhile_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare([str(source)], str(tmp_path / "whole"), **INTERRUPTED)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fomoe_pl.data.prepare.Manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(source)], str(tmp_path / "out"), **INTERRUPTED)
    shard = tmp_path / ".out.partial" / whole.shards[0].file
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    (tmp_path / ".out.partial" / whole.shards[1].file).unlink()
    assert digests(prepare([str(source)], str(tmp_path / "out"), **INTERRUPTED).root) == digests(whole.root)


@pytest.mark.parametrize("n", [1, 40, 1000])
def test_shards_are_as_webdataset_writes_them(tmp_path: Path, n: int) -> None:
    draw = np.random.default_rng(n)
    documents = [draw.integers(0, 300, size).astype(np.uint16) for size in draw.integers(1, 600, n)]
    sizes = [draw.integers(0, high, len(document)).astype(np.uint32)
             for document, high in zip(documents, draw.choice([2, 300, 70_000], n), strict=True)]  # fmt: skip
    for of_tokens in (None, sizes):
        with (tmp_path / "a.tar").open("wb") as file:
            writer = wds.TarWriter(file, user="", group="", mtime=0, encoder=False)
            for number, document in enumerate(documents):
                sample = {"__key__": f"{number:08d}", "npy": _npy(document)}
                if of_tokens is not None:
                    size = of_tokens[number]
                    sample["bytes.npy"] = _npy(size.astype(np.min_scalar_type(size.max())))
                writer.write(sample)
            writer.close()
        digest = write_shard(tmp_path / "b.tar", documents, of_tokens)
        assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
        assert digest == hashlib.sha256((tmp_path / "b.tar").read_bytes()).hexdigest()


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
