"""Rounds inside a real Trainer: what counts as a step, precision, clipping, schedules, the balance bias."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from fomoe_pl.model.transformer import Transformer
from tests.distributed import run_distributed
from tests.federation.toy import digest
from tests.strategies.observers import EachStep, Traffic
from tests.training import Run, fit, launched_as, parameters

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
BIASED = {"balance": "bias", "bias_update_rate": 0.01, "n_experts": 8}


def _one_site(rank: int, root: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with launched_as(rank, 1, folder):
        for strategy, settings in (("single", {}), ("federated", {"local_steps": 2, "check_agreement": True})):
            found[strategy] = parameters(fit(Run(root=root, folder=folder, strategy=strategy, settings=settings), 0, 1))
        sgd = {"optimizer": {"kind": "sgd", "lr": 0.5, "warmup_steps": 0},
               "architecture": {"parametrization": "standard"}, "settings": {"local_steps": 1}}  # fmt: skip
        for clip in (None, 1e-3):
            run = Run(root=root, folder=folder, **sgd, trainer={"max_steps": 1, "gradient_clip_val": clip})
            after = parameters(fit(run, 0, 1))
            before = Transformer(run.config, None, seed=0).named_parameters()
            moved = [(after[name] - tensor.detach()).flatten() for name, tensor in before]
            found[f"moved {clip}"] = float(torch.cat(moved).norm())
    return found


@pytest.fixture(scope="module")
def one_site(root: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(_one_site, 1, root, str(tmp_path_factory.mktemp("one")))[0]


def test_one_site_is_plain_adamw(one_site: dict[str, Any]) -> None:
    for name, tensor in one_site["single"].items():
        torch.testing.assert_close(one_site["federated"][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_sites_gradient_is_clipped_before_its_step(one_site: dict[str, Any]) -> None:
    assert one_site["moved None"] > 0.5 * 1e-2
    assert one_site["moved 0.001"] == pytest.approx(0.5 * 1e-3, rel=1e-3)


class Rates(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.values.append(optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"])


def _prolonged(rank: int, root: str, folder: str) -> tuple[list[float], list[float]]:
    with launched_as(rank, 1, folder):
        first, then = Rates(), Rates()
        run = Run(root=root, folder=folder, optimizer={"cooldown_steps": 2}, settings={"local_steps": 2})
        fit(run, 0, 1, [first]).save_checkpoint(f"{folder}/cooled.ckpt")
        fit(replace(run, trainer={"max_steps": 8}), 0, 1, [then], f"{folder}/cooled.ckpt")
        return first.values, then.values


def test_a_prolonged_run_has_its_own_schedule_from_the_first_step_on(root: str, tmp_path: Path) -> None:
    first, then = run_distributed(_prolonged, 1, root, str(tmp_path))[0]
    assert first == [0.5, 1, 1, 0.5]
    assert then == [1, 1, 1, 0.5]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def _biases(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    return {name: t for name, t in parameters(trainer).items() if "bias" in name}


def _two_sites(rank: int, root: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with launched_as(rank, 2, folder):

        def run(strategy: str = "federated", **settings: Any) -> Run:
            return Run(root=root, folder=folder, strategy=strategy, **settings)

        for precision in PRECISIONS:
            losses = Losses()
            settings = {"local_steps": 2, "overlap": 1, "inner_moments": "average"}
            trainer = fit(run(settings=settings, trainer={"precision": precision}), rank, 2, [losses])
            strategy: Any = trainer.strategy
            dtypes = {p.dtype for p in strategy.transformer.parameters()}
            found[precision] = (losses.values, digest(strategy.federation), strategy.rounds_done, dtypes)

        traffic = Traffic()
        accumulate = {"accumulate_grad_batches": 3, "max_steps": 5}
        trainer = fit(run(settings={"local_steps": 2}, trainer=accumulate), rank, 2, [traffic])
        found["accumulation"] = {call.batch for call in traffic.record.calls}, trainer.strategy.rounds_done

        rounds = EachStep(lambda trainer: trainer.strategy.rounds_done)
        scheduled = run(settings={"local_steps": {0: 1, 4: 2}}, trainer={"max_steps": 9})
        trainer = fit(scheduled, rank, 2, [rounds])
        found["schedule"] = rounds.seen, parameters(trainer)

        for strategy, settings in (("ddp", {}), ("federated", {"local_steps": 3})):
            biases = EachStep(_biases)
            fit(run(strategy, settings=settings, architecture=BIASED, trainer={"max_steps": 6}), rank, 2, [biases])
            found[f"bias {strategy}"] = biases.seen
    return found


@pytest.fixture(scope="module")
def two_sites(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_two_sites, 2, root, str(tmp_path_factory.mktemp("two")))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_and_agrees(two_sites: list[Any], precision: str) -> None:
    for losses, _, rounds, dtypes in (found[precision] for found in two_sites):
        assert rounds == 2
        assert torch.tensor(losses).isfinite().all()
        assert losses[-1] < losses[0]
        assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    assert two_sites[0][precision][1] == two_sites[1][precision][1]


def test_rounds_count_optimizer_steps_under_accumulation(two_sites: list[Any]) -> None:
    for batches, rounds in (found["accumulation"] for found in two_sites):
        assert rounds == 3  # after 2, 4 and (the end) 5 steps
        assert batches == {6, 12, 15}


def test_a_schedule_and_the_partial_last_round(two_sites: list[Any]) -> None:
    for rounds, _ in (found["schedule"] for found in two_sites):
        assert rounds == [1, 2, 3, 4, 4, 5, 5, 6, 7]
    first, second = (found["schedule"][1] for found in two_sites)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between the sites after the run"


def test_the_balance_bias_is_one_for_all(two_sites: list[Any]) -> None:
    for strategy, agreed in (("ddp", {0, 1, 2, 3, 4, 5}), ("federated", {2, 5})):
        first, second = (found[f"bias {strategy}"] for found in two_sites)
        equal = set()
        for step, (ours, theirs) in enumerate(zip(first, second, strict=True)):
            assert ours.keys() == theirs.keys()
            assert any(tensor.count_nonzero() for tensor in ours.values())
            if all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()):
                equal.add(step)
        # Sites see different text: were their biases equal within a round too, agreement after it would show nothing.
        assert equal >= agreed
        assert strategy == "ddp" or equal < set(range(6))
