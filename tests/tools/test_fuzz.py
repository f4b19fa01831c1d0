"""Some of the cases of `tools/faults/fuzz.py`, and that it would find what it looks for."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_pl.checkpoint import format as files
from fomoe_pl.errors import ConfigError
from tests.tools import load

tool: Any = load("fuzz")
Samples = tool.Samples


@pytest.mark.filterwarnings("ignore")
def test_damaged_and_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    counts, wrong = tool.fuzz(range(300), 7, tmp_path)
    assert wrong == []
    assert sum(counts.values()) == 300
    for name in tool.CASES:
        assert counts[f"{name}: refused"] > 10


def test_what_would_run_a_command_is_noticed_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(samples: Any, rng: random.Random) -> None:
        torch.load(samples.checkpoint / "site-00000.pt", weights_only=False)

    def read(samples: Any, rng: random.Random) -> None:
        files.read_state(samples.checkpoint, "site-00000.pt")

    def fails(samples: Any, rng: random.Random) -> None:
        raise IndexError(os.fspath(samples.folder))

    plain = Samples.make

    def planted(folder: Path) -> Any:
        samples = plain(folder)
        path = samples.checkpoint / "site-00000.pt"
        torch.save({"a": tool.Payload()}, path)
        manifest = json.loads((samples.checkpoint / "manifest.json").read_text())
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"]["site-00000.pt"] = {"bytes": len(content), "sha256": digest}
        (samples.checkpoint / "manifest.json").write_text(json.dumps(files.signed(manifest)))
        return samples

    monkeypatch.setattr(Samples, "make", planted)
    cases = {"a": (run, (ConfigError,)), "b": (read, (ConfigError,)), "c": (fails, (ConfigError,))}
    monkeypatch.setattr(tool, "CASES", cases)
    counts, wrong = tool.fuzz(range(3), 0, tmp_path)
    assert counts == {"b: refused": 1}
    assert "os.system" in wrong[0]
    assert "IndexError" in wrong[1]
