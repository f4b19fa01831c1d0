"""`fomoe sweep NAME`: a grid of runs, one after the other, which goes on where it stopped."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fomoe_pl.callbacks.report import REPORT_NAME
from fomoe_pl.errors import ConfigError, OneMessage
from fomoe_pl.shipped import config_path

_FILE = "config"
_LOGGER = "--trainer.logger.init_args"


class Parser(OneMessage, argparse.ArgumentParser):
    """A parser that reports one short error."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="fomoe sweep",
        description="Trains every combination of a grid, each in SAVE_DIR/NAME/VALUES. Runs that have ended are left "
        "alone, and one that was interrupted goes on, so that the same command goes on where it stopped.",
        epilog="fomoe sweep seeds -c quickstart --grid config=strategy/fomoe,strategy/diloco --grid "
        "seed_everything=1,2,3 --trainer.max_steps 96",
    )
    parser.add_argument("name", metavar="NAME", help="of the sweep, and of its folder")
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=VALUE,VALUE",
                        help="a setting and its values; config=FILE,FILE for files after -c; [..] and {..} are one "
                        "value; may be given several times")  # fmt: skip
    parser.add_argument("--save_dir", type=Path, default=Path("runs"), help="folder of all runs, by default runs")
    parser.add_argument("--dry", action="store_true", help="print the commands, and train nothing")
    return parser


def values_of(given: str) -> tuple[str, list[str]]:
    """Key and values of `KEY=VALUE,VALUE`; commas within brackets do not part them.

    Raises:
        ConfigError: If there is no key or no value.
    """
    key, _, rest = given.partition("=")
    values, depth = [""], 0
    for letter in rest:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    if not key or not all(values):
        raise ConfigError("grid", given, "must be a setting and its values", "such as seed_everything=1,2,3")
    return key.removeprefix("--"), values


def run_name(choice: Sequence[tuple[str, str]]) -> str:
    """Name of a run's folder: files by their last parts, settings as `lr=0.01`."""
    short = {"seed_everything": "seed"}
    parts = [
        Path(value).stem if key == _FILE else f"{short.get(key, key.rpartition('.')[2])}={value}"
        for key, value in choice
    ]
    return re.sub(r"[^\w.=+-]+", "_", "-".join(parts))


def commands(name: str, grid: Sequence[str], save_dir: Path, fit: Sequence[str]) -> dict[Path, list[str]]:
    """Folder of each run -> words of its `fomoe fit`.

    Args:
        name: Of the sweep.
        grid: `KEY=VALUE,VALUE` each.
        save_dir: Folder of all runs.
        fit: Words that all have in common.

    Raises:
        ConfigError: If two combinations would have the same folder.
    """
    axes = [[(key, value) for value in values] for key, values in map(values_of, grid)]
    found: dict[Path, list[str]] = {}
    for choice in itertools.product(*axes):
        folder = save_dir / name / run_name(choice)
        if folder in found:
            raise ConfigError("grid", " ".join(grid), f"two combinations would be written to {folder}",
                              "give files and values names that differ")  # fmt: skip
        words = [word for key, value in choice for word in ("-c" if key == _FILE else f"--{key}", value)]
        where = [f"{_LOGGER}.save_dir", str(save_dir), f"{_LOGGER}.name", f"{name}/{folder.name}"]
        found[folder] = ["fit", *fit, *words, *where, "--ckpt_path", "auto"]
    return found


def run_all(runs: dict[Path, list[str]], train: Callable[[list[str]], int]) -> list[Path]:
    """Train what has not ended; returns the folders of runs that failed.

    Args:
        runs: As of `commands`.
        train: Runs the words of a command; returns its exit status.

    Raises:
        SystemExit: If a run was stopped by a signal: so is the sweep.
    """
    failed = []
    for number, (folder, words) in enumerate(runs.items(), 1):
        done = (folder / REPORT_NAME).is_file()
        print(f"[{number}/{len(runs)}] {folder}{': has ended, left alone' if done else ''}", flush=True)
        status = 0 if done else train(words)
        if status > 128 or status < 0:
            print("the sweep stops; the same command goes on", flush=True)
            raise SystemExit(status if status > 0 else 128 - status)
        if status:
            failed.append(folder)
    return failed


def main(arguments: list[str] | None = None, also: Sequence[str] = ()) -> None:
    """Read the command line and train.

    Args:
        arguments: After `fomoe sweep`.
        also: Words for each `fomoe fit`.
    """
    options, fit = make_parser().parse_known_args(arguments)
    for key, values in map(values_of, options.grid):
        for value in values if key == _FILE else ():
            config_path(value, "grid")
    runs = commands(options.name, options.grid, options.save_dir, [*fit, *also])
    if options.dry:
        print("\n".join(shlex.join(["fomoe", *words]) for words in runs.values()))
        return
    failed = run_all(runs, lambda words: subprocess.run([sys.executable, "-m", "fomoe_pl", *words]).returncode)
    if failed:
        sys.exit("failed: " + ", ".join(map(str, failed)))
    print(f"all {len(runs)} runs have ended; next\n  fomoe compare {options.save_dir / options.name}/*")
