"""Pure text cleaning: package contents in, plain documents out."""

import html
import re
import struct
import zlib
from collections.abc import Iterator

_DROPPED_ELEMENTS = re.compile(r"<(script|style|head|nav|footer|svg|template)\b.*?</\1\s*>", re.I | re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_PREFORMATTED = re.compile(r"<pre\b[^>]*>(.*?)</pre\s*>", re.I | re.S)
_BLOCK_TAG = re.compile(
    r"</?(p|div|br|h[1-6]|li|ul|ol|dl|dt|dd|tr|table|section|article|blockquote|hr|caption|figure|main|body|header)"
    r"\b[^>]*>",
    re.I,
)
_TAG = re.compile(r"<[^>]*>")
_LEADING_COMMENT = re.compile(r"\A\s*(?:#![^\n]*\n)?\s*(?:/\*.*?\*/|(?:(?://|#|;|--)[^\n]*\n)+)\s*", re.S)
_CHAPTER = re.compile(r"^(?=chapter [0-9ivxl]+\.?$)", re.I | re.M)


def decode(raw: bytes) -> str:
    """UTF-8, and Latin-1 for the old files that are not."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def html_text(page: str, main: str | None = None) -> str:
    """Text of an HTML page: blocks become lines, ``<pre>`` keeps its layout.

    Args:
        page: HTML source.
        main: Regular expression of the tag where the page's own text begins; what stands before it is navigation.
    """
    start = re.search(main, page, re.I) if main else None
    page = _DROPPED_ELEMENTS.sub("", _COMMENT.sub("", page[start.start() :] if start else page))
    kept: list[str] = []

    def set_aside(match: re.Match[str]) -> str:
        kept.append(html.unescape(_TAG.sub("", match.group(1))).rstrip())
        return f"\n\x01{len(kept) - 1}\x02\n"

    page = _PREFORMATTED.sub(set_aside, page).replace("\n", " ")
    page = _BLOCK_TAG.sub("\n", re.sub(r"</t[dh]\s*>", " ", page, flags=re.I))
    page = html.unescape(_TAG.sub("", page)).replace("\u00b6", "").replace("\uf0c1", "")
    page = "\n".join(re.sub(r"[ \t\r\f\v\u00a0]+", " ", line).strip() for line in page.split("\n"))
    page = re.sub(r"\n{3,}", "\n\n", page.strip())
    return re.sub("\x01(\\d+)\x02", lambda match: kept[int(match.group(1))], page)


def without_licence_header(code: str) -> str:
    """Source code without its first comment where that is a licence: thousands of copies of one text teach nothing."""
    match = _LEADING_COMMENT.match(code)
    if match and re.search(r"copyright|licen[sc]e|SPDX", match.group(0), re.I):
        return code[match.end() :]
    return code


def play_text(markdown: str) -> str:
    """A play without its markdown: no bold names, no emphasis, no trailing blanks."""
    text = re.sub(r"\*\*|^#+ ", "", markdown, flags=re.M)
    text = re.sub(r"(?<!\w)_|_(?!\w)", "", text)
    return re.sub(r" +$", "", text, flags=re.M)


def play_scenes(markdown: str) -> Iterator[str]:
    """The scenes (and prologues) of a play in markdown, each without markup."""
    for part in re.split(r"^(?=### )", markdown, flags=re.M)[1:]:
        # The heading of the next act stands at the end of an act's last scene.
        yield play_text(re.sub(r"^##? .*\Z", "", part, flags=re.M | re.S)).strip()


def chapters(novel: str) -> Iterator[str]:
    """The chapters of a novel, without what stands before the first; a volume's heading stays with what precedes it."""
    for part in _CHAPTER.split(novel)[1:]:
        yield re.sub(r"\n+(VOLUME [IVX]+|FINIS|THE END)\s*\Z", "", part.strip(), flags=re.I).strip()


def parts_of(text: str, size: int) -> Iterator[str]:
    """A long text in parts of about ``size`` characters, cut between paragraphs."""
    part: list[str] = []
    length = 0
    for paragraph in re.split(r"\n{2,}", text.strip()):
        part.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            yield "\n\n".join(part)
            part, length = [], 0
    if part:
        yield "\n\n".join(part)


def r_texts(rdb: bytes, min_lines: int = 1000) -> Iterator[str]:
    """Texts in an R lazy-load database (``.rdb``): zlib chunks of serialized character vectors, one line a string.

    Args:
        rdb: The whole file.
        min_lines: Chunks with fewer strings are no texts.
    """
    position = 0
    while position < len(rdb) - 8:
        inflate = zlib.decompressobj()
        try:
            chunk = inflate.decompress(rdb[position + 4 :])  # four bytes of length stand before the zlib stream
        except zlib.error:
            position += 1
            continue
        position = len(rdb) - len(inflate.unused_data)
        lines = list(_r_strings(chunk))
        if len(lines) > min_lines:
            yield re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _r_strings(chunk: bytes) -> Iterator[str]:
    """Strings of a serialized R object: CHARSXP flags, a big-endian length, the bytes (R Internals, section 1.8)."""
    position = 0
    while (position := chunk.find(b"\x00\x04\x00\x09", position)) >= 0:
        (length,) = struct.unpack(">i", chunk[position + 4 : position + 8])
        if 0 <= length < 5000:
            yield chunk[position + 8 : position + 8 + length].decode("utf-8", "replace")
            position += 8 + length
        else:
            position += 4


def bible_chapters(imp: str) -> Iterator[str]:
    """Chapters of a Bible in SWORD's ``mod2imp`` format (``$$$Book 1:2`` before each verse), one verse a line."""
    current: tuple[str, str] | None = None
    lines: list[str] = []
    for verse in re.sub(r"<note\b.*?</note>", "", imp, flags=re.S).split("$$$")[1:]:
        reference, _, body = verse.partition("\n")
        match = re.match(r"(.*?) (\d+):(\d+)$", reference.strip())
        if not match:
            continue
        book, chapter, number = match.groups()
        if (book, chapter) != current:
            if lines:
                yield "\n".join(lines)
            current, lines = (book, chapter), [f"{book} {chapter}"]
        body = " ".join(html.unescape(_TAG.sub("", body)).replace("\u00b6", "").split())
        if body and number != "0":
            lines.append(f"{number} {body}")
    if lines:
        yield "\n".join(lines)


def dictionary_articles(text: str, size: int = 20_000) -> Iterator[str]:
    """Documents of about ``size`` characters, cut between a dictionary's entries, without GCIDE's source marks."""
    text = re.sub(r"\n[ \t]*\[[^\]\n]{0,40}(PJC|Webster|WordNet)[^\]\n]{0,20}\]", "", text)
    entries: list[str] = []
    length = 0
    for entry in re.split(r"\n(?=\S)", text):
        entries.append(entry)
        length += len(entry)
        if length > size:
            yield "\n".join(entries)
            entries, length = [], 0
    if entries:
        yield "\n".join(entries)


def man_page(rendered: str) -> str:
    """A rendered manual page without overstrikes and runs of empty lines."""
    text = re.sub(".\x08", "", rendered)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n")))


def without_navigation_tables(page: str) -> str:
    """A PostgreSQL manual page without the tables above and below its text."""
    return re.sub(r'<div[^>]*class="nav(header|footer)".*?</table\s*>', "", page, flags=re.S)


def help_page(page: str) -> str:
    """Text of a Mallard help page, whose titles become paragraphs."""
    page = re.sub(r"<info>.*?</info>", "", page, flags=re.S)
    return html_text(page.replace("<title", "<p><title").replace("</title>", "</title></p>"))
