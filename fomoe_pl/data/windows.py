"""Encoding a text of any length in bounded memory, to the tokens that it has as a whole."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fomoe_pl.data.long_text import Text

Ints = NDArray[np.int64]
# What an encoder gives: ids, and the characters of the text where each token starts and ends.
Encode = Callable[[str], tuple[Ints, Ints, Ints]]

WINDOW = 1 << 18  # characters of a window; `tokenizers` takes some 200 bytes for each of them
OVERLAP = 1 << 14  # characters that consecutive windows share


def in_windows(text: Text, encode: Encode) -> Iterator[tuple[Ints, Ints]]:
    """Encode a text window by window, where possible to the tokens that it has as a whole.

    A window starts where a token of the window before it ends, an overlap before that window's end. The text is cut in
    the middle of the overlap, and only if both windows have the same tokens at the same places around the cut, in a
    quarter of the overlap: there neither the one's end nor the other's beginning is felt. Otherwise (a word that is as
    long as the overlap, of which a tokenizer makes one token) the earlier window grows to twice its length.

    This is the same as encoding the whole wherever what a token is does not depend on text that is further away than
    an eighth of the overlap, 2048 characters: pre-tokenizers and normalizers look a few characters around, and a merge
    of byte pairs that starts where a token ends does not depend on anything before (no merge reaches across).

    Args:
        text: The text.
        encode: The tokenizer.

    Yields:
        Ids, and the character where each token ends, never less than before it.
    """
    start, kept = 0, -1  # where the window starts, and up to where tokens have been given
    length = WINDOW
    ids, starts, ends = _encoded(text, start, length, encode)
    while start + length < len(text):
        stop = start + length
        following = _boundary(starts, ends, stop - OVERLAP)
        after = None
        if following <= stop - 3 * OVERLAP // 4:
            after = _encoded(text, following, WINDOW, encode)
            low, high = stop - 5 * OVERLAP // 8, stop - 3 * OVERLAP // 8
            same = _between(ids, ends, low, high), _between(after[0], after[2], low, high)
            if not all(np.array_equal(one, other) for one, other in zip(*same, strict=True)):
                after = None
        if after is None:
            length *= 2
            ids, starts, ends = _encoded(text, start, length, encode)
            continue
        cut = stop - OVERLAP // 2
        yield _between(ids, ends, kept, cut)
        start, length, kept = following, WINDOW, cut
        ids, starts, ends = after
    yield _between(ids, ends, kept, len(text))


def _encoded(text: Text, start: int, length: int, encode: Encode) -> tuple[Ints, Ints, Ints]:
    """Tokens of a window at their places in the whole text."""
    ids, starts, ends = encode(text[start : start + length])
    # A token of several for one character, or of none, ends where the one before it does.
    return ids, starts + start, np.minimum(np.maximum.accumulate(ends) + start, len(text))


def _boundary(starts: Ints, ends: Ints, least: int) -> int:
    """The first place from `least` on that is inside no token."""
    token = int(np.searchsorted(ends, least, side="right"))
    return least if token == len(ends) or starts[token] >= least else int(ends[token])


def _between(ids: Ints, ends: Ints, low: int, high: int) -> tuple[Ints, Ints]:
    """The tokens that end behind `low` and not behind `high`."""
    chosen = (ends > low) & (ends <= high)
    return ids[chosen], ends[chosen]
