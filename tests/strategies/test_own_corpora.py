"""Sites with corpora of their own: nobody opens another's, and all know what there is."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from fomoe_pl.cli import main
from fomoe_pl.data import Manifest
from fomoe_pl.data.prepare import prepare
from fomoe_pl.errors import ConfigError
from tests.conftest import make_documents
from tests.distributed import run_distributed
from tests.training import ROOT, Run, fit, launched_as

SITES = 2
PREPARED: dict[str, Any] = {"shards_per_domain": 4, "val_fraction": 0.2, "separator": "\\x1e"}


class Losses(L.Callback):
    """Of this site; saves after step 4."""

    def __init__(self, path: str | None) -> None:
        self.values: list[float] = []
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))
        if self.path and len(self.values) == 4:
            trainer.save_checkpoint(self.path)


def _fit(run: Run, rank: int, ckpt_path: str | None = None, save: str | None = None) -> dict[str, Any]:
    losses = Losses(save)
    trainer = fit(run, rank, SITES, [losses], ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"losses": losses.values, "metrics": metrics, "trainer": trainer}


def _all_runs(rank: int, shared: str, folder: str) -> dict[str, Any]:
    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
            opened.append(os.path.realpath(os.fsdecode(arguments[0])))

    sys.addaudithook(note)
    found: dict[str, Any] = {}
    trainer = {"max_steps": 6, "limit_val_batches": None, "val_check_interval": 6}
    run = Run(root=shared, folder=folder, settings={"local_steps": 2}, trainer=trainer)
    with launched_as(rank, SITES, folder):
        for split in ("iid", "dirichlet"):
            for name, root in (("shared", shared), ("copies", f"{folder}/copies/{{site}}")):
                done = _fit(replace(run, root=root, data={"split": split}), rank)
                found[f"{name} {split}"] = done["losses"], done["metrics"]
        found["by domain"] = _fit(replace(run, root=f"{folder}/two", data={"split": "domain"}), rank)["losses"]
        opened.clear()
        own = replace(run, root=f"{folder}/own/{{site}}")
        whole = _fit(own, rank, save=f"{folder}/own.ckpt")
        found["own"], data = (whole["losses"], whole["metrics"]), whole["trainer"].datamodule
        found["identity"], found["domains"] = data.identity(), data.domains
        found["probe"] = data.probe(2, 8)["inputs"].tolist()
        rest = _fit(own, rank, f"{folder}/own.ckpt")
        found["resumed"] = whole["losses"][:4] + rest["losses"], rest["metrics"]
        found["opened"] = list(opened)
        mixed = replace(run, data={"weights": {"farm": 90, "sea": 10, "sky": 5}})
        found["mixed"] = _fit(mixed, rank, save=f"{folder}/mixed.ckpt")["losses"]
        found["mixed resumed"] = found["mixed"][:4] + _fit(mixed, rank, f"{folder}/mixed.ckpt")["losses"]
        # Both with the second one's corpus: what is left of it is divided.
        joined = {0: f"{folder}/own/1", 1: f"{folder}/own/1"}
        found["joined"] = _fit(replace(own, root=joined), rank, f"{folder}/own.ckpt")["losses"]  # type: ignore[arg-type]
        found["errors"] = []
        for root in (f"{folder}/lost/{{site}}", f"{folder}/tokenizers/{{site}}", {0: f"{folder}/own/0"}):
            with pytest.raises(ConfigError) as error:
                _fit(replace(run, root=root), rank)  # type: ignore[arg-type]
            found["errors"].append(str(error.value))
    return found


@pytest.fixture(scope="module")
def found(corpus: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("own")
    for domain in ("farm", "sea"):
        (folder / f"{domain}.txt").write_text("\x1e".join(make_documents(domain, 60)))
    (folder / "sky.txt").write_text("\x1e".join(make_documents("sky", 60)))
    sea, sky, farm = (f"{name}={folder / name}.txt" for name in ("sea", "sky", "farm"))
    for site in range(SITES):
        shutil.copytree(corpus.root, folder / "copies" / str(site))
        prepare([(farm, sea)[site]], str(folder / "own" / str(site)), **PREPARED)
    prepare([farm, sea], str(folder / "two"), **PREPARED)
    prepare([farm], str(folder / "lost" / "0"), **PREPARED)
    prepare([sky], str(folder / "tokenizers" / "0"), **PREPARED)
    prepare([sky], str(folder / "tokenizers" / "1"), tokenizer="bpe:258", **PREPARED)
    return run_distributed(_all_runs, SITES, str(corpus.root), str(folder))


def test_copies_are_as_good_as_one_folder(found: list[dict[str, Any]]) -> None:
    for split in ("iid", "dirichlet"):
        for site in found:
            assert site[f"copies {split}"] == site[f"shared {split}"]
    assert found[0]["shared iid"][0] != found[1]["shared iid"][0]


def test_a_site_opens_no_corpus_but_its_own(found: list[dict[str, Any]]) -> None:
    for rank, site in enumerate(found):
        own = [path for path in site["opened"] if f"/own/{rank}/" in path]
        assert any(path.endswith(".tar") for path in own)
        assert not [path for path in site["opened"] if f"/own/{1 - rank}" in path]


def test_own_corpora_train_as_a_corpus_by_domain(found: list[dict[str, Any]]) -> None:
    """The same documents in the same order: the losses are those of one shared corpus of both domains."""
    for site in found:
        assert site["own"][0] == site["by domain"]


def test_every_site_knows_every_domain(found: list[dict[str, Any]]) -> None:
    for site in found:
        assert site["domains"] == ["farm", "sea"]
        assert site["identity"]["domains"] == {"farm": [0], "sea": [1]}
        metrics = site["own"][1]
        assert {"val/loss/farm", "val/loss/sea", "val/bits_per_byte/farm"} <= set(metrics)
        assert all(value == value for value in metrics.values())
        assert metrics == found[0]["own"][1]
        assert site["identity"] == found[0]["identity"]
        assert site["probe"] == found[0]["probe"]


def test_runs_go_on_exactly(found: list[dict[str, Any]]) -> None:
    for site in found:
        assert site["resumed"] == site["own"]
        assert site["mixed resumed"] == site["mixed"]
    assert found[0]["joined"] != found[1]["joined"]


def test_every_site_tells_what_one_of_them_lacks(found: list[dict[str, Any]]) -> None:
    for site in found:
        lost, tokenizer, unnamed = site["errors"]
        assert "site 1: there is no" in lost
        assert "site 1 has tokenizer" in tokenizer
        assert "site 0 has" in tokenizer
        assert "site 1: names no folder for site 1" in unnamed


def test_the_example_trains(corpus: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus.root, tmp_path / "runs" / "corpora" / "0")
    files = [word for name in ("quickstart", "data/own_corpora") for word in ("-c", str(ROOT / f"configs/{name}.yaml"))]
    small = {"max_steps": 2, "devices": 1, "strategy": "single_site", "limit_val_batches": 1, "val_check_interval": 2,
             "callbacks": "null", "num_sanity_val_steps": 0, "enable_progress_bar": "false"}  # fmt: skip
    words = [word for key, value in small.items() for word in (f"--trainer.{key}", str(value))]
    sizes = ["--data.sequence_length", "16", "--data.batch_size", "2", "--model.architecture.d_model", "16",
             "--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=runs"]  # fmt: skip
    main(["fit", *files, *words, *sizes])
    [curves] = (tmp_path / "runs").rglob("metrics.csv")
    assert "val/loss/farm" in curves.read_text().splitlines()[0]
