"""Turning text into token ids, and knowing how many bytes of the text each of them stands for."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fomoe_pl.data import windows
from fomoe_pl.data.long_text import Text
from fomoe_pl.errors import ConfigError

Unsigned = NDArray[np.unsignedinteger]
END_OF_DOCUMENT = "<|endofdocument|>"
_CACHED_WORDS = 1 << 17  # by each process, some 200 bytes each
# End-of-document tokens of common tokenizers, for a tokenizer.json that comes without its tokenizer_config.json.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "<|endofprompt|>", "</s>", "<eos>", "<|im_end|>")


class TextTokenizer(Protocol):
    """What the preparation needs of a tokenizer.

    Attributes:
        kind: `bytes`, `bpe` or `file`.
        vocab_size: Number of ids.
        eod_id: Id that ends every document.
        file: Name of its file in the corpus folder; None where it has none.
        sha256: What identifies it.
    """

    kind: str
    vocab_size: int
    eod_id: int
    file: str | None
    sha256: str

    def encode(self, texts: Sequence[str]) -> list[Unsigned]:
        """Token ids of each text with the end of document behind them; uint16 where the vocabulary allows it."""
        ...

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[Unsigned, Unsigned]]:
        """The same, and for each token the bytes of text from where the one before it ends to where it ends.

        They are bytes of the text, whatever a tokenizer changes or drops: those of a document sum to its size. The end
        of document has what is behind the last token, mostly nothing. Where several tokens stand for one character, the
        first has its bytes.
        """
        ...

    def in_parts(self, text: Text) -> Iterator[tuple[Unsigned, Unsigned]]:
        """The same of one text of any length, part by part."""
        ...

    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for."""
        ...

    def save(self, folder: Path) -> None:
        """Write its file, if it has one."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    kind = "bytes"
    vocab_size = 257
    eod_id = 256
    file: str | None = None
    sha256 = hashlib.sha256(b"bytes 0-255, end of document 256").hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Unsigned]:
        """Ids of each text, uint16."""
        return [np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), np.uint16(256)) for text in texts]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[Unsigned, Unsigned]]:
        """Ids of each text, and one byte for every id but the end of document."""
        return [(ids, (ids != self.eod_id).astype(np.uint8)) for ids in self.encode(texts)]

    def in_parts(self, text: Text) -> Iterator[tuple[Unsigned, Unsigned]]:
        """Ids and bytes of a text, and those of the end of document."""
        for start in range(0, len(text), windows.WINDOW):
            ids = np.frombuffer(text[start : start + windows.WINDOW].encode(), np.uint8).astype(np.uint16)
            yield ids, np.ones(len(ids), np.uint8)
        yield np.array([self.eod_id], np.uint16), np.zeros(1, np.uint8)

    def token_bytes(self) -> NDArray[np.int64]:
        """One, and none for the end of document."""
        return (np.arange(self.vocab_size) != self.eod_id).astype(np.int64)

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    Text that spells a special token is encoded as ordinary text, and the tokenizer's own template (begin of sequence
    and so on), truncation and padding are not used.

    Args:
        tokenizer: The tokenizer.
        kind: `bpe` (trained here) or `file`.
        eod_id: Id that ends every document.

    Attributes:
        serialized: Content of its `tokenizer.json`.
    """

    file: str | None = "tokenizer.json"

    def __init__(self, tokenizer: Tokenizer, kind: str, eod_id: int) -> None:
        self.kind = kind
        self.eod_id = eod_id
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        # Ids may have holes; the size is what an embedding needs.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.serialized: str = tokenizer.to_str(pretty=True)
        self.sha256 = hashlib.sha256(self.serialized.encode()).hexdigest()
        self._dtype = token_dtype(self.vocab_size)
        # Merging is what encoding costs most, and the library keeps the first 10,000 words alone.
        if resize := getattr(tokenizer.model, "_resize_cache", None):
            resize(_CACHED_WORDS)

    def encode(self, texts: Sequence[str]) -> list[Unsigned]:
        """Ids of each text, uint16 or uint32."""
        short = [text for text in texts if len(text) <= windows.WINDOW]
        with _one_message():
            encodings = iter(self._tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            self._ended(next(encodings).ids)
            if len(text) <= windows.WINDOW
            else np.append(self._of_long(text), self._dtype(self.eod_id))
            for text in texts
        ]

    def _of_long(self, text: str) -> Unsigned:
        return np.concatenate([ids.astype(self._dtype) for ids, _ in windows.in_windows(text, self._spans)])

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[Unsigned, Unsigned]]:
        """Ids of each text, and the bytes of text of each id."""
        return [self._with_bytes(text) for text in texts]

    def _with_bytes(self, text: str) -> tuple[Unsigned, Unsigned]:
        ids, sizes = zip(*self.in_parts(text), strict=True)
        joined = np.concatenate(sizes)
        return np.concatenate(ids), joined.astype(np.min_scalar_type(joined.max()))

    def in_parts(self, text: Text) -> Iterator[tuple[Unsigned, Unsigned]]:
        """Ids and bytes of a text, window by window, and those of the end of document."""
        end = 0
        for part, ends in windows.in_windows(text, self._spans):
            yield part.astype(self._dtype), _bytes_between(text, end, ends).astype(np.uint32)
            end = int(ends[-1]) if len(ends) else end
        behind = sum(len(text[at : at + windows.WINDOW].encode()) for at in range(end, len(text), windows.WINDOW))
        yield np.array([self.eod_id], self._dtype), np.array([behind], np.uint32)

    def _spans(self, text: str) -> tuple[windows.Ints, windows.Ints, windows.Ints]:
        """Ids, and the characters where each token starts and ends."""
        with _one_message():
            encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int64), spans[:, 0], spans[:, 1]

    def _ended(self, ids: list[int]) -> Unsigned:
        ids.append(self.eod_id)
        return np.frombuffer(array("I", ids), np.uint32).astype(self._dtype)  # NumPy reads a list half as fast

    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for, which a byte-level vocabulary alone says.

        Raises:
            ConfigError: The vocabulary is another one.
        """
        described = json.loads(self.serialized)
        letters = set(pre_tokenizers.ByteLevel.alphabet())
        added = {token["id"]: token["content"] for token in described["added_tokens"]}
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[number] = len(added[number].encode()) if number in added else len(token)
            if number not in added and not letters.issuperset(token):
                rule = "its vocabulary is not byte-level, so of token files the bytes of text are not known"
                raise ConfigError("tokenizer", token, rule, "Prepare the text itself")
        sizes[self.eod_id] = 0
        return sizes

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        (folder / "tokenizer.json").write_text(self.serialized, encoding="utf-8")


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that shards use for ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@contextmanager
def _one_message() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # bare ones, such as for text of which a vocabulary without an unknown token has nothing
        raise ConfigError(
            "tokenizer", "tokenizer.json", f"cannot encode a document ({error})",
            "Use one that has tokens for every text, such as a byte-level BPE",
        ) from None  # fmt: skip


def _bytes_between(text: Text, start: int, ends: windows.Ints) -> windows.Ints:
    """Bytes from each end to the next, the first from `start` on."""
    stop = int(ends[-1]) if len(ends) else start
    character_N = np.frombuffer(text[start:stop].encode("utf-32-le"), np.uint32)
    width_N = 1 + (character_N >= 0x80) + (character_N >= 0x800) + (character_N >= 0x10000)
    before_N = np.concatenate([[0], np.cumsum(width_N)])
    return np.diff(before_N[ends - start], prepend=0)


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Train a byte-level BPE: all 256 bytes, the end of document, and merges up to `vocab_size`.

    Args:
        texts: Training texts.
        vocab_size: Wanted size. A small text may have fewer merges than that.

    Source: byte-level BPE of GPT-2 (Radford et al. 2019).
    """
    return _trained_bpe(in_parts(texts), pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size)


def train_bpe_from_counts(counts: Mapping[str, int], vocab_size: int) -> SubwordTokenizer:
    """The same as :func:`train_bpe` makes of a text in which words occur so often.

    Args:
        counts: Of each word, in the letters that a byte-level BPE has for bytes, none of which is a blank.
        vocab_size: Wanted size.
    """

    def repeated() -> Iterator[str]:
        for word, count in counts.items():
            most = max(1, windows.WINDOW // (len(word) + 1))
            while count > 0:
                yield f"{word} " * min(most, count)
                count -= most

    return _trained_bpe(repeated(), pre_tokenizers.WhitespaceSplit(), vocab_size)


def _trained_bpe(texts: Iterator[str], words: pre_tokenizers.PreTokenizer, vocab_size: int) -> SubwordTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return SubwordTokenizer(tokenizer, "bpe", eod_id=0)  # special tokens come first


def in_parts(texts: Iterable[str]) -> Iterator[str]:
    """Texts without their empty ones, long ones in parts that begin with a blank: memory follows the longest text."""
    for text in texts:
        start = 0
        while len(text) - start > windows.WINDOW:
            blank = text.rfind(" ", start + 1, start + windows.WINDOW)
            stop = blank if blank > 0 else start + windows.WINDOW
            yield text[start:stop]
            start = stop
        if start < len(text):
            yield text[start:]


def trained_before(path: Path) -> SubwordTokenizer:
    """A tokenizer that :func:`train_bpe` has made, from its file."""
    return SubwordTokenizer(Tokenizer.from_file(str(path)), "bpe", eod_id=0)


def load_tokenizer(path: Path, eod: str | None) -> SubwordTokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: The file.
        eod: Token that ends every document. None: the `eos_token` of the `tokenizer_config.json` beside it, else
            the one well-known end-of-text token that the vocabulary has.

    Raises:
        ConfigError: The file is no tokenizer, or the end of document is unknown or not in the vocabulary.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ConfigError("tokenizer", str(path), f"is no tokenizer.json ({error})", _KINDS) from None
    eod = _configured_end(path.with_name("tokenizer_config.json")) if eod is None else eod
    if eod is None:
        known = [token for token in _KNOWN_ENDS if tokenizer.token_to_id(token) is not None]
        if len(known) != 1:
            raise ConfigError(
                "eod", None, f"{path} does not say which token ends a document", f"--eod TOKEN; candidates: {known}"
            )
        eod = known[0]
    eod_id = tokenizer.token_to_id(eod)
    if eod_id is None:
        raise ConfigError("eod", eod, f"is not in the vocabulary of {path}", "Give a token that is")
    return SubwordTokenizer(tokenizer, "file", eod_id)


def _configured_end(config: Path) -> str | None:
    """The `eos_token` of a `tokenizer_config.json`; None where there is no file or it names none."""
    if not config.exists():
        return None
    try:
        described = json.loads(config.read_text(encoding="utf-8-sig"))
        eos = described.get("eos_token")
        eod = eos["content"] if isinstance(eos, dict) else eos
        if eod is None or isinstance(eod, str):
            return eod
        wrong = f"its eos_token is a {type(eod).__name__}"
    except (OSError, ValueError, RecursionError, AttributeError, KeyError) as error:
        wrong = f"{type(error).__name__}: {error}"
    raise ConfigError("eod", None, f"{config} is no tokenizer_config.json ({wrong})", "Give --eod TOKEN, or mend it")


_KINDS = "Valid: bytes, bpe:VOCAB (e.g. bpe:4096), or the path of a tokenizer.json"


def bpe_vocab_size(spec: str) -> int:
    """The size in `bpe:VOCAB`.

    Raises:
        ConfigError: VOCAB is not a number above 257, the bytes and the end of document.
    """
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or len(size) > 9 or int(size) <= 257:
        raise ConfigError(
            "tokenizer", spec, "VOCAB must be a number above 257 (256 bytes, end of document) and below 10^9", _KINDS
        )
    return int(size)


def fixed_tokenizer(spec: str, eod: str | None) -> TextTokenizer:
    """The tokenizer that `spec` names, where it needs no training.

    Raises:
        ConfigError: No such tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if not Path(spec).is_file():
        raise ConfigError("tokenizer", spec, "unknown tokenizer, and no such file", _KINDS)
    return load_tokenizer(Path(spec), eod)
