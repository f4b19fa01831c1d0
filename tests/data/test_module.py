from itertools import islice
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loops.progress import _BatchProgress

from fomoe_pl.data import FoMoEData, Manifest
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.topology import Topology


class Recorder(L.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[dict[str, torch.Tensor]] = []
        self.val_batches: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.train_batches.append(batch)
        return self.scale * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_of(corpus: Manifest, **settings: Any) -> FoMoEData:
    return FoMoEData(**{"root": str(corpus.root), "sequence_length": 20, "batch_size": 3, **settings})


def at_site(data: FoMoEData, site: int, n_sites: int, n_ranks: int = 1, place: int = 0) -> FoMoEData:
    """As the strategy of a rank of this site would show itself."""
    topology = Topology(n_sites, n_ranks, site * n_ranks + place)
    context = SimpleNamespace(topology=topology)
    strategy = SimpleNamespace(context=context, root_device=torch.device("cpu"))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=_BatchProgress()))
    data.trainer = SimpleNamespace(strategy=strategy, fit_loop=loops)  # type: ignore[assignment]
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fit(corpus: Manifest, num_workers: int) -> None:
    module = Recorder()
    data = data_of(corpus, num_workers=num_workers, val_batch_size=5)
    trainer = L.Trainer(
        max_steps=30,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=30,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, data)
    assert len(module.train_batches) == 30
    for batch in module.train_batches:
        assert {key: tuple(value.shape) for key, value in batch.items()} == {
            "inputs": (3, 20),
            "targets": (3, 20),
            "domain": (3,),
        }
        assert all(value.dtype == torch.int64 for value in batch.values())
    targets = torch.cat([batch["targets"].flatten() for batch in module.val_batches])
    assert int((targets != -100).sum()) == sum(domain.val.tokens for domain in corpus.domains)


def test_properties(corpus: Manifest) -> None:
    data = data_of(corpus)
    assert (data.vocab_size, data.domains) == (257, ["farm", "sea", "sky"])


def test_a_model_may_have_a_larger_vocabulary_than_the_data(corpus: Manifest) -> None:
    data = data_of(corpus)
    for size in (257, 320, 200_019):
        data.check_vocabulary(size)
    with pytest.raises(ConfigError, match=r"vocab_size = 256: must be at least .*\(257\)"):
        data.check_vocabulary(256)


def test_sites_of_the_topology_share_validation(corpus: Manifest) -> None:
    def rows(site: int, n_sites: int) -> list[list[int]]:
        batches = list(at_site(data_of(corpus), site, n_sites).val_dataloader())
        return [row for batch in batches for row in batch["targets"].tolist()]

    whole = rows(0, 1)
    n_sites = next(n for n in range(3, 9) if len(whole) % n)
    parts = [rows(site, n_sites) for site in range(n_sites)]
    assert len({len(part) for part in parts}) == 1
    together = [parts[i % n_sites][i // n_sites] for i in range(n_sites * len(parts[0]))]
    assert together[: len(whole)] == whole
    assert all(set(row) == {-100} for row in together[len(whole) :])


def test_sites_of_the_topology_train_on_different_text(corpus: Manifest) -> None:
    seen = []
    for site in range(3):
        data = at_site(data_of(corpus, split="domain"), site, 3)
        seen.append({int(d) for batch in islice(data.train_dataloader(), 5) for d in batch["domain"]})
    assert seen == [{0}, {1}, {2}]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_of_a_site_share_its_batches(corpus: Manifest, num_workers: int) -> None:
    def batches(n_ranks: int, place: int, *, train: bool) -> list[dict[str, Any]]:
        settings = {"batch_size": 6, "val_batch_size": 6, "num_workers": num_workers if train else 0}
        data = at_site(data_of(corpus, **settings), 1, 2, n_ranks, place)
        return list(islice(data.train_dataloader(), 4) if train else data.val_dataloader())

    for train in (True, False):
        whole, parts = batches(1, 0, train=train), [batches(3, place, train=train) for place in range(3)]
        assert len({len(part) for part in parts}) == 1
        for i, batch in enumerate(whole):
            n_rows = len(batch["targets"])
            assert len({len(part[i]["targets"]) for part in parts}) == 1  # as many for each, in the last one too
            for row in range(n_rows):
                part = parts[row % 3][i]
                assert all(torch.equal(part[key][row // 3], batch[key][row]) for key in batch)
            missing = [part[i]["targets"][-(n_rows // -3) - 1] for part in parts[n_rows % 3 :] if n_rows % 3]
            assert all((row == -100).all() for row in missing)


def test_sites_may_have_batches_of_their_own(corpus: Manifest) -> None:
    sizes = [6, 2, 4]
    for site, size in enumerate(sizes):
        data = at_site(data_of(corpus, batch_size=sizes, val_batch_size=None), site, 3)
        assert len(next(iter(data.train_dataloader()))["inputs"]) == size
        assert data.val_batch_size == 2
    data.check(3, (2, 1, 2))
    for n_sites, ranks, words in ((2, 1, "3 numbers for 2 sites"), (3, (1, 1, 3), "4: is divided among the 3 ranks")):
        with pytest.raises(ConfigError, match=words):
            data.check(n_sites, ranks)


def test_train_loader_is_the_same_again(corpus: Manifest) -> None:
    def batches() -> list[list[list[int]]]:
        data = at_site(data_of(corpus, split="dirichlet", seed=3), 1, 4)
        return [batch["targets"].tolist() for batch in islice(data.train_dataloader(), 10)]

    assert batches() == batches()


def test_loaders_need_a_trainer(corpus: Manifest) -> None:
    with pytest.raises(RuntimeError, match="attach it"):
        data_of(corpus).train_dataloader()


@pytest.mark.parametrize(
    ("settings", "n_sites", "message"),
    [
        ({"sequence_length": 0}, 1, r"data\.sequence_length = 0"),
        ({"batch_size": 0}, 1, r"data\.batch_size = 0"),
        ({"val_batch_size": -1}, 1, r"data\.val_batch_size = -1"),
        ({"num_workers": -1}, 1, r"data\.num_workers = -1"),
        ({"seed": -1}, 1, r"data\.seed = -1: must be at least 0"),
        ({"max_bad_shards": -1}, 1, r"data\.max_bad_shards = -1"),
        ({"dirichlet_alpha": float("nan")}, 1, r"data\.dirichlet_alpha = nan"),
        ({"dirichlet_alpha": float("inf")}, 1, r"data\.dirichlet_alpha = inf"),
        ({"dirichlet_alpha": 1e300}, 1, r"data\.dirichlet_alpha = 1e\+300: must be above 0 and at most 1e\+09"),
        ({"val_sequences": 2}, 1, r"data\.val_sequences = 2: every one of the 3 domains"),
        ({"dirichlet_alpha": 0.0}, 1, r"data\.dirichlet_alpha = 0\.0"),
        ({"num_workers": 50}, 4, r"data\.num_workers = 50: domain .* 4 sites x 50 .* need 200"),
        ({"root": "/nowhere"}, 1, r"data\.root = '/nowhere'"),
    ],
)
def test_check(corpus: Manifest, settings: dict[str, Any], n_sites: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_of(corpus, **settings).check(n_sites)


def test_check_accepts(corpus: Manifest) -> None:
    for split in ("iid", "domain", "dirichlet"):
        data_of(corpus, split=split, num_workers=2, val_sequences=3).check(4)


def test_readers_that_find_nothing_left_are_counted(root: str) -> None:
    data = FoMoEData(root)
    sizes = [[shard.tokens for shard in data.manifest.shards_of("train", name)] for name in data.domains]
    assert data._readers_ahead(8, [[0] * len(domain) for domain in sizes]) == 0
    assert data._readers_ahead(8, sizes) == 0
    consumed = [[0] * len(domain) for domain in sizes]
    consumed[1][4] = sizes[1][4]  # the only shard of the domain that site 4 of eight reads
    assert data._readers_ahead(8, consumed) == 1
    assert data._readers_ahead(2, consumed) == 0
