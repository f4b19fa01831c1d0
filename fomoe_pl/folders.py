"""Which folder a run writes into: one that holds a run already is left alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fomoe_pl.errors import ConfigError

_ROWS, _REPORT, _SAVED = "metrics.csv", "report.json", "checkpoints"
_CURVES = "events.out.tfevents.*"
_WRITTEN = (_ROWS, _REPORT, _CURVES, "config.yaml", "hparams.yaml")
"""Files of a run, which `clear` removes."""


def is_taken(folder: Path) -> bool:
    """Whether a run has written curves, checkpoints or a report into a folder."""
    files = (folder / _ROWS, folder / _REPORT)
    saved = folder / _SAVED
    return (
        any(path.exists() for path in files) or any(folder.glob(_CURVES)) or (saved.is_dir() and any(saved.iterdir()))
    )


def clear(folder: Path) -> None:
    """Remove a run from its folder, and nothing else that lies there."""
    for pattern in _WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / _SAVED, ignore_errors=True)


class RunFolders:
    """The folders that a run's loggers were told to write into, which every start of the same command names alike.

    Loggers that number their runs themselves (no `version`, W&B, MLflow) are left out: they have a new folder each.

    Args:
        loggers: `trainer.logger` of a parsed command line.
    """

    def __init__(self, loggers: Any) -> None:
        several = loggers if isinstance(loggers, list) else [loggers]
        self._settings = [
            logger.init_args for logger in several
            if hasattr(logger, "init_args") and logger.init_args.get("version") is not None
            and {"save_dir", "name"} <= {*vars(logger.init_args)}
        ]  # fmt: skip

    @property
    def paths(self) -> list[Path]:
        """As they stand."""
        return [self._path(settings) for settings in self._settings]

    @staticmethod
    def _path(settings: Any) -> Path:
        version = settings.version if isinstance(settings.version, str) else f"version_{settings.version}"
        return Path(settings.save_dir or ".", str(settings.name or ""), version)

    @property
    def are_taken(self) -> bool:
        """Whether a run has written into one of them."""
        return any(map(is_taken, self.paths))

    def number(self, n: int) -> None:
        """Take the folders with `-n` behind their names."""
        for settings in self._settings:
            # The last part of the path: the version, or without one the name.
            key = "version" if settings.version != "" else "name"
            last = settings[key] if isinstance(settings[key], str) else self._path(settings).name
            settings[key] = f"{last}-{n}" if last else str(n)

    def _numbered(self, n: int) -> list[Path]:
        return [path.with_name(f"{path.name}-{n}") for path in self.paths]

    def choose_free(self) -> bool:
        """Take the first numbered folders that no run has written into, if the named ones are taken.

        Returns:
            Whether they were.
        """
        if not self.are_taken:
            return False
        n = 2
        while any(map(is_taken, self._numbered(n))):
            n += 1
        self.number(n)
        return True

    def choose_newest(self) -> None:
        """Take the last of the numbered folders, if there is one."""
        n = 1
        while any(map(is_taken, self._numbered(n + 1))):
            n += 1
        if n > 1:
            self.number(n)

    def choose_that_of(self, checkpoint: Path) -> bool:
        """Take the folder in which a checkpoint lies, if it is a named or a numbered one.

        Returns:
            Whether it is.
        """
        parents = [parent.resolve() for parent in (checkpoint, *checkpoint.parents)]
        for path in self.paths:
            if path.resolve() in parents:
                return True
            pattern = re.compile(re.escape(path.name) + r"-(\d+)")
            for parent in parents:
                found = pattern.fullmatch(parent.name) if parent.parent == path.resolve().parent else None
                if found is not None:
                    self.number(int(found[1]))
                    return True
        return False


def check_fixed(folders: Sequence[tuple[str, Path]]) -> None:
    """Refuse to write into folders that were given without a name to number, and hold a run.

    Args:
        folders: Of each the setting that names it.

    Raises:
        ConfigError: For the first.
    """
    for key, folder in folders:
        if (folder / _REPORT).exists():
            raise ConfigError(key, str(folder), "holds a run that has ended",
                              "give another folder, or --overwrite")  # fmt: skip
