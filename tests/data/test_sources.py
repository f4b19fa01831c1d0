"""Which files are found, which domain they belong to, and what is refused rather than passed over."""

import os
from pathlib import Path

import pytest

from fomoe_pl.data.sources import Source, find_sources, kind_of
from fomoe_pl.errors import ConfigError


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def found(*specs: object, skip_unreadable: bool = False) -> list[Source]:
    return find_sources([str(spec) for spec in specs], skip_unreadable=skip_unreadable)[0]


def test_sources(tmp_path: Path) -> None:
    touch(tmp_path, "web/b/2.txt", "web/1.jsonl.gz", "books.jsonl.xz")
    books = tmp_path / "books.jsonl.xz"
    web = (tmp_path / "web/1.jsonl.gz", tmp_path / "web/b/2.txt")
    assert found(tmp_path) == [Source("books", (books,)), Source("web", web)]
    assert found(books) == [Source("books", (books,))]
    assert found(f"all={tmp_path}") == [Source("all", (books, *web))]
    assert found(f"z={books}", f"a={tmp_path / 'web'}") == [Source("z", (books,)), Source("a", web)]
    assert found(f"a={books}", f"a={tmp_path / 'web/b'}") == [Source("a", (books, web[1]))]


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        found(f"a={tmp_path}/none")
    for spec in ("", "=", "a=", "=a", f"={tmp_path}"):
        with pytest.raises(ConfigError, match=r"^source = "):
            found(spec)
    with pytest.raises(ConfigError, match="no readable file"):
        found(tmp_path)
    touch(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match="letters, digits"):
        found(f"a b={tmp_path}")


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "A.TXT",
        "a.jsonl",
        "a.JSONL.GZ",
        "a.ndjson.bz2",
        "c4-train.00000-of-01024.json.gz",
        "a.Json.Zst",
        "a.parquet",
        "a.parquet.xz",
    ],
)
def test_every_readable_kind_is_found(tmp_path: Path, name: str) -> None:
    (path,) = touch(tmp_path, f"web/{name}")
    assert found(tmp_path) == [Source("web", (path,))]


@pytest.mark.parametrize(
    "name",
    [
        "a.csv",
        "a.jsonl.lz4",
        "a.zip",
        "README.md",
        "README",
        ".jsonl",
        "a.gz",
        "a.jsonl.part",
        "a.feather",
        "deep/er/a.tar",
    ],
)
def test_what_would_be_left_out_is_named(tmp_path: Path, name: str) -> None:
    good, other = touch(tmp_path, "web/good.jsonl", f"web/{name}")
    for spec in (str(tmp_path), f"web={tmp_path / 'web'}"):
        with pytest.raises(ConfigError, match=r"would leave out .*--skip_unreadable") as error:
            found(spec)
        assert str(other) in str(error.value)
        assert find_sources([spec], skip_unreadable=True) == ([Source("web", (good,))], [other])


def test_a_broken_link_is_left_out_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "web/good.txt")
    (tmp_path / "web/gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"web/gone\.txt"):
        found(tmp_path)


def test_linked_folders_are_followed_and_end(tmp_path: Path) -> None:
    touch(tmp_path, "store/deep/1.jsonl", "source/web/2.jsonl")
    web = tmp_path / "source/web"
    (web / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "source/books").symlink_to(tmp_path / "store")
    (web / "up").symlink_to(web)
    (tmp_path / "store/deep/top").symlink_to(tmp_path / "store")
    assert found(f"web={web}") == [Source("web", (web / "2.jsonl", web / "linked/deep/1.jsonl"))]
    assert found(f"b={tmp_path / 'source/books'}") == [Source("b", (tmp_path / "source/books/deep/1.jsonl",))]
    with pytest.raises(ConfigError, match="seems to be the same as"):  # two domains with the same files
        found(tmp_path / "source")


@pytest.mark.parametrize(
    "names",
    [
        ("en.wiki.jsonl", "en.books.jsonl"),
        ("en.wiki/a.txt", "en.books/a.txt"),
        ("c4.00.json.gz", "c4.01.json.gz"),
        ("v1.0.txt", "v1.1.txt"),
    ],
)
def test_names_with_dots_stay_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *names)
    domains = [source.domain for source in found(tmp_path)]
    assert len(domains) == 2
    assert all(any(name.startswith(domain) for name in names) and "." in domain for domain in domains)


@pytest.mark.parametrize("names", [("web.jsonl", "web.txt"), ("web.txt", "web/1.txt"), ("web.jsonl", "Web.txt")])
def test_two_entries_are_one_domain_only_if_the_user_says_so(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = touch(tmp_path, *names)
    with pytest.raises(ConfigError, match=r"would be the domain '[Ww]eb', as"):
        found(tmp_path)
    assert len(found(f"web={first}", f"web={second}")[0].files) == 2
    with pytest.raises(ConfigError, match="would be the domain"):
        found(f"web={first}", f"WEB={second}")
    elsewhere = touch(tmp_path / "elsewhere", "web.jsonl")[0]
    for specs in ((first, elsewhere), (f"web={first}", elsewhere), (elsewhere, f"web={first}")):
        with pytest.raises(ConfigError, match="would be the domain"):
            found(*specs)


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, link: object) -> None:
    (path,) = touch(tmp_path, "a.jsonl")
    other = path
    if link is not None:
        other = tmp_path / "b.jsonl"
        link(path, other)  # type: ignore[operator]
    for specs in ((path, other), (f"x={path}", f"x={other}"), (f"x={path}", f"y={other}"), (tmp_path, f"y={path}")):
        with pytest.raises(ConfigError, match="its documents would be in the corpus twice"):
            found(*specs)


@pytest.mark.parametrize(
    "names", [("a.jsonl", "a.jsonl.gz"), ("a.txt.zst", "a.txt.XZ"), ("a.parquet", "a.parquet.bz2")]
)
def test_a_file_beside_its_compressed_form_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    paths = touch(tmp_path, *(f"web/{name}" for name in names))
    for specs in ((tmp_path,), (f"web={tmp_path}",), [f"{path.suffix[1:]}={path}" for path in paths]):
        with pytest.raises(ConfigError, match="seems to be the same as"):
            found(*specs)


def test_paths_may_have_equals_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = touch(tmp_path, "lr=0.1/a=b/x.txt", "lr=0.1/y.txt")
    assert found(tmp_path / "lr=0.1/a=b") == [Source("x", (one,))]
    assert found(two) == [Source("y", (two,))]
    assert found(f"web={tmp_path}/lr=0.1/a=b/x.txt") == [Source("web", (one,))]
    monkeypatch.chdir(tmp_path)
    assert found("lr=0.1/y.txt") == [Source("y", (Path("lr=0.1/y.txt"),))]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("web=~/lr=0.1/y.txt") == [Source("web", (two,))]  # which no shell writes out behind a =


def test_what_a_name_says() -> None:
    assert kind_of(Path("x/en.wiki.JSON.Gz")) == ("en.wiki", ".json", ".gz")
    assert kind_of(Path("a.txt")) == ("a", ".txt", "")
    assert kind_of(Path("txt")) is None
