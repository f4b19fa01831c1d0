"""What sites know of each other's corpora: summaries that travel in the place of text, and what follows from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from fomoe_pl.data.manifest import Manifest
from fomoe_pl.data.partition import DomainSize, StreamPlan, draw_mixtures, partition
from fomoe_pl.data.validation import sequence_counts
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import SITE, OfSites, of_site

Root = OfSites
_HASH = 12  # hex digits of a shard's hash that travel: enough to find equal ones


def has_own(root: Root) -> bool:
    """Whether each site has a corpus of its own."""
    return not isinstance(root, str) or SITE in root


def folder_of(root: Root, site: int) -> str:
    """The corpus folder of a site.

    Args:
        root: A folder for all sites, a template with `{site}`, or a mapping from sites to folders.
        site: Its number.

    Raises:
        ConfigError: The mapping does not name the site.
    """
    return of_site("data.root", root, site, "runs/data/its_corpus")


@dataclass(frozen=True)
class DomainSummary:
    """Sizes of a domain at one site: documents, bytes of text and tokens of each split, and training shards."""

    name: str
    train: tuple[int, int, int]
    val: tuple[int, int, int]
    shards: int

    @property
    def size(self) -> DomainSize:
        """Its training data."""
        return DomainSize(self.name, self.shards, self.train[2])


@dataclass(frozen=True)
class Summary:
    """What a site tells of its corpus. It holds no text and no file names.

    Attributes:
        fingerprint: Of the manifest: sites with the same one have copies of the same corpus.
        tokenizer: Hash of the tokenizer.
        vocab_size: Number of token ids, V.
        eod_id: Id that ends a document.
        domains: In the order of the corpus.
        shards: Beginnings of the shards' hashes.
    """

    fingerprint: str
    tokenizer: str
    vocab_size: int
    eod_id: int
    domains: tuple[DomainSummary, ...]
    shards: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Summary:
        """The summary of a corpus."""
        domains = tuple(
            DomainSummary(
                domain.name,
                (domain.train.documents, domain.train.bytes, domain.train.tokens),
                (domain.val.documents, domain.val.bytes, domain.val.tokens),
                len(manifest.shards_of("train", domain.name)),
            )
            for domain in manifest.domains
        )
        return cls(
            manifest.fingerprint, manifest.tokenizer.sha256, manifest.vocab_size, manifest.eod_id, domains,
            tuple(shard.sha256[:_HASH] for shard in manifest.shards),
        )  # fmt: skip

    def text(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self))

    @property
    def names(self) -> list[str]:
        """Names of the domains."""
        return [domain.name for domain in self.domains]


def failure(error: ConfigError) -> str:
    """What a site tells in the place of a summary, where its corpus cannot be read."""
    return json.dumps({"error": [error.key, str(error.value), error.rule, error.hint]})


def read_texts(texts: Sequence[str]) -> list[Summary]:
    """The summaries of all sites.

    Raises:
        ConfigError: A site has told of an error, or what it has told is no summary.
    """
    found = []
    for site, text in enumerate(texts):
        try:
            told = json.loads(text)
            if "error" in told:
                key, value, rule, hint = told["error"]
                raise ConfigError(key, value, f"site {site}: {rule}", hint)
            domains = tuple(
                DomainSummary(d["name"], _three(d["train"]), _three(d["val"]), int(d["shards"]))
                for d in told["domains"]
            )
            found.append(Summary(**{**told, "domains": domains, "shards": tuple(told["shards"])}))
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rule = f"site {site} tells nothing of its corpus that this program understands ({error})"
            raise ConfigError("data.root", None, rule, "let all sites run the same version of fomoe-pl") from None
    return found


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    documents, size, tokens = map(int, values)
    return documents, size, tokens


@dataclass(frozen=True)
class Corpora:
    """The corpora of all sites.

    Sites with the same fingerprint have copies of one corpus, and divide its training shards and validation sequences;
    so sites with copies of one folder do what they would do with one folder that they share. A site whose corpus
    nobody else has reads all of it.

    Attributes:
        summaries: Of each site.
    """

    summaries: tuple[Summary, ...]

    @property
    def n_sites(self) -> int:
        """Number of sites, M."""
        return len(self.summaries)

    @property
    def fingerprints(self) -> list[str]:
        """Of each site's corpus."""
        return [summary.fingerprint for summary in self.summaries]

    @cached_property
    def domains(self) -> list[str]:
        """Names of all domains: those of site 0 in the order of its corpus, then what each further site adds."""
        return list(dict.fromkeys(name for summary in self.summaries for name in summary.names))

    @property
    def trained(self) -> list[str]:
        """Names of the domains that some site has training text of."""
        having = {d.name for summary in self.summaries for d in summary.domains if d.shards}
        return [name for name in self.domains if name in having]

    @property
    def alike(self) -> bool:
        """Whether all sites have the same corpus."""
        return len(set(self.fingerprints)) == 1

    def sharing(self, site: int) -> list[int]:
        """The sites that have the same corpus as this one, itself included."""
        return [other for other, found in enumerate(self.fingerprints) if found == self.fingerprints[site]]

    def sites_of(self, domain: str) -> list[int]:
        """The sites that have text of a domain."""
        return [site for site, summary in enumerate(self.summaries) if domain in summary.names]

    def labels(self, site: int) -> list[int]:
        """For each domain of a site's corpus its index among all domains."""
        return [self.domains.index(name) for name in self.summaries[site].names]

    def check(self, root: Root) -> None:
        """Refuse corpora that cannot train one model.

        Args:
            root: As it was given; where it is one folder for all sites, all must have the same corpus.

        Raises:
            ConfigError: Naming the site, what differs, both values, and what to do.
        """
        first = self.summaries[0]
        common = Counter(summary.tokenizer for summary in self.summaries).most_common(1)[0][0]
        usual = next(site for site, summary in enumerate(self.summaries) if summary.tokenizer == common)
        for site, summary in enumerate(self.summaries):
            if summary.tokenizer != common:
                raise ConfigError(
                    "data.root", root,
                    f"site {site} has tokenizer {summary.tokenizer[:16]} (vocabulary {summary.vocab_size}), site "
                    f"{usual} has {common[:16]} (vocabulary {self.summaries[usual].vocab_size})",
                    f"prepare the corpus of site {site} again with the same one: fomoe prepare --tokenizer "
                    f"TOKENIZER.JSON of site {usual}, or --from_statistics with the same files at all sites",
                )  # fmt: skip
            if not has_own(root) and summary.fingerprint != first.fingerprint:
                raise ConfigError(
                    "data.root", root,
                    f"site {site} has another corpus ({summary.fingerprint[:16]}) than site 0 "
                    f"({first.fingerprint[:16]}) in a folder that all share",
                    "copy the same folder to all machines; or give each site a corpus of its own, with {site} in the "
                    f"path or a mapping: data.root: {{{site}: FOLDER}}",
                )  # fmt: skip
            if not any(domain.train[2] for domain in summary.domains):
                raise ConfigError("data.root", root, f"the corpus of site {site} has no training text",
                                  "prepare it from files with documents")  # fmt: skip

    def warnings(self) -> list[str]:
        """What is to be told at the start: text that two sites have, domains that cannot be validated."""
        told = []
        for one, other in combinations(range(self.n_sites), 2):
            if self.fingerprints[one] != self.fingerprints[other]:
                shared = len(set(self.summaries[one].shards) & set(self.summaries[other].shards))
                if shared:
                    told.append(f"sites {one} and {other} have {shared} shards with the same documents: their text "
                                "counts twice")  # fmt: skip
        for name in self.trained:
            if not any(d.val[2] for summary in self.summaries for d in summary.domains if d.name == name):
                told.append(f"domain {name} has no validation text: no val/loss/{name}")
        return told

    def described(self) -> list[str]:
        """A line for each site."""
        return [
            f"site {site}: "
            + ", ".join(f"{d.name} {d.train[2] / 1e6:.3f} M tokens" for d in summary.domains if d.shards)
            for site, summary in enumerate(self.summaries)
        ]

    def validation_counts(self, sequence_length: int, limit: int | None) -> dict[str, list[int]]:
        """How many validation sequences each corpus gives of each of its domains.

        Args:
            sequence_length: S.
            limit: Most sequences over all sites, an equal share of each domain, of which each corpus gives an equal
                share; None: all.

        Returns:
            Fingerprint -> a number for each of the corpus' domains.
        """
        corpora = {summary.fingerprint: summary for summary in self.summaries}
        available = {
            key: {d.name: -(-d.val[2] // sequence_length) for d in summary.domains} for key, summary in corpora.items()
        }
        total = [sum(of.get(name, 0) for of in available.values()) for name in self.domains]
        share = dict(zip(self.domains, sequence_counts(total, limit), strict=True))
        counts: dict[str, dict[str, int]] = {key: {} for key in corpora}
        for name in self.domains:
            own = [of.get(name, 0) for of in available.values()]
            for key, count in zip(corpora, sequence_counts(own, None if limit is None else share[name]), strict=True):
                counts[key][name] = count
        return {key: [counts[key][name] for name in summary.names] for key, summary in corpora.items()}

    def validation_length(self, counts: Mapping[str, Sequence[int]]) -> int:
        """Validation sequences of each site, filled up to those of the site that has most."""
        sharing = Counter(self.fingerprints)
        return max(-(-sum(of) // sharing[key]) for key, of in counts.items())


def plans_of(
    fingerprint: str, domains: Sequence[DomainSize], division: Mapping[str, Any]
) -> dict[int, list[StreamPlan]]:
    """What each reader of the sites with one corpus reads of it.

    Args:
        fingerprint: Of the corpus.
        domains: Of the corpus.
        division: How data was divided: the sites' `corpora` (fingerprints), all `trained` domains, `readers` a
            site, `split`, `dirichlet_alpha`, `weights` and `seed`.

    Returns:
        Site -> a plan for each reader; empty if no site has the corpus.

    Raises:
        ConfigError: As :func:`fomoe_pl.data.partition.partition`, or the weights leave nothing to read.
    """
    sites = [site for site, found in enumerate(division["corpora"]) if found == fingerprint]
    if not sites:
        return {}
    weights = division["weights"]
    if weights is not None and not any(weights[d.name] for d in domains if d.shards):
        raise ConfigError("data.weights", weights, f"leave site {sites[0]} nothing to read",
                          "give one of its domains a weight above 0")  # fmt: skip
    mixtures = None
    if division["split"] == "dirichlet":
        trained = division["trained"]
        drawn = draw_mixtures(len(trained), len(division["corpora"]), division["dirichlet_alpha"], division["seed"])
        columns = [trained.index(d.name) for d in domains if d.shards]
        mixtures = [drawn[site] for site in sites]
        if columns != list(range(len(trained))):
            of_own = [[row[column] for column in columns] for row in mixtures]
            mixtures = [[share / sum(row) for share in row] for row in of_own]
    plans = partition(
        domains, len(sites), division["readers"], division["split"], division["dirichlet_alpha"], division["seed"],
        weights=weights, mixtures=mixtures,
    )  # fmt: skip
    return dict(zip(sites, plans, strict=True))
