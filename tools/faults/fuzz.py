"""Damaged and hostile files and messages: a clear error or a right result, no hang, and nothing of theirs is run.

`python tools/faults/fuzz.py --cases 10000 --seed 0`

Manifests, parts of checkpoints (whole and of disks of the sites' own), shards, corpus manifests and what sites tell
each other at the meeting are changed at random: bytes, cuts, values of JSON, pickles that would run a command. Half of
the changed files get the hash that they have now, as somebody who writes files can give them one. Every case is one
seed; `--only NUMBER` repeats it with its traceback.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import traceback
import zipfile
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint import parts
from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.data.corpora import Summary, read_texts
from fomoe_pl.data.manifest import Manifest, ShardInfo
from fomoe_pl.data.manifest import read_manifest as read_corpus
from fomoe_pl.data.prepare import prepare
from fomoe_pl.data.repair import DAMAGE
from fomoe_pl.data.shards import read_shard, read_validation_shard
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.layout import ParameterLayout
from fomoe_pl.federation.placement import place
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer
from fomoe_pl.strategies.presence import check_equal, parse, read_settings

watching: list[int] = []
"""The case that runs."""
SECONDS = 20
"""After which a case counts as one that hangs."""
CONFIG = ModelConfig(vocab_size=17, d_model=8, n_layers=2, n_heads=1, n_experts=4, top_k=1, d_expert=4)
N_SITES = 4
RUNS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork", "os.forkpty"})
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    float("nan"),
    "",
    "../../x",
    "x\x00",
    "9" * 400,
    [],
    {},
    [[]],
    {"a": 1},
]


class Ran(BaseException):
    """Something in a file was run."""


class Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(5)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + rng.randrange(1, 64)]
        elif what == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 16))
        elif what == 3:
            data[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), rng.randbytes(8)))
        else:
            del data[at:]
    return bytes(data)


def changed_json(value: Any, rng: random.Random) -> Any:
    """A JSON value of which one part is another, missing or doubled."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    for _ in range(rng.choice((1, 1, 1, 3))):
        if not places:
            return rng.choice(VALUES)
        inner, key = rng.choice(places)
        try:
            what = rng.randrange(4)
            if what == 0:
                del inner[key]
            elif what == 1 and isinstance(inner, dict):
                inner[rng.choice(("x", "../x", "", "format"))] = inner.pop(key)
            else:
                inner[key] = rng.choice(VALUES)
        except (KeyError, IndexError):
            continue
    return rng.choice(VALUES) if rng.random() < 0.02 else value


def poisoned(content: bytes, rng: random.Random) -> bytes:
    """A torch file whose pickle would run a command."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as written:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data = pickle.dumps({"a": Payload()}, protocol=2) if rng.random() < 0.5 else changed_bytes(data, rng)
            written.writestr(name, data)
    return target.getvalue()


@dataclass
class Samples:
    """What is changed: a checkpoint, a part of one, and a corpus."""

    folder: Path
    checkpoint: Path
    part: Path
    corpus: Manifest

    @classmethod
    def make(cls, folder: Path) -> Samples:
        """Write them."""
        model = Transformer(CONFIG)
        layout = ParameterLayout.of(model, model.expert_tensors())
        placement = place("fixed", n_layers=2, n_experts=4, n_sites=N_SITES, overlap=2)
        about = {
            "architecture": asdict(CONFIG), "n_sites": N_SITES, "rounds": 2, "redraws": 0, "optimizer_steps": 8,
            "identity": {"strategy": "FederatedStrategy", "sites": N_SITES}, "placement": placement.record(),
        }  # fmt: skip
        dense = {name: layout.tensors[name] for name in layout.dense}
        states: dict[str, Any] = {
            "site-00000.pt": {"moments": [torch.ones(3)], "n": (1, "x")},
            "trainer.pt": {"epoch": 0},
        }
        of_parts = parts.expert_parts(placement, 2)
        for name in ("whole", "part"):
            experts = {files.experts_name(0): [(i, e) for i in range(2) for e in range(4)]}
            if name == "part":
                experts = {key: list(part.experts) for key, part in of_parts.items() if 0 in part.stores}
            contents = {files.dense_name(): dense, **states} | {
                key: {f"{n}#{e}": layout.tensors[n][e] for i, e in ids for n in layout.sparse(i)}
                for key, ids in experts.items()
            }
            path = folder / f"{name}.ckpt"
            files.begin(path)
            for key, content in contents.items():
                files.write(path, key, content)
            files.seal(path, 0, contents)
            if name == "whole":
                files.finish(path, about)
            else:
                of_all, _ = parts.merged([json.dumps(files.sealed(path))])
                files.write_manifest(files.partial(path), {**about, "copies": 2, "files": of_all})
                files.put_in_place(path)
        text = folder / "text.txt"
        text.write_text("\x1e".join(f"document {i} " * (i % 7 + 1) for i in range(40)))
        corpus = prepare(
            [f"text={text}"], str(folder / "corpus"), shards_per_domain=2, val_fraction=0.2, separator="\\x1e"
        )
        return cls(folder, folder / "whole.ckpt", folder / "part.ckpt", corpus)


def signed(manifest: Any) -> Any:
    """A manifest with the hash that it has now."""
    return files.signed(manifest) if isinstance(manifest, dict) else manifest


@contextmanager
def copied(source: Path) -> Iterator[Path]:
    """A folder of its own for a case."""
    target = source.with_name("case.ckpt")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    yield target


def use(folder: Path) -> None:
    """All that is read of a checkpoint."""
    manifest = files.read_manifest(folder)
    if files.is_part(manifest):
        own = parts.held(folder, manifest)
        has = parts.who_has(manifest, [json.dumps(sorted(own.names))])
        if not parts.lost(manifest, has):
            parts.needed(manifest, has, 0, parts.origins(manifest, has, 1)[0], [[0, 1], [2]])
    else:
        load_global_model(folder)
    for name in manifest["files"]:
        if name.endswith(".pt") and (folder / name).is_file():
            files.read_state(folder, name, manifest)
    files.newest(folder.parent, hashes=True)


def manifest_case(samples: Samples, rng: random.Random) -> None:
    """A manifest of a checkpoint."""
    with copied(rng.choice((samples.checkpoint, samples.part))) as folder:
        path = folder / files.MANIFEST
        if rng.random() < 0.3:
            path.write_bytes(changed_bytes(path.read_bytes(), rng))
        else:
            changed = changed_json(json.loads(path.read_text()), rng)
            path.write_text(json.dumps(signed(changed) if rng.random() < 0.8 else changed))
        use(folder)


def part_case(samples: Samples, rng: random.Random) -> None:
    """A file of a checkpoint."""
    with copied(rng.choice((samples.checkpoint, samples.part))) as folder:
        path, manifest = folder / files.MANIFEST, json.loads((folder / files.MANIFEST).read_text())
        name = rng.choice([name for name in sorted(manifest["files"]) if (folder / name).is_file()])
        content = (folder / name).read_bytes()
        poison = name.endswith(".pt") and rng.random() < 0.5
        content = poisoned(content, rng) if poison else changed_bytes(content, rng)
        (folder / name).write_bytes(content)
        if rng.random() < 0.8:
            manifest["files"][name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            path.write_text(json.dumps(signed(manifest)))
        use(folder)


def shard_case(samples: Samples, rng: random.Random) -> None:
    """A shard."""
    shard: ShardInfo = rng.choice(samples.corpus.shards)
    case = replace(samples.corpus, root=samples.folder / "case")
    (samples.folder / "case").mkdir(exist_ok=True)
    content = changed_bytes((Path(str(samples.corpus.root)) / shard.file).read_bytes(), rng)
    (samples.folder / "case" / shard.file).write_bytes(content)
    if rng.random() < 0.8:
        shard = replace(shard, sha256=hashlib.sha256(content).hexdigest(), file_bytes=len(content))
    read = read_shard if shard.split == "train" else read_validation_shard
    list(read(case, shard))


def corpus_case(samples: Samples, rng: random.Random) -> None:
    """A manifest of a corpus."""
    folder = samples.folder / "case-corpus"
    folder.mkdir(exist_ok=True)
    text = (Path(str(samples.corpus.root)) / "manifest.json").read_text()
    if rng.random() < 0.3:
        (folder / "manifest.json").write_bytes(changed_bytes(text.encode(), rng))
    else:
        (folder / "manifest.json").write_text(json.dumps(changed_json(json.loads(text), rng)))
    read_corpus(folder)


def meeting_case(samples: Samples, rng: random.Random) -> None:
    """What sites tell each other when they meet, and before they go on from their own disks."""

    def changed(text: str) -> str:
        if rng.random() < 0.3:
            return changed_bytes(text.encode(), rng).decode(errors="replace")
        return json.dumps(changed_json(json.loads(text), rng))

    what = rng.randrange(6)
    if what == 0:
        parse(changed(json.dumps({"name": "a", "proof": ""})).encode(), {"name": str, "proof": str})
    elif what == 1:
        own = {"fomoe_pl": "1", "data.seed": 3, "model.lr": 0.1, "trainer.precision": None}
        check_equal(read_settings([json.dumps(own), changed(json.dumps(own))]))
    elif what == 2:
        text = Summary.of(samples.corpus).text()
        read_texts([text, changed(text)])
    elif what == 3:
        found, _ = parts.on_disk(samples.folder, "part.ckpt")
        text = parts.tell(found, False)
        every, _ = parts.understand([text, changed(text)])
        for one in every:
            parts.lost(one.manifest, parts.who_has(one.manifest, ["[]"]))
    elif what == 4:
        manifest = files.read_manifest(samples.part)
        parts.who_has(manifest, [changed(json.dumps(sorted(manifest["files"])))])
    else:
        manifest = files.read_manifest(samples.part)
        parts.merged([json.dumps(manifest["files"]), changed(json.dumps(manifest["files"]))])


CASES: dict[str, tuple[Callable[[Samples, random.Random], None], tuple[type[Exception], ...]]] = {
    "manifests": (manifest_case, (ConfigError,)),
    "parts": (part_case, (ConfigError,)),
    "shards": (shard_case, DAMAGE),
    "corpora": (corpus_case, (ConfigError,)),
    "meetings": (meeting_case, (ConfigError,)),
}
"""What is changed -> how, and the errors that are documented."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what starts a program in a case; an audit hook, which stays for as long as its process."""
    if watching and event in RUNS:
        raise Ran(f"{event} {arguments}")


def hangs(*_: Any) -> None:
    """End a case; a signal's handler."""
    raise Ran(f"more than {SECONDS} seconds")


def fuzz(cases: range, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Run cases.

    Args:
        cases: Their numbers.
        seed: Of all of them.
        folder: A new one.

    Returns:
        How often what came out; of those that nobody documents number, kind and error.
    """
    samples = Samples.make(folder)
    counts: Counter[str] = Counter()
    wrong = []
    sys.addaudithook(watch)
    before = signal.signal(signal.SIGALRM, hangs)
    names = sorted(CASES)
    try:
        for number in cases:
            name = names[number % len(names)]
            case, documented = CASES[name]
            signal.alarm(SECONDS)
            watching.append(number)
            try:
                case(samples, random.Random(f"{seed}-{number}"))
                counts[f"{name}: read"] += 1
            except documented:
                counts[f"{name}: refused"] += 1
            except (Exception, Ran) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                told = traceback.format_exc() if len(cases) == 1 else f"{type(error).__name__}: {str(error)[:200]}"
                wrong.append(f"{number}, {name}: {told} ({Path(last.filename).name}:{last.lineno})")
            finally:
                watching.clear()
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, wrong


def main() -> None:
    """Read the command line and run the cases."""
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of all of them")
    parser.add_argument("--only", type=int, help="number of the one to repeat")
    options = parser.parse_args()
    cases = range(options.cases) if options.only is None else range(options.only, options.only + 1)
    with TemporaryDirectory() as folder:
        counts, wrong = fuzz(cases, options.seed, Path(folder))
    for what, count in sorted(counts.items()):
        print(f"{what}: {count}")
    for line in wrong:
        print(line)
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(cases)} cases ended otherwise")


if __name__ == "__main__":
    main()
