"""Checkpoints of sites without a common file system: who stores what, who has it, and who lacks it.

Every site writes its part into a folder of its own. The manifest, the same on all, lists every file with its hash and
the sites that have it. The functions here decide nothing that not all sites decide alike from the same messages; what
they send is sent by their callers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fomoe_pl.checkpoint import format as files
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import Placement, set_numbers

MOST_MANIFESTS = 4
"""How many checkpoints a site tells of: sites differ by one, for a manifest is written when all have their parts."""


class ExpertPart(NamedTuple):
    """Experts that lie in one file: those of one owner with the same holders.

    Attributes:
        experts: Their (layer, expert).
        holders: Sites that train them.
        stores: Sites that have the file, the owner first; beyond the holders they are sent it.
    """

    experts: tuple[tuple[int, int], ...]
    holders: tuple[int, ...]
    stores: tuple[int, ...]

    @property
    def sent_to(self) -> tuple[int, ...]:
        """Sites that store what they do not hold."""
        return tuple(site for site in self.stores if site not in self.holders)


def expert_parts(placement: Placement, copies: int) -> dict[str, ExpertPart]:
    """The files of experts, by name without a prefix, in order.

    Holders store a file before other sites do: copies up to the overlap cost no traffic. Whoever has a file holds all
    of its experts or none, so a run that goes on with its placement fetches nothing that it has no use for.

    Args:
        placement: Who holds what.
        copies: Sites that store each expert, 1..M.
    """
    n_sites, numbers = placement.n_sites, set_numbers(placement)
    found: dict[str, list[tuple[int, int]]] = {}
    of: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for layer, experts in enumerate(placement.holders):
        for expert, holders in enumerate(experts):
            owner = placement.owner(layer, expert)
            name = files.experts_name(owner, first=numbers[holders])
            if name not in of:
                ring = [(owner + i) % n_sites for i in range(n_sites)]
                ordered = [s for s in ring if s in holders] + [s for s in ring if s not in holders]
                of[name] = holders, tuple(ordered[:copies])
            found.setdefault(name, []).append((layer, expert))
    return {name: ExpertPart(tuple(found[name]), *of[name]) for name in sorted(found)}


def placement_of(manifest: Mapping[str, Any]) -> Placement:
    """Who held what when a checkpoint of parts was saved.

    Raises:
        ConfigError: If the manifest does not say so.
    """
    try:
        n_sites, architecture = manifest["n_sites"], manifest["architecture"]
        if "placement" in manifest:
            found = Placement.of_record(manifest["placement"], n_sites)
        else:
            everywhere = tuple(range(n_sites))
            found = Placement(((everywhere,) * architecture["n_experts"],) * architecture["n_layers"], n_sites)
        if any(not sites or not set(sites) <= {*range(n_sites)} for layer in found.holders for sites in layer):
            raise ValueError(n_sites)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError("ckpt_path", str(manifest.get("sha256")), "is damaged: its manifest does not say who holds "
                          "which expert", "use another checkpoint") from None  # fmt: skip
    return found


def merged(of_sites: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The files of all sites, as a manifest lists them.

    Args:
        of_sites: JSON of `format.sealed` of each site, in their order.

    Returns:
        File name -> size, hash, and the sites that have it; names of files whose copies are not the same.

    Raises:
        ConfigError: If a site tells something else.
    """
    found: dict[str, Any] = {}
    differing = []
    for site, text in enumerate(of_sites):
        try:
            pairs = [(name, {**about}) for name, about in json.loads(text).items()]
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise _no_sense(site, "the files that it has written") from None
        for name, about in pairs:
            first = found.setdefault(name, {**about, "sites": []})
            first["sites"].append(site)
            if {**about, "sites": first["sites"]} != first:
                differing.append(name)
    return found, differing


class Found(NamedTuple):
    """A checkpoint of which some site has a part: the name of its folder, and its manifest."""

    name: str
    manifest: dict[str, Any]

    @property
    def age(self) -> tuple[int, str, str]:
        """The newest is the largest."""
        return self.manifest["optimizer_steps"], self.name, self.manifest["sha256"]


def _places(folder: Path) -> tuple[Path, Path, Path]:
    return folder, files.partial(folder), files.replaced(folder)


def on_disk(root: Path, name: str | None) -> tuple[list[Found], list[str]]:
    """Checkpoints of parts whose manifest is on this disk, the newest first.

    Args:
        root: Where they lie; it need not be there.
        name: Of the one that is wanted; None for the newest ones.

    Returns:
        Them, and what is wrong with others.
    """
    pattern = "*.ckpt*" if name is None else f"{name}*"
    found: dict[tuple[str, str], Found] = {}
    wrong = []
    for path in sorted(root.glob(pattern)):
        base = path.name.removesuffix(".partial").removesuffix(".old")
        if (name is not None and base != name) or not (path / files.MANIFEST).is_file():
            continue
        try:
            manifest = files.read_manifest(path)
        except (ConfigError, OSError) as error:
            wrong.append(str(error))
            continue
        if files.is_part(manifest):
            found[base, manifest["sha256"]] = Found(base, manifest)
    return newest(found.values()), wrong


def newest(found: Iterable[Found]) -> list[Found]:
    """Those that a site tells of, the newest first."""
    return sorted(found, key=lambda one: one.age, reverse=True)[:MOST_MANIFESTS]


def tell(found: Iterable[Found], whole: bool) -> str:
    """What a site tells the others of its disk.

    Args:
        found: What `on_disk` has found.
        whole: Whether the path that was given is a checkpoint of all files here, as of a common file system.
    """
    return json.dumps({"whole": whole, "found": [[one.name, json.dumps(one.manifest)] for one in found]})


def understand(of_sites: Sequence[str]) -> tuple[list[Found], bool]:
    """What sites have told each other.

    Args:
        of_sites: `tell` of each site.

    Returns:
        All checkpoints, the newest first, and whether all sites have the given path whole.

    Raises:
        ConfigError: If a site tells something else.
    """
    every: dict[tuple[str, str], Found] = {}
    whole = True
    for site, text in enumerate(of_sites):
        try:
            told = json.loads(text)
            whole = whole and told["whole"] is True
            pairs = [(str(name), str(manifest)) for name, manifest in told["found"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _no_sense(site, "what it has on its disk") from None
        for name, written in pairs:
            manifest = files.parse_manifest(written, Path(name))
            if Path(name).name != name or not files.is_part(manifest):
                raise _no_sense(site, "a checkpoint's name or manifest")
            every[name, manifest["sha256"]] = Found(name, manifest)
    return sorted(every.values(), key=lambda one: one.age, reverse=True), whole


def _no_sense(site: int, what: str) -> ConfigError:
    return ConfigError("ckpt_path", f"site {site}", f"tells nothing of {what} that this program understands",
                       "give all sites the same version")  # fmt: skip


class Held(NamedTuple):
    """What of a checkpoint is on this disk: in which folder, and which of its files are as they were written."""

    place: Path | None
    names: frozenset[str]


def held(folder: Path, manifest: Mapping[str, Any]) -> Held:
    """Look for a checkpoint's files, also where its manifest could not be written any more; hashes are compared.

    Args:
        folder: The checkpoint's own name on this disk.
        manifest: Its manifest, perhaps from another site.
    """
    places = [path for path in _places(folder) if _sha(path) == manifest["sha256"]]
    # All sites had written when the first one wrote a manifest: a partial folder without one may be whole.
    places += [path for path in _places(folder)[1:2] if path.is_dir() and not (path / files.MANIFEST).is_file()]
    for path in places:
        names = frozenset(name for name, about in manifest["files"].items() if _is_as_written(path / name, about))
        if names or path == folder:
            return Held(path, names)
    return Held(None, frozenset())


def _sha(path: Path) -> str | None:
    with suppress(ConfigError, OSError):
        return str(files.read_manifest(path)["sha256"])
    return None


def _is_as_written(path: Path, about: Mapping[str, Any]) -> bool:
    try:
        return path.stat().st_size == about["bytes"] and files.hash_of(path) == about["sha256"]
    except OSError:
        return False


def who_has(manifest: Mapping[str, Any], of_sites: Sequence[str]) -> dict[str, list[int]]:
    """File name -> the sites that have it now.

    Args:
        manifest: Of the checkpoint.
        of_sites: JSON of the names that each site has.

    Raises:
        ConfigError: If a site tells something else.
    """
    found: dict[str, list[int]] = {name: [] for name in manifest["files"]}
    for site, text in enumerate(of_sites):
        try:
            names = {str(name) for name in json.loads(text)}
        except (ValueError, TypeError, RecursionError):
            raise _no_sense(site, "the files that it has") from None
        for name in names & found.keys():
            found[name].append(site)
    return found


def lost(manifest: Mapping[str, Any], has: Mapping[str, Sequence[int]]) -> list[str]:
    """What of the global model and of the trainer's state no site has any more, as messages; empty if all is there.

    Args:
        manifest: Of the checkpoint.
        has: From `who_has`.

    Raises:
        ConfigError: If the manifest does not say who holds what.
    """
    messages = []
    parts = expert_parts(placement_of(manifest), manifest["copies"])
    for name, sites in has.items():
        base = next((part for part in parts if name.endswith(part)), None)
        if not sites and name.endswith(".safetensors"):
            what = "dense tensors" if base is None else _experts(parts[base].experts)
            messages.append(f"{what} ({name}, which was on site {_list(manifest['files'][name].get('sites', ()))})")
    if not any(sites for name, sites in has.items() if name.startswith("trainer")):
        messages.append("the trainer's state (trainer.pt)")
    return messages


def _experts(experts: Iterable[tuple[int, int]]) -> str:
    by_layer: dict[int, list[int]] = {}
    for layer, expert in experts:
        by_layer.setdefault(layer, []).append(expert)
    return "; ".join(f"experts {_list(ids)} of layer {layer}" for layer, ids in by_layer.items())


def _list(numbers: Iterable[object]) -> str:
    return ", ".join(map(str, numbers))


def origins(manifest: Mapping[str, Any], has: Mapping[str, Sequence[int]], n_sites: int) -> list[int]:
    """Of each site whose own state it goes on from: that of its number, or where the sites are others one on its disk.

    Args:
        manifest: Of the checkpoint.
        has: From `who_has`.
        n_sites: Sites now.
    """
    saved = manifest["n_sites"]
    found = [site % saved for site in range(n_sites)]
    for site in range(n_sites) if n_sites != saved else ():
        here = [old for old in range(saved) if site in has.get(files.site_name(old), ())]
        if here and found[site] not in here:
            found[site] = here[0]
    return found


def needed(
    manifest: Mapping[str, Any], has: Mapping[str, Sequence[int]], site: int, origin: int,
    residents: Sequence[Sequence[int]],
) -> list[str]:  # fmt: skip
    """Files that a site needs to go on, of those that some site has.

    Args:
        manifest: Of the checkpoint.
        has: From `who_has`.
        site: Its number now.
        origin: Whose own state it goes on from, from `origins`.
        residents: Per layer the experts that it holds now.
    """
    wanted = {(layer, expert) for layer, experts in enumerate(residents) for expert in experts}
    parts = expert_parts(placement_of(manifest), manifest["copies"])
    unwanted = [name for name, part in parts.items() if wanted.isdisjoint(part.experts)]
    tensors = [name for name in has if name.endswith(".safetensors") and not name.endswith(tuple(unwanted))]
    own = [files.site_name(origin), files.observers_name(site)]
    trainers = [name for name in has if name.startswith("trainer") and has[name]]
    trainer = files.trainer_name(site)
    own.append(trainer if trainer in trainers else min(trainers))
    return sorted(name for name in (*tensors, *own) if has.get(name))


class Move(NamedTuple):
    """A file that goes from one site's disk to another's."""

    giver: int
    receiver: int
    name: str


def moves(needs: Sequence[Sequence[str]], has: Mapping[str, Sequence[int]]) -> list[Move]:
    """Who sends which file to whom; those that have it give it in turns.

    Args:
        needs: Of each site, from `needed`.
        has: From `who_has`.
    """
    return [
        Move(has[name][receiver % len(has[name])], receiver, name)
        for receiver, names in enumerate(needs)
        for name in names
        if receiver not in has[name]
    ]
