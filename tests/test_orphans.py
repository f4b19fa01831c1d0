"""Nothing that a test has started outlives the process that ran the test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import ROOT

STARTS = """
import subprocess, sys, time
import tests.conftest
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_what_a_killed_worker_has_started_ends() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", STARTS], env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        child = Path("/proc", worker.stdout.readline().strip())
        assert child.is_dir()
        worker.send_signal(signal.SIGKILL)
    for _ in range(600):
        if not child.is_dir() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")
