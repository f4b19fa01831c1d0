"""What a prepared corpus says about itself: `manifest.json` beside its shards."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fomoe_pl.errors import ConfigError
from fomoe_pl.remote import AnyPath, RemotePath, location

VERSION = 2  # 1 had the bytes of each id of the vocabulary, not those of the text
MANIFEST_FILE = "manifest.json"
Split = Literal["train", "val"]
_log = logging.getLogger(__name__)
_ADDRESS = "Check the address, the network and what the protocol needs to log in"
_PREPARE = "fomoe prepare --source PATH --output"
_PREPARE_SAMPLE = "fomoe prepare --source sample --output"


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer of a corpus.

    Attributes:
        kind: `bytes`, `bpe` (trained on the corpus) or `file`.
        vocab_size: Number of token ids.
        eod_id: Id that ends every document.
        sha256: Hash of the tokenizer.
        file: Its file in the corpus folder; None for bytes.
    """

    kind: str
    vocab_size: int
    eod_id: int
    sha256: str
    file: str | None


@dataclass(frozen=True)
class SplitInfo:
    """Size of one split of one domain; tokens count each document's end, bytes are of UTF-8 text."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class DomainInfo:
    """One domain: its name and the sizes of its two splits."""

    name: str
    train: SplitInfo
    val: SplitInfo


@dataclass(frozen=True)
class ShardInfo:
    """One webdataset tar.

    Attributes:
        file: Name in the corpus folder.
        split: `train` or `val`.
        domain: Name of the domain.
        documents: Number of samples.
        tokens: Tokens in them, ends of documents included.
        bytes: Bytes of their UTF-8 text.
        file_bytes: Size of the tar.
        sha256: Hash of the tar.
    """

    file: str
    split: Split
    domain: str
    documents: int
    tokens: int
    bytes: int
    file_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus.

    Attributes:
        root: Its folder.
        tokenizer: Its tokenizer.
        domains: Its domains; their order gives the domain indices of batches.
        shards: Its shards, by domain, split and number.
        settings: What it was prepared with, the hash of the source documents included.
    """

    root: AnyPath
    tokenizer: TokenizerInfo
    domains: tuple[DomainInfo, ...]
    shards: tuple[ShardInfo, ...]
    settings: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.tokenizer.vocab_size

    @property
    def eod_id(self) -> int:
        """Id that ends every document."""
        return self.tokenizer.eod_id

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains, in the order of the domain indices."""
        return [domain.name for domain in self.domains]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything in the manifest, and so over every shard."""
        content = json.dumps(self._content(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def shards_of(self, split: Split, domain: str) -> list[ShardInfo]:
        """The shards of one split of one domain, by number."""
        return [shard for shard in self.shards if shard.split == split and shard.domain == domain]

    def save(self) -> None:
        """Write `manifest.json` into the corpus folder."""
        content = {**self._content(), "fingerprint": self.fingerprint}
        if isinstance(self.root, RemotePath):
            raise TypeError(f"{self.root} is a URL, and a corpus is written to a local folder")
        (self.root / MANIFEST_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def _content(self) -> dict[str, Any]:
        content = asdict(self)
        del content["root"]
        # Through JSON, so that what was read compares and hashes like what was made.
        return {"version": VERSION, **json.loads(json.dumps(content))}


def read_manifest(root: str | Path) -> Manifest:
    """Read a corpus' manifest without looking at its shards.

    Raises:
        ConfigError: There is no manifest, or it is of another version, or it was changed by hand.
    """
    folder = location(root)
    path = folder / MANIFEST_FILE
    try:
        there = path.is_file()
    except OSError as error:
        raise ConfigError("data.root", str(root), str(error), _ADDRESS) from None
    except ConfigError as error:  # of a URL
        raise ConfigError("data.root", str(root), error.rule, error.hint) from None
    if not there:
        raise ConfigError(
            "data.root",
            str(root),
            f"there is no {path}",
            f"Prepare a corpus: {_PREPARE_SAMPLE if str(root).endswith('sample') else _PREPARE} {root}",
        )
    again = f"Prepare it again: {_PREPARE} {root} --overwrite"
    try:
        content = json.loads(path.read_text("utf-8"))
        version = content["version"]
        if version != VERSION:
            what = f"{path} has version {version}, this program reads {VERSION}"
            raise ConfigError("data.root", str(root), what, again)
        manifest = Manifest(
            root=folder,
            tokenizer=TokenizerInfo(**content["tokenizer"]),
            domains=tuple(
                DomainInfo(d["name"], SplitInfo(**d["train"]), SplitInfo(**d["val"])) for d in content["domains"]
            ),
            shards=tuple(ShardInfo(**shard) for shard in content["shards"]),
            settings=content["settings"],
        )
        fingerprint = content["fingerprint"]
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{path} is no corpus' manifest ({type(error).__name__}: {error})"
        raise ConfigError("data.root", str(root), what, again) from None
    if manifest.fingerprint != fingerprint:
        raise ConfigError("data.root", str(root), f"{path} does not have its own fingerprint: it was changed", again)
    return manifest


def _sizes(folder: AnyPath, names: Iterable[str]) -> dict[str, int]:
    """Sizes of those files that are there."""
    if isinstance(folder, RemotePath):
        listed = folder.sizes()
        return listed if listed is not None else {name: (folder / name).size() for name in names}
    return {name: path.stat().st_size for name in names if (path := folder / name).is_file()}


def load_manifest(root: str | Path, *, training: bool = True) -> Manifest:
    """Read a corpus' manifest and check that all its files are there at full size.

    Args:
        root: Folder of the corpus.
        training: Refuse a corpus with a training shard that is missing or cut; else it is told. A run that goes on
            replaces such a shard when its turn comes, as if it had been lost while the run was going.

    Raises:
        ConfigError: As :func:`read_manifest`; or a file is missing or has another size.
    """
    manifest = read_manifest(root)
    needed: dict[str, int | None] = {shard.file: shard.file_bytes for shard in manifest.shards}
    if manifest.tokenizer.file is not None:
        needed[manifest.tokenizer.file] = None
    replaceable = set() if training else {shard.file for shard in manifest.shards if shard.split == "train"}
    again = f"Copy the whole folder again, or prepare it again: {_PREPARE} {root} --overwrite"
    try:
        found = _sizes(manifest.root, needed)
    except OSError as error:
        raise ConfigError("data.root", str(root), str(error), _ADDRESS) from None
    for name, size in needed.items():
        path = manifest.root / name
        if name not in found:
            wrong = f"{path} is missing"
        elif size is not None and found[name] != size:
            wrong = f"{path} has {found[name]} bytes, not {size}"
        else:
            continue
        if name not in replaceable:
            raise ConfigError("data.root", str(root), wrong, again)
        _log.warning("%s; the run goes on, and will replace it when its turn comes", wrong)
    return manifest
