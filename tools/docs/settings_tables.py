"""Tables of settings for the documentation, from signatures and docstrings: what `--help` says, with the defaults.

A page asks for one with a block

    ```{settings} fomoe_pl.federation.settings.FederationConfig
    ```

and may choose keys with the option `:only: overlap, routing`. `docs/conf.py` makes the directive known to Sphinx.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import docstring_parser

YAML = {"None": "null", "True": "true", "False": "false"}
NOT_FOR_FILES = ("progress", "parallel_devices")  # Python's alone


def find(path: str) -> Callable[..., Any]:
    """The class or function with this dotted path."""
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def descriptions(owner: Callable[..., Any]) -> dict[str, str]:
    """What the docstring says of each argument; the attributes of a dataclass are its arguments."""
    texts = (owner.__doc__, getattr(owner, "__init__", None) and owner.__init__.__doc__)
    found: dict[str, str] = {}
    for text in texts:
        for parameter in sorted(docstring_parser.parse(text or "").params, key=lambda p: p.args[0] != "param"):
            found.setdefault(parameter.arg_name, " ".join((parameter.description or "").split()))
    return found


def default(owner: Callable[..., Any], parameter: inspect.Parameter) -> str:
    """As a file would have it."""
    value = parameter.default
    if value is parameter.empty:
        return "required"
    if dataclasses.is_dataclass(owner) and type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        factory = {field.name: field.default_factory for field in dataclasses.fields(owner)}[parameter.name]
        value = factory()  # type: ignore[operator]
    if dataclasses.is_dataclass(value):
        return f"of `{type(value).__name__}`"
    value = list(value) if isinstance(value, tuple) else value
    text = YAML.get(str(value), str(value)) or "''"
    return f"`{text}`"


def rows(owner: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    """Default and description of each setting; those behind `**settings` are of another class."""
    said = descriptions(owner)
    found = {}
    for name, parameter in inspect.signature(owner).parameters.items():
        if name not in NOT_FOR_FILES and parameter.kind is not parameter.VAR_KEYWORD:
            found[name] = (default(owner, parameter), said.get(name, ""))
    return found


def markdown(owner: Callable[..., Any], only: list[str] | None = None) -> str:
    """One table.

    Args:
        owner: Class or function whose arguments are settings.
        only: Some of them; None is all.
    """
    lines = ["| key | default | what it is |", "|---|---|---|"]
    for key, (value, text) in rows(owner).items():
        if only is None or key in only:
            text = re.sub(r"\bNone\b", "`null`", text).replace("|", "\\|")
            text = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
            lines.append(f"| `{key}` | {value} | {text[:1].upper()}{text[1:]} |")
    return "\n".join(lines)
