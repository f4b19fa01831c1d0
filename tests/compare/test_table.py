"""Tables, refusals and limits, on reports written by hand."""

import csv
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe_pl.cli import main as fomoe
from fomoe_pl.compare import main, plots
from fomoe_pl.compare.groups import grouped
from fomoe_pl.compare.runs import Curve, Run, read_run, read_runs
from fomoe_pl.planner.output import pareto_front

MIB = 2**20
DATA = {"corpus": "c0ffee", "tokenizer": "bytes", "sequence_length": 256, "val_sequences": 240}
ROUTING = {"load_entropy": 0.98765, "max_violation": 0.25, "starved_experts": 0.5, "ghost_excess": -0.01, "churn": 0.1}


def write(folder: Path, bits_per_byte: float | None, **changes: Any) -> Path:
    kinds = ("dense", "expert", "moments", "migration", "evaluation", "control")
    wire = dict.fromkeys(kinds, 0) | {
        "dense": 3 * MIB,
        "evaluation": 3 * MIB // 2,
        "total": 9 * MIB // 2,
    }
    report: dict[str, Any] = {
        "method": "four sites",
        "data": DATA,
        "sites": 4,
        "steps": 240,
        "validation": {
            "val/bits_per_byte": bits_per_byte,
            "val/perplexity": None if bits_per_byte is None else 11.5,
        },
        "bytes": {"wire": wire},
        "tokens_per_second": {"local": 5000.4, "with_sync": 4000.0},
        "resident_parameters": 1234567,
        "peak_memory_mib": 512.2,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = {"local": None, "with_sync": 4000.0}  # of DDP nobody measures what is local
    runs = [write(tmp_path / "fomoe", 2.3456), write(tmp_path / "ddp", None, tokens_per_second=speed)]
    main([*map(str, runs), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | sites | steps | bits / byte | ppl | MiB sent | MiB sent for eval |")
    assert lines[1] == "| --- |" + " ---: |" * 10
    assert lines[2] == "| fomoe | 4 | 240 | 2.346 | 11.50 | 3.0 | 1.5 | 4,000 | 5,000 | 1,234,567 | 512 |"
    assert lines[3] == "| ddp | 4 | 240 | - | - | 3.0 | 1.5 | 4,000 | - | 1,234,567 | 512 |"
    assert len(lines) == 5  # nobody has watched the routing


def test_routing_has_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = write(tmp_path / "fomoe", 2.3, routing=ROUTING)
    main([str(watched), str(write(tmp_path / "ddp", 1.9)), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].startswith("| run | load entropy | MaxVio | starved experts | ghosts beyond even | churn |")
    assert lines[7] == "| fomoe | 0.988 | 0.25 | 0.50 | -0.010 | 0.100 | - | - | - | - |"
    assert lines[8] == "| ddp |" + " - |" * 9


def test_necessity_of_an_earlier_validation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validation = {"val/bits_per_byte": 2.3, "val/routing_necessity_nats": 0.1234}
    for name, step in (("now", 240), ("then", 160)):
        write(tmp_path / name, 2.3, routing=ROUTING, validation=validation, other_views_step=step)
    main([str(tmp_path / "now"), str(tmp_path / "then"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[8] for line in lines[7:9]] == ["0.123", "0.123 @ 160"]


def test_a_number_says_at_which_step_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routing = ROUTING | {"site_agreement": 0.8, "drift": 0.001}
    write(tmp_path / "run", 2.3, routing=routing, validation_step=160, looked_step=192)
    main([str(tmp_path / "run"), "--markdown"])
    out = capsys.readouterr().out
    assert "| 2.300 @ 160 | 11.50 @ 160 | 3.0 |" in out
    assert "| -0.010 | 0.100 @ 192 | 0.800 @ 192 | 0.0010 @ 192 |" in out


def seeded(folder: Path, name: str, bits: float, **settings: Any) -> Path:
    known = {"strategy": "FederatedStrategy", "local_steps": 8, "overlap": 2, "optimizer.lr": 0.01}
    return write(folder / name, bits, settings=known | settings)


def test_runs_that_differ_in_seeds_alone_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {seed: {"seed": seed, "data.seed": seed} for seed in (1, 2, 3)}
    runs = [seeded(tmp_path, f"fomoe-s{seed}", 2 + seed / 10, **both[seed]) for seed in both]
    runs += [seeded(tmp_path, f"k32-seed{seed}", 2.5, local_steps=32, **both[seed]) for seed in (1, 2)]
    runs.append(
        write(tmp_path / "ddp", 1.9, settings={"strategy": "CountedDDPStrategy", "optimizer.lr": 0.01, "seed": 1})
    )
    main([*map(str, runs), "--markdown", "--csv", str(tmp_path / "out.csv")])
    tables = [table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n")]
    assert len(tables) == 3
    differ, groups = tables[1:]
    assert differ[0] == "| run | strategy | K | seed |", "what differs, and one seed where all are the same"
    assert differ[2] == "| fomoe-s1 | FederatedStrategy | 8 | 1 |"
    assert differ[7] == "| ddp | CountedDDPStrategy | - | 1 |"
    assert groups[0] == "| runs | n | bits / byte | ppl | MiB sent | tokens / s |"
    assert [row.split(" | ")[:3] for row in groups[2:]] == [
        ["| fomoe", "3", "2.200 ± 0.100"], ["| k32", "2", "2.500 ± 0.000"], ["| ddp", "1", "1.900"],
    ]  # fmt: skip
    first, _, last = csv.DictReader((tmp_path / "out.groups.csv").open())
    assert (first["runs"], first["n"], first["members"]) == ("fomoe", "3", "fomoe-s1 fomoe-s2 fomoe-s3")
    assert float(first["bits / byte mean"]) == pytest.approx(2.2)
    assert float(first["bits / byte std"]) == pytest.approx(0.1)
    assert (last["bits / byte std"], last["bits / byte n"], last["churn mean"]) == ("", "1", "")


def test_names_of_groups_stand_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = [seeded(tmp_path, f"diloco-seed={seed}", 5.2 + seed / 10, seed=seed) for seed in (1, 2)]
    main([*map(str, runs)])
    assert "diloco 2 5.350 ± 0.071 11.50 ± 0.00 3.0 ± 0.0 4,000 ± 0" in " ".join(capsys.readouterr().out.split())


def test_runs_of_other_lengths_or_older_versions_are_not_joined(tmp_path: Path) -> None:
    folders = [seeded(tmp_path, "a", 2.0, seed=1), write(tmp_path / "b", 2.0), write(tmp_path / "c", 2.0)]
    folders.append(write(tmp_path / "d", 2.0, steps=480, settings=json.loads(
        (tmp_path / "a/report.json").read_text())["settings"]))  # fmt: skip
    assert [group.name for group in grouped(read_runs(folders))] == ["a", "b", "c", "d"]


def test_curves_of_seeds_are_a_mean_and_a_band(tmp_path: Path) -> None:
    folders = [seeded(tmp_path, f"x-seed{seed}", 2.0, seed=seed) for seed in (1, 2)]
    folders.append(seeded(tmp_path, "other", 2.0, overlap=4, seed=1))
    steps = np.array([8.0, 16.0])
    runs = [
        dataclasses.replace(run, curves={
            "val/bits_per_byte": Curve(steps, np.array([3.0, 2.0]) + i), "tokens/global": Curve(steps, steps * 1e6),
            "time/train_s": Curve(steps, steps * 3600),
        }) for i, run in enumerate(read_runs(folders))
    ]  # fmt: skip
    figure = plots.quality(runs)
    assert figure is not None
    tokens, time = figure.axes
    assert [line.get_label() for line in tokens.lines] == ["x", "other"]
    assert np.asarray(tokens.lines[0].get_ydata()).tolist() == [3.5, 2.5]
    assert len(tokens.collections) == 1, "a band for the two seeds, none for one run"
    assert (time.get_xlabel(), float(np.asarray(time.lines[0].get_xdata())[-1])) == ("training time (h)", 16.0)


def test_table_has_a_row_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    fomoe(["compare", str(write(tmp_path / "fomoe", 2.3456)), str(write(tmp_path / "ddp", 1.9))])
    out = capsys.readouterr().out
    assert "2.346" in out
    assert "1.900" in out
    assert "1,234,567" in out  # whole, in an ordinary terminal


def test_a_long_name_is_folded_and_no_number_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    routing = ROUTING | {"ghost_fraction": 0.5, "site_agreement": 0.8239, "drift": 0.00123}
    validation = {"val/bits_per_byte": 2.3456, "val/routing_necessity_nats": 0.8412, "val/domain_information_bits": 0.3}
    folder = tmp_path / "partitioned_overlap_2_of_4"
    main([str(write(folder, 2.3456, routing=routing, validation=validation, resident_parameters=16_284_160))])
    out = capsys.readouterr().out
    numbers = ["4", "240", "2.346", "3.0", "1.5", "4,000", "5,000", "16,284,160", "512"]
    numbers += ["0.988", "0.25", "0.50", "-0.010", "0.100", "0.824", "0.0012", "0.841", "0.300"]
    assert [word for word in out.split() if word in numbers] == numbers
    assert "…" not in out


def test_without_ghosts_nothing_is_said_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routing = ROUTING | {"ghost_excess": 0.0, "ghost_fraction": 0.0}
    folders = [write(tmp_path / "ghost", 2.3, routing=ROUTING), write(tmp_path / "full", 2.3, routing=routing)]
    main([*map(str, folders), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[4] for line in lines[7:9]] == ["-0.010", "-"]
    curves = {"routing/ghost_excess/mean": (0.01, 0.0), "routing/ghost_fraction/mean": (0.5, 0.0)}
    runs = [
        dataclasses.replace(
            run, curves={tag: Curve(np.array([8.0]), np.array([values[i]])) for tag, values in curves.items()}
        )
        for i, run in enumerate(read_runs(folders))
    ]
    figure = plots.routing(runs)
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["ghost"]
    assert plots.routing(runs[1:]) is None


def test_csv_has_every_number_unrounded(tmp_path: Path) -> None:
    runs = [write(tmp_path / "fomoe", 2.3456789, routing=ROUTING), write(tmp_path / "ddp", None)]
    main([*map(str, runs), "--csv", str(tmp_path / "runs.csv")])
    first, second = csv.DictReader((tmp_path / "runs.csv").open())
    assert (first["run"], first["method"], first["bits / byte"]) == ("fomoe", "four sites", "2.3456789")
    assert (first["load entropy"], first["MiB sent"], first["sites agree"]) == ("0.98765", "3.0", "")
    assert (second["bits / byte"], second["churn"]) == ("", "")


def test_the_newest_report_of_a_run_counts(tmp_path: Path) -> None:
    old, new = write(tmp_path / "version_9", 1.0), write(tmp_path / "version_10", 2.0)
    os.utime(old / "report.json", (1, 1))
    assert read_run(tmp_path).report == json.loads((new / "report.json").read_text())


@pytest.mark.parametrize(("value", "passes"), [(2.99, True), (3.0, False), (8.0, False), (None, False)])
def test_limit(tmp_path: Path, value: float | None, passes: bool) -> None:
    arguments = [str(write(tmp_path / "good", 1.0)), str(write(tmp_path / "run", value)), "--max_bits_per_byte", "3.0"]
    if passes:
        main(arguments)
        return
    with pytest.raises(SystemExit, match=f"run: val/bits_per_byte is {value}, not below 3.0") as failure:
        main(arguments)
    assert "good" not in str(failure.value.code).replace(str(tmp_path), "")


def test_a_folder_without_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fomoe(["compare", str(tmp_path)])
    assert f"{tmp_path}': has no report.json, here or below" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "has no sites"),
        ('{"sites": 4, "steps": "many"}', "has no steps: it is damaged, or of an older version"),
    ],
)
def test_a_damaged_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        fomoe(["compare", str(tmp_path)])
    shown = capsys.readouterr().err
    assert told in shown
    assert str(tmp_path / "report.json") in shown


@pytest.mark.parametrize("key", ["sites", "validation", "bytes", "tokens_per_second", "peak_memory_mib"])
def test_a_key_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    write(tmp_path, 1.0, **{key: None})
    with pytest.raises(SystemExit, match="2"):
        fomoe(["compare", str(tmp_path)])
    assert f"has no {key}" in capsys.readouterr().err


def test_files_are_written_into_new_folders_and_refused_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write(tmp_path / "run", 1.0))
    main([run, "--csv", str(tmp_path / "new" / "folder" / "runs.csv")])
    assert (tmp_path / "new" / "folder" / "runs.csv").is_file()
    capsys.readouterr()
    for impossible, told in ((tmp_path / "run" / "report.json" / "runs.csv", "cannot be made"), (tmp_path, "a folder")):
        with pytest.raises(SystemExit, match="2"):
            fomoe(["compare", run, "--csv", str(impossible)])
        shown = capsys.readouterr()
        assert told in shown.err
        assert shown.out == ""


def test_a_newer_run_that_has_not_ended_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended, going = write(tmp_path / "version_0", 1.0), tmp_path / "version_1"
    os.utime(ended / "report.json", (10, 10))
    going.mkdir()
    events = going / "events.out.tfevents.1.host.1.0"
    events.touch()
    main([str(tmp_path)])
    assert f"{going} has a newer run that has not ended; {ended} is shown" in capsys.readouterr().err
    os.utime(events, (5, 5))
    main([str(tmp_path)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (DATA | {"corpus": "decaf"}, "are not of the same data: corpus is c0ffee and decaf"),
        (DATA | {"tokenizer": "bpe"}, "are not of the same data: tokenizer is bytes and bpe"),
        (DATA | {"val_sequences": 12}, "are not of the same data: val_sequences is 240 and 12"),
        (None, "the report of other does not say which data it is of"),
    ],
)
def test_other_data_are_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Any, told: str
) -> None:
    runs = [str(write(tmp_path / "run", 1.0)), str(write(tmp_path / "other", 1.0, data=data))]
    with pytest.raises(SystemExit, match="2"):
        fomoe(["compare", *runs])
    shown = capsys.readouterr()
    assert f"compare = 'run, other': {told}" in shown.err
    assert shown.out == ""
    main([*runs, "--any_data"])
    assert "other" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / "a" / "version_0", 9.0), write(tmp_path / "b" / "version_0", 1.0)]
    with pytest.raises(SystemExit, match=r"a/version_0: val/bits_per_byte is 9\.0"):
        main([*map(str, runs), str(write(tmp_path / "c", 1.0)), "--markdown", "--max_bits_per_byte", "3.0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| a/version_0", "| b/version_0", "| c"]
    drawn = plots.quality([with_curve(run) for run in read_runs(runs)])
    assert drawn is not None
    assert [line.get_ydata()[-1] for line in drawn.axes[0].lines] == [9.0, 1.0]


def with_curve(run: Run) -> Run:
    curve = Curve(np.array([240.0]), np.array([1e6]))
    return dataclasses.replace(run, curves={"tokens/global": curve})


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[red]run", "_hidden", "$a_b$", "a|b"]
    folders = [str(write(tmp_path / name, 1.0 + i)) for i, name in enumerate(names)]
    main(folders)
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    main([*folders, "--markdown"])
    assert "| a\\|b | 4 |" in capsys.readouterr().out
    runs = [with_curve(run) for run in read_runs([Path(folder) for folder in folders])]
    quality, pareto = plots.quality(runs), plots.pareto(runs)
    assert quality is not None
    assert pareto is not None
    for legend in (quality.legends[0], pareto.axes[0].get_legend()):
        texts = [text.get_text().strip() for text in legend.get_texts()]
        assert [text for text in texts if text != "not beaten in both"] == ["[red]run", "_hidden", r"\$a_b\$", "a|b"]


def test_a_diverged_run_is_no_point_of_the_front(tmp_path: Path) -> None:
    runs = read_runs([write(tmp_path / "good", 2.0), write(tmp_path / "nan", math.nan)])
    figure = plots.pareto(runs)
    assert figure is not None
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2.0]
    assert len(figure.axes[0].collections) == 1
    assert plots.pareto(runs[1:]) is None


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.5)], [1, 2, 0]),
        ([(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)], [0]),  # beaten in one number, equal in the other
        ([(1.0, 1.0), (1.0, 1.0)], [0]),
    ],
)
def test_pareto_front(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front
