import json
import random
from pathlib import Path

import pytest

from fomoe_pl.data.prepare import prepare

WORDS = {
    "farm": ["cow", "barn", "hay", "plough", "field", "harvest", "the", "a", "of", "and", "sows", "tractor"],
    "sea": ["ship", "sail", "wave", "harbour", "tide", "the", "a", "of", "and", "sinks", "anchor", "storm"],
    "sky": ["cloud", "wing", "star", "wind", "the", "a", "of", "and", "flies", "moon", "feather", "dawn"],
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of bytes with three domains and eight training shards each; for reading only."""
    source, output = tmp_path_factory.mktemp("documents"), tmp_path_factory.mktemp("corpus") / "bytes"
    for domain, words in WORDS.items():
        draw = random.Random(domain)
        texts = [f"{i} " + " ".join(draw.choices(words, k=draw.randint(5, 60))) for i in range(60)]
        Path(source, f"{domain}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(source)], str(output), shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005)
    return str(output)
