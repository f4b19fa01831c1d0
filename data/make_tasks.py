"""Make the evaluation tasks that are shipped: `python data/make_tasks.py CORPUS fomoe_pl/hub/tasks`.

From the validation documents of the sample corpus as `make quickstart` prepares it (bytes, default shares), so that no
model of the quickstart has been trained on them:

    sample_bpb.jsonl      passages, for bits per byte
    sample_choice.jsonl   the beginning of a passage, and four continuations of which one is its own
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from fomoe_pl.data.manifest import Manifest, read_manifest
from fomoe_pl.data.shards import read_shard

PASSAGES, PASSAGE = 16, 1000  # of each domain; characters
QUESTIONS, CONTEXT, CONTINUATION = 40, 200, 60


def texts(manifest: Manifest, domain: str) -> list[str]:
    """The validation documents of a domain that are long enough."""
    documents = [bytes(tokens[:-1].astype("uint8")).decode() for shard in manifest.shards_of("val", domain)
                 for tokens in read_shard(manifest, shard)]  # fmt: skip
    return [text for text in documents if len(text) > 1.2 * PASSAGE]


def cut(text: str, length: int, draw: random.Random) -> str:
    """A part of a text that begins after a blank."""
    start = draw.randrange(len(text) - length)
    start = text.find(" ", start, len(text) - length) + 1
    return text[start : start + length]


def main(corpus: str, output: str) -> None:
    """Write both files."""
    manifest, draw = read_manifest(corpus), random.Random(0)
    passages, questions = [], []
    for domain in manifest.domain_names:
        found = texts(manifest, domain)
        passages += [{"domain": domain, "text": cut(draw.choice(found), PASSAGE, draw)} for _ in range(PASSAGES)]
        for _ in range(QUESTIONS):
            own = cut(draw.choice(found), CONTEXT + CONTINUATION, draw)
            choices = [own[CONTEXT:], *(cut(draw.choice(found), CONTINUATION, draw) for _ in range(3))]
            order = draw.sample(range(4), 4)
            questions.append({"domain": domain, "context": own[:CONTEXT], "choices": [choices[i] for i in order],
                              "label": order.index(0)})  # fmt: skip
    for name, rows in (("sample_bpb", passages), ("sample_choice", questions)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(output, f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
