"""`fomoe new NAME`: a commented file for a run of one's own, from a configuration that is installed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fomoe_pl.errors import ConfigError, OneMessage
from fomoe_pl.files import prepare, write_whole
from fomoe_pl.shipped import config_path, described

_RUN_NAME = re.compile(r"^(\s+name: )\S+(.*# folder of this run.*)$", re.MULTILINE)


class Parser(OneMessage, argparse.ArgumentParser):
    """A parser that reports one short error."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="fomoe new",
        description="Writes NAME.yaml, a file with every setting explained, which `fomoe fit -c NAME.yaml` trains.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the run; a path puts the file into a folder")
    parser.add_argument("--like", default="quickstart", metavar="CONFIG",
                        help="the configuration to begin from, by default the quickstart")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the configurations that there are, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of this name")
    return parser


def experiment(template: str, name: str) -> str:
    """The text of an experiment's file.

    Args:
        template: Text of the configuration that it begins from.
        name: Of the run, and so of its folder.
    """
    head = f"# Experiment {name}, trained by  fomoe fit -c {name}.yaml ; files and options after it win:\n" \
           f"#   fomoe fit -c {name}.yaml -c strategy/diloco --trainer.max_steps 960\n"  # fmt: skip
    return head + _RUN_NAME.sub(rf"\g<1>{name}\g<2>", template)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the file.

    Raises:
        ConfigError: If there is such a file already, or the name cannot be one of a folder.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.list:
        for known, what in described():
            print(f"{known:34}{what}")
        return
    if options.name is None:
        parser.error("give the experiment a NAME, or --list")
    path = Path(options.name.removesuffix(".yaml") + ".yaml")
    if not re.fullmatch(r"[\w.-]+", path.stem) or path.stem.startswith("-"):
        raise ConfigError("NAME", options.name, "its last part becomes the name of a folder",
                          "use letters, digits, points, - and _")  # fmt: skip
    if path.exists() and not options.overwrite:
        raise ConfigError("NAME", options.name, f"{path} is there already", "choose another name, or add --overwrite")
    prepare("NAME", path)
    write_whole(path, experiment(Path(config_path(options.like, "like")).read_text(), path.stem))
    print(f"{path} is written; next\n  fomoe prepare --source sample --output runs/data/sample\n  fomoe fit -c {path}")
