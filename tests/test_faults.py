"""Faults in real runs: what a site that is killed, stopped or without disk leaves behind, and that it goes on."""

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fomoe_pl.checkpoint.format import newest, read_manifest
from tests.test_cli import CHECKPOINT, environment, report, run, small

LONG = ["--trainer.max_steps", "1000000", "--trainer.val_check_interval", "1000000"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
few_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
# Over gloo, and with a GPU for each site over NCCL.
accelerators = pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, few_gpus])])


@contextmanager
def started(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment() | variables, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def trains(folder: Path) -> None:
    """Wait until there is a checkpoint."""
    for _ in range(3000):
        time.sleep(0.1)
        if (folder / CHECKPOINT / "manifest.json").is_file():
            return
    raise AssertionError("it does not train")


def children(pid: int) -> list[int]:
    """Processes that this one has started; not those that only compile kernels for it."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"fomoe_pl" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_ctrl_c_saves_and_the_printed_line_goes_on(root: str, tmp_path: Path) -> None:
    with started(["-m", "fomoe_pl", "fit", *small(root, tmp_path), *LONG], tmp_path) as process:
        trains(tmp_path)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes of the group
        errors = process.communicate(timeout=500)[1]
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    [line] = re.findall(r"resume with\n  (fomoe fit .*)", errors)
    words = shlex.split(line)
    saved = Path(words[words.index("--ckpt_path") + 1])
    steps = read_manifest(tmp_path / saved)["optimizer_steps"]
    assert steps % 2 == 0, "a round's end"
    run([*words[1:], "--trainer.max_steps", str(steps + 4)], tmp_path)
    assert report(tmp_path)["steps"] == steps + 4
    assert report(tmp_path)["tokens"]["global"] == (steps + 4) * 2 * 2 * 16


@accelerators
def test_a_signal_stops_all_sites_in_the_middle_of_a_round_if_asked_to(
    root: str, tmp_path: Path, accelerator: str
) -> None:
    endless = ["--trainer.strategy.init_args.local_steps", "1000000", "--trainer.strategy.init_args.stop_at", "step"]
    command = [*small(root, tmp_path), *LONG, *endless, "--trainer.accelerator", accelerator]
    with started(["-m", "fomoe_pl", "fit", *command], tmp_path) as process:
        trains(tmp_path)
        os.kill(children(process.pid)[0], signal.SIGTERM)  # to the second site alone
        errors = process.communicate(timeout=500)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    saved, _ = newest((tmp_path / CHECKPOINT).parent)
    assert saved is not None
    manifest = read_manifest(saved)
    assert manifest["rounds"] == 0
    steps = manifest["optimizer_steps"]
    assert f"--ckpt_path {saved.relative_to(tmp_path)}" in errors
    run(["fit", *command, "--ckpt_path", "auto", "--trainer.max_steps", str(steps + 1)], tmp_path)
    assert report(tmp_path)["steps"] == steps + 1
    assert report(tmp_path)["tokens"]["global"] == (steps + 1) * 2 * 2 * 16


def test_ctrl_c_saves_one_process_too(root: str, tmp_path: Path) -> None:
    alone = [*small(root, tmp_path), "--trainer.strategy", "single_site", "--trainer.devices", "1"]
    with started(["-m", "fomoe_pl", "fit", *alone, *LONG], tmp_path) as process:
        trains(tmp_path)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=500)[1]
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "resume with\n  fomoe fit" in errors
    assert "Traceback" not in errors


@accelerators
@pytest.mark.parametrize("site", [0, 1])
def test_a_killed_site_is_named_and_the_newest_checkpoint_goes_on(
    root: str, tmp_path: Path, site: int, accelerator: str
) -> None:
    command = ["fit", *small(root, tmp_path), "--trainer.accelerator", accelerator]
    with started(["-m", "fomoe_pl", *command, *LONG], tmp_path) as process:
        trains(tmp_path)
        [child] = children(process.pid)
        os.kill(process.pid if site == 0 else child, signal.SIGKILL)
        errors = process.communicate(timeout=500)[1]  # ends when no process of the run holds the pipe any more
    assert errors.count(f"fomoe: site {site} is gone") == 1, errors
    assert f"resume with --ckpt_path {CHECKPOINT}" in errors
    found, _ = newest((tmp_path / CHECKPOINT).parent)
    assert found is not None
    steps = read_manifest(found)["optimizer_steps"]
    output = run([*command, "--ckpt_path", "auto", "--trainer.max_steps", str(steps + 2)], tmp_path)
    assert f"going on from {found.relative_to(tmp_path)}" in output
    assert report(tmp_path)["steps"] == steps + 2


def test_a_full_disk_ends_nothing(root: str, tmp_path: Path) -> None:
    """No file can be longer than 8 KiB: not a checkpoint, not the curves, not what the run prints."""

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    command = [sys.executable, "-m", "fomoe_pl", "fit", *small(root, tmp_path), "--trainer.max_steps", "60"]
    with (tmp_path / "printed.txt").open("w") as printed:
        code = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=printed, stderr=printed, timeout=500,
                              preexec_fn=small_disk, check=False).returncode  # fmt: skip
    told = (tmp_path / "printed.txt").read_text()
    assert code == 0, told
    assert report(tmp_path)["steps"] == 60
    assert len(told) == 8192, "the rest is lost, and with it no step"
    assert "fomoe: NO CHECKPOINT after step 2" in told
    assert told.count("fomoe: curves have a gap") == 1
    events = EventAccumulator(str(tmp_path / "runs/run"))
    events.Reload()
    assert events.Scalars("train/loss"), "what was written before can be read"


def test_auto_starts_from_scratch_where_there_is_nothing(root: str, tmp_path: Path) -> None:
    output = run(["fit", *small(root, tmp_path), "--ckpt_path", "auto"], tmp_path)
    assert "no checkpoint in runs/run/checkpoints yet" in output
    assert report(tmp_path)["steps"] == 4


def test_auto_starts_from_scratch_where_the_first_save_was_interrupted(root: str, tmp_path: Path) -> None:
    interrupted = tmp_path / f"{CHECKPOINT}.partial"
    interrupted.mkdir(parents=True)
    output = run(["fit", *small(root, tmp_path), "--ckpt_path", "auto"], tmp_path)
    assert "last.ckpt.partial': is no complete checkpoint" in output
    assert report(tmp_path)["steps"] == 4
    (tmp_path / CHECKPOINT / "manifest.json").unlink()
    with pytest.raises(AssertionError, match="no checkpoint in runs/run/checkpoints is complete"):
        run(["fit", *small(root, tmp_path), "--ckpt_path", "auto"], tmp_path)


@accelerators
def test_torchrun_restarts_from_the_last_round(root: str, tmp_path: Path, accelerator: str) -> None:
    steps = 60
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    command = ["-m", "fomoe_pl", "fit", *small(root, tmp_path), "--ckpt_path", "auto"]
    command += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    command += ["--trainer.accelerator", accelerator]
    with started([*launcher, *command], tmp_path) as process:
        trains(tmp_path)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        errors = process.communicate(timeout=500)[1]
    assert process.returncode == 0, errors
    found = report(tmp_path)
    assert (found["steps"], found["tokens"]["global"]) == (steps, steps * 2 * 2 * 16)


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [below for child in found for below in descendants(child)]


@accelerators
def test_a_machine_less_and_the_run_goes_on_to_the_planned_tokens(root: str, tmp_path: Path, accelerator: str) -> None:
    port = find_free_network_port()
    steps = 120
    # Seconds after which a machine that says nothing is gone, and in which further ones may still join.
    waits = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=15"
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", waits]
    command = ["-m", "fomoe_pl", "fit", *small(root, tmp_path), "--ckpt_path", "auto", "--trainer.devices", "1"]
    command += ["--trainer.num_nodes", "2", "--trainer.strategy.init_args.min_sites", "1"]
    command += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(10 * steps)]
    command += ["--trainer.accelerator", accelerator]
    with started([*launcher, *command], tmp_path, CUDA_VISIBLE_DEVICES="0") as first:
        time.sleep(2)  # the first keeps the store
        with started([*launcher, *command], tmp_path, CUDA_VISIBLE_DEVICES="1") as second:
            trains(tmp_path)
            for pid in (*descendants(second.pid), second.pid):
                os.kill(pid, signal.SIGKILL)
            errors = first.communicate(timeout=500)[1]
    assert first.returncode == 0, errors
    found = report(tmp_path)
    saved, _ = newest((tmp_path / CHECKPOINT).parent)
    assert found["sites"] == 1
    assert found["tokens"]["global"] == steps * 2 * 2 * 16
    assert steps < found["steps"] < 2 * steps
    assert saved is not None
    assert read_manifest(saved)["optimizer_steps"] == found["steps"]
