"""Private names of libraries that the package uses: an update that takes one away has to be seen here first."""

import ast
import importlib
import inspect
import os
import re
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _WorkerOutput
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.utils.tensorboard import SummaryWriter

from fomoe_pl.lightning_internals import (
    given_version,
    group_settings,
    requested_devices,
    set_device,
    validation_seconds,
)
from tests.test_architecture import own, private

ROOT = Path(__file__).parents[1]
INTERNALS = "fomoe_pl.lightning_internals"


def test_what_we_replace_in_lightning_is_there() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(_SignalConnector._sigterm_notifier_fn)
    assert callable(_SignalConnector._slurm_sigusr_handler_fn)
    assert callable(_SubprocessScriptLauncher._call_children_scripts)
    assert callable(_MultiProcessingLauncher._wrapping_function)
    assert callable(_MultiProcessingLauncher._collect_rank_zero_results)
    assert _WorkerOutput._fields == ("best_model_path", "weights_path", "trainer_state", "trainer_results", "extra")
    for name in ("_monitor_candidates", "_save_topk_checkpoint", "_save_last_checkpoint"):
        assert callable(getattr(ModelCheckpoint, name))
    assert isinstance(_FitLoop._can_stop_early, property)
    assert callable(_TrainingEpochLoop._num_ready_batches_reached)
    for kind, names in {
        DDPStrategy: ("_setup_model", "_register_ddp_hooks", "_get_process_group_backend"),
        Strategy: ("_configure_launcher",), LightningCLI: ("_parse_ckpt_path",),
    }.items():  # fmt: skip
        assert all(callable(getattr(kind, name)) for name in names)
    assert {"main_pid", "child_processes", "sleep_period"} <= {*signature(_ChildProcessObserver).parameters}


def test_what_we_ask_of_lightning_is_answered(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(devices=3, val_check_interval="00:00:01:30", check_val_every_n_epoch=None, **settings)
    assert (requested_devices(trainer), validation_seconds(trainer)) == (3, 90.0)
    assert validation_seconds(Trainer(**settings)) is None
    assert (given_version(CSVLogger(str(tmp_path), version=4)), given_version(CSVLogger(str(tmp_path)))) == (4, None)
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    set_device(strategy, torch.device("meta"))
    assert strategy.root_device == torch.device("meta")
    ddp = DDPStrategy(parallel_devices=[torch.device("cpu")], timeout=timedelta(seconds=7))
    assert group_settings(ddp) == ("gloo", timedelta(seconds=7))


def of_lightning(name: str) -> bool:
    return re.match(r"(lightning|pytorch_lightning|lightning_fabric)(\.|$)", name) is not None


def known_to_lightning() -> set[str]:
    """Private names that its sources define."""
    text = "".join(path.read_text() for path in Path(lightning.__file__).parent.rglob("*.py"))
    return {*re.findall(r"(?:def|class|self\.) ?(_[a-zA-Z]\w*)", text)}


def reaches_in(source: str, names: set[str]) -> list[str]:
    """Private names of Lightning that a source imports or uses, but for those of its own classes."""
    tree, found = ast.parse(source), []
    given = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and own(node)}
    given |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and of_lightning(node.module or ""):
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [word for word in words if private(word)]
        elif isinstance(node, ast.Attribute) and not own(node) and node.attr in names - given:
            found.append(ast.unparse(node))
    return found


def shared_with_bases(kind: type) -> set[str]:
    """Private names of a class that its bases in Lightning have too: an override, a use, or a collision."""
    bases = [base for base in kind.__mro__ if of_lightning(base.__module__)]
    theirs = {name for base in bases for name in vars(base) if private(name)}
    theirs |= {name for base in bases for name in re.findall(r"self\.(_[a-zA-Z]\w*)", inspect.getsource(base))}
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    ours = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and own(node)}
    return {*filter(private, ours | {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)})} & theirs


def test_one_file_reaches_into_lightning() -> None:
    names, found = known_to_lightning(), []
    for path in sorted((ROOT / "fomoe_pl").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == INTERNALS or "lightning" not in (source := path.read_text()):
            continue
        found += [f"{module}: {name}" for name in reaches_in(source, names)]
        for kind in vars(importlib.import_module(module)).values():
            if isinstance(kind, type) and kind.__module__ == module:
                found += [f"{module}.{kind.__name__}: {name}" for name in sorted(shared_with_bases(kind))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.fabric.utilities.seed import _collect_rng_states",
        "from lightning.fabric.utilities._private import thing",
        "def f(trainer):\n    return trainer._signal_connector",
        "def f(trainer):\n    trainer.fit_loop._can_stop_early = True",
    ],
)
def test_planted_reaches_are_found(source: str) -> None:
    assert len(reaches_in(source, known_to_lightning())) == 1
    assert not reaches_in("def f(trainer):\n    return trainer.global_step", known_to_lightning())


class _Overrides(DDPStrategy):
    def _setup_model(self, model: Any) -> Any:
        return model

    def seconds(self) -> float:
        return self._timeout.total_seconds() if self._timeout else self._own  # type: ignore[attr-defined]


def test_a_planted_override_is_found() -> None:
    assert shared_with_bases(_Overrides) == {"_setup_model", "_timeout"}


def test_random_states_and_the_store_behave() -> None:
    states = _collect_rng_states()
    first = torch.rand(3)
    _set_rng_states(states)
    assert torch.equal(torch.rand(3), first)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        dist.distributed_c10d._get_default_store().set("key", "value")
        own: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        assert own.get("key") == b"value"
        assert own.compare_set("key", "", "other") == b"value"
        assert own.compare_set("new", "", "first") == b"first"
        with pytest.raises(dist.DistStoreError):  # not that of a broken connection
            own.wait(["nowhere"], timedelta(seconds=0.1))
        assert hasattr(dist.distributed_c10d._get_default_group(), "bound_device_id")
        under: Any = dist.distributed_c10d._get_default_store()
        while isinstance(under, dist.PrefixStore):
            under = under.underlying_store
        assert (under.host, under.port) == ("127.0.0.1", store.port)
    finally:
        dist.destroy_process_group()


def test_the_file_behind_tensorboards_writer_is_there(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    file = writer._get_file_writer().event_writer._async_writer._writer._writer
    assert callable(file.write)
    assert Path(os.fsdecode(file.filename)).parent == tmp_path
    writer.close()
