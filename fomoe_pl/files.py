"""Writing files of which a reader never meets half."""

from pathlib import Path

from fomoe_pl.errors import ConfigError


def prepare(key: str, path: Path) -> None:
    """Make a file's folder, before the work is done that goes into it.

    Raises:
        ConfigError: if it cannot be made, or the path is a folder itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(key, str(path), f"its folder cannot be made: {error.strerror}", "name another file") from None
    if path.is_dir():
        raise ConfigError(key, str(path), "is a folder", "name a file in it")


def write_whole(path: Path, text: str) -> None:
    """Write a text under a temporary name beside it, and rename it when it is complete."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)
