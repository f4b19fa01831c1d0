"""What is installed with the package: configurations by name, the sample texts, and what its extras need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile

from fomoe_pl.errors import ConfigError

_PACKAGE = Path(__file__).parent
# In a wheel they lie in the package; in the repository, and so in an editable installation, beside it.
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), None)
SAMPLE = next((path for path in (_PACKAGE / "sample", _PACKAGE.parent / "data" / "sample") if path.is_dir()), None)
_NAMES_OF_SAMPLE = ("sample", "data/sample")


def config_names() -> list[str]:
    """Names of the configurations, as `-c` takes them: `quickstart`, `strategy/diloco`."""
    found = sorted(CONFIGS.rglob("*.yaml")) if CONFIGS is not None else []
    return [str(path.relative_to(path_of_configs()).with_suffix("")) for path in found]


def path_of_configs() -> Path:
    """The folder of the configurations.

    Raises:
        ConfigError: If the package was installed without them.
    """
    if CONFIGS is None:
        raise ConfigError("config", str(_PACKAGE), "there are no configurations beside the package: it is not whole",
                          "install it again, or give the paths of files")  # fmt: skip
    return CONFIGS


def config_path(given: str, key: str = "config") -> str:
    """The file that was meant: a path that exists as it is, else a configuration of that name.

    Args:
        given: A path, or a name such as `strategy/diloco`; `configs/strategy/diloco.yaml` is the same. What is neither
            in its form, such as YAML, is returned as it is.
        key: The setting, for messages.

    Raises:
        ConfigError: If there is neither, with the nearest names.
    """
    if not re.fullmatch(r"[\w./~+-]+", given) or Path(given).is_file():
        return given
    name = given.removeprefix("configs/").removesuffix(".yaml").strip("/")
    path = path_of_configs() / f"{name}.yaml"
    if path.is_file() and not given.startswith(("/", "./", "../", "~")):
        return str(path)
    names = config_names()
    by_last = {known.rpartition("/")[2]: known for known in names}
    near = [*get_close_matches(name, names, 3), *(by_last[last] for last in get_close_matches(name, by_last, 3))]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    raise ConfigError(key, given, "is neither a file nor the name of a configuration",
                      f"{hint}`fomoe new --list` lists the names")  # fmt: skip


def source_path(given: str) -> str:
    """The folder of the sample texts for `sample` or `data/sample`, where nothing has that name; all else as it is."""
    named = given in _NAMES_OF_SAMPLE and not Path(given).exists() and SAMPLE is not None
    return str(SAMPLE) if named else given


def described() -> Iterable[tuple[str, str]]:
    """Each configuration's name, and what its first comment says."""
    for name in config_names():
        first = (path_of_configs() / f"{name}.yaml").read_text().partition("\n")[0]
        yield name, first.removeprefix("#").strip() if first.startswith("#") else ""


def how_to_install(extra: str) -> str:
    """The line that installs what an extra of this package needs.

    Args:
        extra: Its name in pyproject.toml.
    """
    try:
        needed = [line for line in requires("fomoe-pl") or () if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    except PackageNotFoundError:  # only the code is there, on PYTHONPATH
        needed = []
    packages = " ".join(f'"{line.partition(";")[0].strip()}"' for line in needed)
    return f"install it: pip install {packages}" if packages else f"install the extra {extra} of fomoe-pl"


class NamedConfig(ActionConfigFile):
    """The action of `-c`: reads a file, or a configuration of that name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read it."""
        super().__call__(parser, cfg, config_path(values) if isinstance(values, str) else values, option_string)
