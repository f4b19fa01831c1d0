import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its interpreter runs the kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fomoe_pl.data import Manifest
from fomoe_pl.data.prepare import prepare
from tests.distributed import end_with_parent, run_distributed
from tests.watched import SITES, fit_all

_started_plainly = subprocess.Popen.__init__


def _start_bound(self: subprocess.Popen, *args: Any, preexec_fn: Any = None, **kwargs: Any) -> None:
    """Start a process that ends when the one that starts it does, whatever ends that: a time limit, or a signal."""

    def prepare_child() -> None:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore Ctrl-C
        if preexec_fn is not None:
            preexec_fn()

    _started_plainly(self, *args, preexec_fn=prepare_child, **kwargs)


if sys.platform == "linux":  # children of a run end with it themselves: they listen to its first process
    subprocess.Popen.__init__ = _start_bound  # type: ignore[method-assign]

_STARTERS = {"run_distributed", "subprocess", "Popen", "start_processes"}
_SHARED = {"watched_runs", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of modules that start processes, for `make test-fast`."""
    for item in items:
        if isinstance(item, pytest.Function):
            names, fixtures = {*vars(item.module)}, {*item.fixturenames}
            if not names.isdisjoint(_STARTERS) or not fixtures.isdisjoint(_SHARED):
                item.add_marker("processes")


_WORDS = {
    "farm": ["cow", "barn", "hay", "plough", "field", "harvest", "the", "a", "of", "and", "sows", "früh", "tractor"],
    "sea": ["ship", "sail", "wave", "harbour", "tide", "the", "a", "of", "and", "sinks", "écume", "anchor", "storm"],
    "sky": ["cloud", "wing", "star", "wind", "the", "a", "of", "and", "flies", "空", "moon", "feather", "dawn"],
}


def make_documents(domain: str, n: int) -> list[str]:
    """Different texts of 5 to 60 words of one domain, with characters of one to three bytes."""
    draw = random.Random(domain)
    return [f"{i} " + " ".join(draw.choices(_WORDS[domain], k=draw.randint(5, 60))) for i in range(n)]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next test sees neither the seed of `seed_everything`, which is in the environment, nor signals' handlers."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    return {domain: make_documents(domain, n) for domain, n in (("farm", 60), ("sea", 40), ("sky", 50))}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, list[str]]) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for domain, documents in texts.items():
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Manifest:
    """Three domains as bytes, eight training shards each; for reading only."""
    output = tmp_path_factory.mktemp("corpus") / "bytes"
    return prepare([str(source)], str(output), shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005)


@pytest.fixture(scope="session")
def root(corpus: Manifest) -> str:
    """Folder of the corpus."""
    return str(corpus.root)


@pytest.fixture(scope="session")
def watched_runs(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a folder for each run of `tests.watched`."""
    folder = tmp_path_factory.mktemp("watched")
    run_distributed(fit_all, SITES, root, str(folder))
    return folder


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty afterwards."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
