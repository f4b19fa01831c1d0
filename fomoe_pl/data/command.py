"""`fomoe prepare --source data/sample --output runs/data/sample`."""

import logging
import sys

from jsonargparse import ArgumentParser

from fomoe_pl.data.prepare import prepare
from fomoe_pl.errors import OneMessage


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
        help="domains: NAME=PATH (a file or a folder), or the path of a folder with one domain per entry",
    )
    for flag, what in (
        ("overwrite", "replace another corpus in the output folder"),
        ("skip_empty", "leave out, and count, records whose text is null, missing or a blank line"),
        ("skip_unreadable", "leave out, and name, files below a folder that are of no readable kind"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    parser.add_function_arguments(prepare, skip={"source", "overwrite", "skip_empty", "skip_unreadable"})
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, prepare, and print a line per split of each domain.

    Raises:
        ConfigError: As :func:`fomoe_pl.data.prepare.prepare`.
    """
    settings = make_parser().parse_args(arguments)
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fomoe_pl.data")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        manifest = prepare(**settings.as_dict())
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
