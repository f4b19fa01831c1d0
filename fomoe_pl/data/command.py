"""`fomoe prepare --source sample --output runs/data/sample`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from fomoe_pl.data.index import Progress
from fomoe_pl.data.prepare import collect_statistics, prepare
from fomoe_pl.errors import ConfigError, OneMessage
from fomoe_pl.shipped import source_path


class Parser(OneMessage, ArgumentParser):
    """A parser whose errors are one message."""


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="fomoe prepare", description="Text, JSON and Parquet files to a corpus of shards.")
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        help="domains: NAME=PATH (a file or a folder), or the path of a folder with one domain per entry; `sample` is "
        "the texts that are installed",
    )
    parser.add_argument(
        "--validation_source",
        nargs="+",
        action="extend",
        help="domains as for --source, whose documents are the whole validation split (then without val_fraction)",
    )
    parser.add_argument("--output", type=str, help="folder of the corpus; one that already holds this corpus is kept")
    parser.add_argument(
        "--statistics",
        type=str,
        help="write word counts of a sample to this file, and no corpus: a tokenizer for "
        "several sites is trained from their sum",
    )
    parser.add_argument(
        "--min_count", type=int, default=5, help="with --statistics: words that are rarer in the sample are not written"
    )
    parser.add_argument(
        "--from_statistics", nargs="+", action="extend", help="files that bpe:VOCAB is trained on, made by --statistics"
    )
    for flag, what in (
        ("overwrite", "replace another corpus in the output folder"),
        ("skip_empty", "leave out, and count, records whose text is null, missing or a blank line"),
        ("skip_unreadable", "leave out, and name, files below a folder that are of no readable kind"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    own: set[str | int] = {
        "source",
        "overwrite",
        "skip_empty",
        "skip_unreadable",
        "validation_source",
        "output",
        "from_statistics",
    }
    parser.add_function_arguments(prepare, skip=own | {"progress"})
    return parser


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar on a terminal with MB/s and the time that is left; elsewhere nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, completed=0)
            bar.update(tasks[what], completed=done, total=total or None)

        yield show


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, prepare, and print a line per split of each domain.

    Raises:
        ConfigError: As :func:`fomoe_pl.data.prepare.prepare`.
    """
    settings = make_parser().parse_args(arguments).as_dict()
    settings["source"] = [source_path(given) for given in settings["source"]]
    statistics, min_count = settings.pop("statistics"), settings.pop("min_count")
    if (statistics is None) == (settings["output"] is None):
        raise ConfigError("output", settings["output"], "either a corpus is prepared or statistics are written",
                          "Give --output FOLDER, or --statistics FILE")  # fmt: skip
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fomoe_pl.data")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        if statistics is not None:
            wanted = signature(collect_statistics).parameters
            chosen = {key: value for key, value in settings.items() if key in wanted}
            about = collect_statistics(**chosen, statistics=statistics, min_count=min_count)
            print(f"{statistics}: {about['words']} words, {about['occurrences']} occurrences; "
                  f"{about['words_left_out']} words left out that occur less than {min_count} times")  # fmt: skip
            return
        with shown_progress() as progress:
            manifest = prepare(**settings, progress=progress)
    finally:
        logger.removeHandler(said)
    print(f"{manifest.root}: vocabulary {manifest.vocab_size}, fingerprint {manifest.fingerprint[:16]}")
    for domain in manifest.domains:
        for split, size in (("train", domain.train), ("val", domain.val)):
            shards = sum((shard.split, shard.domain) == (split, domain.name) for shard in manifest.shards)
            print(
                f"  {domain.name:12} {split:5} {size.documents:8} documents {size.bytes / 1e6:9.2f} MB "
                f"{size.tokens / 1e6:9.3f} M tokens {shards:5} shards"
            )
