"""Sites that share nothing: own corpora, own disks, own users, joined by a network of namespaces alone.

`sudo python tools/network/own_sites.py --output runs/own_sites.json`

Needs root, `ip` and `setpriv`. Four sites, each a `fomoe fit` of a user of its own in a network namespace of its own,
in a folder that no other user may enter, prepare corpora of their own, train, validate, are killed, go on from their
own disks, lose one disk and go on, lose two neighbouring ones and report what that cost. Compared are the killed and
resumed run with one that nothing befell (the same validation loss, bit for bit), each process's count of what it sends
with its interface's counter, and what a user gets who opens another site's corpus. Everything is bounded in time, and
ends with the tool.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from namespaces import INTERFACE, namespace, network

from fomoe_pl.checkpoint.format import MANIFEST
from fomoe_pl.cli import FoMoECLI
from fomoe_pl.cli import main as fomoe
from fomoe_pl.costs.network import FRAME_HEADER, PACKET_HEADERS
from fomoe_pl.federation.ledger import KINDS, Ledger
from fomoe_pl.files import write_whole

SITES, FIRST_USER, PORT, MTU = 4, 31000, 29579, 9000
ROOT = Path(__file__).parents[2]
K, STEPS, MORE = 4, 16, 24
PHASE_SECONDS = 240.0
DOCUMENTS = 120
"""Of each site, from the sample corpus's sources."""


def settings(site: int, folder: Path, max_steps: int) -> dict[str, Any]:
    """A site's configuration; nothing of it but this site's folder has a path."""
    return {
        "seed_everything": 42,
        "trainer": {
            "accelerator": "cpu", "devices": 1, "num_nodes": SITES, "max_steps": max_steps, "max_epochs": -1,
            "val_check_interval": 8, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder),
            "strategy": {
                "class_path": "fomoe_pl.strategies.FederatedStrategy",
                "init_args": {"overlap": 2, "local_steps": K, "inner_moments": "average", "timeout_seconds": 120.0,
                              "checkpoint_root": {site: str(folder / "disk")}, "copies": 2},
            },
            "callbacks": [{
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": str(folder / "names"), "filename": "{step}", "every_n_train_steps": K,
                              "monitor": "step", "mode": "max", "save_top_k": 2},
            }],
        },
        "model": {
            "architecture": {"vocab_size": 257, "d_model": 128, "n_layers": 4, "n_heads": 4, "n_experts": 8,
                             "top_k": 2, "d_expert": 256, "base_width": 128},
            "optimizer": {"lr": 0.01, "warmup_steps": 4},
        },
        "data": {"root": {site: str(folder / "corpus")}, "sequence_length": 64, "batch_size": 4, "val_batch_size": 8,
                 "val_sequences": 64},
    }  # fmt: skip


def work(arguments: list[str], output: Path) -> None:
    """A site's process: `fomoe`, with what it counts and what its interface counts noted at the end."""
    seen = Ledger()
    for name in ("all_reduce", "send"):
        plain: Callable[..., None] = getattr(Ledger, name)

        def counted(self: Ledger, *words: Any, plain: Callable[..., None] = plain) -> None:
            plain(self, *words)
            plain(seen, *words)

        setattr(Ledger, name, counted)
    before = counters()

    def note(cli: FoMoECLI) -> None:
        metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if "val/" in name}
        sent = {name: value - before[name] for name, value in counters().items()}
        found = {"metrics": metrics, "wire": {kind: seen.wire(kind) for kind in KINDS}, "interface": sent}
        write_whole(output, json.dumps(found))

    setattr(FoMoECLI, "after_fit", note)  # noqa: B010  a hook of Lightning's, which is not declared
    sys.argv = ["fomoe", *arguments]
    fomoe()


def counters() -> dict[str, int]:
    """Bytes and packets that this namespace's interface has sent, and segments that TCP has sent again."""
    folder = Path("/sys/class/net") / INTERFACE / "statistics"
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    again = int(dict(zip(names, values, strict=True))["RetransSegs"])
    return {name: int((folder / name).read_text()) for name in ("tx_bytes", "tx_packets")} | {"sent_again": again}


def as_user(site: int, words: Sequence[str]) -> list[str]:
    """A command of a site's user in its namespace; nothing of what root may do is left."""
    user = str(FIRST_USER + site)
    limits = ["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return ["ip", "netns", "exec", namespace(site), "setpriv", "--reuid", user, "--regid", user, *limits, *words]


def prepare(base: Path) -> None:
    """Give each site a folder that no other user may enter, and in it a corpus of its own."""
    sources = sorted((ROOT / "data/sample").glob("*.jsonl.xz"))
    for site in range(SITES):
        folder = base / str(site)
        folder.mkdir(mode=0o700)
        with lzma.open(sources[site % len(sources)], "rt") as lines:
            every = [line for i, line in enumerate(lines) if i % 2 == site // len(sources)]
        text = folder / f"own{site}.jsonl"
        text.write_text("".join(every[:DOCUMENTS]))
        for path in (folder, text):
            os.chown(path, FIRST_USER + site, FIRST_USER + site)
        words = [sys.executable, "-m", "fomoe_pl", "prepare", "--source", f"own{site}={text}", "--output",
                 str(folder / "corpus"), "--shards_per_domain", "2", "--val_fraction", "0.2"]  # fmt: skip
        subprocess.run(as_user(site, words), env=environment(site, folder), cwd=folder, check=True, timeout=120,
                       stdout=subprocess.DEVNULL)  # fmt: skip


def environment(site: int, folder: Path) -> dict[str, str]:
    """What a launcher tells a site."""
    return {
        "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(PORT), "WORLD_SIZE": str(SITES), "NODE_RANK": str(site), "LOCAL_RANK": "0",
        "FOMOE_RUN_KEY": "a key of sixteen characters or more", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


@contextmanager
def sites(base: Path, phase: str, max_steps: int, ckpt_path: str | None) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of all sites; those that are left are ended with the context."""
    processes = []
    for site in range(SITES):
        folder = base / str(site)
        config = folder / f"{phase}.yaml"
        config.write_text(yaml.safe_dump(settings(site, folder, max_steps)))
        config.chmod(0o644)
        given = ["--ckpt_path", ckpt_path] if ckpt_path else []
        words = [sys.executable, __file__, "--site", str(folder / f"{phase}.json"), "fit", "-c", str(config), *given]
        with (base / f"{phase}-{site}.log").open("wb") as log:
            started = subprocess.Popen(as_user(site, words), env=environment(site, folder), cwd=folder, stdout=log,
                                       stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        processes.append(started)
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(base: Path, phase: str, max_steps: int, ckpt_path: str | None) -> list[int]:
    """Run all sites to their end; their exit codes."""
    end = time.monotonic() + PHASE_SECONDS
    with sites(base, phase, max_steps, ckpt_path) as processes:
        return [process.wait(timeout=max(1.0, end - time.monotonic())) for process in processes]


def found(base: Path, phase: str) -> list[dict[str, Any]]:
    """What the sites' processes have noted, with the part that is counted of what their interfaces sent in packets.

    Packets that TCP has sent again are taken for full ones.

    Raises:
        RuntimeError: With the last lines of a site that did not get to its end.
    """
    results = []
    for site in range(SITES):
        path = base / str(site) / f"{phase}.json"
        if not path.is_file():
            raise RuntimeError(f"{phase}, site {site}: {said(base, phase, site)[-2000:]}")
        result = json.loads(path.read_text())
        wire, interface = sum(result["wire"].values()), result["interface"]
        payload = interface["tx_bytes"] - interface["tx_packets"] * (FRAME_HEADER + PACKET_HEADERS)
        again = interface["sent_again"] * (MTU - PACKET_HEADERS)
        result["payload"], result["counted"] = payload - again, wire / (payload - again)
        results.append(result)
    return results


def said(base: Path, phase: str, site: int) -> str:
    """What a site's process has printed."""
    return (base / f"{phase}-{site}.log").read_text(errors="replace")


def kill_while_it_saves(base: Path) -> int:
    """Start all sites, and kill them once all have a checkpoint after the second round; its step."""
    end = time.monotonic() + PHASE_SECONDS
    with sites(base, "killed", STEPS, None) as processes:
        while time.monotonic() < end and all(process.poll() is None for process in processes):
            disks = [base / str(site) / "disk" for site in range(SITES)]
            if all((disk / f"step={2 * K}.ckpt" / MANIFEST).is_file() for disk in disks):
                break
            time.sleep(0.02)
    steps = [
        max(int(path.parent.name.partition("=")[2].removesuffix(".ckpt")) for path in disk.glob(f"*.ckpt/{MANIFEST}"))
        for disk in disks
    ]
    print(f"killed: the newest checkpoints are after steps {steps}", flush=True)
    return min(steps)


def measure(base: Path) -> Iterator[dict[str, Any]]:
    """Do it all; a result after each phase."""
    prepare(base)
    other = base / "1" / "corpus" / "manifest.json"
    opened = [
        subprocess.run(as_user(site, ["cat", str(other)]), capture_output=True, timeout=30, check=False)
        for site in (0, 1)
    ]
    yield {"phase": "prepared", "another site's corpus": opened[0].stderr.decode().strip() or "READ",
           "its own": "read" if opened[1].returncode == 0 else "refused"}  # fmt: skip

    def result(phase: str, codes: list[int]) -> dict[str, Any]:
        of = found(base, phase)
        if len({json.dumps(site["metrics"]) for site in of}) != 1:
            raise RuntimeError(f"{phase}: sites have different metrics")
        return {"phase": phase, "codes": codes, "loss": of[0]["metrics"]["val/loss"],
                "counted": [round(site["counted"], 5) for site in of],
                "checkpoint_bytes": [site["wire"]["checkpoint"] for site in of], "sites": of}  # fmt: skip

    whole = result("whole", run(base, "whole", STEPS, None))
    yield whole
    for site in range(SITES):
        shutil.rmtree(base / str(site) / "disk")
    step = kill_while_it_saves(base)
    resumed = result("resumed", run(base, "resumed", STEPS, "auto"))
    yield {**resumed, "killed_after": step, "same_loss": resumed["loss"] == whole["loss"]}
    shutil.rmtree(base / "2" / "disk")
    lost = result("lost", run(base, "lost", MORE, "auto"))
    yield {**lost, "told": [line for line in said(base, "lost", 0).splitlines() if "lost" in line or "is sent" in line]}
    for site in (2, 3):
        shutil.rmtree(base / str(site) / "disk")
    codes = run(base, "gone", MORE + K, "auto")
    yield {"phase": "gone", "codes": codes, "told": [said(base, "gone", i).splitlines()[-1][:400] for i in (0, 2)]}


def main() -> None:
    """Read the command line and measure."""
    if sys.argv[1:2] == ["--site"]:
        work(sys.argv[3:], Path(sys.argv[2]))
        return
    parser = ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/own_sites.json"), help="where results go")
    options = parser.parse_args()
    missing = [program for program in ("ip", "setpriv") if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        parser.error(f"needs root, ip and setpriv; missing: {', '.join(missing) or 'root'}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    with TemporaryDirectory(prefix="own_sites-") as base, network(SITES, MTU):
        Path(base).chmod(0o711)
        for result in measure(Path(base)):
            results.append(result)
            write_whole(options.output, json.dumps(results, indent=1) + "\n")
            print({key: value for key, value in result.items() if key != "sites"}, flush=True)


if __name__ == "__main__":
    main()
