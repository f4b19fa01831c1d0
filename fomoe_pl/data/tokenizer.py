"""Turning text into token ids, and knowing how many bytes of text each id stands for."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fomoe_pl.errors import ConfigError

END_OF_DOCUMENT = "<|endofdocument|>"
# End-of-document tokens of common tokenizers, for a tokenizer.json that comes without its tokenizer_config.json.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "<|endofprompt|>", "</s>", "<eos>", "<|im_end|>")


class TextTokenizer(Protocol):
    """What the preparation needs of a tokenizer.

    Attributes:
        kind: ``bytes``, ``bpe`` or ``file``.
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

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Token ids of each text with the end of document behind them; uint16 where the vocabulary allows it."""
        ...

    def token_bytes(self) -> NDArray[np.float32]:
        """Bytes of text per token id, (V,); special tokens have 0."""
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

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Ids of each text, uint16."""
        return [np.append(np.frombuffer(text.encode(), np.uint8).astype(np.uint16), np.uint16(256)) for text in texts]

    def token_bytes(self) -> NDArray[np.float32]:
        """One byte for every id but the end of document."""
        return np.append(np.ones(256, np.float32), np.float32(0))

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    Text that spells a special token is encoded as ordinary text, and the tokenizer's own template (begin of sequence
    and so on), truncation and padding are not used.

    Args:
        tokenizer: The tokenizer.
        kind: ``bpe`` (trained here) or ``file``.
        eod_id: Id that ends every document.

    Attributes:
        serialized: Content of its ``tokenizer.json``.
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

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Ids of each text, uint16 or uint32."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*encoding.ids, self.eod_id], self._dtype) for encoding in encodings]

    def token_bytes(self) -> NDArray[np.float32]:
        """Bytes of text per id.

        Exact for byte-level tokenizers, whose tokens have one character of the byte alphabet per byte (Radford et al.
        2019, GPT-2). For SentencePiece-like ones ``▁`` counts as the blank that it stands for and ``<0xAB>`` as one
        byte; the blank that they put before a text is then counted though the text does not have it.
        """
        described: dict[str, Any] = json.loads(self.serialized)
        byte_level = any(
            part.get("type") == "ByteLevel"
            for part in _parts(described.get("pre_tokenizer")) + _parts(described.get("decoder"))
        )
        added = {entry["id"]: entry for entry in described["added_tokens"]}
        lengths = np.zeros(self.vocab_size, np.float32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                lengths[index] = 0 if added[index]["special"] else len(token.encode())
            elif byte_level:
                lengths[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("▁", " ").encode())
        lengths[self.eod_id] = 0
        return lengths

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``."""
        (folder / "tokenizer.json").write_text(self.serialized, encoding="utf-8")


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that shards use for ids below ``vocab_size``."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer or decoder as the flat list of its parts."""
    if component is None:
        return []
    nested = component.get("pretokenizers", component.get("decoders", []))
    return [component, *(part for child in nested for part in _parts(child))]


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Train a byte-level BPE: all 256 bytes, the end of document, and merges up to ``vocab_size``.

    Args:
        texts: Training texts.
        vocab_size: Wanted size. A small text may have fewer merges than that.

    Source: byte-level BPE of GPT-2 (Radford et al. 2019).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_nonempty(texts), trainer)
    return SubwordTokenizer(tokenizer, "bpe", eod_id=0)  # special tokens come first


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    yield from (text for text in texts if text)


def load_tokenizer(path: Path, eod: str | None) -> SubwordTokenizer:
    """Read a ``tokenizer.json``.

    Args:
        path: The file.
        eod: Token that ends every document. None: the ``eos_token`` of the ``tokenizer_config.json`` beside it, else
            the one well-known end-of-text token that the vocabulary has.

    Raises:
        ConfigError: The file is no tokenizer, or the end of document is unknown or not in the vocabulary.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise ConfigError("tokenizer", str(path), f"is no tokenizer.json ({error})", _KINDS) from None
    config = path.with_name("tokenizer_config.json")
    if eod is None and config.exists():
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        eod = eos["content"] if isinstance(eos, dict) else eos
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


_KINDS = "Valid: bytes, bpe:VOCAB (e.g. bpe:4096), or the path of a tokenizer.json"


def bpe_vocab_size(spec: str) -> int:
    """The size in ``bpe:VOCAB``.

    Raises:
        ConfigError: VOCAB is not a number above 257, the bytes and the end of document.
    """
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or int(size) <= 257:
        raise ConfigError("tokenizer", spec, "VOCAB must be a number above 257 (256 bytes, end of document)", _KINDS)
    return int(size)


def fixed_tokenizer(spec: str, eod: str | None) -> TextTokenizer:
    """The tokenizer that ``spec`` names, where it needs no training.

    Raises:
        ConfigError: No such tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if not Path(spec).is_file():
        raise ConfigError("tokenizer", spec, "unknown tokenizer, and no such file", _KINDS)
    return load_tokenizer(Path(spec), eod)
