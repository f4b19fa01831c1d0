"""The LightningDataModule: a prepared corpus as training and validation batches of a site."""

from functools import cached_property
from typing import Any

import lightning.pytorch as L
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from fomoe_pl.data.manifest import Manifest, load_manifest
from fomoe_pl.data.partition import DomainSize, SplitKind, StreamPlan, partition
from fomoe_pl.data.stream import SiteStream
from fomoe_pl.data.validation import ValidationSequences
from fomoe_pl.errors import ConfigError

Batch = dict[str, Tensor]


class FoMoEData(L.LightningDataModule):
    """A corpus made by ``tools/prepare_data.py``, divided over sites.

    Batches are ``{"inputs": (B, S), "targets": (B, S), "domain": (B,)}``, all int64; targets of -100 are ignored.
    Training is one endless epoch per site; validation is a fixed set that the sites share.

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
        seed: Seed of the data's order and mixtures; null: on the command line that of seed_everything, else 0.
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
        self.seed = seed or 0

    @cached_property
    def manifest(self) -> Manifest:
        """The corpus.

        Raises:
            ConfigError: Its manifest or a shard is missing or damaged.
        """
        return load_manifest(self.root)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.manifest.vocab_size

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's ``domain`` is an index into them."""
        return self.manifest.domain_names

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text per token id, float32 (V,); special tokens have 0."""
        return self.manifest.token_bytes()

    def check(self, n_sites: int) -> None:
        """Check everything that can be seen before any process starts.

        Args:
            n_sites: Number of sites, M.

        Raises:
            ConfigError: A setting out of range; no manifest; a missing shard; fewer shards than sites x workers.
        """
        smallest = {"sequence_length": 1, "batch_size": 1, "val_batch_size": 1, "num_workers": 0}
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

    def train_dataloader(self) -> DataLoader[Batch]:
        """The endless stream of this rank's site."""
        site, n_sites = self._site()
        stream = SiteStream(self.manifest, self._plans(n_sites)[site], self.sequence_length, self.seed, site)
        return DataLoader(
            stream,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_gpu(),
        )

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

    def _plans(self, n_sites: int) -> list[list[StreamPlan]]:
        sizes = [
            DomainSize(domain.name, len(self.manifest.shards_of("train", domain.name)), domain.train.tokens)
            for domain in self.manifest.domains
        ]
        return partition(sizes, n_sites, max(1, self.num_workers), self.split, self.dirichlet_alpha, self.seed)

    def _site(self) -> tuple[int, int]:
        """Index of this rank's site, and the number of sites."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("FoMoEData gives its loaders to a Trainer: attach it by trainer.fit(module, data)")
        topology = getattr(trainer.strategy, "topology", None)
        if topology is None:
            return trainer.global_rank, trainer.world_size
        return topology.site, topology.n_sites

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
