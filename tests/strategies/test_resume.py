"""Interrupted and resumed is uninterrupted, bit for bit; on other sites it is the same global model that goes on."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.federation.inner import moments
from fomoe_pl.federation.outer import Nesterov
from tests.distributed import run_distributed
from tests.strategies.observers import snapshot
from tests.strategies.test_checkpoint import differences
from tests.training import STRATEGIES, Run, fit, from_yaml, launched_as, parameters, short_rounds

pytestmark = pytest.mark.timeout(900)  # a fixture starts dozens of runs
SITES = 2
K, SAVED_AT, STEPS = 2, (4,), 6
# Name of a strategy file -> further settings of the run: every file, and what else has a position of its own.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in STRATEGIES if name != "local_adamw_lean"},  # its formats are those of fomoe_lean
    "fomoe workers": {"data": {"num_workers": 2}},
    "ddp workers": {"data": {"num_workers": 2, "split": "dirichlet"}, "trainer": {"accumulate_grad_batches": 3}},
    "fomoe_random accumulation": {"trainer": {"accumulate_grad_batches": 3}, "data": {"split": "domain"}},
    "diloco workers accumulation": {"trainer": {"accumulate_grad_batches": 2}, "data": {"num_workers": 2}},
    "fomoe_partitioned bias": {"architecture": {"balance": "bias", "bias_update_rate": 0.01}},
    "fomoe_random unlike": {"settings": {"overlap": 1, "capacities": (5, 3), "reshuffle_rounds": 1}},
    # Saved while copies are older than the anchors.
    "fomoe_shadow older": {"settings": {"shadow_refresh": 3, "shadow_bits": 2}},
    # The file's own is saved with an average on its way, these with copies, a fragment, and after the others' turns.
    "fomoe_shadow copies": {"settings": {"local_steps": 3, "delay": 1}},
    "fomoe_diloco turns": {"settings": {"local_steps": 6, "fragments": 3, "delay": 1, "alpha": 0.25}},
    "fomoe_diloco routers": {"settings": {"local_steps": 3, "router_every": 1}, "architecture": {"balance": "bias"}},
    "fomoe_overlapped routers": {"settings": {"local_steps": 3, "delay": 2, "router_every": 1}},
    "fomoe_random turns": {"settings": {"fragments": 2, "reshuffle_rounds": 2}},
    "fomoe_shadow random": {"settings": {"placement": "random", "reshuffle_rounds": 1, "shadow_refresh": 3}},
}


class Watch(L.Callback):
    """Notes every batch and what a site has at the end; saves after some steps."""

    def __init__(self, path: str | None = None) -> None:
        self.path, self.saved = path, 0
        self.batches: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.rounds: list[dict[str, float]] = []

    @property
    def seen(self) -> SimpleNamespace:  # Lightning ties a callback to its module, which is not pickled
        return SimpleNamespace(batches=self.batches, losses=self.losses, rounds=self.rounds)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["inputs"].clone())

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rounds.append(trainer.strategy.round_stats)
        step = trainer.global_step
        if self.path and step in SAVED_AT and step != self.saved:  # with accumulation a step has several batches
            self.saved = step
            trainer.save_checkpoint(f"{self.path}-{step}.ckpt")


def state(trainer: L.Trainer) -> dict[str, Any]:
    """All that there is at the end of a run but time and the control bytes of saving."""
    module: Any = trainer.lightning_module
    tokens = {"site": module.tokens_seen, "global": module.tokens_of_all_sites, "random": torch.get_rng_state()}
    if trainer.strategy.federation is not None:
        return {**snapshot(trainer), **tokens}
    optimizer = trainer.optimizers[0]
    return {
        **tokens,
        "local": parameters(trainer),
        "optimizer": {i: dict(s) for i, s in optimizer.state_dict()["state"].items()},
        "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "counters": (trainer.strategy.optimizer_steps, trainer.global_step),
    }


def make_run(name: str, root: str, folder: str) -> Run:
    file, *_ = name.split()
    kind, settings = from_yaml(file)
    if kind == "federated":
        settings = short_rounds(settings, K) | {"overlap": settings.get("overlap") and 1}
        settings |= {"reshuffle_rounds": 1} if settings.get("placement") == "random" else {}
    more = VARIANTS[name]
    settings |= more.get("settings", {})
    return Run(root=root, folder=folder, strategy=kind, settings=settings, data=more.get("data", {}),
               architecture={"n_experts": 8, **more.get("architecture", {})},
               trainer={"max_steps": STEPS, "gradient_clip_val": 1.0, **more.get("trainer", {})})  # fmt: skip


def _interrupt_all(rank: int, root: str, folder: str, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with launched_as(rank, SITES, folder):
        for name in names:
            run = make_run(name, root, folder)
            torch.manual_seed(5)
            whole = Watch(f"{folder}/{name}")
            end = copy.deepcopy(state(fit(run, rank, SITES, [whole])))
            parts = {}
            for step in SAVED_AT:
                torch.manual_seed(step)
                part = Watch()
                trainer = fit(run, rank, SITES, [part], f"{folder}/{name}-{step}.ckpt")
                parts[step] = copy.deepcopy(state(trainer)), part.seen
            found[name] = end, whole.seen, parts
    return found


PLAIN = [name for name in VARIANTS if any(other.startswith(f"{name} ") for other in VARIANTS)]
"""Files as they are, where the same with another position of its own is tried too: these take their time apart."""


@pytest.fixture(scope="module")
def interrupted(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    names = [name for name in VARIANTS if name not in PLAIN]
    return run_distributed(_interrupt_all, SITES, root, str(tmp_path_factory.mktemp("interrupted")), names)


@pytest.fixture(scope="module")
def interrupted_plain(root: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_interrupt_all, SITES, root, str(tmp_path_factory.mktemp("interrupted")), PLAIN)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        pytest.param(name, "interrupted_plain", marks=pytest.mark.slow) if name in PLAIN else (name, "interrupted")
        for name in VARIANTS
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(request: pytest.FixtureRequest, name: str, runs: str) -> None:
    interrupted = request.getfixturevalue(runs)
    micro = VARIANTS[name].get("trainer", {}).get("accumulate_grad_batches", 1)
    for site in range(SITES):
        end, whole, parts = interrupted[site][name]
        assert len(whole.batches) == STEPS * micro
        for step, (resumed, part) in parts.items():
            rest = whole.batches[step * micro :]
            assert len(part.batches) == len(rest)
            assert all(map(torch.equal, part.batches, rest)), f"another order of data after step {step}"
            assert part.losses == whole.losses[step * micro :]
            assert part.rounds[-1] == whole.rounds[-1]
            assert differences(end, resumed) == []
        # Were all batches alike, their order would show nothing.
        assert len({tuple(batch.flatten().tolist()) for batch in whole.batches}) == STEPS * micro


NESTEROV = Nesterov(lr=0.7)
FOMOE = {"local_steps": K, "overlap": 2, "inner_moments": "average"}
WRITERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "fomoe": (4, "federated", FOMOE),
    "diloco": (4, "federated", {"local_steps": K, "outer": NESTEROV, "overlap": 1}),
    "partitioned": (4, "federated", {**FOMOE, "routing": "partitioned", "placement": "random"}),
    "ddp": (2, "ddp", {}),
}
READERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "fomoe 2": (2, "federated", {**FOMOE, "overlap": 1}),
    "fomoe 8": (8, "federated", FOMOE),
    "fomoe 1": (1, "federated", {**FOMOE, "overlap": 1}),
    "shadow 2": (2, "federated", {**FOMOE, "overlap": 1, "routing": "shadow"}),
    "diloco 2": (2, "federated", {"local_steps": K, "outer": NESTEROV, "overlap": 2}),
    "random partitioned 4": (4, "federated", {**FOMOE, "placement": "random", "routing": "partitioned", "overlap": 1}),
    "ddp 2": (2, "ddp", {}),
}


def expert_moments(trainer: L.Trainer) -> dict[tuple[str, int], list[torch.Tensor]]:
    strategy: Any = trainer.strategy
    layout = strategy.content.layout()
    return {
        (name, expert): [m[row].clone() for m in moments(trainer.optimizers[0], layout.tensors[name]).values()]
        for name, layer in layout.expert_layer.items()
        if name in layout.trained and "router" not in name
        for row, expert in enumerate(strategy.transformer.residency.experts[layer])
    }


class First(L.Callback):
    """What a site starts from, and its global loss before the first step; saves at the end."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        if self.path:
            trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        strategy: Any = trainer.strategy
        if self.path is None:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # as the training loop does before it validates
            trainer.validating = True
            validation.run()
            trainer.training = True
        self.loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        layout = strategy.content.layout()
        self.moments = expert_moments(trainer)
        self.agreed = {n: t.clone() for n, t in strategy.content.tensors().items() if n not in layout.expert_layer}
        self.experts = {
            (name, expert): strategy.content.tensors()[name][row].clone()
            for name, layer in layout.expert_layer.items()
            for row, expert in enumerate(strategy.transformer.residency.experts[layer])
        }
        self.momenta = {
            name: t.clone() for name, t in strategy.content.slots().get("momentum", {}).items() if name in self.agreed
        }
        self.steps = strategy.optimizer_steps

    @property
    def seen(self) -> SimpleNamespace:
        return SimpleNamespace(
            **{k: getattr(self, k) for k in ("moments", "agreed", "experts", "momenta", "steps", "loss")}
        )


def _run(rank: int, sites: int, runs: list[tuple[Run, str | None, str | None]], folder: str) -> list[Any]:
    found = []
    with launched_as(rank, sites, folder):
        for run, start, save in runs:
            first, watch = First(save), Watch()
            trainer = fit(run, rank, sites, [first, watch], start)
            tokens = trainer.lightning_module.tokens_of_all_sites
            loss = float(trainer.callback_metrics["val/loss"])
            found.append((first.seen, watch.batches, tokens, expert_moments(trainer), loss))
    return found


@pytest.fixture(scope="module")
def moved(root: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{writer: its checkpoint and what its sites found, (writer, reader): what the reader's sites found}."""
    folder = str(tmp_path_factory.mktemp("moved"))

    def made(kind: str, settings: dict[str, Any], steps: int, launch: str) -> Run:
        # So long that two of them are not alike by chance.
        trainer = {"max_steps": steps, "val_check_interval": steps, "limit_val_batches": None}
        data = {"sequence_length": 64, "val_sequences": 24, "val_batch_size": 3}
        return Run(data=data, root=root, folder=launch, strategy=kind, settings=settings, trainer=trainer,
                   architecture={"n_experts": 8, "n_layers": 2})  # fmt: skip

    found: dict[Any, Any] = {}
    for sites in {sites for sites, _, _ in WRITERS.values()}:
        names = [name for name, (n, _, _) in WRITERS.items() if n == sites]
        # Each launch has a folder of its own: its processes meet through a file there.
        launch = str(tmp_path_factory.mktemp("writers"))
        runs = [(made(*WRITERS[name][1:], 6, launch), None, f"{folder}/{name}.ckpt") for name in names]
        for index, results in enumerate(zip(*run_distributed(_run, sites, sites, runs, launch), strict=True)):
            found[names[index]] = f"{folder}/{names[index]}.ckpt", list(results)
    for sites in {sites for sites, _, _ in READERS.values()}:
        names = [name for name, (n, _, _) in READERS.items() if n == sites]
        pairs = [(writer, reader) for writer in WRITERS for reader in names]
        launch = str(tmp_path_factory.mktemp("readers"))
        runs = [(made(*READERS[reader][1:], 10, launch), f"{folder}/{writer}.ckpt", None) for writer, reader in pairs]
        results = run_distributed(_run, sites, sites, runs, launch)
        for index, pair in enumerate(pairs):
            found[pair] = [site[index] for site in results]
    return found


PAIRS = [(writer, reader) for writer in WRITERS for reader in READERS]


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_other_sites_go_on_from_the_same_global_model(moved: dict[Any, Any], writer: str, reader: str) -> None:
    path, before = moved[writer]
    sites, _, settings = READERS[reader]
    weights = load_global_model(path).state_dict()
    for first, batches, tokens, *_ in moved[writer, reader]:
        assert first.steps == 6
        for name, value in first.agreed.items():
            assert torch.equal(value, weights[name]), name
        assert len(first.experts) >= 2 * 2 * 8 // sites
        for (name, expert), value in first.experts.items():
            assert torch.equal(value, weights[name][expert]), (name, expert)
        assert len(batches) == 4
        assert tokens == before[0][2] + 4 * sites * batches[0].numel()
        moving = [bool(t.any()) for t in first.momenta.values()]
        assert all(moving) if writer == "diloco" else not any(moving)  # outer momentum goes on, or starts at zero
        assert bool(first.momenta) == ("outer" in settings)


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_received_experts_start_with_fresh_moments_and_kept_ones_with_theirs(
    moved: dict[Any, Any], writer: str, reader: str
) -> None:
    before, kept = moved[writer][1], 0
    for site, (first, *_) in enumerate(moved[writer, reader]):
        owner = 0 if "ddp" in (writer, reader.split()[0]) else site % len(before)
        had = before[owner][3]
        for key, values in first.moments.items():
            if key in had:
                kept += 1
                assert all(map(torch.equal, values, had[key])), key
            else:
                assert values, key
                assert not any(value.any() for value in values), key
    assert kept, "nothing is carried over"


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_the_global_loss_before_the_first_step_is_the_last_one(moved: dict[Any, Any], writer: str, reader: str) -> None:
    last = moved[writer][1][0][-1]
    for first, *_, trained in moved[writer, reader]:
        assert first.loss == pytest.approx(last, rel=1e-5)
        assert trained != pytest.approx(last, rel=1e-3), "training moves it"


# Of eight sites one finds nothing left of a domain, and begins the next epoch.
@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "fomoe 8"])
def test_no_batch_is_seen_again(moved: dict[Any, Any], reader: str) -> None:
    def rows(results: Any) -> set[tuple[int, ...]]:
        # Without the first token: the first sequence of a reader begins with an end of document.
        return {tuple(row[1:].tolist()) for _, batches, *_ in results for batch in batches for row in batch}

    before, after = rows(moved["fomoe"][1]), rows(moved["fomoe", reader])
    sites = READERS[reader][0]
    assert len(before) == 4 * 6 * 3
    assert len(after) == sites * 4 * 3
    assert not before & after
