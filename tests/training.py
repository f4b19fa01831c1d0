"""A real Trainer with a very small model, for ranks that `tests.distributed` has started."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
import yaml

from fomoe_pl.data import FoMoEData
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.module import FoMoEModule
from fomoe_pl.optimizer import OptimizerConfig
from fomoe_pl.strategies import CountedDDPStrategy, FederatedStrategy, SingleSiteStrategy

ROOT = Path(__file__).parents[1]
STRATEGIES = {path.stem: path for path in sorted((ROOT / "configs" / "strategy").glob("*.yaml"))}
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 257, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 8,
    "base_width": 16, "base_depth": 2, "expert_backend": "loop",
}  # fmt: skip
_STORES = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run; what is not given is small and plain.

    Attributes:
        root: prepared corpus.
        folder: folder of this launch, shared by its ranks.
        strategy: `ddp`, `single` or `federated`.
        settings: arguments of the strategy.
        architecture: changes to ARCHITECTURE.
        optimizer: fields of OptimizerConfig.
        trainer: arguments of the Trainer.
        data: arguments of FoMoEData.
        evaluation_window: as for FoMoEModule.
        max_skipped_steps: as for FoMoEModule.
        cuda_graphs: as for FoMoEModule.
    """

    root: str
    folder: str
    strategy: str = "federated"
    settings: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    evaluation_window: int = 64
    max_skipped_steps: int = 100
    cuda_graphs: bool = True

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**{**ARCHITECTURE, **self.architecture})

    def module(self) -> FoMoEModule:
        optimizer = OptimizerConfig(**{"lr": 0.01, "warmup_steps": 2, **self.optimizer})
        return FoMoEModule(
            self.config, optimizer, evaluation_window=self.evaluation_window, max_skipped_steps=self.max_skipped_steps,
            cuda_graphs=self.cuda_graphs,
        )  # fmt: skip

    def datamodule(self) -> FoMoEData:
        settings = {"sequence_length": 16, "batch_size": 3, "val_batch_size": 5, "val_sequences": 30, **self.data}
        return FoMoEData(self.root, **settings)


def from_yaml(name: str) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of the strategy in `configs/strategy/NAME.yaml`."""
    strategy = yaml.safe_load(STRATEGIES[name].read_text())["trainer"]["strategy"]
    settings = dict(strategy.get("init_args", {}))
    if settings.get("outer"):
        module, _, name = settings["outer"]["class_path"].rpartition(".")
        settings["outer"] = getattr(import_module(module), name)(**settings["outer"].get("init_args", {}))
    return ("ddp" if strategy["class_path"].endswith("CountedDDPStrategy") else "federated"), settings


def short_rounds(settings: dict[str, Any], local_steps: int) -> dict[str, Any]:
    """A strategy's settings with a short round, too short for the fragments of a file: all at once then."""
    turns = {"fragments": 1, "delay": 1} if settings.get("delay") else {}
    return {**settings, **turns, "local_steps": local_steps}


def make_trainer(run: Run, rank: int, world_size: int, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """The run's Trainer on this rank, joined to the others' process group (Lightning takes a group that exists)."""
    strategies = {"ddp": CountedDDPStrategy, "federated": FederatedStrategy, "single": SingleSiteStrategy}
    devices = 1 if run.strategy == "single" else world_size
    if run.strategy != "single":
        store = dist.FileStore(str(Path(run.folder, f"store-{next(_STORES)}")), world_size)
        backend = "nccl" if run.trainer.get("accelerator") == "gpu" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    settings: dict[str, Any] = {
        "max_steps": 4, "max_epochs": -1, "num_sanity_val_steps": 0, "limit_val_batches": 0, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "check_val_every_n_epoch": None, "accelerator": "cpu", "log_every_n_steps": 1,
    }  # fmt: skip
    strategy = strategies[run.strategy](**run.settings)
    return L.Trainer(
        strategy=strategy, devices=devices, callbacks=list(callbacks), default_root_dir=run.folder,
        **{**settings, **run.trainer},
    )  # fmt: skip


def skip_run() -> None:
    """On a rank that the next run does not need: the others' next store is this one's too."""
    next(_STORES)


def fit(
    run: Run, rank: int, world_size: int, callbacks: Sequence[L.Callback] = (), ckpt_path: str | None = None
) -> L.Trainer:
    """Train; the Trainer, its strategy and its model are left to be looked at."""
    trainer = make_trainer(run, rank, world_size, callbacks)
    # The path's files are this project's own, and Lightning passes the choice through to the strategy.
    trainer.fit(run.module(), run.datamodule(), ckpt_path=ckpt_path, weights_only=False)
    return trainer


def validate(run: Run, ckpt_path: str, callbacks: Sequence[L.Callback] = ()) -> dict[str, float]:
    """Metrics of a checkpoint's global model in one process."""
    trainer = make_trainer(single(run), 0, 1, callbacks)
    trainer.validate(run.module(), run.datamodule(), ckpt_path=ckpt_path, weights_only=False, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def single(run: Run) -> Run:
    """The same model and data on one plain device."""
    trainer = {"limit_val_batches": None}
    return Run(root=run.root, folder=run.folder, strategy="single", architecture=run.architecture,
               optimizer=run.optimizer, data=run.data, trainer=trainer)  # fmt: skip


@contextmanager
def launched_as(rank: int, world_size: int, folder: str) -> Iterator[None]:
    """Stand in for a launcher: the environment of one rank, and no process group until a Trainer's is made."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    dist.barrier()  # or a rank that is ahead closes its connections while others are still making theirs
    dist.destroy_process_group()
    yield
    store = dist.FileStore(str(Path(folder, "store-end")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def parameters(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """Copies of the local model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in trainer.strategy.transformer.state_dict().items()}
