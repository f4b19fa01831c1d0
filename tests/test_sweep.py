"""A grid of runs that goes on where it stopped."""

from pathlib import Path

import pytest

from fomoe_pl import cli, sweep
from fomoe_pl.errors import ConfigError

GRID = ["config=strategy/fomoe,strategy/diloco", "seed_everything=1,2"]


def test_every_combination_has_a_command_and_a_folder(tmp_path: Path) -> None:
    runs = sweep.commands("seeds", GRID, tmp_path, ["-c", "quickstart"])
    names = ["fomoe-seed=1", "fomoe-seed=2"]
    names += ["diloco-seed=1", "diloco-seed=2"]
    assert [folder.name for folder in runs] == names
    assert runs[tmp_path / "seeds" / names[2]] == [
        "fit", "-c", "quickstart", "-c", "strategy/diloco", "--seed_everything", "1",
        "--trainer.logger.init_args.save_dir", str(tmp_path),
        "--trainer.logger.init_args.name", "seeds/diloco-seed=1", "--ckpt_path", "auto",
    ]  # fmt: skip


def test_values_in_brackets_stay_together() -> None:
    assert sweep.values_of("a.b=[1,2],{x: 1, y: 2},3") == ("a.b", ["[1,2]", "{x: 1, y: 2}", "3"])
    for wrong in ("a", "a=", "a=1,", "=1"):
        with pytest.raises(ConfigError, match="seed_everything=1,2,3"):
            sweep.values_of(wrong)
    with pytest.raises(ConfigError, match="two combinations"):
        sweep.commands("x", ["config=a/b.yaml,c/b.yaml"], Path("runs"), [])


def test_what_has_ended_is_left_alone_and_what_fails_is_told(tmp_path: Path) -> None:
    runs = sweep.commands("s", ["seed_everything=1,2,3,4"], tmp_path, [])
    folders = list(runs)
    folders[1].mkdir(parents=True)
    (folders[1] / "report.json").touch()
    trained: list[str] = []

    def train(words: list[str]) -> int:
        trained.append(words[2])
        return 2 if words[2] == "3" else 0

    assert sweep.run_all(runs, train) == [folders[2]]
    assert trained == ["1", "3", "4"]


@pytest.mark.parametrize("status", [143, -15])
def test_a_signal_ends_the_sweep(tmp_path: Path, status: int) -> None:
    trained: list[list[str]] = []
    with pytest.raises(SystemExit) as ended:
        sweep.run_all(sweep.commands("s", GRID, tmp_path, []), lambda words: trained.append(words) or status)
    assert (ended.value.code, len(trained)) == (143, 1)


def test_commands_are_shown_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["-q", "sweep", "s", "-c", "quickstart", "--grid", GRID[1], "--save_dir", str(tmp_path), "--dry"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("fomoe fit -c quickstart -q --seed_everything 1 ")
    with pytest.raises(ConfigError, match="neither a file nor"):
        sweep.main(["s", "--grid", "config=strategy/nothing", "--dry"])
