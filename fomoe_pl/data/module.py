"""The LightningDataModule: a prepared corpus as training and validation batches of a site."""

import signal
from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from fomoe_pl.data.manifest import Manifest, load_manifest
from fomoe_pl.data.partition import DomainSize, SplitKind, StreamPlan, partition
from fomoe_pl.data.stream import Consumed, SiteStream, consumption
from fomoe_pl.data.validation import ValidationSequences
from fomoe_pl.errors import ConfigError
from fomoe_pl.seed import seed_or_default
from fomoe_pl.training.context import context

Batch = dict[str, Tensor]


def _ignore_signals(worker: int) -> None:
    # A terminal and some launchers signal a whole process group. It is the training process that decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class SiteLoader(DataLoader[dict[str, Tensor]]):
    """Batches of a site's stream from where the run is: Lightning begins to iterate again with each of its epochs.

    Args:
        stream: The site's stream.
        position: Batches of the stream that the run has trained on.
        **settings: As for a DataLoader.
    """

    def __init__(self, stream: SiteStream, position: Callable[[], int], **settings: Any) -> None:
        super().__init__(stream, **settings)
        self._stream, self._position = stream, position

    def __iter__(self) -> Any:
        """Begin at the position."""
        self._stream.start_at(self._position())
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the datamodule keeps the position. But Lightning takes what has none for a loader that loses it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, as `state_dict`."""


class FoMoEData(L.LightningDataModule):
    """A corpus made by ``fomoe prepare``, divided over sites.

    Batches are ``{"inputs": (B, S), "targets": (B, S), "domain": (B,)}``, all int64; targets of -100 are ignored.
    Those of validation have ``bytes`` (B, S) too: the bytes of text that each target stands for.
    Training is one endless stream per site, of which Lightning's epochs (`limit_train_batches`) are sections;
    validation is a fixed set that the sites share.

    Args:
        root: Folder of the corpus.
        sequence_length: Tokens of a sequence, S.
        batch_size: Sequences of a micro-batch of one rank, B.
        val_batch_size: Sequences of a validation batch of one rank; null: batch_size.
        val_sequences: Most validation sequences over all sites, an equal share of each domain; null: all.
        num_workers: Processes that read training data for each rank; 0: the training process reads.
        split: How training data is divided over sites: iid (each has a share of every domain), domain (each has whole
            domains), dirichlet (as iid, each with a random mixture of the domains).
        dirichlet_alpha: Concentration of the mixtures: small gives each site few domains, large equal shares.
        seed: Seed of the data's order and mixtures; null: that of seed_everything, else 0.
        max_bad_shards: Training shards of a domain that a reader replaces by others when they cannot be read; one more
            stops the run.
    """

    def __init__(
        self,
        root: str,
        sequence_length: int = 256,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_sequences: int | None = None,
        num_workers: int = 0,
        split: SplitKind = "iid",
        dirichlet_alpha: float = 0.3,
        seed: int | None = None,
        max_bad_shards: int = 1,
    ) -> None:
        super().__init__()
        self.root = root
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.val_sequences = val_sequences
        self.num_workers = num_workers
        self.split: SplitKind = split
        self.dirichlet_alpha = dirichlet_alpha
        self.seed = seed_or_default(seed)
        self.max_bad_shards = max_bad_shards
        self.goes_on = False  # set before a run that goes on from a checkpoint: it does without shards lost meanwhile
        self._consumed: Consumed | None = None  # before this division of the data over sites and workers
        self._since = 0  # the run's batches at that time
        self._saved: dict[str, Any] | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """The corpus.

        Raises:
            ConfigError: Its manifest or a shard is missing or damaged.
        """
        return load_manifest(self.root, training=not self.goes_on)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.manifest.vocab_size

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's ``domain`` is an index into them."""
        return self.manifest.domain_names

    def check(self, n_sites: int) -> None:
        """Check everything that can be seen before any process starts.

        Args:
            n_sites: Number of sites, M.

        Raises:
            ConfigError: A setting out of range; no manifest; a missing shard; fewer shards than sites x workers.
        """
        smallest = {"sequence_length": 1, "batch_size": 1, "val_batch_size": 1, "num_workers": 0, "seed": 0,
                    "max_bad_shards": 0}  # fmt: skip
        for key, least in smallest.items():
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}", getattr(self, key), f"must be at least {least}", "Give a larger one")
        n_domains = len(self.manifest.domains)
        if self.val_sequences is not None and self.val_sequences < n_domains:
            raise ConfigError(
                "data.val_sequences",
                self.val_sequences,
                f"every one of the {n_domains} domains needs a sequence",
                f"Give {n_domains} or more, or null for all",
            )
        self._plans(n_sites)

    def check_vocabulary(self, size: int) -> None:
        """Check that a model of ``size`` token ids can read the corpus; it may have more (padded) than are used.

        Raises:
            ConfigError: It has fewer.
        """
        if size < self.vocab_size:
            raise ConfigError("model.architecture.vocab_size", size,
                              f"must be at least the vocabulary of the data in {self.root} ({self.vocab_size})",
                              f"set it to {self.vocab_size} or more, or prepare the data with another tokenizer"
                              )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        """The endless stream of this rank's site, from where the run is."""
        site, n_sites = self._site()
        self._take_up(n_sites)
        stream = SiteStream(
            self.manifest, self._plans(n_sites)[site], self.sequence_length, self.seed, site,
            batch_size=self.batch_size, consumed=self._consumed, max_bad_shards=self.max_bad_shards,
        )  # fmt: skip
        return SiteLoader(
            stream,
            lambda: self._batches() - self._since,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            worker_init_fn=_ignore_signals,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the run is in the data of all sites: all of them have been given the same number of batches."""
        return {
            "division": self._division(self._site()[1]),
            "consumed": self._consumed,
            "since": self._since,
            "batches": self._batches(),
        }

    def _batches(self) -> int:
        """Micro-batches that the run has trained on, as Lightning counts them; loaders are ahead of that."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a position; loaders that are made afterwards start there."""
        self._saved = state_dict

    def _take_up(self, n_sites: int) -> None:
        """Find the stream's start: the saved position, or what it leaves to another division over sites."""
        saved, self._saved = self._saved, None
        if saved is None:
            if not self._batches():  # of a new run, which owes nothing to one before it
                self._since, self._consumed = 0, None
            return
        before, now = saved["division"], self._division(n_sites)
        batches = saved["batches"]
        self._since, self._consumed = saved["since"], saved["consumed"]
        if before == now:
            return
        changed = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key])
        if before["corpus"] != now["corpus"] or before["seed"] != now["seed"]:
            self._consumed = None
            rank_zero_info(f"data: another order of documents ({changed}), read from its beginning")
        else:
            plans = partition(self._sizes(), before["n_sites"], before["readers"], before["split"],
                              before["dirichlet_alpha"], before["seed"])  # fmt: skip
            self._consumed = consumption(
                self.manifest, plans, before["sequence_length"], before["seed"],
                batches=batches - self._since, batch_size=before["batch_size"], consumed=self._consumed,
            )  # fmt: skip
            ahead = self._readers_ahead(n_sites, self._consumed)
            more = f"; {ahead} readers of a domain find nothing left and begin the next epoch" if ahead else ""
            rank_zero_info(f"data: what was not read yet in this epoch is divided anew ({changed}){more}")
        self._since = batches

    def _readers_ahead(self, n_sites: int, consumed: Consumed) -> int:
        """Readers of a domain all of whose shards are an epoch further than the domain's least read one."""
        ahead = 0
        for plan in (plan for workers in self._plans(n_sites) for plan in workers):
            for domain, numbers in zip(plan.domains, plan.shards, strict=True):
                shards = self.manifest.shards_of("train", self.domains[domain])
                epochs = [read // shard.tokens for read, shard in zip(consumed[domain], shards, strict=True)]
                ahead += min(epochs[number] for number in numbers) > min(epochs)
        return ahead

    def _division(self, n_sites: int) -> dict[str, Any]:
        return {
            "corpus": self.manifest.fingerprint, "seed": self.seed, "n_sites": n_sites,
            "readers": max(1, self.num_workers), "split": self.split, "dirichlet_alpha": self.dirichlet_alpha,
            "sequence_length": self.sequence_length, "batch_size": self.batch_size,
        }  # fmt: skip

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation sequences of this rank's site. They lie in memory and need no workers."""
        site, n_sites = self._site()
        sequences = ValidationSequences(self.manifest, self.sequence_length, self.val_sequences, n_sites)
        # Lightning leaves a DistributedSampler as it is; it would put one over ranks in the place of any other.
        share: DistributedSampler[Batch] = DistributedSampler(sequences, num_replicas=n_sites, rank=site, shuffle=False)
        return DataLoader(sequences, batch_size=self.val_batch_size, sampler=share, pin_memory=self._on_gpu())

    def identity(self) -> dict[str, Any]:
        """What makes the numbers of two runs comparable: corpus, tokenizer, and the sequences that are validated."""
        return {
            "corpus": self.manifest.fingerprint,
            "tokenizer": self.manifest.tokenizer.sha256,
            "sequence_length": self.sequence_length,
            "val_sequences": self.val_sequences,
        }

    def probe(self, n_sequences: int, n_tokens: int) -> Batch:
        """The same held-out text on every site, whatever `sequence_length` is.

        Args:
            n_sequences: Sequences, an equal share of each domain (the first domains one more, or one alone).
            n_tokens: Tokens of each.

        Returns:
            One batch, of fewer sequences only where the validation split has no more.
        """
        sequences = ValidationSequences(self.manifest, n_tokens, n_sequences, 1)
        batch: Batch = default_collate([sequences[i] for i in range(len(sequences))])
        return batch

    def _sizes(self) -> list[DomainSize]:
        return [
            DomainSize(domain.name, len(self.manifest.shards_of("train", domain.name)), domain.train.tokens)
            for domain in self.manifest.domains
        ]

    def _plans(self, n_sites: int) -> list[list[StreamPlan]]:
        readers = max(1, self.num_workers)
        return partition(self._sizes(), n_sites, readers, self.split, self.dirichlet_alpha, self.seed)

    def _site(self) -> tuple[int, int]:
        """Index of this rank's site, and the number of sites."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("FoMoEData gives its loaders to a Trainer: attach it by trainer.fit(module, data)")
        topology = context(trainer).topology
        return topology.site, topology.n_sites

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
