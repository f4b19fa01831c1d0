"""Speed of preparing a corpus against `tokenizers` alone, same cores and text, interleaved; and peak memory.

`python tools/benchmarks/bench_prepare.py --source data/sample --mb 64 --output runs/bench_prepare`

The documents of the sources are repeated, each time with another first line, up to `--mb` of text in one file.
`tokenizers` alone has the text in memory and encodes it in batches on all cores; a preparation reads the file twice and
writes shards. Each is a process of its own, whose imports are not timed. CPU seconds are printed too: on a
machine that others use their ratio is the steadier one. Memory is that of the preparation and the processes that it
starts, where shared pages are divided among them (Pss), taken ten times a second; with `--document_kb` documents have
that length instead of their own. Writes `bench_prepare.json` and
`bench_prepare.md`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from harness import Report, in_turns, markdown
from jsonargparse import CLI

from fomoe_pl.data.documents import ReadOptions, read_file
from fomoe_pl.data.sources import find_sources
from fomoe_pl.data.tokenizer import train_bpe
from fomoe_pl.data.workers import n_cores

MB = 1e6
CPU = """
import json, resource, sys, time
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
"""
PREPARE = """
from fomoe_pl.data.prepare import prepare
source, output, tokenizer = sys.argv[1:]
start, before = time.perf_counter(), cpu()
manifest = prepare([f"text={source}"], output, tokenizer=tokenizer, separator=r"\\x1e", overwrite=True)
domain = manifest.domains[0]
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "cpu": cpu() - before, "tokens": domain.train.tokens + domain.val.tokens}))
"""
ALONE = """
from tokenizers import Tokenizer
from pathlib import Path
from fomoe_pl.data.documents import ReadOptions, read_file
source, output, tokenizer = sys.argv[1:]
encoder = Tokenizer.from_file(tokenizer)
texts = list(read_file(Path(source), ReadOptions(separator=r"\\x1e")))
batches, size = [[]], 0
for text in texts:
    batches[-1].append(text)
    size += len(text)
    if size > 2_000_000:
        batches.append([])
        size = 0
start, before = time.perf_counter(), cpu()
encoded = (encoder.encode_batch_fast(batch, add_special_tokens=False) for batch in batches)
tokens = sum(len(one) + 1 for batch in encoded for one in batch)
print(json.dumps({"seconds": time.perf_counter() - start, "cpu": cpu() - before, "tokens": tokens}))
"""


def plain_documents(source: str) -> Iterator[str]:
    """The sources' documents."""
    for part in find_sources([source])[0]:
        for path in part.files:
            yield from (text[:] for text in read_file(path, ReadOptions()))


def documents(source: str, mb: float, document_kb: float | None) -> Iterator[str]:
    """The sources' documents, repeated, up to `mb` of text, or as many documents of one length."""
    texts = list(plain_documents(source))
    left = mb * MB
    for number in count():
        text = f"{number}\n{texts[number % len(texts)]}"
        if document_kb is not None:
            size, following = int(document_kb * 1000), number
            while len(text) < size:
                following += 1
                text += texts[following % len(texts)]
            text = text[:size]
        yield text
        left -= len(text.encode())
        if left <= 0:
            return


def measured(code: str, *arguments: str) -> dict[str, Any]:
    """Run a contestant; its seconds, its tokens and the most memory of all its processes, in MB."""
    started = subprocess.Popen([sys.executable, "-c", CPU + code, *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while started.poll() is None:
        peak = max(peak, sum(_memory(pid) for pid in _family(started.pid)))
        time.sleep(0.1)
    assert started.stdout is not None
    out = started.stdout.read()
    if started.returncode:
        raise SystemExit(f"a contestant has failed with {started.returncode}")
    return {**json.loads(out.splitlines()[-1]), "peak_mb": peak / MB}


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(other for child in children for other in _family(int(child)))]


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except OSError:  # it has just ended
        return 0


def bench(
    source: str,
    output: str,
    mb: float = 64.0,
    vocab: int = 16384,
    repeats: int = 3,
    document_kb: float | None = None,
    alone: bool = True,
) -> None:
    """Measure.

    Args:
        source: Where documents come from, as for `fomoe prepare`.
        output: Folder of the text, of the corpus and of the results.
        mb: Text, 10^6 bytes.
        vocab: Vocabulary of a byte-level BPE, which is trained before.
        repeats: How often each contestant runs, in turns.
        document_kb: Length of a document, 10^3 characters; null: the sources' own.
        alone: Whether `tokenizers` alone runs too; else memory and speed of preparing are measured.
    """
    report = Report(
        output, "bench_prepare", "cpu", {"mb": mb, "vocab": vocab, "document_kb": document_kb, "cores": n_cores()}
    )
    folder = Path(output)
    text, tokenizer, corpus = folder / "text.txt", folder / "tokenizer.json", folder / "corpus"
    tokenizer.write_text(train_bpe(plain_documents(source), vocab).serialized)
    with text.open("w") as file:
        for i, document in enumerate(documents(source, mb, document_kb)):
            file.write(("\x1e" if i else "") + document)
    size = text.stat().st_size / MB

    def run(name: str) -> dict[str, Any]:
        shutil.rmtree(corpus, ignore_errors=True)
        found = measured(PREPARE if name == "prepare" else ALONE, *map(str, (text, corpus, tokenizer)))
        print(f"{name}: {size / found['seconds']:.2f} MB/s, peak {found['peak_mb']:.0f} MB", flush=True)
        return found | {"load": os.getloadavg()[0]}

    runs = in_turns({name: partial(run, name) for name in ("prepare", *(["alone"] if alone else []))}, repeats)
    rate, cpu = ({name: size / statistics.median(run[key] for run in found) for name, found in runs.items()}
                 for key in ("seconds", "cpu"))  # fmt: skip
    result = {
        "mb_per_second": rate, "ratio": rate["prepare"] / rate["alone"] if alone else None,
        "mb_per_cpu_second": cpu, "cpu_ratio": cpu["prepare"] / cpu["alone"] if alone else None,
        "peak_mb": max(run["peak_mb"] for run in runs["prepare"]), "runs": runs,
    }  # fmt: skip
    rows = [[name, f"{rate[name]:.3f}", f"{cpu[name]:.3f}", f"{max(run['peak_mb'] for run in found):,.0f}"]
            for name, found in runs.items()]  # fmt: skip
    told = f"prepare over alone: {result['ratio']}; by CPU seconds {result['cpu_ratio']}."
    print(report.write(result, markdown(("", "MB/s", "MB/CPU s", "peak MB"), rows), *([told] if alone else [])))
    shutil.rmtree(corpus, ignore_errors=True)
    text.unlink()


if __name__ == "__main__":
    CLI(bench, as_positional=False)
