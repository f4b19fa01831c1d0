"""Every file of configs/strategy on four sites: bytes, hidden traffic, validation, agreement."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fomoe_pl.callbacks import CommunicationMonitor, RoutingStability, ThroughputMonitor
from fomoe_pl.costs.bytes import control_bytes, ddp_step_bytes, metric_bytes_of, predict_bytes, replica_round_bytes
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.model.sizes import parameter_counts
from tests.distributed import run_distributed
from tests.federation.toy import digest
from tests.strategies.observers import Save, Traffic
from tests.training import STRATEGIES, Run, fit, from_yaml, launched_as, parameters, short_rounds, validate

SITES = 4
K, STEPS, VALIDATIONS = 2, 9, (3, 6, 9)  # the first validation is in mid-round, the last round is a partial one
KINDS = ("dense", "expert", "moments", "migration", "shadow", "evaluation")
# Beside the files: ghost experts on one site each, and full replicas through FoMoE's settings.
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "partitioned_random": ("fomoe_random", {"routing": "partitioned", "overlap": 2, "reshuffle_rounds": 1}),
    "shadow_random": (
        "fomoe_shadow",
        {"placement": "random", "reshuffle_rounds": 2, "shadow_bits": 2, "shadow_refresh": 3},
    ),
    "diloco_random": ("fomoe_diloco", {"placement": "random", "reshuffle_rounds": 2}),
    "fomoe_full": ("fomoe", {"overlap": SITES}),
    "fomoe_diloco_full": ("fomoe_diloco", {"overlap": SITES}),
}
NAMES = [*STRATEGIES, *EXTRA]
VIEWS = ("val/routing_necessity_nats", "val/own_view_gap_nats")


def make_run(name: str, root: str, folder: str) -> Run:
    base, changes = EXTRA.get(name, (name, {}))
    kind, settings = from_yaml(base)
    if kind == "federated":
        settings = short_rounds(settings, K) | changes
    trainer = {"max_steps": STEPS, "val_check_interval": 3, "limit_val_batches": None, "gradient_clip_val": 1.0,
               "enable_checkpointing": True}  # fmt: skip
    return Run(root=root, folder=folder, strategy=kind, settings=settings, trainer=trainer)


def watchers() -> list[L.Callback]:
    return [RoutingStability(2, 1, 6, 5, other_views_every=2), CommunicationMonitor(1), ThroughputMonitor(1)]


def _fit_all(rank: int, root: str, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    with launched_as(rank, SITES, folder):
        for name in NAMES:
            traffic, save = Traffic(), Save(folder, name)
            # Named by a metric of which every site has its own.
            checkpoint = ModelCheckpoint(f"{folder}/{name}", filename="{step}-{train/loss:.6f}", every_n_train_steps=4)
            trainer = fit(
                make_run(name, root, folder),
                rank,
                SITES,
                [*watchers(), traffic, save, checkpoint, EarlyStopping("val/loss", patience=99)],
            )
            strategy: Any = trainer.strategy
            found[name] = {
                "ledger": strategy.ledger,
                "rounds": strategy.rounds_done,
                "traffic": traffic.record,
                "validations": save.metrics,
                "parameters": parameters(trainer),
                "digest": digest(strategy.federation) if strategy.rounds_done else None,
                "metric_bytes": metric_bytes_of(make_run(name, root, folder).config, 3),
            }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="module")
def found(root: str, folder: str) -> list[dict[str, dict[str, Any]]]:
    """[rank][name]: one start of the processes for all files."""
    return run_distributed(_fit_all, SITES, root, folder)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_predicted_ones(found: list[Any], root: str, folder: str, name: str) -> None:
    run = make_run(name, root, folder)
    for site in range(SITES):
        ledger = found[site][name]["ledger"]
        if run.strategy == "ddp":
            assert ledger.payload("dense") == STEPS * 4 * parameter_counts(run.config).total
            assert ledger.payload("evaluation") == len(VALIDATIONS) * found[site][name]["metric_bytes"]
            continue
        expected = predict_bytes(
            run.config, FederationConfig(**run.settings), n_sites=SITES, site=site, steps=STEPS,
            validations=VALIDATIONS, metric_bytes=found[site][name]["metric_bytes"],
        )  # fmt: skip
        assert {kind: ledger.payload(kind) for kind in KINDS} == {kind: expected.payload(kind) for kind in KINDS}
        assert {kind: ledger.wire(kind) for kind in KINDS} == {kind: expected.wire(kind) for kind in KINDS}


@pytest.mark.parametrize("name", NAMES)
def test_every_collective_is_in_the_ledger(found: list[Any], name: str) -> None:
    for rank in range(SITES):
        traffic = found[rank][name]["traffic"]
        # Stock DDP keeps Lightning's own broadcast of a signal before every batch, which is no step of the method.
        signals = [call.nbytes for call in traffic.calls if call.name == "broadcast"]
        assert signals == ([8] * STEPS if name == "ddp" else [])
        calls = [call for call in traffic.calls if call.name != "broadcast"]
        assert calls
        assert len(calls) == traffic.ledger_calls.total(), [call.name for call in calls]
        assert sum(call.nbytes for call in calls) == traffic.ledger_payload


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ddp"])
def test_what_callbacks_tell_other_sites_is_in_the_control_message(found: list[Any], root: str, name: str) -> None:
    run = make_run(name, root, "")
    copied = run.settings.get("routing") == "shadow"
    watched, looked = (
        control_bytes(run.config, SITES, watched=True, looked=look, probe_tokens=6 * 5, monitored=True, copied=copied)
        for look in (False, True)
    )
    for rank in range(SITES):
        calls = [call for call in found[rank][name]["traffic"].calls if call.nbytes in (watched, looked)]
        # Five rounds; looked at are the first, every second, and the last one.
        assert [call.nbytes for call in calls] == [looked, watched, looked, watched, looked]
        # Of averages that are applied a step later, those two that the last step ends come after it.
        assert [call.steps for call in calls] == ([3, 5, 7, 9, 9] if run.settings.get("delay") else [2, 4, 6, 8, 9])


def test_what_other_methods_would_have_sent_is_what_they_send(found: list[Any], root: str) -> None:
    config = make_run("ddp", root, "").config
    assert STEPS * ddp_step_bytes(config, SITES) == found[0]["ddp"]["ledger"].wire("dense")
    rounds, ledger = found[0]["diloco"]["rounds"], found[0]["diloco"]["ledger"]
    assert rounds * replica_round_bytes(config, SITES) == ledger.wire("dense") + ledger.wire("expert")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ddp"])
def test_between_rounds_nothing_crosses(found: list[Any], name: str) -> None:
    ends = {*range(K, STEPS + 1, K), STEPS}
    applied = {end + 1 for end in ends} if name == "fomoe_overlapped" else set()
    saves = {4, 8, *VALIDATIONS}
    for rank in range(SITES):
        for call in found[rank][name]["traffic"].calls:
            if applied and call.name == "all_gather":
                continue  # from a thread, whenever it has come so far
            assert call.batch in ends | applied | saves, call
            assert call.steps == call.batch, f"{call} comes before the optimizer step"
        # Where nothing is validated or saved either, a round is all that there is.
        assert {call.name for call in found[rank][name]["traffic"].calls if call.batch == 2} <= {
            "all_reduce", "all_to_all_single", *(["all_gather"] if {"lean", "overlapped"} & {*name.split("_")} else []),
        }  # fmt: skip
        assert found[rank][name]["rounds"] == len(ends)


@pytest.mark.parametrize("name", NAMES)
def test_sites_agree(found: list[Any], name: str) -> None:
    assert len({found[rank][name]["digest"] for rank in range(SITES)}) == 1
    assert len({str(found[rank][name]["validations"]) for rank in range(SITES)}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_validation_in_fit_is_that_of_the_checkpoint(found: list[Any], root: str, folder: str, name: str) -> None:
    run = make_run(name, root, folder)
    validations = found[0][name]["validations"]
    assert len(validations) == len(VALIDATIONS)
    for path, metrics in validations.items():
        alone = validate(run, path)
        # Random routing draws by batch, and one process with all experts has no view of its own.
        metrics = {key: value for key, value in metrics.items() if key not in VIEWS}
        assert alone.keys() == metrics.keys()
        for key, value in metrics.items():
            assert alone[key] == pytest.approx(value, rel=1e-5), f"{key} of {path}"


@pytest.mark.parametrize(("fomoe", "full"), [("fomoe_full", "local_adamw"), ("fomoe_diloco_full", "diloco")])
def test_overlap_of_all_sites_is_the_full_replica_bit_for_bit(found: list[Any], fomoe: str, full: str) -> None:
    for rank in range(SITES):
        ours, theirs = found[rank][fomoe]["parameters"], found[rank][full]["parameters"]
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_other_views_are_taken_when_it_is_their_turn(found: list[Any], root: str, folder: str, name: str) -> None:
    partial = (make_run(name, root, folder).settings.get("overlap") or SITES) < SITES
    for metrics in (found[rank][name]["validations"] for rank in range(SITES)):
        first, second, third = ({view: v[view] for view in VIEWS if view in v} for v in metrics.values())
        assert first == {}
        assert [*second] == [*VIEWS[: 1 + partial]]
        assert all(math.isfinite(value) for value in second.values())
        # The last one of the run measures again, whosever turn it is.
        assert [*third] == [*second]
        assert third != second


def _rung_4(rank: int, root: str, folder: str) -> list[dict[str, torch.Tensor]]:
    with launched_as(rank, 2, folder):
        sgd = Run(root=root, folder=folder, strategy="ddp", optimizer={"kind": "sgd", "lr": 0.3, "warmup_steps": 0})
        averaged = replace(sgd, strategy="federated", settings={"local_steps": 1})
        return [parameters(fit(run, rank, 2)) for run in (sgd, averaged)]


def test_averaging_every_sgd_step_is_data_parallelism(root: str, tmp_path: Path) -> None:
    for synchronous, averaged in run_distributed(_rung_4, 2, root, str(tmp_path)):
        for key, tensor in synchronous.items():
            torch.testing.assert_close(averaged[key], tensor, rtol=0, atol=1e-6, msg=key)
