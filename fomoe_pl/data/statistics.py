"""Word counts of a sample of text: what sites give each other to train one tokenizer, while the text stays."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from fomoe_pl.data.tokenizer import in_parts
from fomoe_pl.errors import ConfigError
from fomoe_pl.files import write_whole

_FORMAT = "fomoe-pl word statistics 1"
_WRITE = "Write it again: fomoe prepare --source PATH --statistics"


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, as the training of a byte-level BPE counts them (a word may begin with a blank)."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for text in in_parts(texts):
        counts.update(word for word, _ in split.pre_tokenize_str(text))
    return counts


def write_statistics(path: Path, counts: Mapping[str, int], min_count: int) -> dict[str, Any]:
    """Write the counts of words that are not rare.

    Args:
        path: The file.
        counts: Of each word.
        min_count: Least count of a word that is written: what is rarer may be a name or a number of somebody's.

    Returns:
        What the file says beside the counts.
    """
    kept = {word: n for word, n in sorted(counts.items()) if n >= min_count}
    about = {
        "format": _FORMAT, "min_count": min_count, "words_left_out": len(counts) - len(kept), "words": len(kept),
        "occurrences": sum(kept.values()),
    }  # fmt: skip
    write_whole(path, json.dumps({**about, "counts": kept}, ensure_ascii=False, indent=0) + "\n")
    return about


def read_statistics(paths: Sequence[str]) -> Counter[str]:
    """The sum of the counts in some files, in whichever order they are named.

    Raises:
        ConfigError: A file is missing, is named twice, or holds something else.
    """
    total: Counter[str] = Counter()
    seen: dict[str, str] = {}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for path in paths:
        try:
            content = Path(path).expanduser().read_bytes()
            told = json.loads(content)
            if told["format"] != _FORMAT:
                raise ValueError(f"its format is {told['format']!r}, not {_FORMAT!r}")
            counts = told["counts"]
            for word, n in counts.items():
                if not word or not alphabet.issuperset(word) or type(n) is not int or n < 1:
                    raise ValueError(f"the count of {word!r} is {n!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rule = f"holds no word counts ({type(error).__name__}: {error})"
            raise ConfigError("from_statistics", path, rule, f"{_WRITE} {path}") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen:
            raise ConfigError("from_statistics", path, f"is the same as {seen[digest]}", "name each site's file once")
        seen[digest] = path
        total.update(counts)
    return total


def statistics_sha256(counts: Mapping[str, int]) -> str:
    """Hash of the counts."""
    return hashlib.sha256(json.dumps(sorted(counts.items())).encode()).hexdigest()
