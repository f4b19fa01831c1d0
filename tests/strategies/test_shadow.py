"""Copies of absent experts on real sites: what they are after a round, and what a site computes with them."""

from typing import Any

import lightning.pytorch as L
import pytest
import torch

from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.codec import codec_of
from fomoe_pl.federation.federation import Federation
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as

SITES, K = 4, 2
TOKENS_BS = torch.arange(48).view(3, 16) * 5 % 257
CASES: dict[str, dict[str, Any]] = {
    "exact": {"shadow_bits": 32},
    "4 bits": {"shadow_bits": 4},
    "overlap 1, outer step": {"shadow_bits": 8, "overlap": 1, "inner_moments": "keep"},
    "random": {"shadow_bits": 2, "placement": "random", "check_agreement": True},
}


class Seen(L.Callback):
    """Saves when the last round has ended, and notes what the site has and computes; then a refresh breaks off."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.path)
        strategy, rank = trainer.strategy, trainer.global_rank
        federation: Federation = strategy.federation
        assert federation.copies is not None
        with torch.no_grad():
            model = strategy.transformer.eval()
            self.logits = model.logits(model(TOKENS_BS)[0])
        self.absent = federation.placement.complement().residents(rank)
        self.copies = {name: packed.clone() for name, packed in federation.copies.tensors.items()}
        self.broken = _broken(federation, rank)
        self.after = {name: packed.clone() for name, packed in federation.copies.tensors.items()}

    @property
    def seen(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("logits", "absent", "copies", "broken", "after")}


def _train(rank: int, root: str, folder: str) -> dict[str, Any]:
    found = {}
    with launched_as(rank, SITES, folder):
        for name, case in CASES.items():
            settings = {"local_steps": K, "overlap": 2, "routing": "shadow", "inner_moments": "average", **case}
            seen = Seen(f"{folder}/{name}.ckpt")
            fit(Run(root=root, folder=folder, settings=settings, trainer={"max_steps": 3 * K}), rank, SITES, [seen])
            found[name] = seen.seen
    return found


def _broken(federation: Federation, rank: int) -> str:
    """A refresh that fails on one site after some layers, once values have changed."""
    start, calls = federation.transport.start_exchange, 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        wait = start(*args, **kwargs)
        if calls == 2 and rank == 1:
            wait()
            raise RuntimeError("broken")
        return wait

    federation.transport.start_exchange = fails  # type: ignore[method-assign]
    for anchor in federation.anchors.values():
        anchor.add_(1)
    try:
        federation.refresh_copies()
    except RuntimeError as error:
        return str(error)
    finally:
        federation.transport.start_exchange = start  # type: ignore[method-assign]
    return ""


@pytest.fixture(scope="module")
def trained(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("shadow"))
    return folder, run_distributed(_train, SITES, root, folder)


@pytest.mark.parametrize("name", CASES)
def test_copies_are_the_packed_global_experts_on_every_site(trained: tuple[str, list[Any]], name: str) -> None:
    folder, sites = trained
    weights = load_global_model(f"{folder}/{name}.ckpt").state_dict()
    codec = codec_of(CASES[name]["shadow_bits"])
    for site in sites:
        assert site[name]["copies"]
        for tensor, packed in site[name]["copies"].items():
            absent = list(site[name]["absent"][int(tensor.split(".")[1])])
            assert len(packed) == len(absent) > 0
            assert torch.equal(packed, codec.encode(weights[tensor][absent].flatten(1))), tensor


def test_with_exact_copies_a_site_is_the_global_model_when_a_round_begins(trained: tuple[str, list[Any]]) -> None:
    folder, sites = trained
    model = load_global_model(f"{folder}/exact.ckpt")
    with torch.no_grad():
        expected = model.logits(model(TOKENS_BS)[0])
        coarse = [torch.equal(site["4 bits"]["logits"], site["exact"]["logits"]) for site in sites]
    assert all(torch.equal(site["exact"]["logits"], expected) for site in sites)
    assert not any(coarse)


@pytest.mark.parametrize("name", CASES)
def test_a_refresh_that_fails_leaves_all_copies_as_they_were(trained: tuple[str, list[Any]], name: str) -> None:
    _, sites = trained
    assert [site[name]["broken"] for site in sites] == ["", "broken", "", ""]
    before, after = sites[1][name]["copies"], sites[1][name]["after"]
    assert all(torch.equal(after[tensor], packed) for tensor, packed in before.items())
    assert any(not torch.equal(sites[0][name]["after"][t], p) for t, p in sites[0][name]["copies"].items())
