"""The fixed validation sequences, the same set however many sites share them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fomoe_pl.data.manifest import Manifest
from fomoe_pl.data.shards import Tokens, read_validation_shard

IGNORED = -100  # target without a loss: torch.nn.functional.cross_entropy's ignore_index


def sequence_counts(available: Sequence[int], limit: int | None) -> list[int]:
    """How many validation sequences each domain gives.

    Args:
        available: Sequences that each domain has.
        limit: Most sequences in all; None: all of them. Each domain that has any gives an equal share of it (the first
            ones one more where it does not divide), or what it has where that is less.
    """
    if limit is None:
        return list(available)
    having = [domain for domain, count in enumerate(available) if count]
    share, rest = divmod(limit, max(1, len(having)))
    most = {domain: share + (place < rest) for place, domain in enumerate(having)}
    return [min(count, most.get(domain, 0)) for domain, count in enumerate(available)]


def available_sequences(manifest: Manifest, sequence_length: int) -> list[int]:
    """Validation sequences that each domain has, the short last one included."""
    return [-(-domain.val.tokens // sequence_length) for domain in manifest.domains]


class ValidationSequences(Dataset[dict[str, Tensor]]):
    """The validation sequences of all sites that have this corpus.

    Each domain's validation documents, in the order of the manifest, are packed as in training: the first sequence
    begins with an end of document and every token is a target once; the last sequence is filled up with targets that
    are ignored. Sequence i belongs to site i % M. Where M does not divide their number, sequences with ignored targets
    only are added, so that all sites have the same number of batches.

    Args:
        manifest: The corpus.
        sequence_length: S.
        limit: Most sequences over all sites; None: all.
        n_sites: Number of sites, M.
        counts: How many sequences of each domain there are, in the place of a limit.
        least: Least number of sequences: where other corpora have more, all sites have as many batches.
        labels: For each domain, its index in the batches; None: that in the corpus.
    """

    def __init__(
        self,
        manifest: Manifest,
        sequence_length: int,
        limit: int | None,
        n_sites: int,
        *,
        counts: Sequence[int] | None = None,
        least: int = 0,
        labels: Sequence[int] | None = None,
    ) -> None:
        self._eod_id = manifest.eod_id
        self._length = sequence_length
        self._labels = range(len(manifest.domains)) if labels is None else labels
        if counts is None:
            counts = sequence_counts(available_sequences(manifest, sequence_length), limit)
        first = [
            _first_tokens(manifest, name, count * sequence_length)
            for name, count in zip(manifest.domain_names, counts, strict=True)
        ]
        self._tokens, self._bytes = zip(*first, strict=True)
        self._index = [(domain, i) for domain, count in enumerate(counts) for i in range(count)]
        behind_the_end = (0, counts[0] + 1)
        self._index += [behind_the_end] * max(least - len(self._index), -len(self._index) % n_sites)

    def __len__(self) -> int:
        """Number of sequences, a multiple of M."""
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`inputs`, `targets` and the targets' `bytes` of text, each (S,), and `domain` (), all int64."""
        domain, i = self._index[index]
        of_sequence = slice(i * self._length, (i + 1) * self._length + 1)
        sequence = self._filled(self._tokens[domain][of_sequence], IGNORED)
        inputs = torch.where(sequence == IGNORED, self._eod_id, sequence)[:-1]
        return {
            "inputs": inputs,
            "targets": sequence[1:],
            "bytes": self._filled(self._bytes[domain][of_sequence], 0)[1:],
            "domain": torch.tensor(self._labels[domain]),
        }

    def _filled(self, values: Tokens, filling: int) -> Tensor:
        filled = torch.full((self._length + 1,), filling)
        filled[: len(values)] = torch.from_numpy(values.astype(np.int64))
        return filled


def _first_tokens(manifest: Manifest, domain: str, n: int) -> tuple[Tokens, Tokens]:
    """An end of document and the first `n` validation tokens of a domain, and the bytes of text of each."""
    pieces: list[Tokens] = []
    sizes: list[Tokens] = [np.zeros(1, np.uint8)]
    size = 0
    for shard in manifest.shards_of("val", domain):
        for document, of_tokens in read_validation_shard(manifest, shard):
            pieces.append(document)
            sizes.append(of_tokens)
            size += len(document)
            if size >= n:
                break
        if size >= n:
            break
    first = np.array([manifest.eod_id], pieces[0].dtype if pieces else np.uint32)
    return np.concatenate([first, *pieces])[: n + 1], np.concatenate(sizes)[: n + 1]
