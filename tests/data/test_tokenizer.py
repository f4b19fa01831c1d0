import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fomoe_pl.data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    SubwordTokenizer,
    TextTokenizer,
    bpe_vocab_size,
    fixed_tokenizer,
    load_tokenizer,
    train_bpe,
)
from fomoe_pl.errors import ConfigError

HARD = ["plain words", "  two  blanks\n\n\ttab", "früh 空 🙂 é", f"spells {END_OF_DOCUMENT} itself", "\x00\x1e\r\n"]


def n_bytes(tokenizer: TextTokenizer, text: str) -> int:
    return int(tokenizer.token_bytes()[tokenizer.encode([text])[0]].sum())


@pytest.fixture(scope="module")
def bpe(texts: dict[str, list[str]]) -> SubwordTokenizer:
    return train_bpe([text for documents in texts.values() for text in documents], 350)


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode(["aé"])
    assert ids.tolist() == [97, 0xC3, 0xA9, 256]
    assert ids.dtype == np.uint16
    assert tokenizer.token_bytes().sum() == 256


def test_bpe_is_exact_and_ends_documents(bpe: SubwordTokenizer) -> None:
    assert bpe.vocab_size == 350
    reader = Tokenizer.from_str(bpe.serialized)
    for text, ids in zip(HARD, bpe.encode(HARD), strict=True):
        assert ids[-1] == bpe.eod_id
        assert bpe.eod_id not in ids[:-1]
        assert reader.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
        assert n_bytes(bpe, text) == len(text.encode())


def test_bpe_training_is_deterministic(texts: dict[str, list[str]], bpe: SubwordTokenizer) -> None:
    again = train_bpe([text for documents in texts.values() for text in documents], 350)
    assert again.sha256 == bpe.sha256
    assert train_bpe(texts["sea"], 350).sha256 != bpe.sha256


def test_saved_bpe_is_a_tokenizer_file(bpe: SubwordTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    loaded = load_tokenizer(tmp_path / "tokenizer.json", None)
    assert (loaded.sha256, loaded.eod_id, loaded.kind) == (bpe.sha256, bpe.eod_id, "file")
    assert [ids.tolist() for ids in loaded.encode(HARD)] == [ids.tolist() for ids in bpe.encode(HARD)]


def sentencepiece_like() -> Tokenizer:
    """A BPE over ▁-marked words that falls back to bytes, with a begin-of-text template, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["hello world of words and waves\n"], trainer)
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(described))


def test_sentencepiece_like_bytes(tmp_path: Path) -> None:
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", None)
    assert tokenizer.eod_id == 2
    for text in ("hello words", "hello 空", "  waves"):
        assert n_bytes(tokenizer, text) == len(text.encode())


def test_end_of_document_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"<stop>": 0, "a": 1, "</s>": 2, "<eos>": 3, "[UNK]": 4}, "[UNK]"))
    tokenizer.save(str(path))
    with pytest.raises(ConfigError, match=r"--eod TOKEN; candidates: \['</s>', '<eos>'\]"):
        load_tokenizer(path, None)
    assert load_tokenizer(path, "a").eod_id == 1
    with pytest.raises(ConfigError, match="not in the vocabulary"):
        load_tokenizer(path, "b")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(path, None).eod_id == 0


def test_added_tokens_count_their_text_unless_special(tmp_path: Path, bpe: SubwordTokenizer) -> None:
    tokenizer = Tokenizer.from_str(bpe.serialized)
    tokenizer.add_tokens([AddedToken("früh", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", None)
    assert loaded.vocab_size == 351
    assert loaded.token_bytes()[350] == 5
    assert n_bytes(loaded, "so früh") == 8


def test_bad_tokenizers(tmp_path: Path) -> None:
    for spec in ("byte", "gpt2", str(tmp_path / "none.json")):
        with pytest.raises(ConfigError, match="unknown tokenizer"):
            fixed_tokenizer(spec, None)
    for spec in ("bpe:", "bpe:many", "bpe:257", "bpe:-5"):
        with pytest.raises(ConfigError, match="VOCAB must be"):
            bpe_vocab_size(spec)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        fixed_tokenizer(str(tmp_path / "tokenizer.json"), None)
