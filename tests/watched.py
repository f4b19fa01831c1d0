"""Runs of two sites that all callbacks watch, for tests of what they leave behind."""

from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from fomoe_pl.callbacks import CommunicationMonitor, RoutingStability, RunPictures, RunReport, ThroughputMonitor
from tests.training import Run, fit, launched_as

SITES = 2
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ghost_1": ("federated", {"local_steps": 2, "overlap": 1}),
    "partitioned_2": ("federated", {"local_steps": 2, "overlap": 2, "routing": "partitioned"}),
    "shadow_1": ("federated", {"local_steps": 2, "overlap": 1, "routing": "shadow", "shadow_refresh": 2}),
    "ddp": ("ddp", {}),
}


def fit_all(rank: int, root: str, folder: str) -> None:
    with launched_as(rank, SITES, folder):
        for name, (strategy, settings) in RUNS.items():
            logger = [
                TensorBoardLogger(folder, name=name, version="", default_hp_metric=False),
                CSVLogger(folder, name=f"{name}_csv", version=""),
            ]
            run = Run(
                root=root, folder=folder, strategy=strategy, settings=settings,
                trainer={"max_steps": 16, "val_check_interval": 8, "limit_val_batches": None, "logger": logger,
                         "num_sanity_val_steps": -1},
            )  # fmt: skip
            callbacks = [
                RoutingStability(1, 2, other_views_every=1), CommunicationMonitor(2), ThroughputMonitor(2),
                RunPictures(draw_every=5, every_n_steps=2), RunReport(),
            ]  # fmt: skip
            fit(run, rank, SITES, callbacks)
