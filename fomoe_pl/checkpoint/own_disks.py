"""Checkpoints on disks of the sites' own: what crosses between sites when they save, and when they go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fomoe_pl.checkpoint import format as files
from fomoe_pl.checkpoint import parts
from fomoe_pl.checkpoint.content import FederatedContent
from fomoe_pl.checkpoint.disks import Disk, UrlDisk
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.shadow import Copies
from fomoe_pl.federation.transport import Transport
from fomoe_pl.files import OfSites, of_site
from fomoe_pl.lightning_internals import NoCheckpoint
from fomoe_pl.remote import AnyPath, is_url

CHUNK_BYTES = 4 * 2**20
"""Of each file that travels, what is in memory at a time."""


class PartsContent(FederatedContent):
    """Of a strategy with rounds whose sites have no file system in common.

    Attributes:
        root: The folder of each site's checkpoints, see `fomoe_pl.files.of_site`.
    """

    own_disks = True
    root: OfSites = ""
    _folder: Path | None = None  # that the run goes on from
    _origin: int | None = None  # whose own state

    @cached_property
    def disk(self) -> Disk:
        """Where this site's checkpoints are."""
        root = of_site("checkpoint_root", self.root, self.site.topology.site, "runs/checkpoints")
        return UrlDisk(root) if is_url(root) else Disk(Path(root).expanduser())

    def place(self, path: str | Path) -> Path:
        """In this site's folder, under the same name."""
        return self.disk.place(Path(path).name)

    def called(self, path: Path) -> AnyPath:
        """In this site's folder, or its URL."""
        return self.disk.called(path.name)

    def remove(self, path: str | Path) -> None:
        """This site's part."""
        self.disk.remove(Path(path).name)

    def start_training(self, fresh: bool) -> None:
        """Look, where the run starts from scratch, whether all disks have no checkpoints yet.

        Raises:
            ConfigError: On all sites, if one has some.
        """
        if fresh:
            found, wrong = self.disk.found(None)
            if float(self.site.sum_over_sites(torch.tensor([float(bool(found or wrong))]), "control")) > 0:
                rule = "has checkpoints of another run, on this site or another"
                raise ConfigError("checkpoint_root", str(self.disk.called("")), rule,
                                  "go on from them with --ckpt_path auto, or name new folders")  # fmt: skip
        self.disk.clear()

    def close(self) -> None:
        """Remove what lies on this machine for a while."""
        if "disk" in vars(self):
            self.disk.clear()

    def open(self) -> None:
        """Look whether all disks can be written.

        Raises:
            ConfigError: On all sites, naming those that cannot.
        """
        trouble = self.disk.trouble()
        told = [f"site {site}: {text}" for site, text in enumerate(self.site.texts_of_sites(trouble)) if text]
        if told:
            raise ConfigError("checkpoint_root", str(self.root), "; ".join(told), "look at the disk, the address, the "
                              "network and what is needed to log in; or name another place")  # fmt: skip

    # -- what is written ------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """As for all, and on how many sites each expert is."""
        return {**super().manifest(), "copies": self._copies}

    @property
    def _copies(self) -> int:
        return self.site.settings.copies_of(self.site.topology.n_sites)

    def expert_files(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Those that this site stores; of experts that it does not hold they are sent here."""
        site, residents = self.site.topology.site, self.site.transformer.residency.experts
        found, expected = {}, []
        outgoing: list[tuple[int, Tensor]] = []
        for name, part in parts.expert_parts(self.federation.placement, self._copies).items():
            if site in part.stores and site in part.holders:
                rows = [(i, e, residents[i].index(e)) for i, e in part.experts]
                found[f"{prefix}{name}"] = values = self.rows(tensors, rows)
                if site == part.stores[0]:
                    outgoing += [(to, value.float()) for to in part.sent_to for value in values.values()]
            elif site in part.stores:
                expected.append((f"{prefix}{name}", part))
        if self._copies > self.site.settings.overlap_of(self.site.topology.n_sites):
            found |= self._received(tensors, outgoing, expected)
        return found

    def _received(
        self, tensors: Mapping[str, Tensor], outgoing: Sequence[tuple[int, Tensor]],
        expected: Sequence[tuple[str, parts.ExpertPart]],
    ) -> dict[str, dict[str, Tensor]]:  # fmt: skip
        """Send what other sites store, and take what this one stores of theirs; every site calls it."""
        layout = self.layout()
        shapes = {
            name: {f"{tensor}#{e}": tensors[tensor].shape[1:] for layer, e in part.experts
                   for tensor in layout.sparse(layer) if tensor in tensors}
            for name, part in expected
        }  # fmt: skip
        incoming: dict[int, int] = {}
        for name, part in expected:
            n = sum(shape.numel() for shape in shapes[name].values())
            incoming[part.stores[0]] = incoming.get(part.stores[0], 0) + n
        given = self.federation.transport.exchange("checkpoint", outgoing, incoming, torch.float32)
        flat = {giver: values.cpu() for giver, values in given.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for name, part in expected:
            giver, sizes = part.stores[0], [shape.numel() for shape in shapes[name].values()]
            taken, flat[giver] = flat[giver][: sum(sizes)], flat[giver][sum(sizes) :]
            pieces = zip(shapes[name].items(), taken.split(sizes), strict=True)
            found[name] = {key: piece.view(shape).clone() for (key, shape), piece in pieces}
        return found

    # -- what is taken back ---------------------------------------------------------------------------------------

    def load_trainer(self, folder: Path) -> dict[str, Any]:
        """Agree on a checkpoint, and let every site have what it needs of it; `auto` is the newest that all can have.

        Raises:
            ConfigError: On all sites, if there is no such checkpoint, or something of it is on no site's disk.
        """
        auto = str(folder) == "auto"
        found, wrong = self.disk.found(None if auto else folder.name)
        for message in wrong:
            print(f"fomoe: site {self.site.topology.site}: not used: {message}", file=sys.stderr, flush=True)
        whole = not auto and (folder / files.MANIFEST).is_file() and not files.is_part(files.read_manifest(folder))
        every, all_whole = parts.understand(self.site.texts_of_sites(parts.tell(found, whole)))
        self._folder = self._origin = None
        if all_whole and not auto:  # one of another run, or of `fomoe import`, that every site has
            self._folder = folder
        elif not every and auto:
            rank_zero_info("no site has a checkpoint yet: starting from scratch")
            return NoCheckpoint()
        else:
            self._folder = self._agree(every, str(folder))
        return super().load_trainer(self._folder)

    def saved_average(self, folder: Path) -> dict[str, Tensor] | None:
        """That of the checkpoint which the sites have agreed on, whatever it was called."""
        return None if self._folder is None else super().saved_average(self._folder)

    def _agree(self, every: Sequence[parts.Found], given: str) -> Path:
        unusable: list[str] = []
        for one in every:
            own = self.disk.held(one.name, one.manifest)
            has = parts.who_has(one.manifest, self.site.texts_of_sites(json.dumps(sorted(own.names))))
            gone = parts.lost(one.manifest, has)
            if not gone:
                for message in unusable:
                    rank_zero_info(f"not used: {message}")
                return self._gather(one, own, has)
            unusable.append(f"{one.name} after step {one.manifest['optimizer_steps']} is not whole any more: no site "
                            f"has {'; nor '.join(gone)}")  # fmt: skip
        rule = "; ".join(unusable) or "no site has a checkpoint of this name"
        raise ConfigError("ckpt_path", given, rule, "bring the folders of the sites that had them back under "
                          "`checkpoint_root`; `copies` stores each expert on several sites")  # fmt: skip

    def _gather(self, one: parts.Found, own: parts.Held, has: Mapping[str, Sequence[int]]) -> Path:
        """Fetch what this site lacks, and give the checkpoint its name."""
        site, manifest, folder = self.site, one.manifest, self.place(one.name)
        n_sites, config = site.topology.n_sites, site.transformer.config
        site.redraws, site.loads_at_draw = manifest["redraws"], manifest.get("loads_at_draw")
        placement = site.placed(config)
        origins = parts.origins(manifest, has, n_sites)
        self._origin = origins[site.topology.site]
        needs = [parts.needed(manifest, has, i, origins[i], placement.residents(i)) for i in range(n_sites)]
        moves = parts.moves(needs, has)
        self._tell(one, moves, has, origins)
        place, error = own.place, ""
        try:
            place = _ready(folder, own.place)
        except OSError as failed:
            error = str(failed)
        error = fetch(self.federation.transport, moves, manifest["files"], place) or error
        try:
            if not error and place is not None:
                _put_in_place(folder, place, manifest)
                self.disk.adopt(one.name, [move.name for move in moves if move.receiver == site.topology.site])
        except OSError as failed:
            error = str(failed)
        told = [text for text in self.site.texts_of_sites(f"site {site.topology.site}: {error}" if error else "")
                if text]  # fmt: skip
        if told:
            raise ConfigError("ckpt_path", str(folder), f"what a site lacks could not be brought to its disk "
                              f"({'; '.join(told)})", "look at the disks, and start again")  # fmt: skip
        return folder

    def _tell(
        self, one: parts.Found, moves: Sequence[parts.Move], has: Mapping[str, Sequence[int]], origins: Sequence[int]
    ) -> None:
        about = one.manifest["files"]
        rank_zero_info(f"going on from {one.name} after step {one.manifest['optimizer_steps']}")
        for receiver in sorted({move.receiver for move in moves}):
            names = [move.name for move in moves if move.receiver == receiver]
            size = sum(about[name]["bytes"] for name in names) / 1e6
            rank_zero_info(f"site {receiver} is sent {len(names)} files, {size:,.2f} MB, that are not on its disk")
        for site, origin in enumerate(origins):
            if files.site_name(origin) in has and not has[files.site_name(origin)]:
                rank_zero_info(f"the own state of site {origin} is lost ({files.site_name(origin)}): site {site} goes "
                               "on from the global model, with fresh inner moments, without local steps since the last "
                               "round, and counts its bytes from zero")  # fmt: skip
        for site in sorted({*range(one.manifest["n_sites"])} - {*origins}):
            rank_zero_info(f"no site goes on from the own state of site {site}: its inner moments are lost")

    def origin(self, n_saved: int) -> int:
        """Where sites had disks of their own, as all have agreed."""
        return super().origin(n_saved) if self._origin is None else self._origin

    def trainer_file(self, folder: Path, manifest: Mapping[str, Any]) -> str:
        """This site's own, or another's where that is lost."""
        own = files.trainer_name(self.site.topology.site)
        return own if files.is_part(manifest) and (folder / own).is_file() else super().trainer_file(folder, manifest)

    def own_state(self, folder: Path, manifest: Mapping[str, Any], site: int) -> dict[str, Any] | None:
        """None where it went with a disk."""
        if files.is_part(manifest) and not (folder / files.site_name(site)).is_file():
            return None
        return super().own_state(folder, manifest, site)

    def load_copies(self, folder: Path, copies: Copies) -> None:
        """Copies of experts that are not here come from their owners as after a round: packed, not whole."""
        if not files.is_part(files.read_manifest(folder)):
            super().load_copies(folder, copies)
            return
        ledger = self.site.ledger
        before = ledger.sent["shadow"]
        self.federation.refresh_copies()
        sent, ledger.sent["shadow"] = ledger.sent["shadow"] - before, before
        ledger.send("checkpoint", sent)  # an uninterrupted run would not have sent it

    def load_ledger(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint, and count what was sent to find it and to fetch it too."""
        ledger = self.site.ledger
        sent, calls = dict(ledger.sent), dict(ledger.calls)
        super().load_ledger(state)
        for kind in ("checkpoint", "control"):
            ledger.sent[kind] += sent.get(kind, 0)
            ledger.calls[kind] += calls.get(kind, 0)


def _ready(folder: Path, place: Path | None) -> Path:
    """A folder into which a site's missing files go; a new one where it has none."""
    if place is None:
        files.begin(folder)
        place = files.partial(folder)
    return place


def _put_in_place(folder: Path, place: Path, manifest: Mapping[str, Any]) -> None:
    """Give a folder with all that this site needs the checkpoint's name."""
    if not (place / files.MANIFEST).is_file():
        files.write_manifest(place, manifest)
    if place == files.replaced(folder):
        # Its successor is on no other site, or incomplete: it gives way, and stays until the next checkpoint.
        shutil.rmtree(files.partial(folder), ignore_errors=True)
        if folder.exists():
            folder.rename(files.partial(folder))
            (files.partial(folder) / files.MANIFEST).unlink(missing_ok=True)
        place.rename(folder)
    elif place != folder:
        files.put_in_place(folder)


def fetch(
    transport: Transport, moves: Sequence[parts.Move], about: Mapping[str, Any], place: Path | None
) -> str:  # fmt: skip
    """Send and receive files, a chunk of each pair of sites at a time; every site calls it with the same moves.

    A file is written under a temporary name, and renamed when its hash is right.

    Args:
        transport: Counted collectives; bytes count as `checkpoint`.
        moves: Who sends which file to whom.
        about: File name -> `bytes` and `sha256`, of the manifest.
        place: This site's folder, from which it reads and into which it writes; None where it can do neither.

    Returns:
        What is wrong; empty if nothing is. All sites get to the end in either case.
    """
    site = transport.topology.site
    streams: dict[tuple[int, int], list[str]] = {}
    for move in moves:
        streams.setdefault((move.giver, move.receiver), []).append(move.name)
    sizes = {pair: sum(about[name]["bytes"] for name in names) for pair, names in streams.items()}
    givers = {pair[1]: _Reader(place, names) for pair, names in streams.items() if pair[0] == site}
    takers = {pair[0]: _Writer(place, names, about) for pair, names in streams.items() if pair[1] == site}
    for start in range(0, max(sizes.values(), default=0), CHUNK_BYTES):
        now = {pair: max(0, min(CHUNK_BYTES, size - start)) for pair, size in sizes.items()}
        outgoing = [(to, reader.read(now[site, to])) for to, reader in givers.items() if now[site, to]]
        incoming = {giver: now[giver, site] for giver in takers if now[giver, site]}
        given = transport.exchange("checkpoint", outgoing, incoming, torch.uint8)
        for giver, values in given.items():
            takers[giver].write(values.cpu().numpy().tobytes())
    return "; ".join(error for taker in takers.values() for error in taker.errors)


class _Reader:
    """Files one after the other; what cannot be read is zeros, whose hash the receiver finds wrong."""

    def __init__(self, place: Path | None, names: Sequence[str]) -> None:
        self._paths = [] if place is None else [place / name for name in names]
        self._file: Any = None

    def read(self, size: int) -> Tensor:
        found = bytearray()
        with suppress(OSError):
            while len(found) < size and (self._file is not None or self._paths):
                if self._file is None:
                    self._file = self._paths.pop(0).open("rb")
                read = self._file.read(size - len(found))
                found += read
                if not read:
                    self._file.close()
                    self._file = None
        return torch.frombuffer(found + bytes(size - len(found)), dtype=torch.uint8)


class _Writer:
    """Files one after the other, each checked at its end."""

    def __init__(self, place: Path | None, names: Sequence[str], about: Mapping[str, Any]) -> None:
        self.errors: list[str] = [] if place is not None else ["its folder cannot be made"]
        self._place, self._about = place, about
        self._names = list(names)
        self._file: Any = None
        self._start()

    def _start(self) -> None:
        self._left = self._about[self._names[0]]["bytes"] if self._names else 0
        self._hash, self._file = hashlib.sha256(), None

    def write(self, values: bytes) -> None:
        while self._names:
            part, values = values[: self._left], values[self._left :]
            self._hash.update(part)
            self._left -= len(part)
            try:
                self._append(part)
            except OSError as error:
                self.errors.append(str(error))
            if self._left:
                return
            self._finish(self._names.pop(0))
            self._start()

    def _append(self, part: bytes) -> None:
        if self.errors or self._place is None:
            return
        if self._file is None:
            self._file = (self._place / f"{self._names[0]}.fetched").open("wb")
        self._file.write(part)

    def _finish(self, name: str) -> None:
        if self._file is not None:
            self._file.close()
        if self.errors or self._place is None:
            return
        unfinished = self._place / f"{name}.fetched"
        if self._hash.hexdigest() != self._about[name]["sha256"]:
            unfinished.unlink(missing_ok=True)
            self.errors.append(f"{name} did not come as it was written")
        else:
            unfinished.replace(self._place / name)
            files.remember(self._place / name, self._about[name]["sha256"])
