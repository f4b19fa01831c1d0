"""The command lines of `fomoe export`, `fomoe import`, `fomoe generate` and `fomoe evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from fomoe_pl.errors import OneMessage
from fomoe_pl.hub.evaluate import evaluate
from fomoe_pl.hub.export import export
from fomoe_pl.hub.generate import generate
from fomoe_pl.hub.importing import import_model

COMMANDS: dict[str, Callable[..., None]] = {
    "export": export,
    "import": import_model,
    "generate": generate,
    "evaluate": evaluate,
}

_BEHIND = {"export": 1, "generate": 0, "evaluate": 0}
"""Commands that take several folders, and what follows them."""


class Parser(OneMessage, ArgumentParser):
    """A parser that reports one short error."""


def make_parser(command: str) -> Any:
    """The command line of one of `COMMANDS`."""
    run = COMMANDS[command]
    description = (run.__doc__ or "").splitlines()[0]
    parser: Any = Parser(prog=f"fomoe {command}", description=description)
    parser.add_function_arguments(run, as_positional=True)
    return parser


def main(command: str, arguments: list[str]) -> None:
    """Read a command line and do what it says."""
    parser = make_parser(command)
    options = parser.parse_args(_as_one(arguments, _BEHIND[command]) if command in _BEHIND else arguments)
    COMMANDS[command](**options.as_dict())


def _as_one(words: list[str], behind: int) -> list[str]:
    """Of `FOLDER... OUTPUT`, or of `FOLDER...` with nothing behind, all folders as one argument."""
    n = next((i for i, word in enumerate(words) if word.startswith("-")), len(words)) - behind
    return words if n < 2 else [json.dumps(words[:n]), *words[n:]]
