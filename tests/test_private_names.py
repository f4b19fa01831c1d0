"""Private names of libraries that the package uses: an update that takes one away has to be seen here first."""

import os
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.utils.tensorboard import SummaryWriter


def test_what_we_replace_in_lightning_is_there() -> None:
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(_SignalConnector._sigterm_notifier_fn)
    assert callable(_SignalConnector._slurm_sigusr_handler_fn)
    assert callable(_SubprocessScriptLauncher._call_children_scripts)
    for name in ("_monitor_candidates", "_save_topk_checkpoint", "_save_last_checkpoint"):
        assert callable(getattr(ModelCheckpoint, name))
    assert isinstance(_FitLoop._can_stop_early, property)
    assert callable(_TrainingEpochLoop._num_ready_batches_reached)
    assert {"main_pid", "child_processes", "sleep_period"} <= {*signature(_ChildProcessObserver).parameters}


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
