"""What the repository ships for the data: the sample corpus, the command and the configurations."""

import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from fomoe_pl.cli import main
from fomoe_pl.data import FoMoEData, Manifest, load_manifest
from fomoe_pl.data.prepare import prepare

ROOT = Path(__file__).parents[2]


def test_sample_is_small_and_can_be_prepared(tmp_path: Path) -> None:
    sample = ROOT / "data" / "sample"
    assert sum(path.stat().st_size for path in sample.iterdir()) < 2_000_000
    manifest = prepare([str(sample)], str(tmp_path / "sample"))
    assert manifest.domain_names == ["drama", "prose", "speech"]
    for domain in manifest.domains:
        assert 1_990_000 < domain.train.bytes + domain.val.bytes <= 2_000_000
        assert domain.val.bytes > 60_000
    FoMoEData(str(manifest.root)).check(16)


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["--output", str(output), "--val_fraction", "0.2"]
    paths = [str(source / "sea.jsonl"), "--source", f"land={source / 'farm.jsonl'}"]
    main(["prepare", "--source", *paths, *options, "--shards_per_domain", "3"])
    assert load_manifest(output).domain_names == ["sea", "land"]
    assert re.search(r"land +train +\d+ documents .* 3 shards", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["prepare", "--source", *paths, *options, "--shards_per_domain", "4"])
    assert re.match(r"fomoe: output = .*--overwrite", capsys.readouterr().err.splitlines()[-1])
    main(["prepare", "--source", *paths, *options, "--shards_per_domain", "4", "--overwrite"])
    assert len(load_manifest(output).shards_of("train", "sea")) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations(path: Path, corpus: Manifest) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(FoMoEData, "data")
    settings = parser.parse_path(str(path)).data
    FoMoEData(**{**settings, "root": str(corpus.root)}).check(4)
