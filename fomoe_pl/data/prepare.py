"""Documents to tokens to webdataset shards.

Every document is read twice (three times where a tokenizer is trained), so that neither the text nor the tokens of a
corpus have to fit into memory: first its hash and size, which decide split, order and shard; then its text.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.data import long_text
from fomoe_pl.data.documents import ReadOptions, separator_bytes
from fomoe_pl.data.index import DomainIndex, Progress, index_domain, training_bytes, training_share, unseen
from fomoe_pl.data.long_text import LongText
from fomoe_pl.data.manifest import (
    MANIFEST_FILE,
    VERSION,
    DomainInfo,
    Manifest,
    ShardInfo,
    Split,
    SplitInfo,
    TokenizerInfo,
    read_manifest,
)
from fomoe_pl.data.segments import Encoded, Segments, SegmentWriter
from fomoe_pl.data.shards import write_shard
from fomoe_pl.data.sources import find_sources
from fomoe_pl.data.statistics import count_words, read_statistics, statistics_sha256, write_statistics
from fomoe_pl.data.token_files import TokensDtype
from fomoe_pl.data.tokenizer import (
    SubwordTokenizer,
    TextTokenizer,
    bpe_vocab_size,
    fixed_tokenizer,
    token_dtype,
    train_bpe,
    train_bpe_from_counts,
    trained_before,
)
from fomoe_pl.data.workers import Workers, n_cores
from fomoe_pl.errors import ConfigError, check_range
from fomoe_pl.files import alone, sha256_of, write_whole
from fomoe_pl.files import prepare as prepare_file
from fomoe_pl.remote import AnyPath

_log = logging.getLogger(__name__)
_MB = 1e6
# Text encoded at a time: the encodings of `tokenizers` take some hundred times their text. Each process has a batch.
_BATCH_BYTES = 2_000_000
_WORKER_BATCH_BYTES = 250_000
_MOST_WAITING = 16_000_000  # characters at each process: long documents wait until others are done
WORTH_WORKERS = 4_000_000  # bytes of text of a domain from which on several processes encode it
_WORK = ".work"  # what a preparation that goes on needs, below the folder that it writes


def prepare(
    source: list[str],
    output: str,
    tokenizer: str = "bytes",
    eod: str | None = None,
    text_field: str = "text",
    separator: str | None = None,
    skip_empty: bool = False,
    skip_unreadable: bool = False,
    val_fraction: float = 0.05,
    shards_per_domain: int = 16,
    max_shard_mb: float = 16.0,
    tokenizer_mb: float = 50.0,
    seed: int = 0,
    overwrite: bool = False,
    validation_source: list[str] | None = None,
    from_statistics: list[str] | None = None,
    tokens_dtype: TokensDtype = "uint16",
    tokens_end: int | None = None,
    progress: Progress = unseen,
) -> Manifest:
    r"""Prepare a corpus: documents to tokens to shards, with a manifest.

    The same documents and settings give the same files, byte for byte. The corpus is written beside the output folder
    and moved there when it is complete; the same preparation goes on there if it was interrupted.

    Args:
        source: Domains: NAME=PATH (a file, or all files below a folder), or the path of a folder with one domain per
            entry. PATH may be a URL; tokens:PATH has token ids, hf:PATH is a Hugging Face data set folder.
        output: Folder of the corpus. One that already holds this corpus is kept, one that holds another is refused.
        tokenizer: `bytes` (257 ids), `bpe:VOCAB` (trained on an equal share of each domain's training split), or the
            path of a tokenizer.json.
        eod: Token of a tokenizer.json that ends a document. Default: what the tokenizer itself says.
        text_field: Field of JSON and column of .parquet files that holds the text; meta.text is a field in a field.
        separator: What stands between the documents of a .txt file, such as '\x1e' or '¶': any characters, and Python's
            escapes. Default: a file is a document.
        skip_empty: Leave out, and count, records whose text is null, missing or a blank line. Without it they are
            refused, with file and line.
        skip_unreadable: Leave out, and name, files below a folder that are of no readable kind. Without it they are
            refused.
        val_fraction: Share of the documents that the validation split gets, by hash of the document.
        shards_per_domain: Least number of training shards of a domain; sites x workers cannot be more than that.
        max_shard_mb: Most text in a shard in 10^6 bytes, give or take a document. A reader holds a shard in memory.
        tokenizer_mb: Text that a BPE is trained on in 10^6 bytes, over all domains.
        seed: Seed of the documents' order.
        overwrite: Replace another corpus in the output folder.
        validation_source: Domains as for source, whose documents are the whole validation split; val_fraction is not
            used then.
        from_statistics: Files of word counts that bpe:VOCAB is trained on in the place of the text, made by
            --statistics; with the same files every site has the same tokenizer.
        tokens_dtype: Type of the ids in token files (tokens:PATH), little-endian.
        tokens_end: Id that ends a document in them. Default: the tokenizer's own end of document.
        progress: Is called with what is being done, the bytes of text that it has been done for, and those that it is
            to be done for (0: unknown).

    Returns:
        The manifest of the corpus in `output`.

    Raises:
        ConfigError: A setting that cannot work, unreadable input, or an output folder that holds something else.
    """
    _check_numbers(val_fraction, shards_per_domain, max_shard_mb, tokenizer_mb, seed)
    if separator is not None:
        separator_bytes(separator)
    if eod is not None and (tokenizer == "bytes" or tokenizer.startswith("bpe:")):
        raise ConfigError("eod", eod, "is for a tokenizer.json; bytes and bpe: have an end of document", "Leave it out")
    # Before the sources are read, since a mistyped tokenizer should not cost a pass over the corpus.
    choice = bpe_vocab_size(tokenizer) if tokenizer.startswith("bpe:") else fixed_tokenizer(tokenizer, eod)
    if from_statistics and not isinstance(choice, int):
        raise ConfigError("from_statistics", from_statistics, "trains a BPE, and the tokenizer is another",
                          "Give --tokenizer bpe:VOCAB, the same at all sites")  # fmt: skip
    counts = read_statistics(from_statistics) if from_statistics else None
    target = _output(output)
    options = ReadOptions(text_field, separator, skip_empty)
    if not isinstance(choice, int):
        end = choice.eod_id if tokens_end is None else tokens_end
        options = replace(options, tokens_dtype=tokens_dtype, tokens_end=end, vocab_size=choice.vocab_size)

    def indexed(specs: Sequence[str], only: Split | None) -> list[DomainIndex]:
        sources, left_out = find_sources(specs, skip_unreadable=skip_unreadable)
        for path in left_out:
            _log.warning("%s is of no readable kind: left out", path)
        token_bytes = None
        if any(part.tokens for part in sources):
            if isinstance(choice, int):
                raise ConfigError("tokenizer", tokenizer, "is trained, and token files have the ids of another",
                                  "Give the tokenizer.json that they were made with")  # fmt: skip
            token_bytes = choice.token_bytes()
        return [
            index_domain(part, options, val_fraction, shards_per_domain, max_shard_mb * _MB, seed, only, progress,
                         token_bytes if part.tokens else None)
            for part in sources
        ]  # fmt: skip

    indices = indexed(source, "train" if validation_source else None)
    held_out = indexed(validation_source, "val") if validation_source else []
    _look_at([*indices, *held_out])
    _look_for_training_text(indices, held_out)
    documents = {index.source.domain: index.documents_sha256 for index in indices}
    settings: dict[str, Any] = {
        "tokenizer": tokenizer if isinstance(choice, int) else choice.kind,
        "tokenizer_sha256": None if isinstance(choice, int) else choice.sha256,
        "tokenizer_mb": tokenizer_mb if isinstance(choice, int) else None,
        "eod_id": None if isinstance(choice, int) else choice.eod_id,
        "val_fraction": val_fraction,
        "shards_per_domain": shards_per_domain,
        "max_shard_mb": max_shard_mb,
        "seed": seed,
        "documents_sha256": documents,
    }
    # Not in a corpus without them, whose manifest stays as it was.
    if held_out:
        settings["val_fraction"] = None
        settings["validation_sha256"] = {index.source.domain: index.documents_sha256 for index in held_out}
    if counts is not None:
        settings["tokenizer_mb"], settings["statistics_sha256"] = None, statistics_sha256(counts)
    with alone("output", target):  # sources may lie beside it, and have been found
        if (target / MANIFEST_FILE).is_file() and not overwrite:
            return _existing(target, settings)
        partial = target.with_name(f".{target.name}.partial")
        _take_up(partial, settings)
        if isinstance(choice, int):
            kept = partial / _WORK / "tokenizer.json"
            if not kept.is_file():
                write_whole(kept, _trained(indices, choice, tokenizer_mb * _MB, counts).serialized)
            choice = trained_before(kept)
        encoder: TextTokenizer = choice
        _write([*indices, *held_out], encoder, partial, settings, progress)
        shutil.rmtree(partial / _WORK)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        return read_manifest(target)


def _take_up(partial: Path, settings: dict[str, Any]) -> None:
    """Keep what an interrupted preparation of the same corpus has written; clear away that of another."""
    described = json.dumps({"version": VERSION, **settings}, sort_keys=True)
    journal = partial / _WORK / "settings.json"
    try:
        same = journal.read_text() == described
    except OSError:
        same = False
    if same:
        _log.info("%s: going on with a preparation that was interrupted", partial)
        return
    shutil.rmtree(partial, ignore_errors=True)
    journal.parent.mkdir(parents=True)
    write_whole(journal, described)


def collect_statistics(
    source: list[str],
    statistics: str,
    min_count: int = 5,
    text_field: str = "text",
    separator: str | None = None,
    skip_empty: bool = False,
    skip_unreadable: bool = False,
    val_fraction: float = 0.05,
    tokenizer_mb: float = 50.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the word counts of a sample, the text that `prepare` with the same settings would train a BPE on.

    Args:
        source: As for :func:`prepare`.
        statistics: The file.
        min_count: Words that occur less often in the sample are not written.
        text_field: As for :func:`prepare`.
        separator: As for :func:`prepare`.
        skip_empty: As for :func:`prepare`.
        skip_unreadable: As for :func:`prepare`.
        val_fraction: As for :func:`prepare`: text of the validation split is not counted.
        tokenizer_mb: Text that is counted in 10^6 bytes, over all domains.
        seed: As for :func:`prepare`.

    Returns:
        What the file says beside the counts.

    Raises:
        ConfigError: As :func:`prepare`.
    """
    _check_numbers(val_fraction, 1, 1.0, tokenizer_mb, seed)
    check_range("min_count", min_count, "5 is the default, 1 writes every word", least=1)
    path = Path(statistics).expanduser()
    prepare_file("statistics", path)
    if separator is not None:
        separator_bytes(separator)
    sources, left_out = find_sources(source, skip_unreadable=skip_unreadable)
    for left in left_out:
        _log.warning("%s is of no readable kind: left out", left)
    options = ReadOptions(text_field, separator, skip_empty)
    indices = [index_domain(part, options, val_fraction, 1, math.inf, seed) for part in sources]
    _look_at(indices)
    if any(part.tokens for part in sources):
        raise ConfigError("source", " ".join(source), "has token files, which have no words", "Name the text itself")
    return write_statistics(path, count_words(sample(indices, tokenizer_mb * _MB)), min_count)


def _check_numbers(
    val_fraction: float, shards_per_domain: int, max_shard_mb: float, tokenizer_mb: float, seed: int
) -> None:
    if not 0 < val_fraction < 1:
        raise ConfigError("val_fraction", val_fraction, "must lie between 0 and 1", "Common values: 0.01 to 0.1")
    if shards_per_domain < 1:
        raise ConfigError("shards_per_domain", shards_per_domain, "must be at least 1", "The default is 16")
    for key, value in (("max_shard_mb", max_shard_mb), ("tokenizer_mb", tokenizer_mb)):
        if not 0 < value < math.inf:
            raise ConfigError(key, value, "must be positive and finite", "Defaults: max_shard_mb 16, tokenizer_mb 50")
    if seed < 0:
        raise ConfigError("seed", seed, "must not be negative", "The default is 0")


def _output(output: str) -> Path:
    """The folder of the corpus, which is there with a corpus or can be made."""
    if "://" in output:
        raise ConfigError("output", output, "is a URL, and a corpus is written to a local folder", "Name a folder")
    target = Path(output).expanduser()
    if target.is_symlink() or target.name in ("", ".."):  # a link stays, and what it points to is replaced
        target = target.resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError("output", output, "is a file", "Name a folder")
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise ConfigError("output", output, "is a folder of something else", "Give a new folder, or empty this one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output", output, f"cannot be made ({error.strerror})", "Name another folder") from None
    return target


def _look_at(indices: Sequence[DomainIndex]) -> None:
    """Say what was left out of the files, and refuse two files with the same documents."""
    files: dict[bytes, AnyPath] = {}
    for index in indices:
        for what, count in index.left_out.items():
            _log.warning("%s: %d records with %s left out", index.source.domain, count, what)
        for path, digest in index.file_hashes.items():
            if files.setdefault(digest, path) != path:
                raise ConfigError(
                    "source", str(path), f"has the same documents as {files[digest]}",
                    "Leave one of them out: name the files, or move one away",
                )  # fmt: skip


def _look_for_training_text(training: Sequence[DomainIndex], held_out: Sequence[DomainIndex]) -> None:
    """Say how many documents of a validation corpus are training documents too."""
    for index in held_out:
        both = sum(int(np.isin(index.keys, other.keys).sum()) for other in training)
        if both:
            _log.warning("%s: %d of %d validation documents are in the training text too",
                         index.source.domain, both, len(index.keys))  # fmt: skip


def _existing(target: Path, settings: dict[str, Any]) -> Manifest:
    """The corpus that is already there, if it is the wanted one."""
    manifest = read_manifest(target)
    differing = [key for key, value in settings.items() if manifest.settings.get(key) != value]
    if differing:
        raise ConfigError(
            "output",
            str(target),
            f"holds another corpus (other {', '.join(differing)})",
            "Give another folder, or --overwrite to replace it",
        )
    _log.info("%s already holds this corpus: kept", target)
    return manifest


def sample(indices: Sequence[DomainIndex], n_bytes: float) -> Iterator[str]:
    """As much training text of each domain as the smallest has, at most `n_bytes` together."""
    share = min(int(n_bytes / len(indices)), *map(training_bytes, indices))
    for index in indices:
        yield from training_share(index, share)


def _trained(
    indices: Sequence[DomainIndex], vocab_size: int, n_bytes: float, counts: Mapping[str, int] | None
) -> SubwordTokenizer:
    """Train a BPE on a sample, or on word counts."""
    if counts is None:
        encoder = train_bpe(sample(indices, n_bytes), vocab_size)
    else:
        encoder = train_bpe_from_counts(counts, vocab_size)
    if encoder.vocab_size < vocab_size:
        _log.info("The text has merges for %d tokens, not for %d.", encoder.vocab_size, vocab_size)
    return encoder


def _write(
    indices: Sequence[DomainIndex], encoder: TextTokenizer, folder: Path, settings: dict[str, Any], progress: Progress
) -> None:
    """Write shards, tokenizer and manifest."""
    encoder.save(folder)
    shards: list[ShardInfo] = []
    for index in indices:
        shards += _write_shards(index, encoder, folder, progress)
        _log.info("%s: %d documents encoded", index.source.domain, len(index.sizes))
    domains = []
    for name in dict.fromkeys(index.source.domain for index in indices):
        own = [shard for shard in shards if shard.domain == name]
        domains.append(DomainInfo(name, _total(own, "train"), _total(own, "val")))
    info = TokenizerInfo(encoder.kind, encoder.vocab_size, encoder.eod_id, encoder.sha256, encoder.file)
    Manifest(folder, info, tuple(domains), tuple(shards), settings).save()


def _write_shards(index: DomainIndex, encoder: TextTokenizer, folder: Path, progress: Progress) -> list[ShardInfo]:
    """Encode a domain, and write its shards."""
    domain, in_val = index.source.domain, index.shard >= index.n_train_shards
    own = folder / _WORK / f"{domain}-{'val' if index.n_train_shards == 0 else 'train'}"
    n_workers = n_cores() if index.sizes.sum() >= WORTH_WORKERS else 1
    _encode(index, encoder, SegmentWriter(own), in_val, n_workers, progress)
    segments = Segments(own, token_dtype(encoder.vocab_size), in_val)
    order = np.lexsort((index.rank, index.shard))
    first = np.searchsorted(index.shard[order], np.arange(index.n_train_shards + index.n_val_shards + 1))

    def written(shard: int) -> ShardInfo:
        return _shard(index, segments, shard, order[first[shard] : first[shard + 1]], folder)

    shards = []
    done = 0
    for info in Workers(written, n_workers).map(range(len(first) - 1)):
        shards.append(info)
        done += info.bytes
        progress(f"{domain}: writing shards", done, int(index.sizes.sum()))
    segments.close()
    return shards


def _encode(
    index: DomainIndex,
    encoder: TextTokenizer,
    writer: SegmentWriter,
    in_val: NDArray[np.bool_],
    n_workers: int,
    progress: Progress,
) -> None:
    """Encode the documents that no segment has yet."""
    size = min(_BATCH_BYTES, _WORKER_BATCH_BYTES) if n_workers > 1 else _BATCH_BYTES
    token_bytes = encoder.token_bytes().astype(np.uint32) if index.source.tokens else None

    def encoded(batch: tuple[int, list[Any]]) -> Encoded:
        first, texts = batch
        vals = in_val[first : first + len(texts)]
        if token_bytes is not None:
            ended = [np.append(ids, encoder.eod_id).astype(token_dtype(encoder.vocab_size)) for ids in texts]
            of_val = [token_bytes[ids] for ids, val in zip(ended, vals, strict=True) if val]
            lengths = np.array([len(ids) for ids in ended], np.int64)
            return Encoded(np.concatenate(ended), lengths, np.concatenate([np.zeros(0, np.uint32), *of_val]))
        train = iter(encoder.encode([text for text, val in zip(texts, vals, strict=True) if not val]))
        counted = iter(encoder.encode_with_bytes([text for text, val in zip(texts, vals, strict=True) if val]))
        documents: list[NDArray[np.unsignedinteger]] = []
        sizes = [np.zeros(0, np.uint32)]
        for val in vals:
            if val:
                tokens, of_tokens = next(counted)
                sizes.append(of_tokens.astype(np.uint32))
            else:
                tokens = next(train)
            documents.append(tokens)
        lengths = np.array([len(tokens) for tokens in documents], np.int64)
        return Encoded(np.concatenate(documents), lengths, np.concatenate(sizes))

    def in_parts(number: int, text: LongText) -> Iterator[Encoded]:
        length, nothing, unknown = 0, np.zeros(0, np.uint32), np.zeros(0, np.int64)
        for ids, of_ids in encoder.in_parts(text):
            length += len(ids)
            yield Encoded(ids, unknown, of_ids.astype(np.uint32) if in_val[number] else nothing)
        yield Encoded(nothing.astype(token_dtype(encoder.vocab_size)), np.array([length], np.int64), nothing)

    def parts() -> Iterator[Encoded]:
        batches = _batches(index, writer.documents, size)
        if not has_long(index):
            workers = Workers(encoded, n_workers, lambda batch: sum(map(len, batch[1])), _MOST_WAITING)
            yield from workers.map(batches)
            return
        for number, texts in batches:  # a long text is a file of this process
            yield from in_parts(number, texts[0]) if isinstance(texts[0], LongText) else [encoded((number, texts))]

    def shown() -> Iterator[Encoded]:
        done, number = int(index.sizes[: writer.documents].sum()), writer.documents
        total = int(index.sizes.sum())
        for part in parts():
            yield part
            done += int(index.sizes[number : number + len(part.lengths)].sum())
            number += len(part.lengths)
            progress(f"{index.source.domain}: encoding", done, total)

    if writer.documents < len(in_val):
        writer.write(shown())


def has_long(index: DomainIndex) -> bool:
    """Whether there is a text that is not held in memory as a whole."""
    return not index.source.tokens and bool((index.sizes > long_text.LONGEST).any())


def _shard(index: DomainIndex, segments: Segments, shard: int, documents: NDArray[np.int64], folder: Path) -> ShardInfo:
    """Write a shard, unless it is there."""
    name, split = index.shard_name(shard)
    described = folder / _WORK / f"{name}.json"
    if described.is_file():
        kept = ShardInfo(**json.loads(described.read_text()))
        if _intact(folder / name, kept):
            return kept
    sizes = map(segments.bytes, documents.tolist()) if split == "val" else None
    unfinished = folder / _WORK / name
    sha256 = write_shard(unfinished, map(segments.tokens, documents.tolist()), sizes)
    info = ShardInfo(
        file=name,
        split=split,
        domain=index.source.domain,
        documents=len(documents),
        tokens=int(segments.lengths[documents].sum()),
        bytes=int(index.sizes[documents].sum()),
        file_bytes=unfinished.stat().st_size,
        sha256=sha256,
    )
    unfinished.rename(folder / name)
    write_whole(described, json.dumps(asdict(info)))
    return info


def _intact(path: Path, info: ShardInfo) -> bool:
    """Whether a shard of an interrupted preparation is as it was written."""
    if not path.is_file() or path.stat().st_size != info.file_bytes:
        return False
    return sha256_of(path) == info.sha256


def _batches(index: DomainIndex, skipped: int, size: int) -> Iterator[tuple[int, list[Any]]]:
    """Consecutive texts of a domain in lists of about `size` characters, with the number of the first.

    Args:
        index: The domain.
        skipped: Texts at its beginning that are left out.
        size: Characters.

    Raises:
        ConfigError: There are not as many as there were.
    """
    n = len(index.sizes)
    batch: list[Any] = []
    length = 0
    number = skipped
    documents = index.documents()
    for text in islice(documents, skipped, n):
        if isinstance(text, LongText):
            if batch:
                yield number, batch
            number, batch, length = number + len(batch), [], size
        batch.append(text)
        length += len(text)
        if length >= size:
            yield number, batch
            number += len(batch)
            batch, length = [], 0
    if batch:
        yield number, batch
    if number + len(batch) != n or next(documents, None) is not None:
        raise ConfigError("source", index.source.domain, "its files changed while they were read",
                          "Prepare again when nothing writes to them")  # fmt: skip


def _total(shards: Sequence[ShardInfo], split: Split) -> SplitInfo:
    own = [shard for shard in shards if shard.split == split]
    return SplitInfo(sum(s.documents for s in own), sum(s.bytes for s in own), sum(s.tokens for s in own))
