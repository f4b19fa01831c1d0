import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fomoe_pl.data import windows
from fomoe_pl.data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    SubwordTokenizer,
    TextTokenizer,
    bpe_vocab_size,
    fixed_tokenizer,
    in_parts,
    load_tokenizer,
    train_bpe,
)
from fomoe_pl.errors import ConfigError

HARD = ["plain words", "  two  blanks\n\n\ttab", "früh 空 🙂 é", f"spells {END_OF_DOCUMENT} itself", "\x00\x1e\r\n"]


def bytes_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Bytes of text of each token; the tokens are the plain ones, and the bytes sum to those of the text."""
    ((ids, sizes),) = tokenizer.encode_with_bytes([text])
    assert ids.tolist() == tokenizer.encode([text])[0].tolist()
    assert len(sizes) == len(ids)
    assert sizes.sum() == len(text.encode())
    return sizes.tolist()


@pytest.fixture(scope="module")
def bpe(texts: dict[str, list[str]]) -> SubwordTokenizer:
    return train_bpe([text for documents in texts.values() for text in documents], 350)


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode(["aé"])
    assert ids.tolist() == [97, 0xC3, 0xA9, 256]
    assert ids.dtype == np.uint16
    assert bytes_of(tokenizer, "aé") == [1, 1, 1, 0]


def test_bpe_is_exact_and_ends_documents(bpe: SubwordTokenizer) -> None:
    assert bpe.vocab_size == 350
    reader = Tokenizer.from_str(bpe.serialized)
    for text, ids in zip(HARD, bpe.encode(HARD), strict=True):
        assert ids[-1] == bpe.eod_id
        assert bpe.eod_id not in ids[:-1]
        assert reader.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
        assert bytes_of(bpe, text)[-1] == 0


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
        assert bytes_of(tokenizer, text)[-1] == 0


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
    assert loaded.encode(["so früh"])[0][-2] == 350
    assert bytes_of(loaded, "so früh")[-2] in (5, 6)  # the blank before it may be a token of its own


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


def normalizing() -> Tokenizer:
    """Unigram over compatibility characters made plain, as T5 and XLM-R have."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz123⁄"),
        ("fi", -2.5),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    """Lower case without accents or control characters, marked by ##, blanks dropped, as BERT has."""
    words = ["[UNK]", "</s>", "cafe", "wave", "##s", "a", "ﬁ", ",", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def splitter() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "wave": 2, "café": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def prefixing() -> Tokenizer:
    """A blank before every text, and offsets that leave blanks out, as RoBERTa has."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["waves and waves of the sea"], trainer)
    return tokenizer


KINDS = [normalizing, wordpiece, splitter, prefixing, sentencepiece_like]
CHANGED = [
    "ﬁ ½  wave",
    "  Café  waves\x00 , ",
    "Ｆｕｌｌ width　blanks",
    "e\u0301 a\u0300",
    "\n\n\t",
    "wave\n",
    "🙂🙂 空",
    "x" * 300,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bytes_are_those_of_the_text_whatever_a_tokenizer_does_to_it(kind: Any) -> None:
    tokenizer = SubwordTokenizer(kind(), "file", 1)
    for text in [*CHANGED, *HARD, " ".join(CHANGED + HARD)]:
        bytes_of(tokenizer, text)


def test_bytes_of_each_token() -> None:
    """What is dropped goes to the token behind it; a document's last blanks to its end."""
    assert bytes_of(SubwordTokenizer(splitter(), "file", 1), " café   wave \n") == [6, 7, 2]
    assert bytes_of(SubwordTokenizer(wordpiece(), "file", 1), "Café waves.") == [5, 5, 1, 1, 0]
    assert bytes_of(SubwordTokenizer(normalizing(), "file", 1), "aﬁ") == [1, 0, 3, 0]


@pytest.mark.parametrize("kind", [*KINDS, "bpe"], ids=lambda kind: getattr(kind, "__name__", kind))
@pytest.mark.parametrize("window", [256, 1000])
def test_windows_give_the_tokens_of_the_whole(
    bpe: SubwordTokenizer, monkeypatch: pytest.MonkeyPatch, kind: Any, window: int
) -> None:
    tokenizer = bpe if kind == "bpe" else SubwordTokenizer(kind(), "file", 1)
    draw = random.Random(0)
    pieces = [*CHANGED, *HARD, "waves", " ", "\n\n", "of words", "aaaa", "hello world", "café", "空", "123", "e\u0301"]
    texts = [
        "".join(draw.choices(pieces, k=400)),
        "a" * 5000,
        " " * 3000 + "wave" * 900,
        "空" * 4000,
        "ab" * 3000 + " x",
        "wave " * 2000,
        "x" * 2000 + " wave" * 300 + "y" * 3000,
        "ﬁ½" * 1500,
    ]
    whole = [
        (ids.tolist(), bytes_of(tokenizer, text)) for ids, text in zip(tokenizer.encode(texts), texts, strict=True)
    ]
    longest = 0

    def noting(text: str, encode: Any = tokenizer._spans) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text)

    monkeypatch.setattr(tokenizer, "_spans", noting)
    monkeypatch.setattr(windows, "WINDOW", window)
    monkeypatch.setattr(windows, "OVERLAP", 128)
    for text, (ids, sizes) in zip(texts, whole, strict=True):
        assert (tokenizer.encode([text])[0].tolist(), bytes_of(tokenizer, text)) == (ids, sizes)
    longest = 0
    tokenizer.encode(["wave of waves, " * 3000])
    assert longest == window  # however long the text is
    monkeypatch.undo()


def test_a_tokenizer_that_lacks_a_token_is_one_message() -> None:
    tokenizer = SubwordTokenizer(Tokenizer(models.WordLevel({"a": 0, "</s>": 1})), "file", 1)
    for encode in (tokenizer.encode, tokenizer.encode_with_bytes):
        with pytest.raises(ConfigError, match=r"tokenizer = .*cannot encode a document"):
            encode(["b"])


def test_a_long_text_is_given_to_trainingin_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", 100)
    text = "wave after wave " * 50 + "x" * 250
    parts = list(in_parts(["", text, "short"]))
    assert "".join(parts) == text + "short"
    assert max(map(len, parts)) <= 100
    assert all(part.startswith(" ") for part in parts[1:-4])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"eos_token": 5}',
        b'{"eos_token": {"lstrip": true}}',
        b'{"eos_token": []}',
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, bpe: SubwordTokenizer, content: bytes) -> None:
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"eod = None: .*tokenizer_config\.json is no .*--eod TOKEN"):
        load_tokenizer(tmp_path / "tokenizer.json", None)
    assert load_tokenizer(tmp_path / "tokenizer.json", END_OF_DOCUMENT).eod_id == bpe.eod_id
