"""configs/paper: every cell of the paper's grid that its page names, with the paper's batch, schedule and data."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fomoe_pl import sweep
from fomoe_pl.federation.outer import Average, Nesterov
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts
from fomoe_pl.strategies import CountedDDPStrategy, FederatedStrategy
from tests.test_cli import environment
from tests.test_readme import ParsedOnly, commands
from tests.training import ROOT

FOLDER = ROOT / "configs/paper"
PAGE = (ROOT / "docs/tutorials/paper-table.md").read_text()
ARMS = ("partial", "partial_random", "skip", "centralised")
SITES = {4: [], 2: ["sites_2"], 8: ["sites_8"]}


def merged(*names: str) -> dict[str, Any]:
    """The files one after the other, as the command line merges them."""

    def merge(one: Any, other: Any) -> Any:
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return other
        if one.get("class_path") != other.get("class_path"):
            return other
        return {key: merge(one[key], other[key]) if key in one and key in other else {**one, **other}[key]
                for key in {**one, **other}}  # fmt: skip

    found: dict[str, Any] = {}
    for name in ("proxy", *names):
        found = merge(found, yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    return found


def test_all_files_are_used() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(
        ["proxy", "diloco", *ARMS, *itertools.chain(*SITES.values())]
    )
    for path in FOLDER.iterdir():
        assert f"`{path.name}`" in PAGE


@pytest.mark.parametrize("sites", SITES)
def test_each_number_of_sites_has_the_papers_batch(sites: int) -> None:
    settings = merged(*SITES[sites])
    trainer, data = settings["trainer"], settings["data"]
    sequences = trainer["devices"] * trainer["accumulate_grad_batches"] * data["batch_size"]
    assert (trainer["devices"], sequences, data["sequence_length"]) == (sites, 1024, 2048)
    assert trainer["max_steps"] * sequences * data["sequence_length"] == pytest.approx(1.34e9, rel=0.002)
    assert trainer["val_check_interval"] == trainer["max_steps"] * trainer["accumulate_grad_batches"]


def test_the_model_is_the_papers() -> None:
    preset = yaml.safe_load((ROOT / "configs/model/fomoe-54m.yaml").read_text())["model"]["architecture"]
    architecture = merged()["model"]["architecture"]
    assert architecture == preset
    assert parameter_counts(ModelConfig(**architecture)).total == pytest.approx(54e6, rel=0.01)


@pytest.mark.parametrize("arm", [(), *((arm,) for arm in ARMS)], ids=str)
@pytest.mark.parametrize("sites", SITES)
def test_every_cell_is_a_run(arm: tuple[str, ...], sites: int) -> None:
    for last in ([], ["diloco"]):
        strategy = merged(*SITES[sites], *arm, *last)["trainer"]["strategy"]
        settings = dict(strategy.get("init_args", {}))
        if arm == ("centralised",):
            assert strategy["class_path"] == "fomoe_pl.strategies.CountedDDPStrategy" or last
            continue
        if settings["outer"]:
            assert settings["outer"]["class_path"] == "fomoe_pl.federation.outer.Nesterov"
            settings["outer"] = Nesterov(**settings["outer"]["init_args"])
        for k, overlap in itertools.product((32, 64, 128), (1, 2, 4, 8)):
            if overlap <= sites:
                made = FederatedStrategy(**{**settings, "local_steps": k, "overlap": overlap}).settings
                made.check(8, sites, 2)
        assert isinstance(made.rule, Nesterov if last else Average)
        assert made.inner_moments == ("keep" if last else "average")
        assert (made.routing == "ghost", made.placement) == (
            arm == ("skip",), "random" if arm == ("partial_random",) else "fixed"
        )  # fmt: skip


def test_the_sweeps_of_the_page_are_table_6() -> None:
    options = [sweep.make_parser().parse_known_args(words[2:]) for words in commands(PAGE) if words[1] == "sweep"]
    runs = {given.name: sweep.commands(given.name, given.grid, given.save_dir, fit) for given, fit in options}
    assert {name: len(of) for name, of in runs.items()} == {
        "paper_4": 2 * 3 * 2, "paper_8": 2 * 3 * 3, "paper_full": 2 * 3
    }  # fmt: skip
    for folder, words in (item for of in runs.values() for item in of.items()):
        files = [word for before, word in itertools.pairwise(words) if before == "-c"]
        assert [word for word in files if not (ROOT / f"configs/{word}.yaml").is_file()] == []
        assert "paper_8" not in str(folder) or "paper/sites_8" in files


@pytest.mark.slow
def test_the_command_line_takes_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for names in (["centralised"], ["sites_2", "skip", "diloco"], ["sites_8", "partial_random", "diloco"]):
        files = [word for name in ["proxy", *names] for word in ("-c", f"configs/paper/{name}.yaml")]
        monkeypatch.setattr(sys, "argv", ["fomoe", "fit", *files])
        cli = ParsedOnly()
        strategy = cli.parser.instantiate_classes(cli.config).fit.trainer.strategy
        assert isinstance(strategy, CountedDDPStrategy if names == ["centralised"] else FederatedStrategy)


@pytest.mark.slow
def test_a_cell_trains_in_small(root: str, tmp_path: Path) -> None:
    """As M = 8 and overlap 1: a site has one expert of a layer, where tokens would pick two."""
    small = {
        "trainer": {"accelerator": "cpu", "devices": 2, "precision": "32-true", "max_steps": 4,
                    "accumulate_grad_batches": 2, "val_check_interval": 8, "enable_progress_bar": False},
        "model": {"architecture": {"vocab_size": 257, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_experts": 2,
                                   "d_expert": 8}},
        "data": {"root": root, "weights": None, "sequence_length": 16, "batch_size": 2, "val_batch_size": 4,
                 "val_sequences": 12},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    files = [FOLDER / f"{name}.yaml" for name in ("proxy", "partial_random", "diloco")] + [tmp_path / "small.yaml"]
    words = [word for path in files for word in ("-c", str(path))]
    strategy = ["--trainer.strategy.init_args.overlap", "1", "--trainer.strategy.init_args.local_steps", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "fomoe_pl", "fit", *words, *strategy], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs/paper/random-4-32-2/report.json").read_text())
    assert (report["sites"], report["steps"], report["rounds"]) == (2, 4, 2)
    assert 0 < report["validation"]["val/perplexity"] < 1000
