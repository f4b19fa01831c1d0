"""What partial replicas cost in quality, measured with this project: many short runs on one GPU, and their table.

    python tools/study/quality.py run --root runs/data/eight_sites_8192 --results runs/quality/16m.jsonl
    python tools/study/quality.py table --results runs/quality/16m.jsonl --page docs/quality.md

`run` trains what the file of results does not have yet, several runs at once, and adds a line for each run that has
ended: started again it goes on. The sites of a run share the GPU; their processes stay for the next run.
docs/quality.md says what is compared.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from quality_runs import FULL, STUDIES, SYNCHRONOUS, Place, Run, Study, is_available, serve

from fomoe_pl.costs.bytes import ddp_step_bytes
from fomoe_pl.costs.network import framed
from fomoe_pl.data import load_manifest
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import prepare, write_whole
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.sizes import parameter_counts
from fomoe_pl.planner.quality import measured_quality

HEADING = "## Results"
StudyName = Literal["16m", "16m_long", "80m", "paper", "tiny"]


# -- results ------------------------------------------------------------------------------------------------------


class Results:
    """A file with a line of JSON for each run that has ended.

    Args:
        path: The file; it need not be there.

    Attributes:
        rows: What is in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; the file is never seen with half of it."""
        self.rows.append(row)
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def of(self, study: str) -> dict[Run, dict[str, Any]]:
        """The rows of a study by their run."""
        return {Run(*row["run"]): row for row in self.rows if row["study"] == study}

    def check(self, study: str, identity: dict[str, Any]) -> None:
        """Refuse to mix what cannot be compared.

        Raises:
            ConfigError: If a row of the study was trained with other settings.
        """
        for row in self.of(study).values():
            if other := [name for name, value in identity.items() if row["identity"].get(name) != value]:
                rule = f"has runs of the study {study} with other settings ({', '.join(other)})"
                raise ConfigError("results", str(self.path), rule, "Name another file")


# -- running ------------------------------------------------------------------------------------------------------


class Lane:
    """The processes of one run's sites, which stay for the next run.

    Args:
        place: Where they train.
        context: Of multiprocessing.
    """

    def __init__(self, place: Place, context: Any) -> None:
        self.run: Run | None = None
        self.answers: dict[int, Any] = {}
        self.connections: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(place.study.sites):
            own, other = context.Pipe()
            process = context.Process(target=serve, args=(other, rank, place), name=f"quality-site-{rank}")
            process.start()
            other.close()
            self.connections.append(own)
            self.processes.append(process)

    def start(self, run: Run, store: Path) -> None:
        """Let all sites begin a run."""
        self.run, self.answers, self.began = run, {}, time.monotonic()
        for connection in self.connections:
            connection.send((run, str(store)))

    def waiting(self) -> list[Any]:
        """Connections of the sites that have not answered yet."""
        return [c for rank, c in enumerate(self.connections) if self.run is not None and rank not in self.answers]

    def hear(self, connection: Any) -> str | None:
        """Take a site's answer; returns what went wrong, if anything did."""
        rank = self.connections.index(connection)
        try:
            answer = connection.recv()
        except EOFError:
            self.processes[rank].join(timeout=10)
            return f"the process of site {rank} ended with code {self.processes[rank].exitcode}"
        if isinstance(answer, str):
            return f"site {rank}: {answer}"
        self.answers[rank] = answer
        return None

    @property
    def is_done(self) -> bool:
        """Whether all sites have ended their run."""
        return len(self.answers) == len(self.connections)

    def close(self) -> None:
        """End the processes: idle ones by themselves, others at once."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            if self.run is None:
                process.join(timeout=10)
            process.kill()
            process.join()


@contextlib.contextmanager
def shared_by_mps(folder: str) -> Iterator[None]:
    """Let kernels of several processes run at the same time on the GPU, through NVIDIA's multi-process service.

    Raises:
        ConfigError: If it cannot be started.
    """
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/mps", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/mps-log"}
    for name in ("mps", "mps-log"):
        Path(folder, name).mkdir()
    control = "nvidia-cuda-mps-control"
    try:
        subprocess.run([control, "-d"], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError("mps", True, f"{control} cannot be started: {error}", "Leave --mps out") from None
    try:
        yield
    finally:
        subprocess.run([control], input="quit\n", text=True, check=False, timeout=60)


@dataclass
class Pace:
    """How fast runs end, and whether there is time for one more.

    Attributes:
        deadline: Seconds of `time.monotonic`; after it nothing runs. None is never.
        run_seconds: Of the run that ended last.
    """

    deadline: float | None
    run_seconds: float = 0.0

    def left(self) -> float | None:
        """Seconds until the deadline; None where there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def allows(self) -> bool:
        """Whether a run that begins now ends in time, if it takes as long as the last."""
        left = self.left()
        return left is None or left > self.run_seconds


def train_all(
    todo: Sequence[Run], place: Place, lanes: int, pace: Pace
) -> Generator[tuple[Run, Any, float], None, None]:
    """Train runs, several at once.

    Args:
        todo: The runs, the most wanted first.
        place: where.
        lanes: Runs at once.
        pace: Until when.

    Yields:
        Run, its first site's answer or the text of an error, and its seconds, as they end.
    """
    context = multiprocessing.get_context("forkserver")
    # Processes start in a moment where large packages are loaded already, none of which touches the GPU.
    context.set_forkserver_preload(["torch", "torch.distributed", "lightning.pytorch"])
    queue, numbers = deque(todo), itertools.count()
    open_lanes: list[Lane] = []

    def begin(lane: Lane) -> None:
        lane.run = None
        if queue and pace.allows():
            lane.start(queue.popleft(), Path(place.folder, f"store-{next(numbers)}"))

    try:
        for _ in range(min(lanes, len(queue)) if pace.allows() else 0):
            open_lanes.append(Lane(place, context))
        for lane in open_lanes:
            begin(lane)
        while waiting := {c: lane for lane in open_lanes for c in lane.waiting()}:
            ready = wait(list(waiting), timeout=pace.left())
            if not ready:
                return
            for connection in ready:
                lane = waiting[connection]
                if lane not in open_lanes:
                    continue  # another site of it has just failed
                error = lane.hear(connection)
                assert lane.run is not None
                seconds = time.monotonic() - lane.began
                if error is not None:
                    open_lanes.remove(lane)
                    lane.close()
                    yield lane.run, error, seconds
                    if queue:
                        open_lanes.append(Lane(place, context))
                        begin(open_lanes[-1])
                elif lane.is_done:
                    pace.run_seconds = seconds
                    yield lane.run, lane.answers[0], seconds
                    begin(lane)
    finally:
        for lane in open_lanes:
            lane.close()


def run_name(run: Run) -> str:
    """What `--runs` calls a run."""
    return f"{run.split} {run.local_steps} {run.arm} {run.seed}"


def run(
    root: str,
    results: Path,
    study: StudyName = "16m",
    lanes: int = 4,
    seconds: float | None = None,
    only: list[str] | None = None,
    splits: list[str] | None = None,
    seeds: list[int] | None = None,
    runs: list[str] | None = None,
    accelerator: Literal["gpu", "cpu"] = "gpu",
    compile_blocks: bool = False,
    num_workers: int = 0,
    mps: bool = False,
) -> int:
    """Train the runs that the results do not have yet.

    Args:
        root: Folder of a prepared corpus.
        results: File of results, a line of JSON for each run.
        study: Which runs; docs/quality.md has them.
        lanes: Runs at once. Each has a process for each site.
        seconds: After which nothing runs any more; no run is started that would not end by then. null: no limit.
        only: Arms to train, such as full and ghost_2; null is all of the study.
        splits: Divisions of the data; null is all of the study.
        seeds: Seeds; null is all of the study.
        runs: Single runs in this order, such as "iid 8 full+lean 0" (data, K, arm, seed); null is all of the others.
        accelerator: Gpu, which all processes share, or cpu.
        compile_blocks: As the model's setting: faster steps, after a compilation in each run's first.
        num_workers: As the data's setting.
        mps: Start NVIDIA's multi-process service for these runs: kernels of several processes run at the same time.

    Returns:
        Exit code: 1 if a run failed.

    Raises:
        ConfigError: For a setting that cannot work, and for results of other settings.
    """
    began = time.monotonic()
    chosen = STUDIES[study]
    if lanes < 1:
        raise ConfigError("lanes", lanes, "must be at least 1", "4 is the default")
    for key, given, known in (
        ("only", only, chosen.arms), ("splits", splits, chosen.splits), ("seeds", seeds, chosen.seeds),
        ("runs", runs, [run_name(r) for r in chosen.runs()]),
    ):  # fmt: skip
        if unknown := [value for value in given or () if value not in known]:
            raise ConfigError(key, unknown, f"is not in the study {study}", f"Choose among {list(known)}")
    prepare("results", results)
    manifest = load_manifest(root)
    identity = chosen.identity(manifest.fingerprint)
    kept = Results(results)
    kept.check(study, identity)
    done = kept.of(study)
    wanted = [r for r in chosen.runs() if (only is None or r.arm in only) and (splits is None or r.split in splits)
              and (seeds is None or r.seed in seeds)]  # fmt: skip
    if runs is not None:
        wanted = sorted((r for r in wanted if run_name(r) in runs), key=lambda r: runs.index(run_name(r)))
    missing = [r for r in wanted if r not in done]
    todo = [r for r in missing if is_available(r.arm)]
    print(f"{study}: {len(wanted)} runs, {len(wanted) - len(missing)} are done, {len(todo)} to train", flush=True)
    if absent := sorted({r.arm for r in missing if r not in todo}):
        print(f"not available in this version: {', '.join(absent)}", flush=True)
    pace = Pace(None if seconds is None else began + seconds)
    failed, ended, started = 0, 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if mps:
            stack.enter_context(shared_by_mps(folder))
        place = Place(study=chosen, root=root, folder=folder, accelerator=accelerator, compile_blocks=compile_blocks,
                      num_workers=num_workers)  # fmt: skip
        ends = stack.enter_context(contextlib.closing(train_all(todo, place, lanes, pace)))
        for item, answer, taken in ends:
            if isinstance(answer, str):
                failed += 1
                print(f"FAILED: {item}: {answer}", file=sys.stderr, flush=True)
                continue
            ended += 1
            kept.add({"study": study, "run": item, "seconds": taken, "lanes": lanes, "compiled": compile_blocks,
                      "mps": mps, "identity": identity, **answer})  # fmt: skip
            a_run = (time.monotonic() - started) / ended
            print(
                f"{item}: {bits_per_byte(answer):.4f} bits per byte, {taken:.1f} s ({answer['round_seconds']:.1f} s in "
                f"rounds), {chosen.tokens / taken:,.0f} tokens/s; all lanes: {ended} runs, {a_run:.1f} s a run, "
                f"{chosen.tokens / a_run:,.0f} tokens/s",
                flush=True,
            )
    left = len(todo) - ended
    print(f"{ended} runs trained in {time.monotonic() - began:.0f} s, {failed} failed, {left} left", flush=True)
    return 1 if failed else 0


# -- the table ----------------------------------------------------------------------------------------------------


def bits_per_byte(row: dict[str, Any]) -> float:
    """Mean over domains, each of which counts the same."""
    return statistics.fmean(row["quality"][f"bits_per_byte/{domain}"] for domain in row["domains"])


def _above(values: dict[int, float], reference: dict[int, float]) -> float | None:
    """How much larger values are, as a share, seed by seed: seeds that only one side has do not count."""
    seeds = values.keys() & reference.keys()
    if not seeds:
        return None
    return statistics.fmean(values[seed] / reference[seed] - 1 for seed in seeds)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}%"


def group_table(study: Study, rows: dict[Run, dict[str, Any]], split: str, local_steps: int) -> list[str]:
    """Markdown lines of one division of the data and one K; none where there is no result."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for item, row in rows.items():
        if (item.split, item.local_steps) == (split, local_steps) or item.arm == SYNCHRONOUS:
            by_arm.setdefault(item.arm, {})[item.seed] = row
    if not by_arm.keys() - {SYNCHRONOUS}:
        return []
    bits = {arm: {seed: bits_per_byte(row) for seed, row in found.items()} for arm, found in by_arm.items()}
    perplexity = {arm: {seed: _perplexity(row) for seed, row in found.items()} for arm, found in by_arm.items()}
    lines = [
        f"### {split}, K = {local_steps}", "",
        "| arm | bits per byte | standard deviation | seeds | above full | above synchronous | perplexity above full "
        "| the paper's | necessity (nats) | own view (nats) | sent by site 0 (MiB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for arm in (name for name in study.arms if name in by_arm):
        values, found = bits[arm], by_arm[arm]
        mean = statistics.fmean(values.values())
        deviation = f"{statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
        routing, _, overlap = arm.partition("_")
        paper = None
        if overlap and routing == "partitioned":
            paper = measured_quality(method="local_adamw", routing="partitioned", sites=study.sites,
                                     overlap=int(overlap), local_steps=local_steps)  # fmt: skip
        others = [
            [row["quality"][name] for row in found.values() if name in row["quality"]]
            for name in ("routing_necessity_nats", "own_view_gap_nats")
        ]
        sent = statistics.fmean(sum(row["sent_bytes"].values()) for row in found.values()) / 2**20
        cells = [
            arm, f"{mean:.4f}", deviation, str(len(values)),
            *(_share(_above(values, bits.get(reference, {})) if arm != reference else None)
              for reference in (FULL, SYNCHRONOUS)),
            _share(_above(perplexity[arm], perplexity.get(FULL, {})) if arm != FULL else None),
            _share(paper.penalty if paper else None),
            *(f"{statistics.fmean(numbers):.2f}" if numbers else "" for numbers in others), f"{sent:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    absent = [arm for arm in study.arms if arm not in by_arm and "+" not in arm]
    return [*lines, "", *([f"Not run: {', '.join(absent)}.", ""] if absent else [])]


def frontier(study: Study, rows: dict[Run, dict[str, Any]]) -> list[str]:
    """Markdown lines: quality of equal data against what was sent for it, the most bytes first; needs `synchronous`.

    A site of data parallelism would have sent float32 gradients in every step. Minutes are those of the bytes and their
    frames, without latency; of `overlapped` arms they pass beside training.
    """
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for item, row in rows.items():
        if item.split == "iid":
            found.setdefault((item.arm, item.local_steps), {})[item.seed] = row
    alone = next((of for (arm, _), of in found.items() if arm == SYNCHRONOUS), None)
    if alone is None or len({arm for arm, _ in found if "+" in arm}) == 0:
        return []
    bits, losses = ({seed: of(row) for seed, row in alone.items()} for of in (bits_per_byte, _perplexity))
    gradients = study.steps * ddp_step_bytes(_config_of(study, alone), study.sites)
    lines = [
        "### Quality against bytes, iid", "",
        "| arm | K | bits per byte | standard deviation | seeds | above synchronous | perplexity above synchronous "
        "| sent by a site (GiB) | fewer bytes than data parallelism | minutes at 100 Mbit/s | at 1 Gbit/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    sent = {key: statistics.fmean(sum(row["sent_bytes"].values()) for row in of.values()) for key, of in found.items()}
    sent = {key: value if key[0] != SYNCHRONOUS else gradients for key, value in sent.items()}
    for (arm, local_steps), of in sorted(found.items(), key=lambda item: -sent[item[0]]):
        values = {seed: bits_per_byte(row) for seed, row in of.items()}
        bytes_ = sent[arm, local_steps]
        minutes = [framed(bytes_) * 8 / rate / 60 for rate in (1e8, 1e9)]
        reference = arm == SYNCHRONOUS
        cells = [
            arm, "1" if reference else str(local_steps), f"{statistics.fmean(values.values()):.4f}",
            f"{statistics.stdev(values.values()):.4f}" if len(values) > 1 else "", str(len(values)),
            _share(None if reference else _above(values, bits)),
            _share(None if reference else _above({seed: _perplexity(row) for seed, row in of.items()}, losses)),
            f"{bytes_ / 2**30:,.1f}", "" if reference else f"{gradients / bytes_:,.0f}",
            *(f"{m:,.1f}" for m in minutes),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _perplexity(row: dict[str, Any]) -> float:
    return math.exp(row["quality"]["loss"])


def _config_of(study: Study, rows: dict[int, dict[str, Any]]) -> ModelConfig:
    """The model of a full replica with tied embeddings, whose vocabulary its number of parameters tells."""
    outside = parameter_counts(study.model(1)).total - study.model(1).d_model
    row = next(iter(rows.values()))
    return study.model((row["resident_parameters"] - outside) // study.model(1).d_model)


def tables(results: Results) -> str:
    """All results as Markdown."""
    lines: list[str] = []
    for name, study in STUDIES.items():
        rows = results.of(name)
        if not rows:
            continue
        first = next(iter(rows.values()))
        lines += [
            f"**{name}**: {len(rows)} runs, {study.tokens / 1e6:.1f} million tokens each, {study.sites} sites, on "
            f"{', '.join(sorted({row['device'] for row in rows.values()}))}, torch {first['torch']}, corpus "
            f"{first['identity']['corpus'][:12]}.", "",
        ]  # fmt: skip
        for local_steps in study.local_steps:
            for split in study.splits:
                lines += group_table(study, rows, split, local_steps)
        lines += frontier(study, rows)
    return "\n".join(lines)


def table(results: Path, page: Path | None = None) -> int:
    """Print the results as Markdown tables.

    Args:
        results: File of results.
        page: Markdown page to write them into, as its section Results; another such section is replaced.

    Returns:
        Exit code.

    Raises:
        ConfigError: If there are no results.
    """
    kept = Results(results)
    if not kept.rows:
        raise ConfigError("results", str(results), "has no results", "Train first: python tools/study/quality.py run")
    found = tables(kept)
    print(found)
    if page is not None:
        section = f"{HEADING}\n{found.rstrip()}\n"
        before, _, after = page.read_text().partition(f"{HEADING}\n")
        following = re.search(r"^## .*", after, flags=re.MULTILINE | re.DOTALL)
        write_whole(page, before.rstrip() + f"\n\n{section}" + (f"\n{following.group()}" if following else ""))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that processes of sites end with it
    try:
        sys.exit(auto_cli({"run": run, "table": table}, as_positional=False))
    except ConfigError as error:
        sys.exit(f"error: {error}")
