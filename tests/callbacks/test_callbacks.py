"""Callbacks against a trainer, strategy and module of plain attributes, with values computed by hand."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from fomoe_pl.callbacks import (
    CommunicationMonitor,
    FoMoEProgressBar,
    RoutingStability,
    RunReport,
    ThroughputMonitor,
)
from fomoe_pl.callbacks import throughput as throughput_module
from fomoe_pl.callbacks.progress import human_bytes
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import KINDS, Ledger
from fomoe_pl.federation.topology import Topology
from fomoe_pl.metrics import RoutingHealth
from fomoe_pl.model.backends.kernels import Copies
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency
from fomoe_pl.model.sizes import expert_parameters, flops_by_part
from fomoe_pl.module import FoMoEModule
from tests.training import Run as TrainingRun
from tests.training import fit

MIB = 2**20


class FakeLogger:
    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))


class Run:
    """Four sites, seen from site 0; a round every second step."""

    def __init__(self, folder: Path) -> None:
        self.strategy: Any = SimpleNamespace(
            topology=Topology(4, 1, 0), ledger=Ledger(), rounds_done=0, sync_seconds=0.0, round_stats={},
            has_rounds=True, observers=[], wire_dtype="float32", watch_seconds=0.0, placement=None,
            watch_movement=lambda: None, copy_errors=lambda: None, copy_age=lambda: None,
            agreed_bytes=lambda: 3 * MIB, describe=lambda: "four sites", hyperparameters={"local_steps": 4},
            save_seconds=0.0, measures_sync=True, optimizer_steps=0, tokens_of_all=lambda tokens: 4 * tokens,
        )  # fmt: skip
        self.strategy.context = self.strategy
        self.strategy.counted = self.strategy.ledger
        self.strategy.ledger_of_site = lambda: self.strategy.ledger
        self.logger = FakeLogger(str(folder))
        self.trainer: Any = SimpleNamespace(
            strategy=self.strategy, loggers=[self.logger], logger=self.logger, global_step=0, is_global_zero=True,
            callback_metrics={}, default_root_dir=str(folder), callbacks=[], optimizers=[], precision="32-true",
            max_steps=99, world_size=1, global_rank=0, datamodule=None, accumulate_grad_batches=1,
            gradient_clip_val=None,
        )  # fmt: skip
        self.module: Any = torch.nn.Linear(3, 2)
        self.module.device = torch.device("cpu")
        self.module.tokens_seen = self.module.tokens_of_all_sites = 0
        self.module.validation_before_training = {}
        self.module.watch_routing = self.module.measure_other_views = lambda: None
        self.module.routing_health = RoutingHealth(2, 4)
        self.module.config = ModelConfig(
            vocab_size=8, d_model=4, n_layers=2, n_heads=1, n_experts=4, top_k=2, d_expert=4
        )
        residency = Residency("ghost", ((0, 1), (2, 3)))
        self.module.transformer = SimpleNamespace(residency=residency, layers=[])
        self.module.hparams = {"optimizer": {"lr": 0.5}}

    def start(self, callback: Any) -> None:
        callback.on_train_start(self.trainer, self.module)

    def step(self, callback: Any, *, tokens: int = 100, round_end: bool = False, stepped: bool = True) -> None:
        callback.on_train_batch_start(self.trainer, self.module, None, 0)
        self.trainer.global_step += stepped
        self.strategy.optimizer_steps = self.trainer.global_step
        self.module.tokens_seen += tokens
        self.module.tokens_of_all_sites += tokens * self.strategy.topology.n_sites
        if round_end:
            self.end_round()
        batch = {"inputs": torch.zeros(2, 5)}
        callback.on_train_batch_end(self.trainer, self.module, None, batch, 0)

    def end_round(self) -> None:
        """What the strategy does, alone: the other sites count the same."""
        for observer in self.strategy.observers:
            observer.before_synchronization()
        self.strategy.rounds_done += 1
        self.strategy.round_stats = {"train_loss": 2.5}
        for observer in self.strategy.observers:
            observer.after_synchronization()
            observer.receive(observer.statistics() * 4)

    @property
    def steps_logged(self) -> list[int]:
        """Optimizer steps taken at each entry; loggers count them from 0."""
        return [step + 1 for step, _ in self.logger.lines]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only when a test says so."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: clock.now)
    return clock


def test_routing_of_all_sites_is_logged_at_round_ends_and_reset(run: Run) -> None:
    callback = RoutingStability(every_n_rounds=4, every_n_steps=1, probe_sequences=0)
    run.start(callback)
    # Layer 0 even, layer 1 all to one expert; of 8 picks 6 and 2 are live.
    load_LE = torch.tensor([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]])
    resident_LE = torch.tensor([[True, True, True, False], [False, True, True, True]])
    run.module.routing_health.update(load_LE, torch.tensor([0.5, 0.1]), 8, None, resident_LE)
    run.step(callback)
    assert run.steps_logged == []  # between rounds nothing is read, whatever every_n_steps says
    run.step(callback, round_end=True)
    assert run.steps_logged == [2]
    values = run.logger.lines[0][1]
    assert values["routing/ghost_fraction/layer_00"] == pytest.approx(0.25)
    assert values["routing/ghost_fraction/layer_01"] == pytest.approx(1)
    assert values["routing/ghost_excess/layer_01"] == pytest.approx(0.75)
    assert values["routing/load_entropy/mean"] == pytest.approx(0.5)
    assert values["routing/gate_entropy/mean"] == pytest.approx(0.3)
    assert values["routing/max_violation/layer_01"] == pytest.approx(3)
    loads = ("load_entropy", "load_cv", "max_violation", "starved_experts")
    statistics = [*loads, *(f"live_{name}" for name in loads), "ghost_fraction", "ghost_excess", "gate_entropy"]
    assert set(values) == {f"routing/{s}/{of}" for s in statistics for of in ("mean", "layer_00", "layer_01")}
    assert callback.view is not None
    assert float(callback.view.health.picks) == 4 * 8  # of all sites
    assert float(run.module.routing_health.picks) == 0
    # The second round is not looked at: its means alone. The fifth is; the same keys where nothing was routed.
    for _ in range(4):
        run.step(callback, round_end=True)
    assert [set(line) for _, line in run.logger.lines[1:4]] == [{key for key in values if "/mean" in key}] * 3
    assert set(run.logger.lines[4][1]) == set(values)


def test_in_synchronous_training_the_interval_counts_optimizer_steps(run: Run) -> None:
    run.strategy.has_rounds = False
    callback = CommunicationMonitor(every_n_steps=2)
    run.start(callback)
    for micro_batch in range(1, 9):
        run.step(callback, stepped=micro_batch % 2 == 0)  # two micro-batches a step
    assert run.steps_logged == [2, 4]


def test_rounds_replace_the_interval(run: Run) -> None:
    callback = CommunicationMonitor(every_n_steps=1)
    run.trainer.global_step = 6
    run.strategy.rounds_done = 3  # resumed
    run.start(callback)
    for step in range(1, 7):
        run.step(callback, round_end=step % 2 == 0)
    assert run.steps_logged == [8, 10, 12]


def test_communication_by_hand(run: Run, clock: SimpleNamespace) -> None:
    ledger = run.strategy.ledger
    ledger.send("control", 7 * MIB)  # before training: in the totals, not in the first round nor in bytes per token
    callback = CommunicationMonitor()
    run.start(callback)
    ledger.all_reduce("dense", 8 * MIB, 4)  # ring of 4: 1.5 x 8 = 12
    ledger.all_reduce("expert", 4 * MIB, 2)  # ring of 2: 4
    run.strategy.sync_seconds = 0.5
    clock.now += 2
    run.step(callback, round_end=True)
    ledger.all_reduce("dense", 8 * MIB, 4)
    ledger.send("evaluation", 3 * MIB)
    run.strategy.sync_seconds = 0.75
    clock.now += 2
    run.step(callback, round_end=True)
    first, second = (values for _, values in run.logger.lines)
    assert first["comm/payload_MiB/dense"] == 8
    assert first["comm/wire_MiB/dense"] == 12
    assert first["comm/wire_MiB/expert"] == 4
    assert first["comm/wire_MiB/total"] == 7 + 16
    assert first["comm/round_wire_MiB/total"] == 16
    assert first["comm/sync_s"] == 0.5
    assert first["comm/wire_per_token_B"] == pytest.approx(16 * MIB / 100)
    assert first["round/train_loss"] == 2.5
    assert second["comm/payload_MiB/total"] == 7 + 8 + 4 + 8 + 3
    assert second["comm/round_wire_MiB/dense"] == 12
    assert second["comm/round_wire_MiB/expert"] == 0
    assert second["comm/round_wire_MiB/total"] == 15
    assert second["comm/wire_per_token_B"] == pytest.approx(31 * MIB / 200)
    assert second["comm/training_wire_MiB"] == 7 + 16 + 12
    assert second["comm/bandwidth_MiB_per_s"] == pytest.approx(12 / 0.25)
    assert second["comm/sync_share"] == pytest.approx(0.75 / 4)
    # 28 MiB since the start of training take 2.35 s on a link of 0.1 Gbit/s; 3.25 s were local.
    assert second["comm/modelled_s/0.1Gbps"] == pytest.approx(3.25 + 28 * MIB * 8 / 1e8)
    assert second["comm/modelled_s/10Gbps"] == pytest.approx(3.25 + 28 * MIB * 8 / 1e10)
    # Of width 4: 8 x 4 embedded; 2 layers of 4 x 16 attention, 4 norms of 4, 4 router rows, 4 experts of 32; 2 norms.
    parameters = 32 + 2 * (64 + 16 + 16 + 128) + 8
    assert second["comm/ddp_wire_MiB"] * MIB == pytest.approx(2 * 4 * parameters * 1.5)
    assert second["comm/replica_wire_MiB"] * MIB == pytest.approx(2 * 4 * parameters * 1.5)
    assert second["comm/of_ddp"] == pytest.approx(35 * MIB / (2 * 4 * parameters * 1.5))
    # What each site had sent when the round ended; the stand-in for the other sites adds the same three times more.
    assert second["comm/site_wire_MiB/site_00"] == 4 * (7 + 16 + 12 + 3)
    assert second["comm/site_wire_MiB/site_03"] == 0
    groups = ("payload", "wire", "round_wire")
    keys = {f"comm/{group}_MiB/{kind}" for group in groups for kind in (*KINDS, "total")}
    keys |= {f"comm/site_wire_MiB/site_{site:02d}" for site in range(4)} | {"round/train_loss"}
    keys |= {f"comm/modelled_s/{link}Gbps" for link in ("0.1", "1", "10")}
    keys |= {f"comm/{name}_MiB" for name in ("training_wire", "all_sites_wire", "ddp_wire", "replica_wire")}
    keys |= {f"comm/{name}" for name in ("of_ddp", "of_replica", "sync_s", "sync_share", "wire_per_token_B")}
    assert set(first) == set(second) == keys | {"comm/bandwidth_MiB_per_s"}


def test_replicas_are_counted_in_the_dtype_of_the_wire(run: Run, clock: SimpleNamespace) -> None:
    sent = {}
    for dtype in ("float32", "bfloat16"):
        run.strategy.wire_dtype = dtype
        callback = CommunicationMonitor()
        run.start(callback)
        clock.now += 1
        run.step(callback, round_end=True)
        values = run.logger.lines[-1][1]
        sent[dtype] = values["comm/replica_wire_MiB"] / run.strategy.rounds_done
        run.strategy.observers.clear()
    assert sent["bfloat16"] == pytest.approx(sent["float32"] / 2)


def test_what_data_parallelism_hides_is_not_called_zero(run: Run, clock: SimpleNamespace) -> None:
    run.strategy.has_rounds = run.strategy.measures_sync = False
    communication, throughput, report = CommunicationMonitor(1), ThroughputMonitor(1), RunReport()
    for callback in (communication, throughput, report):
        run.start(callback)
    run.strategy.ledger.all_reduce("dense", 8 * MIB, 4)
    clock.now += 2
    for callback in (communication, throughput, report):
        run.step(callback)
    tags = {tag for _, values in run.logger.lines for tag in values}
    assert not [tag for tag in tags if re.search("comm/sync|bandwidth|local", tag)]
    assert "comm/of_ddp" in tags
    values = run.logger.lines[0][1]
    # All of the 2 s, and 12 MiB over 1 Gbit/s.
    assert values["comm/modelled_s/1Gbps"] == pytest.approx(2 + 12 * MIB * 8 / 1e9)
    found = report.report(run.trainer, run.module)
    assert found["sync_seconds"] is None
    assert found["tokens_per_second"]["local"] is None
    assert found["tokens_per_second"]["with_sync"] > 0


def timed_steps(run: Run, callback: Any, clock: SimpleNamespace) -> None:
    """Four steps of 2 s and 100 tokens, 1 s of synchronisation in the second; 50 s of validation and 30 s of saving."""
    run.start(callback)
    for step in range(1, 5):
        clock.now += 2  # between batches, like waiting for data: it counts
        if step == 2:
            clock.now += 1
            run.strategy.sync_seconds += 1
        run.step(callback, round_end=step == 2)
        if step == 2:
            callback.on_validation_start(run.trainer, run.module)
            clock.now += 50
            callback.on_train_batch_start(run.trainer, run.module, None, 0)
        if step == 3:
            callback.on_save_checkpoint(run.trainer, run.module, {})
            clock.now += 30
            run.strategy.sync_seconds += 4  # nor does a gather for the checkpoint count
            callback.on_train_batch_start(run.trainer, run.module, None, 0)


def test_throughput_by_hand(run: Run, clock: SimpleNamespace) -> None:
    callback = ThroughputMonitor(every_n_steps=2)
    loads_LE, resident_LE = torch.full((2, 4), 2.0), torch.tensor([[True, False, False, False]]).expand(2, 4)
    run.module.routing_health.update(loads_LE, torch.zeros(2), 8, None, resident_LE)
    timed_steps(run, callback, clock)
    assert run.steps_logged == [2, 4]
    first, second = (values for _, values in run.logger.lines)
    assert first["throughput/local_tokens_per_s"] == pytest.approx(200 / 4)
    assert first["throughput/with_sync_tokens_per_s"] == pytest.approx(200 / 5)
    assert first["throughput/with_sync_global_tokens_per_s"] == pytest.approx(4 * 200 / 5)
    assert second["throughput/local_tokens_per_s"] == pytest.approx(200 / 4)
    assert second["throughput/with_sync_tokens_per_s"] == pytest.approx(200 / 4)
    # A process with torch in it has at least tens of MiB and no TiB: the unit is right.
    assert 50 < first["memory/peak_MiB"] < 1e6
    assert second["time/train_s"] == pytest.approx(9)
    assert second["memory/parameters_MiB"] == pytest.approx(8 * 4 / MIB)
    assert second["memory/anchors_MiB"] == 3
    config = run.module.config
    nominal = flops_by_part(config, 5).training
    assert second["throughput/nominal_TFLOP_per_s"] == pytest.approx(nominal * 50 / 1e12)
    # One of four picks was executed in the round: half an expert a token and layer.
    executed = flops_by_part(config, 5, executed_picks=0.5).training
    assert second["throughput/executed_TFLOP_per_s"] == pytest.approx(executed * 50 / 1e12)
    assert set(first) == set(second) == {
        "throughput/local_tokens_per_s", "throughput/with_sync_tokens_per_s",
        "throughput/with_sync_global_tokens_per_s", "throughput/nominal_TFLOP_per_s",
        "throughput/executed_TFLOP_per_s", "time/train_s", "time/watch_s", "memory/peak_MiB",
        *(f"memory/{part}_MiB" for part in ("parameters", "gradients", "moments", "anchors")),
    }  # fmt: skip


@pytest.mark.parametrize("has_values", [True, False])
def test_copies_count_with_the_parameters_and_halve_gradients(run: Run, has_values: bool) -> None:
    places = [torch.empty(n, dtype=torch.bfloat16) for n in (3, 2)]
    experts = SimpleNamespace(copies=Copies(places[0], places[1], has_values))
    run.module.transformer.layers = [SimpleNamespace(moe=SimpleNamespace(experts=experts, shadow=None))]
    held = throughput_module.held_bytes(run.trainer, run.module)
    assert held["parameters"] == 8 * 4 + (5 * 2 if has_values else 0)
    assert held["gradients"] == 8 * 4 - 5 * 2


def test_packed_copies_of_absent_experts_are_counted_apart(run: Run) -> None:
    assert "copies" not in throughput_module.held_bytes(run.trainer, run.module)
    shadow = SimpleNamespace(w_in=torch.empty(2, 34, dtype=torch.uint8), w_out=torch.empty(2, 17, dtype=torch.uint8))
    run.module.transformer.layers = [
        SimpleNamespace(moe=SimpleNamespace(experts=SimpleNamespace(copies=None), shadow=shadow))
    ]
    held = throughput_module.held_bytes(run.trainer, run.module)
    assert (held["copies"], held["parameters"]) == (2 * (34 + 17), 8 * 4)


def test_picks_that_copies_compute_are_executed_and_learn_nothing(run: Run, clock: Any) -> None:
    callback = ThroughputMonitor(every_n_steps=1)
    run.module.transformer.residency = replace(run.module.transformer.residency, routing="shadow")
    run.start(callback)
    resident_LE = (torch.arange(4) < 1).expand(2, 4)
    run.module.routing_health.update(torch.full((2, 4), 2.0), torch.zeros(2), 8, None, resident_LE)
    clock.now += 1
    run.step(callback, round_end=True)
    config = run.module.config
    values = run.logger.lines[-1][1]
    learnt = 2 * 2 * 1.5 * expert_parameters(config)  # one and a half of two picks in two layers, without this product
    expected = flops_by_part(config, 5).training - learnt
    assert values["throughput/executed_TFLOP_per_s"] == pytest.approx(expected * 100 / 1e12)
    assert values["throughput/nominal_TFLOP_per_s"] > values["throughput/executed_TFLOP_per_s"]


def test_watching_is_no_part_of_local_steps(run: Run, clock: SimpleNamespace) -> None:
    callback = ThroughputMonitor(every_n_steps=1)
    run.start(callback)
    clock.now += 3
    run.strategy.watch_seconds += 1
    run.step(callback)
    values = run.logger.lines[0][1]
    assert values["throughput/local_tokens_per_s"] == pytest.approx(100 / 2)
    assert values["throughput/with_sync_tokens_per_s"] == pytest.approx(100 / 3)
    assert values["time/watch_s"] == pytest.approx(1)
    assert "throughput/executed_TFLOP_per_s" not in values  # not measured before a round ends


@pytest.mark.parametrize("hook", ["on_validation_start", "on_save_checkpoint"])
def test_what_others_watch_before_a_validation_or_a_save_is_counted(run: Run, clock: Any, hook: str) -> None:
    callback = ThroughputMonitor(every_n_steps=2)
    run.start(callback)
    clock.now += 2
    run.step(callback)
    clock.now += 3  # a callback behind it draws
    run.strategy.watch_seconds += 3
    for _ in range(2):  # a validation, and then perhaps a save
        getattr(callback, hook)(run.trainer, run.module, *([{}] if hook == "on_save_checkpoint" else []))
        clock.now += 70
    clock.now += 70
    callback.on_train_batch_start(run.trainer, run.module, None, 0)
    clock.now += 2
    run.step(callback)
    values = run.logger.lines[0][1]
    assert values["time/watch_s"] == pytest.approx(3)
    assert values["time/train_s"] == pytest.approx(7)
    assert values["throughput/local_tokens_per_s"] == pytest.approx(200 / 4)


def test_a_save_by_an_earlier_callback_is_no_training(run: Run, clock: Any) -> None:
    callback = ThroughputMonitor(every_n_steps=1)
    run.start(callback)
    callback.on_train_batch_start(run.trainer, run.module, None, 0)
    clock.now += 2
    run.module.tokens_seen, run.trainer.global_step = 100, 1
    callback.on_save_checkpoint(run.trainer, run.module, {})
    clock.now += 30
    callback.on_train_batch_end(run.trainer, run.module, None, {"inputs": torch.zeros(2, 5)}, 0)
    values = run.logger.lines[0][1]
    assert values["time/train_s"] == pytest.approx(2)
    assert values["throughput/local_tokens_per_s"] == pytest.approx(100 / 2)


@pytest.mark.parametrize("read", [False, True], ids=["nobody else reads", "somebody else reads"])
def test_executed_picks_are_those_of_the_round(run: Run, clock: Any, read: bool) -> None:
    callback = ThroughputMonitor(every_n_steps=1)
    run.start(callback)
    executed = []
    for residents in (1, 3):
        resident_LE = (torch.arange(4) < residents).expand(2, 4)
        run.module.routing_health.update(torch.full((2, 4), 2.0), torch.zeros(2), 8, None, resident_LE)
        clock.now += 1
        run.step(callback, round_end=True)
        if read:
            run.module.routing_health.reset()
        executed.append(run.logger.lines[-1][1]["throughput/executed_TFLOP_per_s"])
    config = run.module.config
    expected = [flops_by_part(config, 5, executed_picks=2 * share).training * 100 / 1e12 for share in (1 / 4, 3 / 4)]
    assert executed == pytest.approx(expected)


def test_the_stall_of_a_save_is_logged_once(run: Run, clock: SimpleNamespace) -> None:
    callback = ThroughputMonitor(every_n_steps=1)
    run.strategy.save_seconds = 5.0  # of another fit
    run.start(callback)
    for stall in (0.0, 2.0, 0.0):
        clock.now += 1
        run.strategy.save_seconds += stall
        run.step(callback)
    run.strategy.save_seconds += 3.0
    callback.on_train_end(run.trainer, run.module)
    assert [values.get("time/save_stall_s") for _, values in run.logger.lines] == [None, 2.0, None, 3.0]


def test_report(run: Run, clock: SimpleNamespace, tmp_path: Path) -> None:
    callback = RunReport()
    run.strategy.ledger.all_reduce("dense", 80, 4)
    run.strategy.ledger.send("evaluation", 5)
    run.trainer.callback_metrics = {
        "val/loss": torch.tensor(1.5), "val/bits_per_byte": torch.tensor(2.25),
        "val/bits_per_byte/law": torch.tensor(math.nan), "train/loss": torch.tensor(9.0),
    }  # fmt: skip
    run.module.validation_before_training = {"val/bits_per_byte": 8.0, "val/bits_per_byte/empty": math.nan}
    timed_steps(run, callback, clock)
    callback.on_train_end(run.trainer, run.module)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report.pop("peak_memory_mib") > 50
    nothing = dict.fromkeys(KINDS, 0)
    assert report == {
        "strategy": "SimpleNamespace",
        "method": "four sites",
        "data": None,
        "routing": {},
        "sites": 4,
        "steps": 4,
        "rounds": 1,
        "tokens": {"site": 400, "global": 1600},
        "validation": {"val/loss": 1.5, "val/bits_per_byte": 2.25, "val/bits_per_byte/law": None},
        "round": {"train_loss": 2.5},
        "bytes": {
            "payload": {**nothing, "dense": 80, "evaluation": 5, "total": 85},
            "wire": {**nothing, "dense": 120, "evaluation": 5, "total": 125},
        },
        "train_seconds": pytest.approx(9),
        "sync_seconds": pytest.approx(1),
        "watch_seconds": 0,
        "evaluations": {},
        "other_views_step": None,
        "looked_step": None,
        "validation_step": None,
        "settings": {
            "local_steps": 4,
            "optimizer.lr": 0.5,
            "accumulate_grad_batches": 1,
            "gradient_clip_val": None,
            "precision": "32-true",
        },
        "validation_before_training": {"val/bits_per_byte": 8.0, "val/bits_per_byte/empty": None},
        "tokens_per_second": {"local": pytest.approx(400 / 8), "with_sync": pytest.approx(400 / 9)},
        "resident_parameters": 8,
    }


def test_report_goes_where_it_is_told(run: Run, tmp_path: Path) -> None:
    callback = RunReport(folder=str(tmp_path / "new" / "folder"))
    run.start(callback)
    run.step(callback)
    callback.on_train_end(run.trainer, run.module)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")] == [Path("new/folder/report.json")]


@pytest.mark.parametrize(
    "callback", [RoutingStability(probe_sequences=0), CommunicationMonitor(1), ThroughputMonitor(1), RunReport()]
)
def test_other_ranks_write_nothing(run: Run, tmp_path: Path, callback: Any) -> None:
    run.trainer.is_global_zero = False
    run.start(callback)
    run.module.routing_health.update(torch.ones(2, 4), torch.zeros(2), 4)
    run.step(callback, round_end=True)
    callback.on_train_end(run.trainer, run.module)
    assert run.logger.lines == []
    assert list(tmp_path.iterdir()) == []
    if isinstance(callback, RoutingStability):
        assert float(run.module.routing_health.picks) == 0  # all ranks' sums start again together


def test_lightnings_own_strategy_is_one_site_without_bytes(run: Run) -> None:
    run.trainer.strategy = SimpleNamespace()  # has nothing that ours have
    callback = CommunicationMonitor(every_n_steps=1)
    run.start(callback)
    run.step(callback)
    assert run.logger.lines[0][1]["comm/wire_MiB/total"] == 0


@pytest.mark.parametrize("kind", [RoutingStability, CommunicationMonitor, ThroughputMonitor])
def test_an_interval_below_one_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.every_n_steps = 0"):
        kind(every_n_steps=0)


def test_progress_bar_items(run: Run) -> None:
    bar = FoMoEProgressBar()
    assert bar.get_metrics(run.trainer, run.module) == {"round": 0, "sent": "0 B"}
    run.strategy.ledger.send("dense", 3 * MIB // 2)
    run.strategy.rounds_done = 2
    run.trainer.callback_metrics = {"train/loss": torch.tensor(1.23456), "val/bits_per_byte": torch.tensor(2.5)}
    shown = bar.get_metrics(run.trainer, run.module)
    assert shown == {"loss": "1.235", "bpb": "2.500", "round": 2, "sent": "1.5 MiB"}


def test_progress_bar_says_where_training_starts(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TQDMProgressBar, "on_sanity_check_end", lambda *_: None)  # closes bars that are not drawn here
    run.module.validation_before_training = {"val/bits_per_byte": 8.125}
    FoMoEProgressBar().on_sanity_check_end(run.trainer, run.module)
    assert "8.125 bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**30, "5.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_human_bytes(n: int, text: str) -> None:
    assert human_bytes(n) == text


class Zeros(LightningDataModule):
    def train_dataloader(self) -> Any:
        tokens = torch.zeros(2, 4, dtype=torch.int64)
        batch = {"inputs": tokens, "targets": tokens, "domain": torch.zeros(2, dtype=torch.int64)}
        return DataLoader([batch] * 8, batch_size=None)


def trained(folder: Path, **settings: Any) -> Trainer:
    config = ModelConfig(d_model=8, n_layers=1, n_heads=1, d_expert=4, n_experts=2, top_k=1, vocab_size=8)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=str(folder), **settings,
    )  # fmt: skip
    trainer.fit(FoMoEModule(config), datamodule=Zeros())
    return trainer


def test_nothing_is_read_for_the_bar_between_its_updates(tmp_path: Path) -> None:
    """A logged value with `prog_bar=True` is read after every step, and each time the host waits for the GPU."""
    trainer = trained(tmp_path, max_steps=2, log_every_n_steps=1, callbacks=[FoMoEProgressBar()])
    assert "train/loss" in trainer.callback_metrics
    assert trainer.progress_bar_metrics == {}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_a_terminal_there_is_a_line_at_each_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int
) -> None:
    trained(tmp_path, max_steps=3, log_every_n_steps=2, accumulate_grad_batches=accumulate,
            callbacks=[FoMoEProgressBar()])  # fmt: skip
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert [re.search(r"step (\d/3) ", line)[1] for line in lines] == ["2/3", "3/3"]  # type: ignore[index]
    for line in lines:
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step \d/3  round 0  loss \S+  lr \S+  grad \S+  [\d,]+ tokens/s  "
            r"memory [\d,]+ MiB  waited 0\.0 s  sent 0 B  left \d+:\d\d:\d\d",
            line,
        )
    trained(tmp_path, max_steps=2, log_every_n_steps=1, callbacks=[FoMoEProgressBar(refresh_rate=0)])
    assert "tokens/s" not in capsys.readouterr().out


def test_a_bar_counts_the_runs_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fomoe_pl.callbacks.progress._on_terminal", lambda: True)
    bar = FoMoEProgressBar(refresh_rate=2)
    trained(tmp_path, max_steps=3, log_every_n_steps=1, accumulate_grad_batches=2, callbacks=[bar])
    shown = capsys.readouterr().out
    assert "tokens/s" not in shown
    assert re.search(r"3/3 .* loss \d\.\d{3}, round 0, 0 B sent \[00:00 left\]", shown)
    assert "2/3 " in shown


def test_a_trainer_takes_them_all_and_the_bar_replaces_lightnings(tmp_path: Path) -> None:
    callbacks = [RoutingStability(), CommunicationMonitor(), ThroughputMonitor(), RunReport(), FoMoEProgressBar()]
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path), callbacks=list(callbacks))
    assert trainer.progress_bar_callback is callbacks[-1]


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"max_steps": 12, "val_check_interval": 2}, [8, 12]),  # the fourth, and the last
        ({"max_steps": 7, "val_check_interval": 3}, [7]),
        ({"max_steps": 4, "val_check_interval": 4, "accumulate_grad_batches": 2}, [4]),
        ({"max_steps": -1, "val_check_interval": 2, "max_epochs": 1, "limit_train_batches": 10}, [8, 10]),
    ],
)
def test_the_last_validation_measures_other_views(
    root: str, tmp_path: Path, settings: dict[str, Any], measured: list[int]
) -> None:
    class Notes(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_validation_start(self, trainer: Trainer, module: Any) -> None:
            self.steps += [trainer.global_step] * module.measures_other_views

    stability, notes = RoutingStability(other_views_every=4), Notes()
    trainer = {"limit_val_batches": 1, **settings}
    fit(TrainingRun(root=root, folder=str(tmp_path), strategy="single", trainer=trainer), 0, 1, [stability, notes])
    assert notes.steps == measured
    assert stability.other_views_step == measured[-1]


@pytest.mark.parametrize("watched", [False, True])
def test_routing_is_only_measured_for_those_who_read_it(root: str, tmp_path: Path, watched: bool) -> None:
    class Counts(TorchDispatchMode):
        entropies = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.entropies += "entr" in str(func)
            return func(*args, **(kwargs or {}))

    settings = {"max_steps": 3}
    callbacks = [RoutingStability(every_n_steps=9, probe_sequences=0)] if watched else []
    with Counts() as counts:
        run = TrainingRun(root=root, folder=str(tmp_path), strategy="single", trainer=settings)
        trainer = fit(run, 0, 1, callbacks)
    health: Any = trainer.lightning_module.routing_health
    assert float(health.picks) == watched * 3 * 3 * 16 * 2
    assert counts.entropies == watched * 3 * 2  # a layer and step
