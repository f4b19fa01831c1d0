"""Prepare a corpus: `python tools/prepare_data.py --source data/sample --output runs/data/sample`."""

import logging
import sys

from jsonargparse import ArgumentParser

from fomoe_pl.data.prepare import prepare
from fomoe_pl.errors import ConfigError


def main() -> None:
    """Read the command line, prepare, and print a line per domain."""
    parser = ArgumentParser(description="Documents (.txt, .jsonl, .parquet) to tokens to webdataset shards.")
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        help="domains: NAME=PATH (a file or a folder), or the path of a folder with one domain per entry",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another corpus in the output folder")
    parser.add_function_arguments(prepare, skip={"source", "overwrite"})
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        manifest = prepare(**arguments.as_dict())
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"{manifest.root}: vocabulary {manifest.vocab_size}, fingerprint {manifest.fingerprint[:16]}")
    for domain in manifest.domains:
        for split, size in (("train", domain.train), ("val", domain.val)):
            shards = sum((shard.split, shard.domain) == (split, domain.name) for shard in manifest.shards)
            print(
                f"  {domain.name:12} {split:5} {size.documents:8} documents {size.bytes / 1e6:9.2f} MB "
                f"{size.tokens / 1e6:9.3f} M tokens {shards:5} shards"
            )


if __name__ == "__main__":
    main()
