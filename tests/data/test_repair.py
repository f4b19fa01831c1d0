"""Damaged shards in mid-stream: named, replaced, counted, and an error above the limit."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from fomoe_pl.data import Manifest, load_manifest, repair
from fomoe_pl.data.stream import DomainStream

SHARDS = (1, 4, 6)


@pytest.fixture
def copied(corpus: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setattr(repair, "WAITS", (0.0, 0.01))
    shutil.copytree(corpus.root, tmp_path / "copy")
    return load_manifest(tmp_path / "copy")


def damage(manifest: Manifest, number: int, how: str) -> str:
    shard = manifest.shards_of("train", "farm")[number]
    path = manifest.root / shard.file
    content = bytearray(path.read_bytes())
    content[700] ^= 1  # in the header or the tokens of a document
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "flipped": content}
    path.unlink()
    if how != "gone":
        path.write_bytes(damaged[how])
    return shard.file


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_shard_is_named_and_keeps_its_place(
    copied: Manifest, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    whole = DomainStream(copied, 0, SHARDS, seed=0)
    expected = whole.take(whole.tokens_per_epoch)
    order = whole._shard_order()
    whole.seek(0)
    order = whole._shard_order()
    file = damage(copied, order[1], how)
    stream = DomainStream(copied, 0, SHARDS, seed=0, max_bad_shards=1)
    with caplog.at_level(logging.WARNING):
        found = stream.take(stream.tokens_per_epoch)
    assert f"shard {file} cannot be read (1 of at most 1)" in caplog.text
    assert f"take the place of {file}" in caplog.text
    sizes = [copied.shards_of("train", "farm")[number].tokens for number in order]
    first, third = slice(0, sizes[0]), slice(sizes[0] + sizes[1], None)
    # The shards around it come where they would have come, so that all positions stay what they were.
    assert np.array_equal(found[first], expected[first])
    assert np.array_equal(found[third], expected[third])
    assert not np.array_equal(found, expected)
    stream.seek(sizes[0] + 10)
    assert np.array_equal(stream.take(20), found[sizes[0] + 10 : sizes[0] + 30])


def test_above_the_limit_it_is_an_error_that_names_them_all(copied: Manifest) -> None:
    files = [damage(copied, number, "empty") for number in SHARDS[:2]]
    stream = DomainStream(copied, 0, SHARDS, seed=0, max_bad_shards=1)
    with pytest.raises(RuntimeError, match="data.max_bad_shards is 1") as error:  # noqa: RUF043
        stream.take(2 * stream.tokens_per_epoch)
    assert all(file in str(error.value) for file in files)


def test_a_shard_that_comes_back_is_read(copied: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = copied.shards_of("train", "farm")[SHARDS[0]]
    path, away = copied.root / shard.file, copied.root / "away"
    path.rename(away)
    waits = []

    def come_back(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            away.rename(path)

    monkeypatch.setattr(repair.time, "sleep", come_back)
    reader = repair.ShardReader(copied, 0)
    assert sum(map(len, reader.read(shard, []))) == shard.tokens
    assert waits == [0.0, 0.01]
    assert not reader.bad
