"""One site of a run under `tools/faults/chaos.py`: `fomoe fit`, with faults at the moments that a plan names.

The package knows nothing of it. Moments are found from outside: by wrapping a few public methods and collectives, and
by Python's audit events for everything that is done to a file. A fault happens in the site itself, exactly there.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

PARENT_ENDS = 1  # PR_SET_PDEATHSIG
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILE_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
FULL_AT = 256  # bytes that a file may have on a full disk


class Chaos:
    """What happens to one site in one attempt.

    Args:
        plan: `events` (the file that all sites write what they see into), `attempt`, `site`, `K`; `faults`, each with
            `kind`, `moment`, `after` (steps since the attempt's start), `count` (which of that moment's events then)
            and `seed`; `poison`, steps whose gradient is infinite; `damaged`, the folder that takes the place of the
            corpus once the run has looked at it, or null.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.waiting: list[dict[str, Any]] = [dict(fault) for fault in plan["faults"]]
        self.first: int | None = None  # step that the attempt started from
        self.step = 0
        self.trainer: Any = None
        self.read_only = False
        self._events = os.open(plan["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def tell(self, what: str, **more: Any) -> None:
        """Write one line for the tool, whole also if this is the last that the site does."""
        line = {"attempt": self.plan["attempt"], "site": self.plan["site"], "time": time.time(), "what": what, **more}
        now = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        os.write(self._events, (json.dumps(line) + "\n").encode())
        resource.setrlimit(resource.RLIMIT_FSIZE, now)

    # -- moments --------------------------------------------------------------------------------------------------

    def reached(self, moment: str) -> None:
        """Let the faults of a moment happen; signals whose moment does not come are sent in a local step."""
        for fault in list(self.waiting):
            since = self.step - (self.step if self.first is None else self.first)
            if since < fault["after"]:
                continue
            late = fault["kind"] in SIGNALS and since > fault["after"] + 4 * self.plan["K"] and moment == "local step"
            if fault["moment"] == moment:
                fault["count"] -= 1
            elif not late:
                continue
            if fault["count"] <= 0 or late:
                self.waiting.remove(fault)
                self.happens(fault, moment)

    def happens(self, fault: dict[str, Any], moment: str) -> None:
        """One fault."""
        kind, draw = fault["kind"], random.Random(fault["seed"])
        self.tell("fault", kind=kind, moment=moment, step=self.step)
        if kind in SIGNALS:
            number = getattr(signal, kind)
            if moment == "any moment":
                timer = threading.Timer(draw.uniform(0, 0.4), os.kill, (os.getpid(), number))
                timer.daemon = True
                timer.start()
            else:
                os.kill(os.getpid(), number)
        elif kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, self._limits[1]))
        elif kind == "read-only folder":
            self.read_only = True
        elif kind == "shard away for a moment":
            raise OSError(errno.EIO, "Input/output error (chaos)")
        elif kind == "bit flip":
            self.flip(draw)

    def flip(self, draw: random.Random) -> None:
        """Change one bit of one agreed value that this site shares with others."""
        import torch

        strategy = self.trainer.strategy
        alone = strategy.settings.overlap_of(strategy.topology.n_sites) == 1
        dense = strategy.federation.layout.dense
        names = sorted(name for name in strategy.federation.anchors if not alone or name in dense)
        name = draw.choice(names)
        bits = strategy.federation.anchors[name].view(-1).view(torch.int32)
        bits[draw.randrange(len(bits))] ^= 1 << draw.randrange(31)
        self.tell("flipped", tensor=name)

    # -- hooks ----------------------------------------------------------------------------------------------------

    def file_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python is about to do something to a file."""
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(arguments[0])
        if "/checkpoints" in path:
            self.reached("saving" if self.first is not None else "resuming")
            # Not for rmtree, whose own steps are what fails.
            if self.read_only and event != "shutil.rmtree" and (event != "open" or arguments[2] & WRITES):
                raise OSError(errno.EROFS, "Read-only file system (chaos)")
        elif path.endswith(".tar") and "/train-" in path and event == "open":
            self.tell("shard", file=Path(path).name)
            self.reached("reading")

    def before(self, owner: Any, name: str, moment: str, look: Callable[..., None] | None = None) -> None:
        """Let a moment be reached before each call of a function."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if look is not None:
                look(*args, **kwargs)
            self.reached(moment)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def starts_step(self, module: Any, *_: Any) -> None:
        """A micro-batch begins."""
        self.step = module.trainer.global_step
        if self.step % self.plan["K"] == self.plan["K"] - 1:  # there is a disk again before the next save
            self.read_only = False
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        if self.first is None:
            self.first, self.trainer = self.step, module.trainer
            last = module.trainer.strategy.checkpoints.last_saved
            self.tell("start", step=self.step, folder=None if last is None else str(last))
            if self.plan["poison"]:
                next(module.parameters()).register_hook(self.poison)
            for fault in self.waiting:
                if fault["moment"] == "resuming":  # nothing to resume from
                    fault["moment"] = "local step"

    def poison(self, gradient: Any) -> Any:
        """Make the gradients of the plan's steps infinite."""
        return gradient * float("inf") if self.step in self.plan["poison"] else gradient

    def ends_step(self, module: Any, *_: Any) -> None:
        """A local step is as good as done."""
        self.step = module.trainer.global_step + 1
        self.tell("step", step=self.step)
        self.reached("any moment")

    def install(self) -> None:
        """Set the hooks; nothing removes them but the process's end."""
        import torch.distributed as dist

        from fomoe_pl.data.module import FoMoEData
        from fomoe_pl.module import FoMoEModule

        looked_at: Any = FoMoEData.manifest

        def damage(*_: Any) -> None:
            if self.plan["damaged"]:
                folder = Path(self.plan["damaged"])
                FoMoEData.manifest = property(lambda data: replace(looked_at.fget(data), root=folder))  # type: ignore

        self.before(FoMoEModule, "training_step", "local step", self.starts_step)
        self.before(FoMoEModule, "on_before_optimizer_step", "local step", self.ends_step)
        self.before(FoMoEModule, "validation_step", "validating")
        self.before(FoMoEData, "train_dataloader", "loading", damage)
        for collective in ("all_reduce", "all_to_all_single"):
            self.before(dist, collective, "collective")
        sys.addaudithook(self.file_event)


def run(plan: dict[str, Any], arguments: list[str]) -> None:
    """Train as `fomoe fit` does; ends the process as it does."""
    from fomoe_pl import cli

    chaos = Chaos(plan)
    chaos.install()
    sys.argv = ["fomoe", "fit", *arguments]
    cli.main()
    chaos.tell("end", step=chaos.step)


def forked(plan: dict[str, Any], arguments: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """A site as a process of the fork server, in an environment as torchrun makes it."""
    import ctypes

    ctypes.CDLL(None).prctl(PARENT_ENDS, signal.SIGKILL)  # an interrupted tool leaves nothing behind
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ |= environment
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    run(plan, arguments)


if __name__ == "__main__":  # under torchrun: the plans of all attempts and sites are in a file
    plans = json.loads(Path(sys.argv[1]).read_text())
    attempt, own_site = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    run(plans[min(attempt, len(plans) - 1)][own_site], sys.argv[2:])
