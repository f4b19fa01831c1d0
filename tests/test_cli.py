"""The command as a user types it: real runs, and one message for everything that cannot work."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fomoe_pl import cli
from fomoe_pl.callbacks import RunReport
from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.cli import FoMoECLI
from fomoe_pl.data import FoMoEData
from fomoe_pl.data.validation import ValidationSequences
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.strategies import REGISTERED, FederatedStrategy, SingleSiteStrategy
from fomoe_pl.strategies.base import SiteStrategy
from tests.training import ROOT, STRATEGIES

QUICKSTART = ["-c", str(ROOT / "configs/quickstart.yaml")]
STRATEGY = "--trainer.strategy.init_args"
# Files of configs/paper stand for themselves: tests/test_paper_configs.py.
FILES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("experiment", "paper", "plan")
)
# Sizes of a run of seconds, from the quickstart.
SMALL = """
trainer:
  devices: 2
  max_steps: 4
  val_check_interval: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  strategy:
    class_path: fomoe_pl.strategies.FederatedStrategy
    init_args: {overlap: 1, local_steps: 2}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: last, every_n_train_steps: 2, enable_version_counter: false}
    - class_path: fomoe_pl.callbacks.CommunicationMonitor
    - class_path: fomoe_pl.callbacks.RunReport
model:
  architecture: {d_model: 16, n_layers: 2, n_heads: 2, n_experts: 4, top_k: 2, d_expert: 8, base_width: 16}
  optimizer: {cooldown_steps: 0}
data: {sequence_length: 16, batch_size: 2, val_batch_size: 4, val_sequences: 12}
"""


def small(root: str, folder: Path, name: str = "run") -> list[str]:
    """Arguments of the small run, which writes into FOLDER/runs/NAME."""
    (folder / "small.yaml").write_text(SMALL)
    return [*QUICKSTART, "-c", str(folder / "small.yaml"), "--data.root", root, "--trainer.logger.init_args.name", name]


def environment() -> dict[str, str]:
    """This process's environment, without what a launcher or a seed has left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LOCAL_", "NODE_", "WORLD_"))}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(command: list[str], folder: Path, launcher: tuple[str, ...] = ()) -> str:
    """Run `fomoe COMMAND` in a folder; returns what it printed."""
    start = [sys.executable, *launcher, "-m", "fomoe_pl", *command]
    done = subprocess.run(start, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def report(folder: Path, name: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / name / "report.json").read_text())
    return found


def printed(output: str, metric: str) -> float:
    """A value in the table that Lightning prints."""
    match = re.search(rf"{metric} +│ +([\d.]+)", output)
    assert match, output
    return float(match[1])


@pytest.fixture(scope="module")
def trained(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two sites have trained for four steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(["fit", *small(root, folder)], folder)
    return folder


CHECKPOINT = "runs/run/checkpoints/last.ckpt"


def test_a_run_is_validated_in_one_process_to_the_same_numbers(trained: Path, root: str) -> None:
    before = sorted(path.name for path in trained.rglob("*"))
    output = run(["validate", *small(root, trained), "--ckpt_path", CHECKPOINT], trained)
    assert sorted(path.name for path in trained.rglob("*")) == before, "curves and settings are those of the training"
    for metric in ("val/loss", "val/bits_per_byte", "val/bits_per_byte/farm"):
        assert printed(output, metric) == pytest.approx(report(trained)["validation"][metric], rel=1e-5)


def test_a_checkpoint_is_the_model_that_python_loads(trained: Path, root: str) -> None:
    data = FoMoEData(root, sequence_length=16, val_sequences=12)
    model = load_global_model(trained / CHECKPOINT)
    sequences = ValidationSequences(data.manifest, 16, 12, 1)
    batches = [{name: tensor[None] for name, tensor in sequences[i].items()} for i in range(len(sequences))]
    losses = [model.token_losses(model(batch["inputs"])[0], batch["targets"]) for batch in batches]
    tokens = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    loss = sum(float(loss.sum()) for loss in losses) / tokens
    assert loss == pytest.approx(report(trained)["validation"]["val/loss"], rel=1e-5)


def test_the_documents_load_it_too(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/tutorials/to-hugging-face.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code.replace("runs/quickstart/checkpoints/last.ckpt", str(trained / CHECKPOINT)), {})
    assert capsys.readouterr().out.count("tensor") == 2  # the load of each layer


@pytest.mark.slow
def test_a_signal_stops_all_sites_at_the_end_of_a_round(root: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fomoe_pl", "fit", *small(root, tmp_path), "--trainer.max_steps", "1000000"]
    command += ["--trainer.val_check_interval", "1000000"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            time.sleep(0.1)
            if (tmp_path / CHECKPOINT / "manifest.json").is_file():  # it trains
                break
        process.terminate()
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 128 + 15, errors
    assert errors.count("fomoe: stopped by a signal; resume with") == 1
    assert "Traceback" not in errors


def test_a_run_logs_what_the_documents_list(trained: Path) -> None:
    events = EventAccumulator(str(trained / "runs/run"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/loss", "train/grad_norm", "train/learning_rate", "tokens/site", "tokens/global", "val/loss",
        "val/bits_per_byte/sea", "round/train_loss", "comm/wire_MiB/dense", "comm/payload_MiB/moments",
    }  # fmt: skip
    warmup = 24  # the quickstart's
    assert [e.value for e in events.Scalars("train/learning_rate")] == pytest.approx(
        [0.01 * step / warmup for step in (1, 2, 3, 4)]
    )
    before, *after = (e.value for e in events.Scalars("val/bits_per_byte"))
    assert [e.step for e in events.Scalars("val/bits_per_byte")] == [0, 1, 3]
    assert before == pytest.approx(report(trained)["validation_before_training"]["val/bits_per_byte"])
    assert after[-1] < after[0] < before == pytest.approx(8, abs=0.3)


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(trained: Path, root: str, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    run(["fit", *small(root, tmp_path), "--ckpt_path", CHECKPOINT, "--trainer.max_steps", "6"], tmp_path)
    before, after = report(trained), report(tmp_path)
    assert (before["steps"], before["rounds"], after["steps"], after["rounds"]) == (4, 2, 6, 3)
    assert after["tokens"] == {"site": 6 * 32, "global": 2 * 6 * 32}
    assert after["bytes"]["wire"]["dense"] == 1.5 * before["bytes"]["wire"]["dense"]


@pytest.mark.slow
def test_torchrun_trains_the_same_model(trained: Path, root: str, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(["fit", *small(root, tmp_path)], tmp_path, torchrun)
    keys = ("validation", "round", "bytes", "tokens")
    assert {key: report(tmp_path)[key] for key in keys} == {key: report(trained)[key] for key in keys}


@pytest.mark.slow
def test_data_parallelism_by_its_file_trains_validates_and_goes_on(root: str, tmp_path: Path) -> None:
    common = [*small(root, tmp_path), "-c", str(ROOT / "configs/strategy/ddp.yaml")]
    output = run(["fit", *common], tmp_path)
    for noise in ("deprecated", "Warning", "C++", "what():"):
        assert noise not in output, output
    assert report(tmp_path)["strategy"] == "CountedDDPStrategy"
    assert report(tmp_path)["bytes"]["payload"]["dense"] == 4 * 4 * report(tmp_path)["resident_parameters"]
    output = run(["validate", *common, "--ckpt_path", CHECKPOINT], tmp_path)
    assert printed(output, "val/loss") == pytest.approx(report(tmp_path)["validation"]["val/loss"], rel=1e-5)
    run(["fit", *common, "--ckpt_path", CHECKPOINT, "--trainer.max_steps", "6"], tmp_path)
    assert report(tmp_path)["steps"] == 6


class Built(Exception):  # noqa: N818  not an error: the end of what is to be run
    """The Trainer is about to start processes or to train."""


def build(arguments: list[str], patch: pytest.MonkeyPatch) -> FoMoECLI:
    """Parse, instantiate and check, but start nothing."""
    kept: list[FoMoECLI] = []

    class Stopped(FoMoECLI):
        def _check(self) -> None:
            kept.append(self)
            super()._check()
            raise Built

    patch.setattr(cli, "FoMoECLI", Stopped)
    with pytest.raises(Built):
        cli.main(arguments)
    return kept[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_file_after_the_quickstart_makes_a_run(path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The corpus here has bytes for a vocabulary, and its smallest domain eight shards.
    fit = ["--data.root", root, "--model.architecture.vocab_size", "257", "--trainer.logger", "false"]
    built = build(["fit", *QUICKSTART, "-c", str(path), *fit], monkeypatch)
    assert built.trainer.max_steps == 480


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_name_is_its_file(name: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data.root", root, "--trainer.logger", "false"]
    file, named = (
        build(["fit", *QUICKSTART, *arguments, *choice], monkeypatch).trainer.strategy
        for choice in (["-c", str(STRATEGIES[name])], ["--trainer.strategy", name])
    )
    assert type(file) is type(named)
    if isinstance(file, FederatedStrategy):
        assert settings(file) == settings(named)


@pytest.mark.parametrize(
    ("files", "steps"),
    [
        (["model/fomoe-153m", "experiment/four_sites_one_gpu"], 200), (["experiment/routing_eight_domains"], 832),
        (["experiment/two_sites_two_ranks"], 480), (["model/fomoe-1.8b", "experiment/three_data_centres"], 32_000),
    ],
)  # fmt: skip
def test_an_experiment_makes_a_run(root: str, monkeypatch: pytest.MonkeyPatch, files: list[str], steps: int) -> None:
    # On four processes of this machine instead of a GPU.
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "4", f"{STRATEGY}.share_device", "false"]
    corpus = ["--data.root", root, "--model.architecture.vocab_size", "257", "--trainer.logger", "false"]
    given = [word for name in files for word in ("-c", str(ROOT / "configs" / f"{name}.yaml"))]
    if files[-1].endswith("three_data_centres"):  # of two processes each, on one machine
        here[3:] = ["6", "--trainer.num_nodes", "1", f"{STRATEGY}.ranks_per_site", "2", "--data.batch_size", "2"]
        here += ["--data.val_batch_size", "2"]
    built = build(["fit", *given, *here, *corpus], monkeypatch)
    assert (built.trainer.max_steps, built.trainer.num_devices) == (steps, int(here[3]))


def settings(strategy: Any) -> dict[str, Any]:
    found = vars(strategy.settings)
    return {field.name: found[field.name] for field in fields(FederationConfig)} | {
        "outer": str(strategy.settings.rule)
    }


def test_every_name_has_a_file() -> None:
    assert {*REGISTERED} - {"single_site", "ddp_counted"} == {*STRATEGIES} - {"ddp"}


def in_folder(root: str, folder: Path, patch: pytest.MonkeyPatch, *more: str) -> FoMoECLI:
    """The small run, about to start in a folder."""
    patch.chdir(folder)
    return build(["fit", *small(root, folder), *more], patch)


def test_a_run_is_written_beside_another(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def folder(*more: str) -> str:
        cli = in_folder(root, tmp_path, monkeypatch, *more)
        monkeypatch.undo()
        return str(cli.trainer.logger.log_dir)  # type: ignore[union-attr]

    first = tmp_path / "runs/run"
    assert folder() == "runs/run/"
    first.mkdir(parents=True)
    (first / "report.json").touch()
    assert (folder(), folder("--overwrite")) == ("runs/run-2/", "runs/run/")
    assert "this one is written to runs/run-2 (--overwrite replaces" in capsys.readouterr().out
    again = in_folder(root, tmp_path, monkeypatch, "--overwrite")
    monkeypatch.undo()
    assert not again.config.fit.overwrite, "what is saved does not replace a run when it is read again"
    assert (first / "report.json").exists(), "nothing is removed before all is checked"
    monkeypatch.setenv("RANK", "1")
    assert folder() == "runs/run/", "other ranks ask the first one"
    assert "run-2" not in capsys.readouterr().out


def test_intervals_in_rounds_and_one_setting_of_a_callback(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--trainer.val_check_interval", "3 rounds", "--callbacks.ModelCheckpoint.every_n_train_steps", "2 rounds",
            "--callbacks.ModelCheckpoint.save_top_k=1", "--trainer.accumulate_grad_batches", "5",
            "--callbacks.CommunicationMonitor", "null", "--max_tokens", "3000"]  # fmt: skip
    trainer: Any = in_folder(root, tmp_path, monkeypatch, *more).trainer
    assert trainer.val_check_interval == 3 * 2 * 5
    assert (trainer.checkpoint_callback._every_n_train_steps, trainer.checkpoint_callback.filename) == (4, "last")
    assert "CommunicationMonitor" not in {type(callback).__name__ for callback in trainer.callbacks}
    assert trainer.max_steps == 10, "3000 tokens at 2 sites x 5 x 2 x 16 are 9.4 steps, and a round has 2"


def test_one_seed_is_for_all_that_have_none_of_their_own(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["fit", *QUICKSTART, "--data.root", root, "--trainer.logger", "false", "--seed_everything", "7"]
    built = build(arguments, monkeypatch)
    assert (built.model.seed, built.datamodule.seed) == (7, 7)
    built = build([*arguments, "--model.seed", "3"], monkeypatch)
    assert (built.model.seed, built.datamodule.seed) == (3, 7)


def test_without_a_strategy_one_process_trains_the_whole_model(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data.root", root, "--trainer.logger", "false", "--trainer.strategy", "auto"]
    built = build(["fit", *QUICKSTART, *arguments, "--trainer.devices", "1"], monkeypatch)
    assert isinstance(built.trainer.strategy, SingleSiteStrategy)


def test_the_whole_model_goes_where_the_accelerator_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine with a GPU too: the quickstart asks for the CPU.
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", lambda *_: [0])  # which would look for one
    for accelerator, device in ((CPUAccelerator(), "cpu"), (CUDAAccelerator(), "cuda:0")):
        monkeypatch.setattr(type(accelerator), "setup_device", lambda *_: None)
        strategy = SingleSiteStrategy(accelerator=accelerator)
        monkeypatch.setattr(SiteStrategy, "setup_environment", lambda _: None)  # which needs a run
        strategy.setup_environment()
        assert strategy.root_device == torch.device(device)


def _not_reached(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a process was to be started")


@pytest.fixture
def refused(
    root: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Function that gives a command's one message; `ROOT` and `CHECKPOINT` stand for the corpus and a checkpoint."""
    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", _not_reached)

    def message(command: str) -> str:
        command = command.replace("CHECKPOINT", str(trained / CHECKPOINT)).replace("LOGS", str(trained / "runs"))
        arguments = shlex.split(command)
        with pytest.raises(SystemExit) as end:
            cli.main([arguments[0], *small(root, tmp_path), *arguments[1:]])
        assert end.value.code == 2
        printed = capsys.readouterr().err
        lines = [line for line in printed.splitlines() if line.startswith("fomoe: ")]
        assert len(lines) == 1, printed
        assert "Traceback" not in printed
        return printed[printed.index("fomoe: ") :]

    return message


ARCHITECTURE = "--model.architecture"


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (f"fit {STRATEGY}.overlap 3", ["init_args.overlap = 3", "number of sites (2)", "one of [1, 2]"]),
        (f"fit {STRATEGY}.capacities [3,2]", ["init_args.capacities = [3, 2]", "add up to 4", "uch as [2, 2]"]),
        (f"fit {STRATEGY}.places [eu]", ["init_args.places = ['eu']", "there are 2 sites"]),
        (f"fit {STRATEGY}.routing partitioned {STRATEGY}.capacities [3,1]", ["capacities = (3, 1)", "pick 2", "ghost"]),
        (f"fit {ARCHITECTURE}.top_k 9", ["architecture.top_k = 9", "n_experts (4)", "1 to 4"]),
        (f"fit {ARCHITECTURE}.n_heads 3", ["architecture.d_model = 16", "divisible by n_heads (3)"]),
        (f"fit {ARCHITECTURE}.gate tanh", ["model.architecture.gate", "tanh", "sigmoid", "softmax"]),
        (f"fit {ARCHITECTURE}.widht 3", ["widht"]),
        (f"fit {STRATEGY}.local_steps 0", ["init_args.local_steps = 0", "at least 1", "type 32"]),
        (f"fit {STRATEGY}.local_steps '{{0: 1, 3: 2, 6: 4}}'", ["3..6", "rounds of 2", "5 or 7"]),
        (f"fit {STRATEGY}.ranks_per_site 3", ["init_args.ranks_per_site = 3", "must divide", "(2 =", "one of 1, 2"]),
        (f"fit {STRATEGY}.ranks_per_site 2 --data.batch_size 3", ["data.batch_size = 3", "2 ranks", "2 or 4"]),
        (f"fit {STRATEGY}.ranks_per_site 2 {STRATEGY}.sites 2", ["init_args.sites = 2", "tart 4 processes"]),
        (f"fit {STRATEGY}.sites 3", ["init_args.sites = 3", "(2 =", "trainer.devices to 3"]),
        (f"fit {STRATEGY}.share_device true", ["init_args.sites = None", "must be given"]),
        (f"fit {STRATEGY}.wire_dtype float16 {STRATEGY}.inner_moments average", ["wire_dtype = 'float16'", "bfloat16"]),
        ("fit --trainer.max_steps -1", ["trainer.max_steps = -1", "such as 480"]),
        ("fit --trainer.max_epochs 1", ["trainer.max_epochs = 1", "middle of a round", "--max_tokens "]),
        ("fit --max_tokens 0", ["max_tokens = 0", "above 0"]),
        ("fit --trainer.strategy ddp_counted --trainer.val_check_interval '2 rounds'", ["has no rounds"]),
        ("fit --callbacks.RunReprt.folder x", ["callbacks.RunReprt", "Did you mean RunReport"]),
        ("fit --overwrite --ckpt_path auto", ["overwrite = True", "goes on with the run"]),
        ("fit --overwrite --ckpt_path CHECKPOINT --trainer.logger.init_args.save_dir LOGS", ["overwrite", "lies in"]),
        ("fit --trainer.accumulate_grad_batches 0", ["accumulate_grad_batches = 0", "at least 1"]),
        ("fit --trainer.val_check_interval 0", ["val_check_interval = 0", "positive"]),
        ("fit --trainer.gradient_clip_val -1", ["gradient_clip_val = -1", "at least 0"]),
        ("fit --trainer.precision 16-mixed", ["trainer.precision = '16-mixed'", "bf16-mixed"]),
        ("fit --trainer.strategy single_site", ["trainer.devices = 2", "single_site"]),
        (f"fit {STRATEGY}.timeout_seconds -5", ["timeout_seconds = -5", "above 0"]),
        ("fit --model.optimizer.betas [1.5,2]", ["model.optimizer.betas = 1.5", "at least 0 and below 1"]),
        (f"fit {STRATEGY}.outer Nesterov {STRATEGY}.outer.momentum 1.5", ["momentum = 1.5", "at least 0 and below 1"]),
        (f"fit {ARCHITECTURE}.vocab_size 256", ["vocab_size = 256", "(257)", "Set it to 257"]),
        ("fit --data.root nowhere", ["data.root = 'nowhere'", "no nowhere/manifest.json", "fomoe prepare --source"]),
        ("fit --data.num_workers 50", ["data.num_workers = 50", "training shards", "2 sites x 50", "at most"]),
        ("fit --trainer.strategy fomo", ["trainer.strategy = 'fomo'", "fomoe_overlap1", "local_adamw"]),
        ("fit --trainer.strategy fsdp", ["trainer.strategy = 'fsdp'", "fomoe_overlap1", "local_adamw"]),
        (
            "fit --trainer.strategy.class_path lightning.pytorch.strategies.DDPStrategy",
            ["DDPStrategy", "no strategy of fomoe-pl", "local_adamw"],
        ),
        ("fit --trainer.strategy.class_path fomoe_pl.Nothing", ["trainer.strategy", "fomoe_pl.Nothing"]),
        ("fit --trainer.accelerator tpu", ["torch_xla"]),
        ("fit --ckpt_path nowhere", ["ckpt_path = 'nowhere'", "no manifest.json"]),
        ("fit --ckpt_path CHECKPOINT/manifest.json", ["no complete checkpoint"]),
        ("fit --ckpt_path last", ["ckpt_path = 'last'", "no complete checkpoint"]),
        (f"fit --ckpt_path CHECKPOINT {ARCHITECTURE}.d_expert 4", ["d_expert: checkpoint 8, configured 4"]),
        ("validate", ["ckpt_path = None", "needs a checkpoint"]),
        (f"validate --ckpt_path CHECKPOINT {ARCHITECTURE}.d_expert 4", ["d_expert: checkpoint 8, configured 4"]),
        (
            f"validate --ckpt_path CHECKPOINT {ARCHITECTURE}.balance bias",
            ["balance: checkpoint 'aux_loss', configured"],
        ),
        ("validate --ckpt_path CHECKPOINT --data.root nowhere", ["data.root = 'nowhere'"]),
    ],
)
def test_bad_input_gets_one_message_before_anything_starts(refused: Any, command: str, parts: list[str]) -> None:
    message = refused(command)
    assert [part for part in parts if part not in message] == [], message


def test_a_launcher_with_another_number_of_processes_is_refused(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert "trainer.devices = 2: times trainer.num_nodes (1) must be the 3 processes" in refused("fit")


def test_a_gpu_that_is_not_there_is_named(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "trainer.accelerator = 'gpu': torch" in refused("fit --trainer.accelerator gpu")


def test_a_missing_shard_is_named(refused: Any, root: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "train-sea-00003.tar").unlink()
    assert "train-sea-00003.tar is missing" in refused(f"fit --data.root {copy}")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command_that_there_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words)
    told = capsys.readouterr().out
    assert [name for name in (*FoMoECLI.subcommands(), *cli.HUB_COMMANDS, *cli.OTHERS) if name not in told] == []
    assert max(map(len, told.splitlines())) <= 110


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("fomoe-pl 0.")


def test_completion_knows_commands_options_and_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=60, check=False).returncode == 0
    asked = "; ".join(
        f"COMP_WORDS=(fomoe {words}) COMP_CWORD={words.count(' ') + 1}; _fomoe; echo ${{COMPREPLY[*]}}"
        for words in ("ev", "fit --model.optimizer.l", "fit --trainer.strategy.init_args.local", "fit -c strategy/dil")
    )
    done = subprocess.run(
        ["bash"], input=f"{script}\n{asked}\n", text=True, capture_output=True, cwd=tmp_path, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "evaluate", "--model.optimizer.lr", "--trainer.strategy.init_args.local_steps", "strategy/diloco",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", "'train' is no command. Did you mean fit? There are new, prepare, plan"),
        ("evalute model", "Did you mean evaluate?"),
        ("xyzzy", "'xyzzy' is no command. There are new, prepare"),
        ("fit --trainer.max_stepz 3", "--trainer.max_stepz 3. Did you mean --trainer.max_steps?"),
        ("fit --modl.optimizer.lr=3", "Did you mean --model.optimizer.lr?"),
        ("fit -c quickstart --trainer.strategy.init_args.overlp 3", "'overlp' is not accepted. Did you mean overlap?"),
        ("fit", "required: fit.model"),
        ("fit", "Give a configuration, such as -c quickstart"),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(command: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("own_disks", [False, True])
def test_a_run_ends_with_what_can_be_done_next(tmp_path: Path, own_disks: bool) -> None:
    report = RunReport()
    report.path = Path("runs/a/report.json")
    last = Path("runs/a/checkpoints/last.ckpt")
    strategy = SimpleNamespace(
        checkpoints=SimpleNamespace(last_saved=last), content=SimpleNamespace(own_disks=own_disks)
    )
    trainer: Any = SimpleNamespace(
        strategy=strategy, global_step=8, callback_metrics={"val/bits_per_byte": 2.0}, callbacks=[report]
    )
    told = cli._ending(trainer)
    assert told.startswith("finished after 8 steps: 2.000 bits per byte of the global model\ncheckpoint  runs/a/check")
    assert "report      runs/a/report.json" in told
    assert f"fomoe export {'PART... OUTPUT' if own_disks else f'{last} runs/a/model'}" in told
    assert told.endswith("fomoe compare runs/a")
