"""The one error for settings a user can correct, and the one way in which commands tell it."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, get_args

EXIT_CONFIG = 2


class ConfigError(ValueError):
    """A setting that cannot work, as one message: what it is, which rule it breaks, what to do.

    Args:
        key: Dotted name of the setting as the user writes it, e.g. `model.architecture.n_experts`.
        value: The value that was given.
        rule: The rule that the value breaks, without a final full stop.
        hint: What would be valid, preferably the list of valid values.
    """

    def __init__(self, key: str, value: object, rule: str, hint: str) -> None:
        # All four go to ValueError, so that the error survives pickling on its way out of a spawned process.
        super().__init__(key, value, rule, hint)
        self.key = key
        self.value = value
        self.rule = rule
        self.hint = hint

    def __str__(self) -> str:
        """Return `KEY = VALUE: RULE. HINT` on one line."""
        return f"{self.key} = {self.value!r}: {self.rule}. {self.hint[:1].upper()}{self.hint[1:]}"


def check_choice(key: str, value: object, choices: Any) -> None:
    """Refuse what is none of a Literal's values: a command line checks that itself, Python does not.

    Args:
        key: As of `ConfigError`.
        value: What was given.
        choices: The Literal.

    Raises:
        ConfigError: Naming the choices.
    """
    valid = get_args(choices)
    if value not in valid:
        raise ConfigError(key, value, "is not one of the choices", f"use {', '.join(map(str, valid))}")


def check_names(given: Iterable[str], valid: Sequence[str]) -> None:
    """Refuse a setting that there is not, naming the nearest one.

    Args:
        given: Names of settings that were given.
        valid: Those that there are.

    Raises:
        ConfigError: For the first unknown one.
    """
    for name in given:
        if name not in valid:
            near = get_close_matches(name, valid, 1)
            raise ConfigError(name, "given", "there is no such setting",
                              f"did you mean {near[0]}?" if near else f"there are {', '.join(valid)}")  # fmt: skip


MOST_SEED = 2**32 - 1
"""The largest seed that torch, NumPy and Lightning all take."""


def check_range(
    key: str,
    value: float | None,
    hint: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse a number that is not finite or out of its range; None, a setting that was left out, is fine.

    Args:
        key: As of `ConfigError`.
        value: What was given.
        hint: As of `ConfigError`.
        least: The smallest value, if there is one.
        above: What the value must be larger than.
        below: What the value must be smaller than.
        most: The largest value.

    Raises:
        ConfigError: Stating the range.
    """
    bounds = {"at least": least, "above": above, "below": below, "at most": most}
    given = {words: bound for words, bound in bounds.items() if bound is not None}
    holds = value is None or (
        math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (most is None or value <= most)
    )
    if not holds:
        rule = " and ".join(f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}"
                            for words, bound in given.items())  # fmt: skip
        raise ConfigError(key, value, f"must be a finite number, {rule}", hint)


def check_seed(key: str, value: int | None) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        ConfigError: Stating the range.
    """
    check_range(key, value, "42 is as good as any", least=0, most=MOST_SEED)


class SiteLostError(RuntimeError):
    """Other sites are gone, and with them the run.

    Args:
        sites: The sites that do not answer; empty if all do, and only the connection broke.
        what: What the connection said.
        speaks: Whether this rank tells the user; one of those that are left does.
    """

    def __init__(self, sites: list[int], what: str, *, speaks: bool) -> None:
        super().__init__(sites, what)
        self.sites = sites
        self.what = what
        self.speaks = speaks
        self.checkpoint: str | None = None  # to resume from

    def __str__(self) -> str:
        """Return the sites, the connection's words and the way on, on one line."""
        named = ", ".join(map(str, self.sites))
        lost = f"site {named} is gone" if named else "the connection between the sites broke"
        on = (
            f"resume with --ckpt_path {self.checkpoint}" if self.checkpoint else "there is no checkpoint to resume from"
        )
        return f"{lost} ({self.what}); {on}"


class MeetingError(ConfigError):
    """An error in the settings of other sites, which have terminals of their own.

    Args:
        key: What it is about.
        rule: As of `ConfigError`.
        hint: As of `ConfigError`.
        mine: Whether only this process prints it, not the first one of each machine.
    """

    def __init__(self, key: str, rule: str, hint: str, mine: bool = False) -> None:
        super().__init__(key, None, rule, hint)
        self.args = (key, rule, hint, mine)  # what it is made of again when it comes out of another process
        self.mine = mine

    def __str__(self) -> str:
        """Return `KEY: RULE. HINT` on one line."""
        return f"{self.key}: {self.rule}. {self.hint[:1].upper()}{self.hint[1:]}"

    @property
    def speaks(self) -> bool:
        """Whether this process tells it."""
        return self.mine or os.environ.get("LOCAL_RANK", "0") == "0"


def config_error_in(error: BaseException | None) -> ConfigError | None:
    """Return the ConfigError that an exception is, or that it was raised from or during; None if there is none."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def config_message(error: BaseException | None) -> str | None:
    """The message of the ConfigError that an exception comes from, if any."""
    found = config_error_in(error)
    if found is not None:
        return _with_path(str(found))
    # Where a setting may be one of several types, jsonargparse keeps of what a constructor raised only the text.
    for quoted in re.finditer(r"^\s*- (\S+ = .*)$", str(error), re.MULTILINE):
        message = _with_path(quoted[1])
        if re.match(r"(trainer|model|data|sites)\.", message):
            return message
    return None


KEY_PATHS: dict[str, str] = {}
"""First word of a setting's name -> what the command line puts before it; the command line fills it. From Python a
setting is a field or an argument, and its name is all that was typed."""


def _with_path(message: str) -> str:
    name = re.match(r"\w+", message)
    return KEY_PATHS.get(name[0], "") + message if name else message


def speaks() -> bool:
    """Whether this is the first rank, or no launcher's at all."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def fail(message: str, show: bool | None = None) -> NoReturn:
    """End with one message.

    Args:
        message: What is wrong.
        show: Whether this process prints it; None is the first rank alone.
    """
    if speaks() if show is None else show:
        print(f"fomoe: {message}", file=sys.stderr)
    raise SystemExit(EXIT_CONFIG)


class OneMessage:
    """For a command line's parser, first among its bases: errors are one message, without a page of usage."""

    _actions: list[Any]

    def options(self) -> set[str]:
        """All options, dashes included, those of subcommands too."""
        found = {option for action in self._actions for option in action.option_strings}
        for action in self._actions:
            for parser in action.choices.values() if isinstance(action.choices, dict) else ():
                found |= parser.options()
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end."""
        fail(config_message(ex) or " ".join(message.split()))
