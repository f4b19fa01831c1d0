"""The tokenizer of an export: the corpus's, with its end-of-document token, as transformers reads it.

Without one transformers would build an empty tokenizer, and an evaluation would measure nonsense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fomoe_pl.data.manifest import Manifest
from fomoe_pl.data.tokenizer import END_OF_DOCUMENT
from fomoe_pl.errors import ConfigError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class ExportedTokenizer:
    """What is written next to the weights.

    Attributes:
        serialized: Content of `tokenizer.json`.
        eod: The token that ends a document: end of sequence, and where there is no other, its begin and padding.
        eod_id: Its id.
    """

    serialized: str
    eod: str
    eod_id: int

    def library(self) -> Tokenizer:
        """The tokenizer of the `tokenizers` library."""
        return Tokenizer.from_str(self.serialized)

    def save(self, folder: Path, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`.

        Args:
            folder: Of the export.
            max_length: Tokens of a training sequence.
        """
        (folder / TOKENIZER).write_text(self.serialized, encoding="utf-8")
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
            "clean_up_tokenization_spaces": False, "bos_token": self.eod, "eos_token": self.eod, "pad_token": self.eod,
            "padding_side": "left",
        }  # fmt: skip
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_tokenizer() -> ExportedTokenizer:
    """UTF-8 bytes as ids 0 to 255 and 256 for the end of a document, as a byte-level BPE without merges."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == 256
    return ExportedTokenizer(tokenizer.to_str(pretty=True), END_OF_DOCUMENT, 256)


def _byte_alphabet() -> list[str]:
    """The character of each byte in byte-level tokenizers (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def corpus_tokenizer(manifest: Manifest) -> ExportedTokenizer:
    """The tokenizer that a corpus was prepared with.

    Args:
        manifest: Of the corpus.

    Raises:
        ConfigError: If its file is gone.
    """
    info = manifest.tokenizer
    if info.file is None:
        return byte_tokenizer()
    path = manifest.root / info.file
    if not path.is_file():
        raise ConfigError("data", str(manifest.root), f"{path} is missing", "copy the whole folder again")
    serialized = path.read_text(encoding="utf-8")
    eod = Tokenizer.from_str(serialized).id_to_token(info.eod_id)
    assert eod is not None, "the corpus was prepared with it"
    return with_special_end(serialized, eod)


def imported_tokenizer(checkpoint: Path) -> ExportedTokenizer | None:
    """The tokenizer that `fomoe import` has put into a checkpoint; None where there is none.

    Args:
        checkpoint: Its folder.
    """
    if not (checkpoint / TOKENIZER).is_file() or not (checkpoint / SETTINGS).is_file():
        return None
    eos = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8")).get("eos_token")
    eod = eos["content"] if isinstance(eos, dict) else eos
    return with_special_end((checkpoint / TOKENIZER).read_text(encoding="utf-8"), eod) if eod else None


def with_special_end(serialized: str, eod: str) -> ExportedTokenizer:
    """A tokenizer whose end-of-document token is a special one: it never comes out of text, nor into decoded text.

    Args:
        serialized: Content of a `tokenizer.json`.
        eod: The token.
    """
    tokenizer = Tokenizer.from_str(serialized)
    if not any(t.content == eod and t.special for t in tokenizer.get_added_tokens_decoder().values()):
        tokenizer.add_special_tokens([AddedToken(eod, special=True, normalized=False)])
        serialized = tokenizer.to_str(pretty=True)
    eod_id = tokenizer.token_to_id(eod)
    assert eod_id is not None, "it was added"
    return ExportedTokenizer(serialized, eod, eod_id)
