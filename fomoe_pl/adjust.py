"""Settings that a command line writes shorter than the Trainer takes them: intervals in rounds, single callbacks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback

from fomoe_pl.errors import ConfigError, check_range, config_message
from fomoe_pl.shipped import config_path

KEY = "callbacks"
_MODULES = ("fomoe_pl.callbacks", "fomoe_pl.hub.callback", "lightning.pytorch.callbacks")
_ROUNDS = re.compile(r"(\d+) rounds?")

Changes = dict[str, dict[str, Any] | None]
"""Class of a callback -> settings that are changed; None leaves the callback out."""


# -- callbacks ----------------------------------------------------------------------------------------------------


def merged_changes(words: Sequence[str]) -> list[str]:
    """A command line with all its changes to callbacks as one option at the end.

    A parser lets a later file replace what an earlier one says of the same callback; here settings are merged one by
    one, those of files and of options `--callbacks.NAME.SETTING VALUE` in the order in which they are given.

    Args:
        words: After `fomoe`.
    """
    changes: dict[str, Any] = {}
    kept: list[str] = []
    found = False
    position = 0
    while position < len(words):
        word, _, value = words[position].partition("=")
        if not word.startswith("--callbacks"):
            kept.append(words[position])
            if word in ("-c", "--config"):
                given = value or (words[position + 1] if position + 1 < len(words) else "")
                merge(changes, _section(given))
            position += 1
            continue
        found = True
        if not value:
            position += 1
            value = words[position] if position < len(words) else "null"
        name, _, setting = word.removeprefix("--callbacks").removeprefix(".").partition(".")
        loaded = yaml.safe_load(value)
        merge(changes, {name: {setting: loaded} if setting else loaded} if name else loaded or {})
        position += 1
    return [*kept, "--callbacks", json.dumps(changes)] if found or changes else kept


def merge(changes: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add changes; a setting that both have is that of `more`."""
    for name, settings in more.items():
        both = isinstance(settings, Mapping) and isinstance(changes.get(name), Mapping)
        changes[name] = {**changes[name], **settings} if both else settings


def _section(given: str) -> dict[str, Any]:
    """What a file says of single callbacks; nothing of what is no file, which the parser finds out."""
    path = Path(config_path(given))
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    section = loaded.get(KEY) if isinstance(loaded, dict) else None
    return section if isinstance(section, dict) else {}


def changed_callbacks(callbacks: Sequence[Any], changes: Changes) -> list[Any]:
    """A list of callbacks with some of them changed, added or left out.

    Args:
        callbacks: `trainer.callbacks` of a parsed command line.
        changes: Of each the settings that differ. One that is not in the list is added.

    Raises:
        ConfigError: If there is no such callback or setting, or a value that it does not take.
    """
    changed = [*callbacks]
    for name, settings in changes.items():
        places = [i for i, entry in enumerate(changed) if name in (entry.class_path, entry.class_path.split(".")[-1])]
        if len(places) > 1:
            raise ConfigError(f"{KEY}.{name}", settings, f"there are {len(places)} of this class in trainer.callbacks",
                              "change them in that list")  # fmt: skip
        if settings is None:
            for place in places:
                del changed[place]
            continue
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{KEY}.{name}", settings, "must be settings by name, or null to leave it out",
                              f"type --{KEY}.{name}.SETTING VALUE")  # fmt: skip
        old = changed[places[0]] if places else Namespace(class_path=_class_path(name), init_args=Namespace())
        given = vars(old.get("init_args") or Namespace())
        new = _checked(name, old.class_path, {**given, **settings})
        if places:
            changed[places[0]] = new
        else:
            changed.append(new)
    return changed


def _class_path(name: str) -> str:
    known = {
        member: f"{module}.{member}" for module in _MODULES for member, owner in vars(import_module(module)).items()
        if isinstance(owner, type) and issubclass(owner, Callback) and owner is not Callback
    }  # fmt: skip
    if "." in name:
        return name
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise ConfigError(f"{KEY}.{name}", "given", "there is no such callback",
                          f"did you mean {near[0]}?" if near else "give its full path")  # fmt: skip
    return known[name]


def _checked(name: str, class_path: str, settings: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    try:
        parsed = parser.parse_object({"callback": {"class_path": class_path, "init_args": settings}})
    except Exception as error:
        told = config_message(error) or " ".join(str(error).split())
        raise ConfigError(f"{KEY}.{name}", settings, f"is not what {class_path} takes ({told[-300:]})",
                          "see its arguments") from None  # fmt: skip
    return parsed.callback


# -- intervals and budgets ----------------------------------------------------------------------------------------


def in_steps(key: str, value: Any, local_steps: Any) -> Any:
    """An interval in optimizer steps: `20 rounds` is 20 K, and all else what it was.

    Args:
        key: The setting, for messages.
        value: What was given.
        local_steps: K, as of the strategy: a number, a schedule, or None where there are no rounds.

    Raises:
        ConfigError: If rounds have no one length.
    """
    found = _ROUNDS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    if not isinstance(local_steps, int):
        rule = "this strategy has no rounds" if local_steps is None else f"the length of a round changes: {local_steps}"
        raise ConfigError(key, value, rule, "give a number of steps")
    check_range(key, int(found[1]), "1 round is the least", least=1)
    return int(found[1]) * local_steps


def changes_in_steps(changes: Changes, local_steps: Any) -> Changes:
    """Changes with all intervals in optimizer steps."""
    return {
        name: None if settings is None else {
            key: in_steps(f"{KEY}.{name}.{key}", value, local_steps) for key, value in settings.items()
        } for name, settings in changes.items()
    }  # fmt: skip


def steps_for(max_tokens: float, step_tokens: int, local_steps: Any) -> int:
    """Optimizer steps after which at least so many tokens have been read, in whole rounds if they have one length.

    Args:
        max_tokens: Of all sites.
        step_tokens: Tokens of a step of all sites.
        local_steps: K, as for `in_steps`.
    """
    check_range("max_tokens", max_tokens, "1e9 is a billion", above=0)
    steps = int(-(-max_tokens // step_tokens))
    return -(-steps // local_steps) * local_steps if isinstance(local_steps, int) else steps
