import json
import shutil
from pathlib import Path

import pytest

from fomoe_pl.data import Manifest, load_manifest
from fomoe_pl.data.shards import read_shard
from fomoe_pl.errors import ConfigError


@pytest.fixture
def copy(corpus: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.root, tmp_path / "copy"))


def test_round_trip(corpus: Manifest, copy: Path) -> None:
    loaded = load_manifest(copy)
    assert loaded.fingerprint == corpus.fingerprint
    assert (loaded.domain_names, loaded.vocab_size, loaded.eod_id) == (["farm", "sea", "sky"], 257, 256)


def test_missing_manifest_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data\.root.*no .*manifest\.json.*fomoe prepare .*{tmp_path}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["train-sea-00003.tar", "val-sky-00000.tar"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_manifest(copy)


def test_short_shard(copy: Path) -> None:
    shard = copy / "train-sea-00003.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ConfigError, match=r"train-sea-00003\.tar has \d+ bytes, not \d+"):
        load_manifest(copy)


def test_a_run_that_goes_on_does_without_training_shards(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "train-sea-00003.tar").unlink()
    (copy / "train-sky-00001.tar").write_bytes(b"")
    assert load_manifest(copy, training=False).domain_names == ["farm", "sea", "sky"]
    assert [message for message in ("train-sea-00003.tar is missing", "train-sky-00001.tar has 0 bytes")
            if message not in caplog.text] == []  # fmt: skip
    (copy / "val-sky-00000.tar").unlink()
    with pytest.raises(ConfigError, match=r"val-sky-00000\.tar is missing"):
        load_manifest(copy, training=False)


def test_changed_manifest(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"eod_id": 256', '"eod_id": 255'))
    with pytest.raises(ConfigError, match="own fingerprint"):
        load_manifest(copy)


@pytest.mark.parametrize("version", [1, 0, "2", None])
def test_other_versions_say_what_to_type(copy: Path, version: object) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(ConfigError, match=rf"has version {version}.*fomoe prepare --source .*{copy} --overwrite"):
        load_manifest(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"version": 2}', '{"version": 2, "tokenizer": 5}',
                                     "[" * 100_000, '{"version": 2, "tokenizer": {}, "domains": [1]}'])  # fmt: skip
def test_a_manifest_that_is_none_is_one_message(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.root = .*is no corpus' manifest"):
        load_manifest(copy)


def test_a_folder_with_a_colon_is_a_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that opens URLs takes `data:v2/...` for one."""
    copy.rename(copy.with_name("data:v2"))
    monkeypatch.chdir(copy.parent)
    manifest = load_manifest("data:v2")
    assert all(list(read_shard(manifest, shard)) for shard in manifest.shards)
    with pytest.raises(ConfigError, match=r"data\.root = .*no URL that fsspec knows"):
        load_manifest("nosuch://bucket/corpus")


def test_exchanged_shards_are_seen_when_they_are_read(copy: Path) -> None:
    manifest = load_manifest(copy)
    by_size = sorted(manifest.shards_of("train", "sea"), key=lambda shard: shard.tokens)
    one, two = by_size[0], by_size[-1]
    shutil.copy(copy / one.file, copy / two.file)
    with pytest.raises(ValueError, match="damaged"):
        list(read_shard(manifest, two))
