"""Where documents and shards come from: URLs, token files, data set folders."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fomoe_pl.data import FoMoEData, Manifest, load_manifest
from fomoe_pl.data.prepare import prepare
from fomoe_pl.data.shards import read_shard, read_validation_shard
from fomoe_pl.errors import ConfigError
from tests.data.test_module import at_site
from tests.data.test_prepare import digests, stored

pyarrow = pytest.importorskip("pyarrow")
SETTINGS = {"shards_per_domain": 4, "val_fraction": 0.2}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server of this process gives its files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def targets(root: str, **settings: int) -> list[list[list[int]]]:
    data = at_site(FoMoEData(root, sequence_length=20, batch_size=3, **settings), 0, 2)
    data.check(2)
    loaders = (data.train_dataloader(), data.val_dataloader())
    return [batch["targets"].tolist() for loader in loaders for batch in islice(loader, 4)]


def test_sources_and_corpora_of_any_protocol(source: Path, tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.put(str(source), "/bucket/texts", recursive=True)
    whole = prepare([str(source)], str(tmp_path / "local"), **SETTINGS)
    there = prepare(["memory://bucket/texts"], str(tmp_path / "remote"), **SETTINGS)
    assert digests(there.root) == digests(whole.root)
    one = prepare(["sea=memory://bucket/texts/sea.jsonl"], str(tmp_path / "one"), **SETTINGS)
    assert one.shards_of("train", "sea") == whole.shards_of("train", "sea")
    memory.put(str(whole.root), "/bucket/corpus", recursive=True)
    assert load_manifest("memory://bucket/corpus").fingerprint == whole.fingerprint
    assert targets("memory://bucket/corpus") == targets(str(whole.root))
    memory.rm(f"/bucket/corpus/{whole.shards[0].file}")
    with pytest.raises(ConfigError, match=rf"memory://bucket/corpus/{whole.shards[0].file} is missing"):
        load_manifest("memory://bucket/corpus")
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(["memory://bucket/nothing"], str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"there is no memory://bucket/nothing/manifest\.json"):
        load_manifest("memory://bucket/nothing")


def test_sources_and_corpora_over_http(source: Path, tmp_path: Path, served: tuple[Path, str]) -> None:
    pytest.importorskip("aiohttp")
    folder, address = served
    shutil.copy(source / "sea.jsonl", folder)
    whole = prepare([str(source / "sea.jsonl")], str(folder / "corpus"), **SETTINGS)
    there = prepare([f"{address}/sea.jsonl"], str(tmp_path / "there"), **SETTINGS)
    assert there.fingerprint == whole.fingerprint
    assert targets(f"{address}/corpus") == targets(str(whole.root))
    with pytest.raises(ConfigError, match=r"source = .*does not exist"):
        prepare([f"{address}/sky.jsonl"], str(tmp_path / "none"))


def test_an_address_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    for address in ("http://127.0.0.1:1/texts.jsonl", "nosuch://bucket/texts"):
        with pytest.raises(ConfigError, match=address):
            prepare([address], str(tmp_path / "out"))
        with pytest.raises(ConfigError, match=address):
            load_manifest(address)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files(source: Path, tmp_path: Path, texts: dict[str, list[str]], dtype: str) -> None:
    """The corpus is that of the text, whether the ids are of bytes or of a BPE."""
    for name, tokenizer in (("bytes", "bytes"), ("bpe", "bpe:300")):
        text = prepare([str(source / "sea.jsonl")], str(tmp_path / f"{name} text"), tokenizer=tokenizer, **SETTINGS)
        documents = [d for split in ("train", "val") for s in text.shards_of(split, "sea") for d in read_shard(text, s)]
        file = tmp_path / f"{name}.bin"
        np.concatenate(documents).astype(dtype).tofile(file)
        given = "bytes" if tokenizer == "bytes" else str(text.root / "tokenizer.json")
        corpus = prepare([f"sea=tokens:{file}"], str(tmp_path / f"{name} {dtype}"), tokenizer=given,
                         tokens_dtype=dtype, **SETTINGS)  # type: ignore[arg-type]  # fmt: skip
        found = [d for split in ("train", "val") for s in corpus.shards_of(split, "sea") for d in read_shard(corpus, s)]
        assert sorted(map(tuple, found)) == sorted(map(tuple, documents))
        [domain] = corpus.domains
        assert domain.train.bytes + domain.val.bytes == sum(len(t.encode()) for t in texts["sea"])
        for shard in corpus.shards_of("val", "sea"):
            assert all(len(ids) == len(sizes) for ids, sizes in read_validation_shard(corpus, shard))


def test_other_ends_of_documents(tmp_path: Path, corpus: Manifest) -> None:
    ids = np.array([7, *[n for i in range(40) for n in (65 + i % 20, 66, 7)], 90], "<u2")
    ids.tofile(tmp_path / "a.bin")
    found = prepare([f"tokens:{tmp_path}/a.bin"], str(tmp_path / "out"), tokens_end=7, **SETTINGS)
    texts = [text for split in ("train", "val") for shard in stored(found, split, "a") for text in shard]
    assert sorted(texts) == sorted([*(chr(65 + i % 20) + "B" for i in range(40)), "Z"])


def test_token_files_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    np.array([1, 2, 256, 3, 300, 256], "<u2").tofile(file)
    with pytest.raises(ConfigError, match="token 4 is 300, and the tokenizer has 257 ids"):
        prepare([f"tokens:{file}"], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is trained, and token files have the ids of another"):
        prepare([f"tokens:{file}"], str(tmp_path / "out"), tokenizer="bpe:300")
    file.write_bytes(b"123")
    with pytest.raises(ConfigError, match="has 3 bytes, no whole number of uint16 ids"):
        prepare([f"tokens:{file}"], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="'sea' would have text and token files"):
        prepare([f"sea=tokens:{file}", f"sea={source}/sea.jsonl"], str(tmp_path / "out"))


def test_data_set_folders(source: Path, tmp_path: Path, texts: dict[str, list[str]]) -> None:
    """As `datasets` saves them, with one split or several, and as Parquet files of a hub's data set."""
    table = pyarrow.table({"text": texts["sea"], "id": range(40)})
    for folder in (tmp_path / "plain", tmp_path / "dict" / "train", tmp_path / "dict" / "test"):
        folder.mkdir(parents=True)
        for number, part in enumerate((table.slice(0, 25), table.slice(25))):
            path = folder / f"data-{number:05d}-of-00002.arrow"
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(part)
        files = [{"filename": path.name} for path in sorted(folder.glob("*.arrow"))]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    from pyarrow import parquet

    (tmp_path / "hub" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "hub" / "README.md").touch()
    whole = prepare([str(source / "sea.jsonl")], str(tmp_path / "whole"), **SETTINGS)
    for number, spec in enumerate(("plain", "dict#train", "hub")):
        found = prepare([f"sea=hf:{tmp_path / spec}"], str(tmp_path / f"out{number}"), **SETTINGS)
        assert found.fingerprint == whole.fingerprint
    with pytest.raises(ConfigError, match=r"has several splits\. Name one: hf:.*/dict#train, hf:.*/dict#test"):
        prepare([f"sea=hf:{tmp_path}/dict"], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="has no such split"):
        prepare([f"sea=hf:{tmp_path}/dict#dev"], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is no data set folder"):
        prepare([f"sea=hf:{source}"], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"has no such column\. Columns: text, id"):
        prepare([f"sea=hf:{tmp_path}/plain"], str(tmp_path / "out"), text_field="body")
    (tmp_path / "plain" / "data-00001-of-00002.arrow").write_bytes(b"ARROW1 and nothing else")
    with pytest.raises(ConfigError, match=r"data-00001-of-00002\.arrow': cannot be read"):
        prepare([f"sea=hf:{tmp_path}/plain"], str(tmp_path / "out"), **SETTINGS)
