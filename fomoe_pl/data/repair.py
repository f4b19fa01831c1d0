"""Shards that cannot be read: tried again, then replaced aloud, up to a limit."""

import logging
import tarfile
import time
from collections.abc import Sequence

from fomoe_pl.data.manifest import Manifest, ShardInfo
from fomoe_pl.data.shards import Tokens, read_shard

_log = logging.getLogger(__name__)
WAITS = (0.1, 1.0)  # seconds before the second and the third try: a network file system may come back
DAMAGE = (OSError, ValueError, EOFError, KeyError, tarfile.TarError)


class ShardReader:
    """Reads shards whole, and puts documents of other shards in the place of one that cannot be read.

    The replacement has as many tokens as the shard should have: positions in the stream, and with them the other
    sites and a resumed run, stay in step.

    Args:
        manifest: The corpus.
        max_bad_shards: Different shards that may be replaced; one more is an error.
    """

    def __init__(self, manifest: Manifest, max_bad_shards: int) -> None:
        self._manifest = manifest
        self._max_bad_shards = max_bad_shards
        self.bad: dict[str, str] = {}  # file -> what is wrong with it

    def read(self, shard: ShardInfo, spares: Sequence[ShardInfo]) -> list[Tokens]:
        """The documents of a shard, or as many tokens of the spare shards.

        Args:
            shard: The shard.
            spares: Shards that may take its place, in the order in which they are tried.

        Raises:
            RuntimeError: More shards than the limit, or the shard and all its spares, cannot be read.
        """
        documents = self._try(shard)
        if documents is not None:
            return documents
        for spare in spares:
            documents = self._try(spare)
            if documents is not None:
                _log.warning("documents of %s take the place of %s", spare.file, shard.file)
                return _cut(documents, shard.tokens)
        raise RuntimeError(f"no shard can be read in the place of {shard.file}: {self._named()}")

    def _try(self, shard: ShardInfo) -> list[Tokens] | None:
        for wait in (*WAITS, None):
            try:
                return list(read_shard(self._manifest, shard))
            except DAMAGE as error:
                what = f"{type(error).__name__}: {error}"
            if wait is not None:
                time.sleep(wait)
        self.bad[shard.file] = what
        _log.warning("shard %s cannot be read (%d of at most %d): %s",
                     shard.file, len(self.bad), self._max_bad_shards, what)  # fmt: skip
        if len(self.bad) > self._max_bad_shards:
            limit = f"data.max_bad_shards is {self._max_bad_shards}"
            raise RuntimeError(f"{len(self.bad)} training shards cannot be read, and {limit}: {self._named()}")
        return None

    def _named(self) -> str:
        return "; ".join(f"{self._manifest.root / file} ({what})" for file, what in self.bad.items())


def _cut(documents: list[Tokens], tokens: int) -> list[Tokens]:
    """Exactly `tokens` tokens of some documents, from the first on, again and again if need be."""
    pieces = []
    while tokens:
        for document in documents:
            pieces.append(document[:tokens])
            tokens -= len(pieces[-1])
            if not tokens:
                break
    return pieces
