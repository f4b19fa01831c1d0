"""What runs gave before a change of structure, and whether they give it still: `python -m tests.golden record FILE`.

Every strategy file, on two and on four sites, whole and resumed in mid-round: losses, bytes, weights and the tensors
of checkpoints, to the bit. Bits depend on the machine and on torch: record and compare on the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from safetensors import safe_open

from fomoe_pl.data.prepare import prepare
from tests.conftest import _WORDS, make_documents
from tests.distributed import run_distributed
from tests.training import STRATEGIES, Run, fit, from_yaml, launched_as, parameters, short_rounds

K, STEPS, SAVED = 2, 9, 5


class Watch(L.Callback):
    """Losses of all steps, metrics of all validations, and a checkpoint in mid-round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[str] = []
        self.validations: list[dict[str, str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]).hex())
        if trainer.global_step in (SAVED, STEPS):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.validations.append({name: float(v).hex() for name, v in metrics if name.startswith("val/")})


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, type and bits."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """Hashes of all tensors of a checkpoint's safetensors files, by file and name."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {f"{path.name}/{name}": digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return found


def run_of(name: str, n_sites: int, root: str, folder: Path) -> Run:
    """A run of a strategy file with rounds of K steps."""
    kind, settings = from_yaml(name)
    if kind == "federated":
        settings = short_rounds(settings, K)
    trainer = {"max_steps": STEPS, "val_check_interval": 3, "limit_val_batches": None, "gradient_clip_val": 1.0}
    return Run(root=root, folder=str(folder), strategy=kind, settings=settings, trainer=trainer)


def _results(rank: int, n_sites: int, root: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with launched_as(rank, n_sites, folder):
        for name in STRATEGIES:
            for part in ("whole", "resumed"):
                (place := Path(folder, name)).mkdir(exist_ok=True)
                watch = Watch(place / part)
                ckpt = str(place / "whole" / f"{SAVED}.ckpt") if part == "resumed" else None
                trainer = fit(run_of(name, n_sites, root, place), rank, n_sites, [watch], ckpt)
                strategy: Any = trainer.strategy
                ledger = strategy.ledger.state_dict()
                found[f"{name}, {n_sites} sites, {part}"] = {
                    "losses": watch.losses,
                    "validations": watch.validations,
                    "rounds": strategy.rounds_done,
                    "sent": {kind: n for kind, n in sorted(ledger["sent"].items()) if kind != "control"},
                    "reduced": sorted(row for row in ledger["reduced"] if row[0] != "control"),
                    "weights": {n: digest(t) for n, t in parameters(trainer).items()},
                    "checkpoint": tensors_of(place / part / f"{STEPS}.ckpt") if rank == 0 else {},
                }
    return found


def results() -> dict[str, Any]:
    """Everything, by setting and rank."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.mkdir()
        for domain in _WORDS:
            lines = [json.dumps({"text": text}) + "\n" for text in make_documents(domain, 60)]
            (source / f"{domain}.jsonl").write_text("".join(lines))
        corpus = prepare([str(source)], f"{folder}/corpus", shards_per_domain=8, val_fraction=0.2, max_shard_mb=0.0005)
        found: dict[str, Any] = {}
        for n_sites in (2, 4):
            (place := Path(folder, str(n_sites))).mkdir()
            for rank, of_rank in enumerate(run_distributed(_results, n_sites, n_sites, str(corpus.root), str(place))):
                found |= {f"{setting}, rank {rank}": result for setting, result in of_rank.items()}
    return found


def main() -> None:
    """Record, or compare and exit with 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    found = json.loads(json.dumps(results()))
    if args.what == "record":
        args.file.write_text(json.dumps(found, indent=1, sort_keys=True))
        print(f"{len(found)} results in {args.file}")
        return
    known = json.loads(args.file.read_text())
    wrong = [
        f"{setting}: {key}"
        for setting in sorted({*known, *found})
        for key in sorted({*known.get(setting, {}), *found.get(setting, {})})
        if known.get(setting, {}).get(key) != found.get(setting, {}).get(key)
    ]
    print("\n".join(wrong) or f"all {len(found)} results are equal")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
