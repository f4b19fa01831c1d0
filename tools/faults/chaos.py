"""Faults, drawn from a seed, in real training runs that are started again until they end; what was lost, as a table.

`python tools/faults/chaos.py --kills 100 --others 20 --output runs/chaos` makes a small corpus, trains small models on
four sites, and lets processes be killed or signalled, disks fail, checkpoints and shards be damaged, agreed values and
gradients go wrong, at moments that the seed chooses. Each run goes on with `--ckpt_path auto` until it has all its
steps, and is compared, bit for bit, with one that nothing befell. Sites are forked from a process that has the packages
loaded; runs under torchrun, which restarts them itself, start as usual. It ends its own processes alone, also when it
is interrupted. Exit code 1 if anything was found.
"""

from __future__ import annotations

import json
import lzma
import multiprocessing as mp
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from chaos_run import ENDING, STEPS_PER_FAULT, WORLDS, Found, K, Run, World, damage_file, draw_attempts
from jsonargparse import auto_cli

from fomoe_pl.data.prepare import prepare
from fomoe_pl.files import write_whole

ROOT = Path(__file__).parents[2]


def small_corpus(folder: Path) -> Path:
    """Pieces of the sample texts, in shards so small that a run reads many of them."""
    source = folder / "text"
    source.mkdir(parents=True)
    for path in sorted((ROOT / "data/sample").glob("*.jsonl.xz")):
        with lzma.open(path, "rt") as lines:
            text = " ".join(json.loads(line)["text"] for line in islice(lines, 200))[:60_000]
        pieces = [text[start : start + 400] for start in range(0, len(text), 400)]
        (source / f"{path.name.split('.')[0]}.jsonl").write_text(
            "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
        )
    prepare([str(source)], str(folder / "corpus"), shards_per_domain=40, val_fraction=0.1)
    return folder / "corpus"


def damaged_corpus(root: Path, how: str, file: str, draw: random.Random) -> Path:
    """A copy of a corpus with one damaged shard."""
    copy = root.parent / f"corpus-{how}"
    shutil.copytree(root, copy)
    damage_file(draw, copy / file, how)
    return copy


class Campaign:
    """Runs until enough faults have happened.

    Args:
        output: An empty folder.
        seed: Of everything that is drawn.
        sites: Processes of a run.
        faults: Attempts of a run that a fault ends.
        parallel: Runs at a time.
        quiet: Seconds without a sign of life after which an attempt hangs.
        root: A prepared corpus of bytes; None makes one.
        worlds: What runs are like, in turns.
    """

    def __init__(
        self, output: Path, seed: int, sites: int, faults: int, parallel: int, quiet: float,
        root: Path | None = None, worlds: tuple[World, ...] = WORLDS,
    ) -> None:  # fmt: skip
        self.output, self.seed, self.sites, self.faults = output.resolve(), seed, sites, faults
        self.parallel, self.quiet, self.worlds = parallel, quiet, worlds
        self.steps = STEPS_PER_FAULT * faults
        self.found = Found()
        self.root = (root or small_corpus(self.output)).resolve()
        self.damaged: dict[World, Path] = {}
        self.expected: dict[World, dict[str, Any]] = {}

    def run(self, number: int, world: World, name: str) -> Run:
        """A run in a folder of its own."""
        folder = self.output / name
        folder.mkdir(parents=True)
        return Run(number, world, folder, self.root, self.damaged.get(world), self.sites, self.steps, self.quiet,
                   self.found)  # fmt: skip

    def undisturbed(self, world: World) -> None:
        """Train a world that nothing befalls, and keep what it ends with."""
        run = self.run(0, world, f"undisturbed-{self.worlds.index(world)}")
        if not run.go([], random.Random(0)):
            raise RuntimeError(f"the undisturbed run of {world} failed; see {run.folder}")
        self.expected[world] = run.final()

    def prepare(self, pool: ThreadPoolExecutor) -> None:
        """Make the damaged corpora, of a shard that is read, and train all worlds undisturbed."""
        plain = next(
            (world for world in self.worlds if not world.damage), replace(self.worlds[0], damage=None, poison=())
        )
        if plain not in self.worlds:
            self.worlds += (plain,)
        self.undisturbed(plain)
        events = (self.output / f"undisturbed-{self.worlds.index(plain)}/events.jsonl").read_text().splitlines()
        read = [event for event in map(json.loads, events) if event["what"] == "shard" and event["site"] == 1]
        draw = random.Random(f"{self.seed} damage")
        for world in self.worlds:
            if world.damage:
                # Not the first: that one has been read before a run can be damaged.
                self.damaged[world] = damaged_corpus(self.root, world.damage, read[len(read) // 2]["file"], draw)
        list(pool.map(self.undisturbed, [world for world in self.worlds if world != plain]))

    def disturbed(self, number: int, torchrun: bool) -> None:
        """One run with faults, compared with its undisturbed one."""
        world = self.worlds[number % len(self.worlds)]
        draw = random.Random(f"{self.seed} {number}")
        run = self.run(number, world, f"run-{number}")
        attempts = draw_attempts(draw, self.faults, self.sites, kills_only=torchrun)
        if world.damage:
            self.found.faults.append({"run": number, "kind": f"{world.damage} shard", "moment": "reading", "lost": 0})
        ended = run.under_torchrun(attempts) if torchrun else run.go(attempts, draw)
        if ended:
            final, expected = run.final(), self.expected[world]
            different = [name for name in expected if not same(final.get(name), expected[name])]
            if different or final.keys() != expected.keys():
                self.found.bad(number, f"ends with other values than without faults: {different[:3]}", "divergences")
            shutil.rmtree(run.checkpoints)
        self.found.runs.append({"run": number, "world": str(world), "torchrun": torchrun, "ended": ended})

    def go(self, kills: int, others: int, torchrun: int, minutes: float) -> Found:
        """Make runs until there were enough faults or the time is over; first those under torchrun."""
        mp.set_forkserver_preload(["torch", "torch.distributed", "lightning.pytorch", "fomoe_pl.cli"])
        end = time.time() + minutes * 60
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting: list[Future[None]] = []
            try:
                self.prepare(pool)
                number = 0
                while (number < torchrun or not self.enough(kills, others)) and time.time() < end:
                    number += 1
                    waiting.append(pool.submit(self.disturbed, number, number <= torchrun))
                    while sum(not run.done() for run in waiting) >= self.parallel:
                        time.sleep(0.1)
                for run in waiting:
                    run.result()
            finally:
                self.found.stopped.set()
        return self.found

    def enough(self, kills: int, others: int) -> bool:
        """Whether there were as many kills, and disk and data faults, as wanted."""
        done = [fault["kind"] for fault in list(self.found.faults)]
        return done.count("SIGKILL") >= kills and sum(kind not in ENDING for kind in done) >= others


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, bit for bit."""
    return torch.equal(left, right) if isinstance(right, torch.Tensor) else left == right


# -- the page -----------------------------------------------------------------------------------------------------


def middle_and_most(values: list[float], digits: int = 0) -> str:
    """`median / largest`."""
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}"


def processor() -> str:
    """Name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def table(found: Found) -> str:
    """Faults by kind and moment."""
    lines = [
        "| fault | moment | injected | came back | steps lost, median / most | seconds until all processes had ended, "
        "median / most | seconds from the restart to the first step, median / most |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = sorted({(fault["kind"] not in ENDING, fault["kind"], fault["moment"]) for fault in found.faults})
    for _, kind, moment in groups:
        of_group = [fault for fault in found.faults if (fault["kind"], fault["moment"]) == (kind, moment)]
        back = [fault for fault in of_group if fault["lost"] is not None]
        # What several faults have cost together is in the rows of those that do not end a run by themselves.
        alone = [fault["lost"] for fault in back if kind not in ENDING or fault.get("shared") == 1]
        ended = [fault["seconds_to_end"] for fault in of_group if "seconds_to_end" in fault]
        again = [fault["restart_seconds"] for fault in back if kind in ENDING]
        lines.append(f"| {kind} | {moment} | {len(of_group)} | {len(back)} | {middle_and_most(alone)} | "
                     f"{middle_and_most(ended, 1)} | {middle_and_most(again, 1)} |")  # fmt: skip
    return "\n".join(lines)


def page(campaign: Campaign, command: str, minutes: float) -> str:
    """The campaign as Markdown."""
    found = campaign.found
    kinds = [fault["kind"] for fault in found.faults]
    ended, kills = sum(run["ended"] for run in found.runs), kinds.count("SIGKILL")
    others = sum(kind not in ENDING for kind in kinds)
    alone = [f["lost"] for f in found.faults if f.get("shared") == 1 and f["lost"] is not None and f["kind"] in ENDING]
    named = [fault["named"] for fault in found.faults if fault.get("in_training") and "named" in fault]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            check=False).stdout.strip()  # fmt: skip
    what = f"{len(found.problems)} problems" if found.problems else "nothing that must not be"
    answer = f"{ended} of {len(found.runs)} runs came to their end; {what} was found."
    settings = (
        f"{campaign.sites} processes; runs of {campaign.steps} steps, saved after every round of {K}, the last two "
        f"checkpoints kept; `check_agreement`; {minutes:.0f} minutes, {campaign.parallel} runs at a time"
    )
    lost = f"{statistics.median(alone):.0f} (median), {max(alone)} (most)" if alone else "-"
    return f"""# Chaos, CPU, {time.strftime("%Y-%m-%d", time.gmtime())}
Question: does a run that is killed, signalled, or let down by its disks and data always come back, and at what price?
Answer: {answer}

| | |
| --- | --- |
| faults | {len(kinds)}: {kills} kills, {others} of disks and data, {len(kinds) - kills - others} others |
| runs completed | {ended} of {len(found.runs)}, {sum(run["torchrun"] for run in found.runs)} of them under torchrun |
| steps lost to a fault | {lost}; a round has {K} |
| corrupted checkpoints | {found.counts["corrupted"]} |
| hangs | {found.counts["hangs"]} (nothing heard of a run for {campaign.quiet:.0f} s) |
| silent divergences | {found.counts["divergences"]} |
| killed sites named by the others | {sum(named)} of {len(named)} kills in training |

{table(found)}

| | |
| --- | --- |
| commit | {commit} |
| command | `{command}` |
| hardware | {processor()}, {len(os.sched_getaffinity(0))} cores |
| versions | Python {platform.python_version()}, torch {torch.__version__}, Lightning {lightning.__version__} |
| settings that matter | {settings} |

- Steps lost are those of single faults; the rows of disks and of checkpoints at rest count what they cost together with
  the fault that ended the run, up to a round each.
- "Resuming" is before all sites have met: the others wait for the one that is gone until `timeout_seconds`
  ({campaign.quiet / 4:.0f}).
- Restarts are without the seconds of Python's imports, but for runs under torchrun.
"""


def main(
    output: str, kills: int = 100, others: int = 20, torchrun: int = 2, seed: int = 0, sites: int = 4, faults: int = 12,
    parallel: int = 3, quiet: float = 120.0, minutes: float = 120.0, root: str | None = None, keep: bool = False,
    ranks: int = 1, inside: str = "replicate",
    strategies: list[str] | None = None,
) -> int:  # fmt: skip
    """Inject faults until there were enough.

    Args:
        output: Folder for runs, `page.md` and `found.json`; must not exist.
        kills: Sites that are killed, at least.
        others: Faults of disks and data, at least.
        torchrun: Runs, the first ones, that torchrun starts and restarts.
        seed: Of everything that is drawn.
        sites: Processes of a run.
        faults: Attempts of a run that a fault ends.
        parallel: Runs at a time.
        quiet: Seconds without a sign of life after which an attempt hangs.
        minutes: After which no further run is started.
        root: A prepared corpus of bytes; null makes one of the sample texts.
        keep: Keep the folders of runs.
        ranks: Processes of a site.
        inside: What each of them has of its site's model: `replicate` or `shard`.
        strategies: Of the runs; null is all that the tool knows.
    """
    folder, started = Path(output), time.time()
    folder.mkdir(parents=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell in the background ignores the second
        signal.signal(number, signal.default_int_handler)
    # Slices of averages that are on their way cannot be saved.
    able = [world for world in WORLDS if inside != "shard" or not world.settings]
    worlds = tuple(
        replace(world, ranks=ranks, inside=inside)
        for world in able if strategies is None or world.strategy in strategies
    )  # fmt: skip
    corpus = None if root is None else Path(root)
    campaign = Campaign(folder, seed, sites, faults, parallel, quiet, corpus, worlds)
    try:
        campaign.go(kills, others, torchrun, minutes)
    except (KeyboardInterrupt, InterruptedError):
        print("interrupted; what was found so far:", flush=True)
    found = campaign.found
    text = page(campaign, " ".join(["python tools/faults/chaos.py", *sys.argv[1:]]), (time.time() - started) / 60)
    write_whole(folder / "page.md", text)
    write_whole(folder / "found.json", json.dumps({"faults": found.faults, "runs": found.runs,
                                                   "problems": found.problems}, indent=1))  # fmt: skip
    print(text + "".join(f"PROBLEM: {problem}\n" for problem in found.problems))
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
