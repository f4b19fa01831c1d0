"""One run of `chaos.py`: what it is like, what is drawn for it, its attempts, and what they must look like."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_site
import torch
import yaml
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fomoe_pl.checkpoint.format import MANIFEST, newest, read_manifest, verify
from fomoe_pl.checkpoint.resuming import tokens_in
from fomoe_pl.errors import ConfigError

ROOT = Path(__file__).parents[2]
K = 4  # local steps of a round; saved after each
STEPS_PER_FAULT = 2 * K
FREE = ("shard away for a moment",)  # costs no steps
ENDING = ("SIGKILL", "SIGTERM", "SIGINT", "bit flip")  # a run has to be started again after these
MOMENTS = ("local step", "collective", "saving", "validating", "any moment", "resuming")
CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu", "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2 * K,
        "num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "gradient_clip_val": 1.0,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
             "init_args": {"filename": "{step}", "every_n_train_steps": K, "enable_version_counter": False,
                           "monitor": "step", "mode": "max", "save_top_k": 2}},
            {"class_path": "fomoe_pl.callbacks.RunReport"},
        ],
    },
    "model": {
        "architecture": {"vocab_size": 257, "d_model": 32, "n_layers": 2, "n_heads": 2, "n_experts": 8, "top_k": 2,
                         "d_expert": 16, "base_width": 32, "base_depth": 2},
        "optimizer": {"warmup_steps": 4},
    },
    "data": {"sequence_length": 32, "batch_size": 2, "val_batch_size": 4, "val_sequences": 12},
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """What a run is like, whether or not anything befalls it.

    Attributes:
        strategy: A file of configs/strategy.
        damage: What happens to one training shard once the run has begun; None for nothing.
        poison: (process, step) whose gradients are infinite.
        ranks: Processes of a site.
        inside: What each of them has of its site's model.
        settings: Of the strategy, beside the file's.
    """

    strategy: str
    damage: str | None = None
    poison: tuple[tuple[int, int], ...] = ()
    ranks: int = 1
    inside: str = "replicate"
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """A name for folders and lines."""
        parts = [self.strategy, self.damage and f"{self.damage} shard", self.poison and "infinite gradients",
                 self.ranks > 1 and f"{self.ranks} ranks a site ({self.inside})"]  # fmt: skip
        return ", ".join(part for part in parts if part)


WORLDS = (
    World("fomoe"), World("fomoe_random", "truncated"), World("diloco", "corrupt"),
    World("fomoe_partitioned", None, ((1, 9), (1, 10), (3, 22))), World("fomoe_overlap1", "vanished"),
    World("local_adamw", "empty"), World("fomoe_diloco"),
    World("fomoe_overlapped", None, ((1, 9), (1, 10), (3, 22)),
          settings=(("fragments", "2"), ("delay", "1"))),
)  # fmt: skip


@dataclass
class Found:
    """What a campaign found.

    Attributes:
        faults: Of each fault: run, kind, moment, steps lost, what more it shared them with, seconds.
        runs: Of each run: its world, attempts, launcher, whether it ended as planned.
        problems: Everything that must not be, in words.
        counts: Of the problems that have a name.
        stopped: Set when the campaign is to end at once.
    """

    faults: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("hangs", "corrupted", "divergences"), 0))
    stopped: threading.Event = field(default_factory=threading.Event)

    def bad(self, run: int, what: str, count: str | None = None) -> None:
        """Note a problem and tell it at once."""
        self.problems.append(f"run {run}: {what}")
        if count:
            self.counts[count] += 1
        print(f"run {run}: PROBLEM: {what}", flush=True)


# -- what is drawn ------------------------------------------------------------------------------------------------


def draw_attempts(draw: random.Random, n: int, sites: int, kills_only: bool) -> list[dict[str, Any]]:
    """Faults of one run, attempt by attempt: `faults`, the last of which ends the attempt, and damage done after it."""

    def fault(kind: str, moment: str, after: int, count: int, site: int | None = None) -> dict[str, Any]:
        site = draw.randrange(sites) if site is None else site
        return {"kind": kind, "moment": moment, "after": after, "count": count, "site": site,
                "seed": draw.randrange(2**31)}  # fmt: skip

    attempts = []
    for _ in range(n):
        kind = draw.choices(ENDING, (1, 0, 0, 0) if kills_only else (76, 8, 8, 8))[0]
        moment = "local step" if kind == "bit flip" else draw.choice(MOMENTS)
        count = {"collective": 14, "saving": 8, "resuming": 8, "local step": 2}.get(moment, 1)
        after = 0 if moment == "resuming" else draw.randrange(2 * K)
        faults, damage = [], None
        if not kills_only:
            more = draw.random()
            if more < 0.16:
                # Before the round in which the attempt ends, if that is later.
                first = draw.choice(("full disk", "read-only folder"))
                faults.append(fault(first, "saving", draw.randrange(K), draw.randint(1, 4)))
                after = max(after, K) if moment != "resuming" else after
            elif more < 0.24:
                faults.append(fault("shard away for a moment", "reading", 0, 1))
            elif more < 0.36:
                damage = draw.choice(("bit of a checkpoint flipped", "checkpoint cut", "checkpoint without manifest"))
        everyone = kind in ("SIGTERM", "SIGINT") and draw.random() < 0.5
        ending = fault(kind, moment, after, draw.randint(1, count))
        ends = [{**ending, "site": site} for site in range(sites)] if everyone else [ending]
        attempts.append({"faults": faults + ends, "damage": damage})
    return attempts


def damage_file(draw: random.Random, path: Path, how: str) -> None:
    """Damage a file of a checkpoint or of a corpus."""
    content = bytearray(path.read_bytes())
    if how in ("vanished", "checkpoint without manifest"):
        path.unlink()
    elif how in ("truncated", "checkpoint cut"):
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def damage_checkpoint(draw: random.Random, folder: Path, how: str) -> Path | None:
    """Damage the newest checkpoint, if there is another before it."""
    path, _ = newest(folder, hashes=True)
    if path is None or len([one for one in folder.glob("*.ckpt") if is_intact(one)]) < 2:
        return None
    name = MANIFEST if how.endswith("manifest") else draw.choice([MANIFEST, *sorted(read_manifest(path)["files"])])
    damage_file(draw, path / name, how)
    return path


def looks_complete(folder: Path) -> bool:
    """Whether a folder looks like a complete checkpoint; hashes are not checked."""
    try:
        read_manifest(folder)
    except ConfigError:
        return False
    return True


def is_intact(folder: Path) -> bool:
    """Whether a checkpoint is complete and undamaged."""
    try:
        for name in read_manifest(folder)["files"]:
            verify(folder, name)
    except ConfigError:
        return False
    return True


def written_at(folder: Path) -> int:
    """When a checkpoint was completed, in nanoseconds; -1 for one without manifest."""
    path = folder / MANIFEST
    return path.stat().st_mtime_ns if path.is_file() else -1


# -- one run ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of a campaign: a folder, and the attempts that are made in it until it ends.

    Args:
        number: Of the run; 0 for one that nothing befalls.
        world: What it is like.
        folder: An empty folder of its own.
        root: The corpus.
        damaged: The same corpus with the world's damage.
        sites: processes.
        steps: Local steps of the whole run.
        quiet: Seconds without a sign of life after which an attempt hangs.
        found: Where all is noted.
    """

    number: int
    world: World
    folder: Path
    root: Path
    damaged: Path | None
    sites: int
    steps: int
    quiet: float
    found: Found
    reached: int = 0  # the furthest step of the last attempt
    pending: list[dict[str, Any]] = field(default_factory=list)  # faults after which nothing has gone on yet
    damaged_checkpoints: dict[str, int] = field(default_factory=dict)  # path -> when it had been written

    @property
    def in_background(self) -> bool:
        """Whether checkpoints are written while training goes on: in every second pair of runs."""
        return self.number % 4 < 2

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"

    @property
    def events(self) -> Path:
        """What its sites have told."""
        return self.folder / "events.jsonl"

    def told(self, attempt: int | None = None) -> list[dict[str, Any]]:
        """The events of an attempt, or of all."""
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if attempt is None or event["attempt"] == attempt]

    def arguments(self, goes_on: bool) -> list[str]:
        """Words of `fomoe fit`."""
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        strategy = "--trainer.strategy.init_args"
        root = self.damaged if goes_on and self.damaged else self.root
        # An attempt that starts from scratch reads the corpus before it is damaged.
        return [
            "-c", str(config), "-c", str(ROOT / f"configs/strategy/{self.world.strategy}.yaml"),
            "--trainer.devices", str(self.sites), "--trainer.max_steps", str(self.steps),
            "--trainer.default_root_dir", str(self.folder), "--data.root", str(root), "--ckpt_path", "auto",
            f"{strategy}.local_steps", str(K), f"{strategy}.check_agreement", "true",
            f"{strategy}.timeout_seconds", str(self.quiet / 4), f"{strategy}.inside", self.world.inside,
            f"{strategy}.ranks_per_site", str(self.world.ranks),
            f"{strategy}.async_save", str(self.in_background).lower(),
            f"{strategy}.stop_at", "step" if self.number % 2 else "round",
            *(word for name, value in self.world.settings for word in (f"{strategy}.{name}", value)),
        ]  # fmt: skip

    def plan(self, attempt: int, site: int, faults: list[dict[str, Any]]) -> dict[str, Any]:
        """What a site is told, see `chaos_site.Chaos`."""
        return {
            "events": str(self.events), "attempt": attempt, "site": site, "K": K,
            "faults": [fault for fault in faults if fault["site"] == site],
            "poison": [step for at, step in self.world.poison if at == site],
            "damaged": None if self.damaged is None else str(self.damaged),
        }  # fmt: skip

    def waits(self, alive: Callable[[], bool], started: float) -> bool:
        """Wait until an attempt has ended; False if it hangs."""
        while alive():
            if self.found.stopped.is_set():
                raise InterruptedError("the campaign was stopped")
            sign = self.events.stat().st_mtime if self.events.exists() else started
            if time.time() - max(sign, started) > self.quiet:
                return False
            time.sleep(0.05)
        return True

    def attempt(self, number: int, faults: list[dict[str, Any]]) -> list[int | None]:
        """Start all sites and wait for them; returns their exit codes (None for one that hung)."""
        context = mp.get_context("forkserver")
        port = find_free_network_port()
        words, started, processes = self.arguments(newest(self.checkpoints)[0] is not None), time.time(), []
        for site in range(self.sites):
            environment = {
                "RANK": str(site), "LOCAL_RANK": str(site), "WORLD_SIZE": str(self.sites), "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": str(self.sites), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "chaos", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            plan, output = self.plan(number, site, faults), str(self.folder / f"output-{number}-{site}.txt")
            process = context.Process(
                target=chaos_site.forked, args=(plan, words, environment, str(self.folder), output)
            )
            process.start()
            processes.append(process)
        try:
            if not self.waits(lambda: any(process.is_alive() for process in processes), started):
                stuck = [site for site, process in enumerate(processes) if process.is_alive()]
                self.found.bad(self.number, f"attempt {number}: sites {stuck} hang", "hangs")
                return [None if process.is_alive() else process.exitcode for process in processes]
            return [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()

    def output(self, attempt: int) -> str:
        """What all sites printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"output-{attempt}-*.txt")))

    # -- judging it -----------------------------------------------------------------------------------------------

    def go(self, attempts: list[dict[str, Any]], draw: random.Random) -> bool:
        """Make the attempts, and one more without faults; returns whether the run has ended as planned."""
        codes: list[int | None] = []
        for number, planned in enumerate([*attempts, {"faults": [], "damage": None}]):
            started = time.time()
            codes = self.attempt(number, planned["faults"])
            self.judge(number, codes, started)
            if all(code == 0 for code in codes):
                return self.is_whole()
            if planned["damage"]:
                path = damage_checkpoint(draw, self.checkpoints, planned["damage"])
                if path is not None:
                    self.damaged_checkpoints[str(path)] = written_at(path)
                    self.note({"kind": planned["damage"], "moment": "at rest", "path": str(path), "after": number})
        self.found.bad(
            self.number, f"did not come to its end: exit codes {codes}\n{self.output(len(attempts))[-3000:]}"
        )
        return False

    def note(self, fault: dict[str, Any]) -> None:
        """A fault has happened; what it cost shows when the run goes on."""
        self.pending.append({"run": self.number, "lost": None, **fault})
        self.found.faults.append(self.pending[-1])

    def account(self, number: int, started: float) -> dict[str, dict[str, Any]]:
        """Note what an attempt went on from and how far it came, and its faults by kind."""
        events = self.told(number)
        starts = [event for event in events if event["what"] == "start"]
        if len(starts) == self.sites:
            self.went_on(number, starts, min(e["time"] for e in events if e["what"] == "step") - started)
            self.reached = max(event["step"] for event in events if event["what"] == "step")
        # A signal to all sites is one fault.
        happened = {event["kind"]: event for event in events if event["what"] == "fault"}
        for kind, event in happened.items():
            self.note({"kind": kind, "moment": event["moment"], "site": event["site"], "time": event["time"],
                       "in_training": len(starts) == self.sites})  # fmt: skip
        return happened

    def judge(self, number: int, codes: list[int | None], started: float) -> None:
        """Look at an attempt: what it went on from, how it ended, and what it has left on the disk."""
        ended, output = time.time(), self.output(number)
        happened = self.account(number, started)
        named = ", ".join(f"{kind} ({event['moment']})" for kind, event in happened.items())
        told = f"attempt {number}: {named or 'no fault'}; exit codes {codes}; step {self.reached}"
        print(f"run {self.number} ({self.world}) {told}", flush=True)
        why = f"{told}\n{output[-3000:]}"
        [ending] = {*happened} & {*ENDING} or [None]
        if ending is None:
            if any(codes):
                self.found.bad(self.number, f"nothing should have ended {why}")
            self.look_at_disk(number)
            return
        fault = next(fault for fault in reversed(self.pending) if fault["kind"] == ending)
        fault["seconds_to_end"] = ended - fault["time"]
        if ending == "bit flip" and "sites differ after a round in" not in output:
            self.found.bad(self.number, f"a flipped bit was not found: {why}", "divergences")
        if ending == "SIGKILL":
            fault["named"] = output.count(f"fomoe: site {fault['site'] // self.world.ranks} is gone") == 1
        # Sites that were sent no signal end as after a SIGTERM.
        expected = {"SIGTERM": {0, 143}, "SIGINT": {0, 130, 143}}.get(ending)
        if expected and fault["in_training"] and {*codes} - expected:
            self.found.bad(self.number, f"not the exit codes of a signal: {why}")
        self.look_at_disk(number)

    def went_on(self, number: int, starts: list[dict[str, Any]], seconds: float) -> None:
        """Attribute what was lost to the faults before."""
        steps, folders = {event["step"] for event in starts}, {event["folder"] for event in starts}
        if len(steps) > 1 or len(folders) > 1:
            self.found.bad(self.number, f"attempt {number}: sites go on from {folders}, steps {steps}", "divergences")
        lost = self.reached - min(steps)
        costly = [fault for fault in self.pending if fault["kind"] not in FREE]
        # What is still being written when a site is killed is lost too.
        if lost > K * (len(costly) + (self.in_background and bool(costly))):
            causes = ", ".join(f"{fault['kind']} ({fault['moment']})" for fault in costly)
            self.found.bad(self.number, f"attempt {number}: {lost} steps lost after {causes or 'nothing'}")
        for fault in self.pending:
            fault.update(lost=lost, shared=len(costly), restart_seconds=seconds)
            path = fault.get("path")
            if path is not None:
                if path in folders:
                    self.found.bad(self.number, f"attempt {number} went on from {path}, which was damaged", "corrupted")
                if Path(path).name not in "".join(self.output(n) for n in range(fault["after"] + 1, number + 1)):
                    self.found.bad(self.number, f"no attempt says that {path}, which was damaged, is not used")
        self.pending.clear()

    def look_at_disk(self, number: int) -> None:
        """What would be taken for a complete checkpoint must be one; half a one, written or removed, is no matter."""
        for folder in sorted(self.checkpoints.glob("*.ckpt*")):
            known = self.damaged_checkpoints.get(str(folder), 0) == written_at(folder)
            if not known and looks_complete(folder) and not is_intact(folder):
                self.found.bad(self.number, f"attempt {number} has left a damaged checkpoint: {folder}", "corrupted")

    def is_whole(self) -> bool:
        """Whether the run has all its steps and tokens."""
        data, n_sites = CONFIG["data"], self.sites // self.world.ranks
        tokens = self.steps * n_sites * data["batch_size"] * data["sequence_length"]
        if (self.folder / "report.json").exists():
            report = json.loads((self.folder / "report.json").read_text())
            ended = report["steps"], report["tokens"]["global"]
        else:  # killed between its last checkpoint and its report: the next attempt had nothing left to train
            path, _ = newest(self.checkpoints)
            ended = (0, 0) if path is None else tokens_in(path)
        if ended != (self.steps, tokens):
            self.found.bad(self.number, f"ended after {ended[0]} steps and {ended[1]} tokens, not {tokens}")
            return False
        if self.world.damage and not self.shard_is_named():
            self.found.bad(self.number, "the damaged shard is not named")
        return True

    def shard_is_named(self) -> bool:
        """Whether a message tells of the shard that cannot be read."""
        return any("cannot be read (1 of" in path.read_text() for path in self.folder.glob("output-*.txt"))

    def final(self) -> dict[str, Any]:
        """What must be, bit for bit, that of the run that nothing befell: hashes of all weights, inner moments."""
        path, _ = newest(self.checkpoints)
        assert path is not None
        files = read_manifest(path)["files"]
        found = {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}
        for name in files:
            if name.startswith("site-"):
                [state] = torch.load(path / name, weights_only=False)["optimizer_states"]
                for key, values in state["state"].items():
                    found |= {f"{name} {key} {what}": value for what, value in values.items()}
        return found

    # -- under torchrun -------------------------------------------------------------------------------------------

    def under_torchrun(self, attempts: list[dict[str, Any]]) -> bool:
        """Let torchrun start the sites, and start them again; returns whether the run has ended as planned."""
        plans = [
            [self.plan(number, site, planned["faults"]) for site in range(self.sites)]
            for number, planned in enumerate([*attempts, {"faults": []}])
        ]
        (self.folder / "plans.json").write_text(json.dumps(plans))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.sites),
            "--max-restarts", str(len(attempts)), str(Path(chaos_site.__file__)), str(self.folder / "plans.json"),
            *self.arguments(goes_on=False),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = time.time()
        with (self.folder / "output-0-all.txt").open("w") as output:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=output, stderr=output)
            try:
                if not self.waits(lambda: process.poll() is None, started):
                    self.found.bad(self.number, "torchrun's run hangs", "hangs")
            finally:
                process.terminate()  # and with it, its workers
                process.wait()
        for number in range(len(attempts) + 1):
            if not self.told(number):
                break
            happened = self.account(number, started)
            print(f"run {self.number} ({self.world}) under torchrun, attempt {number}: {', '.join(happened)}, step "
                  f"{self.reached}", flush=True)  # fmt: skip
            started = max(event["time"] for event in happened.values()) if happened else started
        self.look_at_disk(len(attempts))
        if process.returncode != 0:
            text = (self.folder / "output-0-all.txt").read_text()
            self.found.bad(self.number, f"torchrun ended with {process.returncode}\n{text[-5000:]}")
            return False
        return self.is_whole()
