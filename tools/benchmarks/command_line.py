"""The command line that benchmarks of a model share: a file of configs/model, and the arguments of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from fomoe_pl.model.config import ModelConfig


def read(
    description: str, bench: Callable[..., Any], arguments: list[str] | None
) -> tuple[ArgumentParser, ModelConfig, dict[str, Any]]:
    """Read a benchmark's command line.

    Args:
        description: what it measures, for `--help`.
        bench: the benchmark; its arguments are options, but for `architecture`, which is `-c` and `--model`.
        arguments: words of the command line; None is those of the process.

    Returns:
        The parser, for errors of the benchmark's own; the architecture; the other arguments of `bench`.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("-c", "--config", action="config", help="a file of configs/model")
    parser.add_class_arguments(ModelConfig, "model.architecture")
    parser.add_function_arguments(bench, skip={"architecture"})
    options = parser.parse_args(arguments)
    settings = {name: value for name, value in options.as_dict().items() if name not in ("config", "model")}
    return parser, ModelConfig(**options.model.architecture.as_dict()), settings
