"""The commands of docs/tutorials/to-hugging-face.md, from text to a model that others load, with fewer steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fomoe_pl.cli import main

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
STEPS = 8


def printed() -> list[list[str]]:
    page = (ROOT / "docs/tutorials/to-hugging-face.md").read_text()
    block = re.findall(r"^```\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0]
    return [shlex.split(line) for line in block.splitlines()]


def shorter(folder: Path) -> Path:
    """Settings of the quickstart with few steps: its callbacks are a list, which a later file replaces as a whole."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["trainer"]
    for callback in settings["callbacks"]:
        if "every_n_train_steps" in callback.get("init_args", {}):
            callback["init_args"]["every_n_train_steps"] = STEPS
    kept = [c for c in settings["callbacks"] if c["class_path"].rpartition(".")[2] in ("ModelCheckpoint", "RunReport")]
    strategy = settings["strategy"]
    strategy["init_args"]["overlap"] = 1  # of two sites, which start in half the time of four
    path = folder / "shorter.yaml"
    path.write_text(yaml.safe_dump({
        "trainer": {"callbacks": kept, "devices": 2, "strategy": strategy, "max_steps": STEPS,
                    "val_check_interval": STEPS, "num_sanity_val_steps": 0, "enable_progress_bar": False},
        "model": {"optimizer": {"warmup_steps": 2, "cooldown_steps": 2}}, "data": {"val_sequences": 12},
    }))  # fmt: skip
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_page(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "data" / "sample").symlink_to(root)
    fit, *others = printed()
    assert [" ".join(words[:2]) for words in (fit, *others)] == [
        "fomoe fit", "fomoe export", "python -c", "fomoe generate", "fomoe evaluate"
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fomoe_pl", *fit[1:], "-c", str(shorter(tmp_path))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    said = []
    for program, *words in others:  # one process each takes far longer to start than to run
        if program == "python":
            exec(words[1], {})
        else:
            main(words)
        said.append(capsys.readouterr().out)
    assert "FomoeForCausalLM" in said[1]
    assert said[2].startswith("My fellow citizens, ")
    assert "sample_bpb: " in said[3]
    found = json.loads((tmp_path / "runs/quickstart/model/evaluations.json").read_text())["global"]
    assert found["steps"] == STEPS
    assert 1 < found["tasks"]["sample_bpb"]["bits_per_byte"] < 9
