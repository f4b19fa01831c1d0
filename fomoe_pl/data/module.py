"""The LightningDataModule: a prepared corpus as training and validation batches of a site."""

import hashlib
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from fomoe_pl.data.corpora import Corpora, Root, Summary, failure, folder_of, has_own, plans_of, read_texts
from fomoe_pl.data.manifest import Manifest, load_manifest
from fomoe_pl.data.partition import DomainSize, SplitKind, StreamPlan, check_alpha
from fomoe_pl.data.stream import Consumed, SiteStream, consumption
from fomoe_pl.data.validation import ValidationSequences
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.seed import seed_or_default
from fomoe_pl.training.context import context

Batch = dict[str, Tensor]


def _ignore_signals(worker: int) -> None:
    # A terminal and some launchers signal a whole process group. It is the training process that decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass(frozen=True)
class OwnRows:
    """Makes batches of a site's sequences, of which each of its ranks takes every n-th.

    So what a site reads does not depend on its number of ranks.

    Attributes:
        place: Of this rank in its site.
        n_ranks: Of the site.
    """

    place: int
    n_ranks: int

    def __call__(self, sequences: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate this rank's."""
        batch: dict[str, Tensor] = default_collate(sequences[self.place :: self.n_ranks])
        return batch


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
    """A corpus made by `fomoe prepare`, divided over sites.

    Batches are `{"inputs": (B, S), "targets": (B, S), "domain": (B,)}`, all int64; targets of -100 are ignored.
    Those of validation have `bytes` (B, S) too: the bytes of text that each target stands for.
    Training is one endless stream per site, of which Lightning's epochs (`limit_train_batches`) are sections;
    validation is a fixed set that the sites share.

    Args:
        root: Folder of the corpus. If each site has a corpus of its own, a template with `{site}` or a mapping from
            sites to folders; a site opens no folder but its own.
        sequence_length: Tokens of a sequence, S.
        batch_size: Sequences of a micro-batch of one site, B, which its ranks share. One number for all sites, or one
            for each such as [8, 8, 4], so that sites of unlike GPUs take as long for a step.
        val_batch_size: Sequences of a validation batch of one site, likewise, one number; null: batch_size, the
            smallest.
        val_sequences: Most validation sequences over all sites, an equal share of each domain; null: all.
        num_workers: Processes that read training data for each rank; 0: the training process reads.
        split: How training data is divided over sites: iid (each has a share of every domain), domain (each has whole
            domains), dirichlet (as iid, each with a random mixture of the domains).
        dirichlet_alpha: Concentration of the mixtures: small gives each site few domains, large equal shares.
        weights: Share of each domain in what a site reads, by name, such as {web: 90, code: 10}; 0 leaves it out. Those
            of a site's domains are scaled to sum 1. null: by the domains' tokens.
        shuffle_sequences: Sequences of a domain that a reader shuffles at a time. 1: the sequences of a long document
            follow each other; documents are shuffled either way.
        seed: Seed of the data's order and mixtures; null: that of seed_everything, else 0.
        max_bad_shards: Training shards of a domain that a reader replaces by others when they cannot be read; one more
            stops the run.
    """

    def __init__(
        self,
        root: str | dict[int, str],
        sequence_length: int = 256,
        batch_size: int | list[int] = 8,
        val_batch_size: int | None = None,
        val_sequences: int | None = None,
        num_workers: int = 0,
        split: SplitKind = "iid",
        dirichlet_alpha: float = 0.3,
        weights: dict[str, float] | None = None,
        shuffle_sequences: int = 1,
        seed: int | None = None,
        max_bad_shards: int = 1,
    ) -> None:
        super().__init__()
        self.root: Root = root
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        if val_batch_size is None:
            val_batch_size = batch_size if isinstance(batch_size, int) else min(batch_size, default=0)
        self.val_batch_size = val_batch_size
        self.val_sequences = val_sequences
        self.num_workers = num_workers
        self.split: SplitKind = split
        self.dirichlet_alpha = dirichlet_alpha
        self.weights = weights
        self.shuffle_sequences = shuffle_sequences
        self.seed = seed_or_default(seed)
        self.max_bad_shards = max_bad_shards
        self.goes_on = False  # set before a run that goes on from a checkpoint: it does without shards lost meanwhile
        self._past: list[tuple[dict[str, Any], int]] = []  # divisions over sites and workers before, and their batches
        self._consumed: Consumed | None = None  # before this division
        self._consumed_once: dict[str, Consumed] = {}  # by corpus; what an earlier version's checkpoint has for `past`
        self._orders: list[str] | None = None  # domains by the numbers of their orders
        self._since = 0  # the run's batches when this division began
        self._saved: dict[str, Any] | None = None
        self._agreed: Corpora | None = None
        self._manifests: dict[str, Manifest] = {}
        self._model_vocabulary: int | None = None

    @property
    def manifest(self) -> Manifest:
        """The corpus; where each site has its own, that of this rank's site.

        Raises:
            ConfigError: Its manifest or a shard is missing or damaged.
        """
        folder = folder_of(self.root, self._site()[0] if has_own(self.root) else 0)
        if folder not in self._manifests:
            self._manifests = {folder: load_manifest(folder, training=not self.goes_on)}
        return self._manifests[folder]

    def setup(self, stage: str) -> None:
        """Tell the other sites what this one has, in numbers, and hear what they have; all sites do so together.

        Raises:
            ConfigError: On all sites, if one of them has no corpus or one that does not fit the others', naming it.
        """
        self._agreed = None
        n_sites = self._site()[1]
        if n_sites == 1 and not has_own(self.root):  # it has been checked
            for line in self._corpora(1).warnings():
                rank_zero_info(line)
            return
        try:
            told = Summary.of(self.manifest).text()
        except ConfigError as error:
            told = failure(error)
        self._agreed = Corpora(tuple(read_texts(context(self.trainer).texts_of_sites(told))))
        self._check_corpora(self._agreed)
        if self._model_vocabulary is not None:
            self.check_vocabulary(self._model_vocabulary)
        for line in (*(self._agreed.described() if has_own(self.root) else ()), *self._agreed.warnings()):
            rank_zero_info(line)

    def _corpora(self, n_sites: int) -> Corpora:
        """The corpora of all sites: as they have told, or one that all share."""
        if self._agreed is not None and self._agreed.n_sites == n_sites:
            return self._agreed
        if has_own(self.root) and n_sites > 1:
            raise RuntimeError(
                "each site has a corpus of its own, and they have not met: give the datamodule to a Trainer"
            )
        return Corpora((Summary.of(self.manifest),) * n_sites)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.manifest.vocab_size

    @property
    def domains(self) -> list[str]:
        """Names of the domains; a batch's `domain` is an index into them."""
        return self.manifest.domain_names if self._agreed is None else self._agreed.domains

    def batch_sizes(self, n_sites: int) -> tuple[int, ...]:
        """Sequences of a micro-batch of each site."""
        return (self.batch_size,) * n_sites if isinstance(self.batch_size, int) else tuple(self.batch_size)

    def check(self, n_sites: int, n_ranks: int | tuple[int, ...] = 1) -> None:
        """Check everything that can be seen before any process starts.

        Args:
            n_sites: Number of sites, M.
            n_ranks: Ranks of a site, or of each site.

        Raises:
            ConfigError: A setting out of range; no manifest; a missing shard; fewer shards than sites x workers. Of
                corpora that each site has of its own nothing is seen until the sites have met.
        """
        sizes, ranks = self.batch_sizes(n_sites), (n_ranks,) * n_sites if isinstance(n_ranks, int) else n_ranks
        if len(sizes) != n_sites:
            rule = f"gives {len(sizes)} numbers for {n_sites} sites"
            raise ConfigError("data.batch_size", self.batch_size, rule, "give one for each site, or one for all")
        if min(sizes) < 1:
            raise ConfigError("data.batch_size", self.batch_size, "must be at least 1", "Give a larger one")
        smallest = {"sequence_length": 1, "val_batch_size": 1, "num_workers": 0, "seed": 0, "shuffle_sequences": 1,
                    "max_bad_shards": 0}  # fmt: skip
        for key, least in smallest.items():
            if getattr(self, key) < least:
                raise ConfigError(f"data.{key}", getattr(self, key), f"must be at least {least}", "Give a larger one")
        shared = [("batch_size", size, n) for size, n in zip(sizes, ranks, strict=True)]
        for key, size, n in (*shared, *(("val_batch_size", self.val_batch_size, n) for n in set(ranks))):
            if size % n:
                below = size // n * n
                hint = f"type {f'{below} or ' if below else ''}{below + n}"
                raise ConfigError(f"data.{key}", size, f"is divided among the {n} ranks of a site", hint)
        check_alpha(self.dirichlet_alpha)
        for name, weight in (self.weights or {}).items():
            check_range(f"data.weights.{name}", weight, "such as 90 and 10, or 0 to leave the domain out", least=0)
        if self.weights is not None and self.split == "dirichlet":
            raise ConfigError("data.weights", self.weights, "and data.split dirichlet both say how domains are mixed",
                              "leave the weights out, or choose split iid or domain")  # fmt: skip
        if not has_own(self.root):
            self._check_corpora(self._corpora(n_sites))

    def _check_corpora(self, corpora: Corpora) -> None:
        corpora.check(self.root)
        having = {d.name for summary in corpora.summaries for d in summary.domains if d.val[2]}
        if self.val_sequences is not None and self.val_sequences < len(having):
            raise ConfigError(
                "data.val_sequences",
                self.val_sequences,
                f"every one of the {len(having)} domains needs a sequence",
                f"Give {len(having)} or more, or null for all",
            )
        if self.weights is not None and set(self.weights) != set(corpora.trained):
            wrong = [*(f"there is no domain {name}" for name in self.weights if name not in corpora.trained),
                     *(f"{name} has none" for name in corpora.trained if name not in self.weights)]  # fmt: skip
            raise ConfigError("data.weights", self.weights, "; ".join(wrong),
                              f"give one for each of {', '.join(corpora.trained)}")  # fmt: skip
        for summary in {summary.fingerprint: summary for summary in corpora.summaries}.values():
            plans_of(summary.fingerprint, [d.size for d in summary.domains], self._division(corpora))

    def check_vocabulary(self, size: int) -> None:
        """Check that a model of `size` token ids can read the corpus; it may have more (padded) than are used.

        Raises:
            ConfigError: It has fewer.
        """
        if has_own(self.root) and self._agreed is None:
            self._model_vocabulary = size  # until the sites have met
            return
        if size < self.vocab_size:
            raise ConfigError("model.architecture.vocab_size", size,
                              f"must be at least the vocabulary of the data in {self.root} ({self.vocab_size})",
                              f"set it to {self.vocab_size} or more, or prepare the data with another tokenizer"
                              )  # fmt: skip

    def train_dataloader(self) -> DataLoader[Batch]:
        """The endless stream of this rank's site, from where the run is."""
        site, n_sites = self._site()
        self._take_up(n_sites)
        corpora = self._corpora(n_sites)
        stream = SiteStream(
            self.manifest, self._plans(n_sites)[site], self.sequence_length, self.seed, site,
            batch_size=self.batch_sizes(n_sites)[site], consumed=self._consumed, max_bad_shards=self.max_bad_shards,
            orders=self._order_numbers(), labels=corpora.labels(site), shuffle=self.shuffle_sequences,
        )  # fmt: skip
        return SiteLoader(
            stream,
            lambda: self._batches() - self._since,
            batch_size=self.batch_sizes(n_sites)[site],
            collate_fn=self._own_rows(),
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            worker_init_fn=_ignore_signals,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the run is in the data of all sites: all of them have been given the same number of batches."""
        corpora = self._corpora(self._site()[1])
        return {
            "division": self._division(corpora),
            "past": self._past,
            "consumed_once": self._consumed_once,
            "orders": self._orders or corpora.domains,
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
        corpora = self._corpora(n_sites)
        if saved is None:
            if not self._batches():  # of a new run, which owes nothing to one before it
                self._since, self._past, self._consumed, self._consumed_once = 0, [], None, {}
                self._orders = corpora.domains
            return
        saved = _of_this_version(saved, self.manifest)
        before, now = saved["division"], self._division(corpora)
        batches = saved["batches"]
        self._since, self._past, self._consumed_once = saved["since"], list(saved["past"]), saved["consumed_once"]
        self._orders = [*saved["orders"], *(name for name in corpora.domains if name not in saved["orders"])]
        if before == now:
            self._consumed = self._read_before()
            return
        plain = [key for key in now if key not in ("corpora", "trained") and before[key] != now[key]]
        changed = ", ".join(f"{key} {before[key]} -> {now[key]}" for key in plain) or "other corpora"
        if before["seed"] != now["seed"] or not set(now["corpora"]) & set(before["corpora"]):
            self._past, self._consumed, self._consumed_once = [], None, {}
            self._orders = corpora.domains
            what = changed if before["seed"] != now["seed"] else "another corpus"
            rank_zero_info(f"data: another order of documents ({what}), read from its beginning")
        else:
            self._past.append((before, batches - self._since))
            self._consumed = self._read_before()
            new = [str(site) for site, found in enumerate(now["corpora"]) if found not in before["corpora"]]
            told = f"; site {', '.join(new)} has a corpus that was not there, read from its beginning" if new else ""
            ahead = 0 if self._consumed is None else self._readers_ahead(n_sites, self._consumed)
            more = f"; {ahead} readers of a domain find nothing left and begin the next epoch" if ahead else ""
            rank_zero_info(f"data: what was not read yet in this epoch is divided again ({changed}){told}{more}")
        self._since = batches

    def _read_before(self) -> Consumed | None:
        """What has been read of this site's corpus under the divisions before this one; None for nothing."""
        manifest = self.manifest
        consumed = self._consumed_once.get(manifest.fingerprint)
        for division, batches in self._past:
            plans = plans_of(manifest.fingerprint, _sizes(manifest), division)
            if plans:
                consumed = consumption(
                    manifest, list(plans.values()), division["sequence_length"], division["seed"], batches=batches,
                    batch_size=division["batch_size"], consumed=consumed, sites=list(plans),
                    orders=self._order_numbers(), shuffle=division["shuffle_sequences"],
                )  # fmt: skip
        return consumed

    def _order_numbers(self) -> list[int]:
        """For each domain of this site's corpus the number of its orders, which stays when other sites come or go."""
        names = self._orders if self._orders is not None else self.domains
        return [names.index(name) for name in self.manifest.domain_names]

    def _readers_ahead(self, n_sites: int, consumed: Consumed) -> int:
        """Readers of a domain all of whose shards are an epoch further than the domain's least read one."""
        ahead = 0
        for plan in (plan for workers in self._plans(n_sites).values() for plan in workers):
            for domain, numbers in zip(plan.domains, plan.shards, strict=True):
                shards = self.manifest.shards_of("train", self.manifest.domain_names[domain])
                epochs = [read // shard.tokens for read, shard in zip(consumed[domain], shards, strict=True)]
                ahead += min(epochs[number] for number in numbers) > min(epochs)
        return ahead

    def _division(self, corpora: Corpora) -> dict[str, Any]:
        return {
            "corpora": corpora.fingerprints, "trained": corpora.trained, "weights": self.weights,
            "seed": self.seed, "n_sites": corpora.n_sites,
            "readers": max(1, self.num_workers), "split": self.split, "dirichlet_alpha": self.dirichlet_alpha,
            "sequence_length": self.sequence_length, "batch_size": self.batch_size,
            "shuffle_sequences": self.shuffle_sequences,
        }  # fmt: skip

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation sequences of this rank's site. They lie in memory and need no workers."""
        site, n_sites = self._site()
        corpora = self._corpora(n_sites)
        sharing = corpora.sharing(site)
        counts = corpora.validation_counts(self.sequence_length, self.val_sequences)
        n_ranks = math.lcm(*map(len, context(self.trainer).topology.ranks))
        length = -(-corpora.validation_length(counts) // n_ranks) * n_ranks
        if not length:
            raise ConfigError("data.root", self.root, "no site has validation text",
                              "prepare with val_fraction or --validation_source, or set trainer.limit_val_batches to 0"
                              )  # fmt: skip
        sequences = ValidationSequences(
            self.manifest, self.sequence_length, None, len(sharing), counts=counts[self.manifest.fingerprint],
            least=length * len(sharing), labels=corpora.labels(site),
        )  # fmt: skip
        # Lightning leaves a DistributedSampler as it is; it would put one over ranks in the place of any other.
        share: DistributedSampler[Batch] = DistributedSampler(
            sequences, num_replicas=len(sharing), rank=sharing.index(site), shuffle=False
        )
        return DataLoader(
            sequences, batch_size=self.val_batch_size, sampler=share, collate_fn=self._own_rows(),
            pin_memory=self._on_gpu(),
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What makes the numbers of two runs comparable: corpus, tokenizer, and the sequences that are validated.

        Where sites have different corpora, `corpus` is a hash over all of them, and `domains` says who has which.
        """
        told: dict[str, Any] = {
            "corpus": self.manifest.fingerprint,
            "tokenizer": self.manifest.tokenizer.sha256,
            "sequence_length": self.sequence_length,
            "val_sequences": self.val_sequences,
        }
        if self._agreed is not None and not self._agreed.alike:
            every = "".join(sorted(set(self._agreed.fingerprints)))
            told["corpus"] = hashlib.sha256(every.encode()).hexdigest()
            told["domains"] = {name: self._agreed.sites_of(name) for name in self._agreed.domains}
        return told

    def probe(self, n_sequences: int, n_tokens: int) -> Batch:
        """The same held-out text on every site, whatever `sequence_length` is.

        Where sites have different corpora no text is on all of them: then tokens drawn at random.

        Args:
            n_sequences: Sequences, an equal share of each domain (the first domains one more, or one alone).
            n_tokens: Tokens of each.

        Returns:
            One batch, of fewer sequences only where the validation split has no more.
        """
        if self._agreed is not None and not self._agreed.alike:
            draw = torch.Generator().manual_seed(self.seed)
            tokens = torch.randint(self.vocab_size, (n_sequences, n_tokens + 1), generator=draw)
            return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "bytes": torch.ones_like(tokens[:, 1:]),
                    "domain": torch.zeros(n_sequences, dtype=torch.int64)}  # fmt: skip
        sequences = ValidationSequences(self.manifest, n_tokens, n_sequences, 1)
        batch: Batch = default_collate([sequences[i] for i in range(len(sequences))])
        return batch

    def _plans(self, n_sites: int) -> dict[int, list[StreamPlan]]:
        """What each reader of the sites that have this site's corpus reads."""
        manifest = self.manifest
        return plans_of(manifest.fingerprint, _sizes(manifest), self._division(self._corpora(n_sites)))

    def _site(self) -> tuple[int, int]:
        """Index of this rank's site, and the number of sites."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("FoMoEData gives its loaders to a Trainer: attach it by trainer.fit(module, data)")
        topology = context(trainer).topology
        return topology.site, topology.n_sites

    def _own_rows(self) -> OwnRows:
        topology = context(self.trainer).topology
        return OwnRows(topology.place, topology.n_ranks)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _sizes(manifest: Manifest) -> list[DomainSize]:
    return [summary.size for summary in Summary.of(manifest).domains]


def _of_this_version(saved: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """A saved position, also of a version that knew of one corpus for all sites alone."""
    division = {"shuffle_sequences": 1, **saved["division"]}
    if "past" in saved:
        past = [({"shuffle_sequences": 1, **before}, batches) for before, batches in saved["past"]]
        return {**saved, "division": division, "past": past}
    corpus = division.pop("corpus")
    division |= {"corpora": [corpus] * division["n_sites"], "trained": manifest.domain_names, "weights": None}
    consumed = {} if saved["consumed"] is None else {corpus: saved["consumed"]}
    return {
        "division": division, "past": [], "consumed_once": consumed, "orders": manifest.domain_names,
        "since": saved["since"], "batches": saved["batches"],
    }  # fmt: skip
