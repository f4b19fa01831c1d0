"""What the benchmarks share: command line, models, clock, runs in turn, and the JSON and the page of the results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from fomoe_pl.files import write_whole
from fomoe_pl.model import init
from fomoe_pl.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
CLIP_NORM = 1.0
SITE_TIMEOUT = timedelta(minutes=5)
BARE: dict[str, Any] = {
    "max_epochs": -1, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "logger": False,
}  # fmt: skip
"""Arguments of a Trainer that does nothing but train."""
T = TypeVar("T")


def read(
    description: str, bench: Callable[..., Any], arguments: list[str] | None
) -> tuple[ArgumentParser, ModelConfig, dict[str, Any]]:
    """Read the command line of a benchmark of one model.

    Args:
        description: What it measures, for `--help`.
        bench: The benchmark; its arguments are options, but for `architecture`, which is `-c` and `--model`.
        arguments: Words of the command line; None is those of the process.

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


def architecture(name: str, **changes: Any) -> ModelConfig:
    """A model of configs/model.

    Args:
        name: The file's, without `.yaml`.
        **changes: Fields that are replaced.
    """
    path = ROOT / "configs" / "model" / f"{name}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())["model"]["architecture"]
    return ModelConfig(**found | changes)


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Draw initial values on the device: faster, and a model that is timed may have any."""
    kept = init._draw
    init._draw = _draw_quickly
    try:
        yield
    finally:
        init._draw = kept


def _draw_quickly(target: Tensor, rule: init.Rule, generator: object) -> None:
    target.normal_(rule.init_mean, rule.init_std)


def random_tokens(n: int, vocab_size: int, batch_size: int, sequence_length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (n,B,S), int64, of the same seed each time."""
    tokens = torch.randint(vocab_size, (n, batch_size, sequence_length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()


def now() -> float:
    """Seconds on a clock, after the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(contestants: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Run A B A B ..., so that whatever else the machine does meets all of them; results by name, in order."""
    found: dict[str, list[T]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            found[name].append(run())
    return found


def middle(values: Sequence[float]) -> str:
    """Median and range, for a table."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


def environment(device: str | torch.device, commit: str = "") -> dict[str, str]:
    """Commit, hardware, versions, command.

    Args:
        device: `cuda`, `gpu` or `cpu`, or a torch device.
        commit: Of the code, where there is no git.
    """
    on_gpu = torch.device(device if device != "gpu" else "cuda").type == "cuda"
    found = {
        "commit": commit or _said(["git", "describe", "--always", "--dirty", "--exclude", "*"]),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    if on_gpu:
        found["driver"] = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    found["Python"] = platform.python_version()
    for package in ("torch", "lightning", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"command": " ".join(["python", *sys.argv])}


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


class Report:
    """The results of a benchmark: `NAME.json` and the page `NAME.md`, both with the environment and the settings.

    Args:
        output: Their folder; made if it is missing.
        name: Of the files.
        device: As for `environment`.
        settings: Of the benchmark.
        commit: As for `environment`.
    """

    def __init__(
        self, output: str | Path, name: str, device: str | torch.device, settings: Mapping[str, Any], commit: str = ""
    ) -> None:
        self.path = Path(output) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = {**environment(device, commit), **settings}

    def write(self, results: Mapping[str, Any], *tables: str) -> str:
        """Write both files whole, as often as there is something new; returns the page."""
        write_whole(self.path.with_suffix(".json"), json.dumps({**self.facts, **results}, indent=1) + "\n")
        facts = markdown(("", ""), [(name, str(value)) for name, value in self.facts.items()])
        page = "\n\n".join([facts, *tables]) + "\n"
        write_whole(self.path.with_suffix(".md"), page)
        return page
