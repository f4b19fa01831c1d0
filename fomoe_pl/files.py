"""Writing files of which a reader never meets half."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text under a temporary name beside it, and rename it when it is complete."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, newline="")
    unfinished.replace(path)
