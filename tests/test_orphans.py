"""Nothing that a test has started outlives the process that ran the test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import ROOT

STARTS = {
    "a command": """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
""",
    "a rank": """
tests.distributed.run_distributed(tests.test_orphans.says_its_number_and_waits, 2)
""",
}


def says_its_number_and_waits(rank: int) -> None:
    if rank == 0:
        print(os.getpid(), flush=True)
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("what", STARTS)
def test_what_a_killed_worker_has_started_ends(what: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = tmp_path / "worker.py"
    beginning = "import subprocess, sys, time, tests.conftest, tests.distributed, tests.test_orphans"
    indented = STARTS[what].strip().replace("\n", "\n    ")
    script.write_text(f"{beginning}\nif __name__ == '__main__':\n    {indented}\n")
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        child = Path("/proc", worker.stdout.readline().strip())
        assert child.is_dir()
        worker.send_signal(signal.SIGKILL)
    for _ in range(600):
        if not child.is_dir() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")
