"""Several ranks in a site are as good as one: the same training, the same bytes, the same checkpoints."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from fomoe_pl.callbacks import CommunicationMonitor, RoutingStability
from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.ledger import KINDS, Ledger
from fomoe_pl.federation.outer import Nesterov
from fomoe_pl.federation.topology import Topology
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.parallel import check_shares
from fomoe_pl.slices import whole
from fomoe_pl.strategies import FederatedStrategy
from fomoe_pl.strategies.checks import ranks_on_hosts
from tests.distributed import run_distributed
from tests.training import ARCHITECTURE, STRATEGIES, Run, fit, from_yaml, launched_as, short_rounds, skip_run

pytestmark = pytest.mark.timeout(900)
BATCH = {"batch_size": 4, "val_batch_size": 4, "val_sequences": 14}
FEDERATED = [name for name in STRATEGIES if from_yaml(name)[0] == "federated" and name != "local_adamw_lean"]
WITH_ROUTERS = ("fomoe_random", "fomoe_partitioned")  # which are averaged within rounds too
UNCODED = {"wire_codec": None, "moments_codec": None, "error_feedback": False}
QUICK = ("fomoe_random", "fomoe_shadow", "fomoe_overlapped")  # the others' test is a slow one


class Losses(L.Callback):
    """Of this rank's part of each batch, and a checkpoint in mid-round."""

    def __init__(self, save: str | None = None, step: int = 3) -> None:
        self.values: list[float] = []
        self.save, self.step = save, step
        self.ledger = Ledger()
        self.model: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))
        if self.save and len(self.values) == self.step:
            trainer.save_checkpoint(self.save)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.ledger = trainer.strategy.ledger_of_site()
        named = {**dict(module.model.named_parameters()), **module.model.state_dict()}
        self.model = {name: whole(tensor).detach().clone() for name, tensor in named.items()}


def trained(
    run: Run, rank: int, n_sites: int, n_ranks: int, inside: str = "replicate", **more: Any
) -> dict[str, Any] | None:
    """What a run leaves on this rank; None on ranks that it does not need."""
    if rank >= n_sites * n_ranks:
        skip_run()
        return None
    settings = run.settings if n_ranks == 1 else {**run.settings, "ranks_per_site": n_ranks, "inside": inside}
    os.environ["WORLD_SIZE"] = str(n_sites * n_ranks)
    losses = Losses(more.pop("save", None))
    callbacks = [losses, *more.pop("callbacks", ())]
    trainer = fit(replace(run, settings=settings), rank, n_sites * n_ranks, callbacks, **more)
    module: Any = trainer.lightning_module
    ledger = losses.ledger
    return {
        "model": losses.model, "losses": losses.values, "tokens": module.tokens_of_all_sites,
        "metrics": {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")},
        "wire": {kind: ledger.wire(kind) for kind in KINDS},
        "rounds": trainer.strategy.round_stats, "trainer": trainer,
    }  # fmt: skip


def told(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What can be sent back."""
    return None if found is None else {name: value for name, value in found.items() if name != "trainer"}


def _two_sites(rank: int, root: str, folder: str, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with launched_as(rank, 4, folder):
        for name in names:
            settings = from_yaml(name)[1] | ({"router_every": 1} if name in WITH_ROUTERS else {})
            run = Run(
                root=root, folder=folder, settings=short_rounds(settings, 2) | {"check_agreement": True}, data=BATCH,
                trainer={"max_steps": 6, "gradient_clip_val": 0.5, "limit_val_batches": None, "val_check_interval": 5},
            )  # fmt: skip
            # Groups of slices have other scales than those of whole tensors: cut sites are compared without codes.
            plain = replace(run, settings=run.settings | UNCODED)
            of_shard = plain if run.settings.get("wire_codec") else run
            cases = [(run, 1, "replicate"), (run, 2, "replicate"), (of_shard, 2, "shard")]
            cases += [(plain, 1, "shard")] if of_shard is plain else []
            for which, n_ranks, inside in cases:
                callbacks = [CommunicationMonitor(), RoutingStability(probe_sequences=2, probe_tokens=8)]
                found = trained(which, rank, 2, n_ranks, inside if n_ranks > 1 else "replicate", callbacks=callbacks)
                results[name, n_ranks, inside] = told(found)
    return results


@pytest.fixture(scope="module")
def quick(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_two_sites, 4, root, str(tmp_path_factory.mktemp("two")), list(QUICK))


@pytest.fixture(scope="module")
def others(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    names = [name for name in FEDERATED if name not in QUICK]
    return run_distributed(_two_sites, 4, root, str(tmp_path_factory.mktemp("two")), names)


@pytest.mark.parametrize("inside", ["replicate", "shard"])
@pytest.mark.parametrize("name", QUICK)
def test_two_sites_of_two_ranks_are_two_sites(quick: list[dict[str, Any]], name: str, inside: str) -> None:
    check_two_sites(quick, name, inside)


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["replicate", "shard"])
@pytest.mark.parametrize("name", [name for name in FEDERATED if name not in QUICK])
def test_so_they_are_with_the_other_strategies(others: list[dict[str, Any]], name: str, inside: str) -> None:
    check_two_sites(others, name, inside)


def check_two_sites(two_sites: list[dict[str, Any]], name: str, inside: str) -> None:
    # Codes of numbers that differ in their last bits may differ by a level.
    coded = name in ("fomoe_lean", "fomoe_overlapped") and inside == "replicate"
    plain = inside if (name, 1, inside) in two_sites[0] else "replicate"
    within = 1e-2 if coded else 1e-3 if name == "photon" else 2e-6  # first steps of moments divide small by small
    for rank in range(4):
        own, one = two_sites[rank][name, 2, inside], two_sites[rank // 2][name, 1, plain]
        for key, value in one["model"].items():
            torch.testing.assert_close(own["model"][key], value, atol=within, rtol=0, msg=key)
        assert own["metrics"].keys() == one["metrics"].keys()
        for metric, value in one["metrics"].items():
            if "necessity" not in metric:  # against random picks, which are drawn batch by batch
                assert own["metrics"][metric] == pytest.approx(value, rel=1e-2 if coded else 1e-4), metric
        assert own["tokens"] == one["tokens"]
        assert own["rounds"]["train_loss"] == pytest.approx(one["rounds"]["train_loss"], rel=1e-2 if coded else 1e-5)
    for site in (0, 1):
        first, second = two_sites[2 * site][name, 2, inside], two_sites[2 * site + 1][name, 2, inside]
        assert all(torch.equal(first["model"][key], value) for key, value in second["model"].items())
        one, own = two_sites[site][name, 1, plain]["wire"], first["wire"]
        assert {k: v for k, v in own.items() if k != "control"} == {k: v for k, v in one.items() if k != "control"}


ONE_SITE: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced by a loss": {"architecture": {"balance": "aux_loss", "aux_loss_weight": 0.1, "z_loss_weight": 0.01}},
    "balanced by a bias": {
        "architecture": {"balance": "bias", "bias_update_rate": 0.01}, "trainer": {"accumulate_grad_batches": 2}
    },
}  # fmt: skip
STEPS = 20


def _one_site(rank: int, root: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with launched_as(rank, 4, folder):
        for name, changes in ONE_SITE.items():
            trainer = {"max_steps": STEPS, "gradient_clip_val": 0.1, **changes.get("trainer", {})}
            run = Run(
                root=root, folder=folder, settings={"local_steps": 5}, data=BATCH, trainer=trainer,
                architecture=changes.get("architecture", {}), optimizer={"lr": 1e-3},
            )  # fmt: skip
            for n_ranks, inside in ((1, "replicate"), (2, "replicate"), (2, "shard"), (4, "shard")):
                results[name, n_ranks, inside] = told(trained(run, rank, 1, n_ranks, inside))
        mixed = replace(run, trainer={"max_steps": 4, "precision": "bf16-mixed"}, architecture={})
        for inside in ("replicate", "shard"):
            results["mixed", 2, inside] = told(trained(mixed, rank, 1, 2, inside))
    return results


@pytest.fixture(scope="module")
def one_site(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_one_site, 4, root, str(tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize(("n_ranks", "inside"), [(2, "replicate"), (2, "shard"), (4, "shard")])
@pytest.mark.parametrize("name", ONE_SITE)
def test_a_site_of_several_ranks_trains_as_one_rank_with_the_whole_batch(
    one_site: list[dict[str, Any]], name: str, n_ranks: int, inside: str
) -> None:
    whole = one_site[0][name, 1, "replicate"]
    parts = [one_site[rank][name, n_ranks, inside] for rank in range(n_ranks)]
    for part in parts:
        for key, value in whole["model"].items():
            torch.testing.assert_close(part["model"][key], value, atol=1e-6, rtol=0, msg=key)
        assert sum(part["wire"].values()) == part["wire"]["control"]
        assert part["tokens"] == whole["tokens"]
    for i, loss in enumerate(whole["losses"]):
        assert sum(part["losses"][i] for part in parts) / n_ranks == pytest.approx(loss, abs=1e-5)


def test_experts_gathered_in_the_type_of_products_train_as_whole_ones(one_site: list[dict[str, Any]]) -> None:
    whole, cut = (one_site[0]["mixed", 2, inside] for inside in ("replicate", "shard"))
    assert cut["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    for key, value in whole["model"].items():
        torch.testing.assert_close(cut["model"][key], value, atol=1e-6, rtol=0, msg=key)
    assert cut["metrics"] == pytest.approx(whole["metrics"], rel=1e-4)


def _unequal(rank: int, root: str, folder: str) -> dict[str, Any]:
    """Two sites of 2 and 1 ranks and of 4 and 2 sequences, and the same of one rank each."""
    found = {}
    with launched_as(rank, 3, folder):
        for ranks in ((1, 1), (2, 1)):
            if rank >= sum(ranks):
                skip_run()
                continue
            settings = from_yaml("fomoe_random")[1] | {"ranks_per_site": ranks, "local_steps": 2, "overlap": 1}
            data = {**BATCH, "batch_size": [4, 2]}
            trainer = {"max_steps": 6, "gradient_clip_val": 0.5, "limit_val_batches": None, "val_check_interval": 6}
            run = Run(root=root, folder=folder, settings=settings | {"check_agreement": True}, data=data,
                      trainer=trainer)  # fmt: skip
            os.environ["WORLD_SIZE"] = str(sum(ranks))
            losses = Losses()
            fitted = fit(run, rank, sum(ranks), [losses])
            module: Any = fitted.lightning_module
            found[ranks] = losses.model, module.tokens_seen, module.tokens_of_all_sites, dict(fitted.callback_metrics)
    return found


def test_sites_may_have_unlike_ranks_and_batches(root: str, tmp_path: Any) -> None:
    found = run_distributed(_unequal, 3, root, str(tmp_path))
    for rank, site in ((0, 0), (1, 0), (2, 1)):
        model, tokens, of_all, metrics = found[rank][2, 1]
        whole, *told, expected = found[site][1, 1]
        for key, value in whole.items():
            torch.testing.assert_close(model[key], value, atol=2e-6, rtol=0, msg=key)
        assert [tokens, of_all] == told == [6 * (4, 2)[site] * 16, 6 * 6 * 16]
        assert float(metrics["val/loss"]) == pytest.approx(float(expected["val/loss"]), rel=1e-5)


SHAPES = {"one": (1, "replicate"), "alike": (2, "replicate"), "cut": (2, "shard")}
RESUMED = {"fomoe_random": ("one", "alike", "cut"), "fomoe_lean": ("one", "alike"), "fomoe_overlapped": ("cut",)}
PAIRS = [(name, saved, then) for name, shapes in RESUMED.items() for saved in shapes for then in shapes]


def _resumed(rank: int, root: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with launched_as(rank, 4, folder):
        for name, shapes in RESUMED.items():
            settings = {**from_yaml(name)[1], "local_steps": 2, "reshuffle_rounds": 1, "overlap": 1}
            if settings.get("delay"):  # saved while averages are on their way
                settings |= {"local_steps": 3, "fragments": 1}
            run = Run(
                root=root, folder=folder, settings={**settings, "outer": Nesterov(lr=0.7, momentum=0.5)}, data=BATCH,
                trainer={"max_steps": 6},
            )  # fmt: skip
            for saved in shapes:
                path = f"{folder}/{name}-{saved}.ckpt"
                results[name, saved] = told(trained(run, rank, 2, *SHAPES[saved], save=path))
                for then in shapes:
                    results[name, saved, then] = told(trained(run, rank, 2, *SHAPES[then], ckpt_path=path))
        with pytest.raises(ConfigError) as error:
            trained(run, rank, 2, *SHAPES["alike"], ckpt_path=path)
        results["refused"] = str(error.value)
    return results


@pytest.fixture(scope="module")
def resumed(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = str(tmp_path_factory.mktemp("resumed"))
    return run_distributed(_resumed, 4, root, folder), folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saved", "then"), PAIRS)
def test_a_checkpoint_does_not_tell_how_many_ranks_a_site_had(
    resumed: tuple[list[dict[str, Any]], str], name: str, saved: str, then: str
) -> None:
    results, folder = resumed
    models = [load_global_model(f"{folder}/{name}-{shape}.ckpt").state_dict() for shape in (RESUMED[name][0], saved)]
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, atol=1e-2 if "lean" in name else 1e-5, rtol=0, msg=key)
    had, has = SHAPES[saved][0], SHAPES[then][0]
    for site in range(2):
        before, after = results[site * had][name, saved], results[site * has][name, saved, then]
        wire = [{kind: n for kind, n in run["wire"].items() if kind != "control"} for run in (before, after)]
        assert wire[0] == wire[1]  # what was sent before is counted, once
        for key, value in before["model"].items():
            if then == saved:  # bit for bit
                assert torch.equal(after["model"][key], value), key
            else:
                torch.testing.assert_close(after["model"][key], value, atol=1e-2, rtol=0, msg=key)
        for place in range(has if then == saved else 0):
            ranks = results[site * has + place]
            assert ranks[name, saved, then]["losses"] == ranks[name, saved]["losses"][3:]


@pytest.mark.slow
def test_slices_of_averages_on_their_way_go_on_in_as_many_ranks(resumed: tuple[list[dict[str, Any]], str]) -> None:
    for found in resumed[0]:
        assert all(part in found["refused"] for part in ("ranks_per_site = 2", "in slices of 2 ranks", "inside: shard"))


def test_a_launch_is_told_and_a_torn_site_is_warned_of() -> None:
    two = Topology(2, 2, 0)
    assert ranks_on_hosts(two, ["a", "a", "b", "b"]) == ("site 0: ranks 0 to 1 on a; site 1: ranks 2 to 3 on b", "")
    assert ranks_on_hosts(two, ["a", "b", "c", "d"])[1] == ""  # machines of their own
    assert ranks_on_hosts(two, ["a"] * 4)[1] == ""
    told, warning = ranks_on_hosts(Topology(2, 3, 0), ["a", "a", "b", "b", "c", "c"])
    assert told.startswith("site 0: ranks 0 to 2 on a, b; site 1")
    assert "site 0 is on a and b, where site 1 is too" in warning


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"inside": "shard"}, ["inside = 'shard'", "there is one", "ranks_per_site 2"]),
        ({"inside": "split", "ranks_per_site": 2}, ["inside = 'split'", "replicate", "shard"]),
        ({"ranks_per_site": 0}, ["ranks_per_site = 0", "1 or more"]),
        ({"ranks_per_site": (2, 0)}, ["ranks_per_site = 0", "a number for each site"]),
        ({"ranks_per_site": (2, 1), "sites": 3}, ["2 numbers for 3 sites"]),
        ({"ranks_per_site": (2, 1), "inside": "shard"}, ["as many ranks in each site, not [2, 1]", "replicate"]),
        ({"ranks_per_site": (2, 1), "min_sites": 1}, ["min_sites = 1", "one number of ranks"]),
        ({"weighting": "size"}, ["weighting = 'size'", "tokens", "even"]),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        FederatedStrategy(**settings)
    assert [part for part in parts if part not in str(error.value)] == []


def test_widths_that_ranks_do_not_divide_are_refused() -> None:
    config = ModelConfig(**ARCHITECTURE)  # d_model 16, d_expert 8
    check_shares(config, "ghost", 8)
    with pytest.raises(ConfigError, match=r"ranks_per_site = 3.*d_model \(16\) or .*d_expert \(8\).*1, 2, 4"):
        check_shares(config, "ghost", 3)
