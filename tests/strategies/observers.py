"""What a test sees of a run: callbacks, and wrappers around every collective."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_pl.federation.inner import moments
from tests.training import parameters

COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
]


@dataclass(frozen=True)
class Call:
    """One collective: its name, the payload it carries away, and when it was called.

    `batch` counts batches begun, `steps` optimizer steps taken.
    """

    name: str
    nbytes: int
    batch: int
    steps: int


@dataclass
class Record:
    """Collectives between the start and the end of training, and what the ledger counted in that time."""

    calls: list[Call] = field(default_factory=list)
    ledger_calls: Counter[str] = field(default_factory=Counter)
    ledger_payload: int = 0


class Traffic(L.Callback):
    """Records every collective between the start and the end of training."""

    def __init__(self) -> None:
        self.record = Record()
        self._batch = 0
        self._patch = pytest.MonkeyPatch()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._batch += 1

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._before = Counter(trainer.strategy.ledger.calls), trainer.strategy.ledger.total_payload
        for name in COLLECTIVES:
            self._patch.setattr(dist, name, self._recorded(name, getattr(dist, name), trainer.strategy))

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self._patch.undo()
        calls, payload = self._before
        self.record.ledger_calls = Counter(trainer.strategy.ledger.calls) - calls
        self.record.ledger_payload = trainer.strategy.ledger.total_payload - payload

    def _recorded(self, name: str, original: Callable[..., Any], strategy: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            sent = tensors[1] if name == "all_to_all_single" else tensors[0] if tensors else None
            nbytes = 0 if sent is None else sent.nbytes
            others = dist.get_world_size(kwargs.get("group")) - 1
            if name == "all_to_all_single" and len(args) == 2:  # equal parts, of which one is the site's own
                nbytes = nbytes * others // (others + 1)
            if name == "all_gather":
                nbytes *= others
            if name == "broadcast_object_list" and strategy.is_global_zero:
                nbytes = len(pickle.dumps(args[0][0]))
            self.record.calls.append(Call(name, nbytes, self._batch, strategy.optimizer_steps))
            return original(*args, **kwargs)

        return call


class Save(L.Callback):
    """Writes a checkpoint after each validation, and keeps the validation's metrics."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.metrics: dict[str, dict[str, float]] = {}

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        path = str(Path(self.folder, f"{self.name}-{trainer.global_step}.ckpt"))
        self.metrics[path] = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        trainer.save_checkpoint(path)


class EachStep(L.Callback):
    """Calls a function after every optimizer step (one batch each) and keeps what it returns."""

    def __init__(self, look: Callable[[L.Trainer], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(trainer))


def snapshot(trainer: L.Trainer) -> dict[str, Any]:
    """Copies of all that a resumed run must find again on this site; control bytes go on while it is written."""
    strategy: Any = trainer.strategy
    federation, optimizer = strategy.federation, trainer.optimizers[0]
    ledger = strategy.ledger.state_dict()
    optimizer_state = {
        name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state.get(tensor, {}).items()}
        for name, tensor in federation.layout.tensors.items()
    }
    return {
        "local": parameters(trainer),
        "anchors": {name: tensor.clone() for name, tensor in federation.anchors.items()},
        "copies": {} if federation.copies is None else {n: t.clone() for n, t in federation.copies.tensors.items()},
        "momenta": {name: t.clone() for name, t in federation.state.slots.get("momentum", {}).items()},
        "residuals": {name: t.clone() for name, t in federation.state.own.get("residual", {}).items()},
        "optimizer": optimizer_state,
        "lr": torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "placement": federation.placement,
        "residents": strategy.transformer.residency.experts,
        "counters": (strategy.rounds_done, strategy.optimizer_steps, trainer.global_step),
        "tokens": trainer.lightning_module.tokens_seen,
        "sent": {kind: n for kind, n in ledger["sent"].items() if kind != "control"},
        "reduced": [row for row in ledger["reduced"] if row[0] != "control"],
    }


def sizes(trainer: L.Trainer) -> dict[str, list[int]]:
    """Elements of the site's expert parameters, gradients, moments and anchors, a number for each tensor."""
    federation, optimizer = trainer.strategy.federation, trainer.optimizers[0]
    layout = federation.layout
    names = [name for name in layout.expert_layer if name in layout.trained]
    tensors = [layout.tensors[name] for name in names]
    return {
        "parameters": [t.numel() for t in tensors],
        "gradients": [0 if t.grad is None else t.grad.numel() for t in tensors],
        "moments": [m.numel() for t in tensors for m in moments(optimizer, t).values()],
        "anchors": [federation.anchors[name].numel() for name in names],
    }


class Largest(TorchDispatchMode):
    """Remembers whether any operation made a tensor of all E experts."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.shape[0] == self.n_experts:
                self.found.append((str(func), tuple(tensor.shape)))
        return out


@contextmanager
def watched(target: Any, method: str, mode: Largest) -> Iterator[None]:
    """Run a method of an object under the mode."""
    original = getattr(target, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, method, call)
        yield
