"""What is watched of copies of absent experts, on two real sites: share of picks, error, age, a site's own view."""

from typing import Any

import lightning.pytorch as L
import pytest
import torch

from fomoe_pl.callbacks import RoutingStability
from fomoe_pl.codec import codec_of
from fomoe_pl.federation.settings import FederationConfig
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as

pytestmark = pytest.mark.timeout(300)
SITES, K, STEPS = 2, 2, 12
RUNS: dict[str, dict[str, Any]] = {
    "exact": {"shadow_bits": 32},
    "coarse": {"shadow_bits": 2},
    "rare": {"shadow_bits": 4, "shadow_refresh": 3},
}


class Rounds(L.Callback):
    """What was logged of each round, and what copies are made of after it."""

    def __init__(self, stability: RoutingStability) -> None:
        self.stability, self.values, self.anchors = stability, list[dict[str, float]](), dict[str, torch.Tensor]()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: object) -> None:
        if trainer.global_step % K == 0:
            assert self.stability.view is not None
            self.values.append(dict(self.stability.view.values))
            federation = trainer.strategy.federation
            self.anchors = {name: federation.anchors[name].clone() for name in federation.copies.tensors}


def _fit_all(rank: int, root: str, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    with launched_as(rank, SITES, folder):
        for name, settings in RUNS.items():
            stability = RoutingStability(2, 1, 6, 7, other_views_every=1)
            rounds = Rounds(stability)
            run = Run(
                root=root, folder=folder, settings={"local_steps": K, "overlap": 1, "routing": "shadow", **settings},
                trainer={"max_steps": STEPS, "val_check_interval": STEPS, "limit_val_batches": None},
            )  # fmt: skip
            trainer = fit(run, rank, SITES, [stability, rounds])
            validated = {key: float(value) for key, value in trainer.callback_metrics.items()}
            found[name] = {"values": rounds.values, "anchors": rounds.anchors, "validated": validated}
    return found


@pytest.fixture(scope="module")
def found(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_distributed(_fit_all, SITES, root, str(tmp_path_factory.mktemp("copies")))


def test_their_share_of_picks_is_not_called_that_of_ghosts(found: list[Any]) -> None:
    for values in found[0]["coarse"]["values"]:
        assert not [tag for tag in values if "ghost" in tag]
        assert 0 < values["routing/copy_fraction/mean"] < 1
        assert values["routing/copy_excess/mean"] == pytest.approx(values["routing/copy_fraction/mean"] - 0.5)


@pytest.mark.parametrize(("name", "bits"), [("exact", 32), ("coarse", 2), ("rare", 4)])
def test_their_error_is_that_of_the_agreed_values(found: list[Any], name: str, bits: int) -> None:
    """Each expert lives on one of the two sites: together they are the model."""
    last, codec = found[0][name]["values"][-1], codec_of(bits)
    for layer in range(2):
        squares = torch.zeros(2, dtype=torch.float64)
        for site in found:
            for tensor, value in site[name]["anchors"].items():
                if tensor.startswith(f"layers.{layer}."):
                    exact = value.flatten(1)
                    decoded = codec.decode(codec.encode(exact), exact.shape[1])
                    squares += torch.stack([(decoded - exact).double().square().sum(), exact.double().square().sum()])
        error = float((squares[0] / squares[1]).sqrt())
        assert last[f"routing/copy_error/layer_{layer:02d}"] == pytest.approx(error, rel=1e-5)
        assert (error == 0) == (bits == 32)
    looked = ["routing/copy_error/mean" in values for values in found[0][name]["values"]]
    assert looked == [True, False, True, False, True, True]  # every second round and the last one


def test_their_age_is_that_of_the_round_that_used_them(found: list[Any]) -> None:
    def ages(name: str) -> list[float]:
        return [values["routing/copy_age_rounds"] for values in found[0][name]["values"]]

    assert ages("coarse") == [0] * 6
    assert ages("rare") == [0, 1, 2, 0, 1, 2]


def test_a_sites_own_view_has_its_copies(found: list[Any]) -> None:
    """Exact ones make the site's model the global one; rough ones do not."""
    gap = {name: found[0][name]["validated"]["val/own_view_gap_nats"] for name in ("exact", "coarse")}
    assert gap["exact"] == pytest.approx(0, abs=1e-6)
    assert abs(gap["coarse"]) > 1e-5


@pytest.mark.parametrize(
    ("settings", "ages"),
    [
        ({}, [0, 0, 0, 0, 0, 0, 0]),
        ({"shadow_refresh": 4}, [0, 1, 2, 3, 0, 1, 2]),
        ({"shadow_refresh": 4, "placement": "random", "reshuffle_rounds": 3}, [0, 1, 2, 0, 0, 1, 0]),
        ({"shadow_refresh": 100}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_age_begins_again_with_a_refresh_and_where_experts_move(settings: dict[str, Any], ages: list[int]) -> None:
    federation = FederationConfig(overlap=1, routing="shadow", **settings)
    assert [federation.age_of_copies(rounds) for rounds in range(7)] == ages
