"""What a process says of itself at the meeting: which settings it has, and that it knows the run's key."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from lightning.pytorch.callbacks import ModelSummary, ProgressBar

from fomoe_pl import __version__
from fomoe_pl.errors import MeetingError
from fomoe_pl.federation.settings import FederationConfig

RUN_KEY = "FOMOE_RUN_KEY"
LEAST_KEY = 16  # characters

_MODEL = ("seed", "evaluation_window", "max_skipped_steps")
_TRAINER = (
    "max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "limit_train_batches",
    "limit_val_batches", "log_every_n_steps", "num_nodes",
)  # fmt: skip
OWN_SETTINGS: Mapping[str, frozenset[str]] = {
    "architecture": frozenset({"expert_backend", "activation_checkpointing", "loss_chunk_bytes"}),
    "federation": frozenset({"outer_state"}),
    "data": frozenset({"root", "max_bad_shards"}),
}
"""Settings that each site chooses for itself: they are about its machine. So are all that are not compared: paths,
loggers, the accelerator, compilation, recorded steps."""

Plain = str | int | float | bool | None


def shared_settings(
    trainer: Any, module: Any, data: Any, federation: FederationConfig | None, *, strategy: str
) -> dict[str, Plain]:
    """Everything that must be equal on all sites, by the name that a user types.

    Args:
        trainer: The Trainer.
        module: The FoMoEModule.
        data: Its datamodule, or None.
        federation: The federation's settings; None without rounds.
        strategy: Name of the strategy.
    """
    found: dict[str, Any] = {"fomoe_pl": __version__, "trainer.strategy": strategy}
    found |= {f"trainer.{name}": getattr(trainer, name) for name in _TRAINER}
    found |= {f"model.{name}": getattr(module, name) for name in _MODEL}
    found |= _under("model.architecture", dataclasses.asdict(module.config), OWN_SETTINGS["architecture"])
    found |= _under("model.optimizer", dataclasses.asdict(module.optimizer_config))
    if federation is not None:
        fields = {field.name: getattr(federation, field.name) for field in dataclasses.fields(federation)}
        fields |= {"outer": federation.rule, "placement": federation.policy}  # None and a default are the same
        found |= _under("trainer.strategy.init_args", fields, OWN_SETTINGS["federation"])
    if data is not None:
        found["data"] = type(data).__name__
        found |= _under("data", _declared(data), OWN_SETTINGS["data"])
    watching = [callback for callback in trainer.callbacks if not isinstance(callback, ProgressBar | ModelSummary)]
    for place, callback in enumerate(watching):  # they take part in collectives, in this order
        name = f"trainer.callbacks.{place}"
        found[name] = type(callback).__name__
        found |= {
            f"{name}.{key}": value for key, value in _declared(callback).items()
            if isinstance(value, bool | int | float)
        }  # fmt: skip
    return {name: _plain(value) for name, value in found.items()}


def _under(prefix: str, values: Mapping[str, Any], without: frozenset[str] = frozenset()) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items() if name not in without}


def _declared(thing: Any) -> dict[str, Any]:
    """An object's constructor arguments, as far as it keeps them under their names."""
    names = signature(type(thing).__init__).parameters
    kept = getattr(thing, "__dict__", {})  # no property, which may need a run
    return {name: kept[name] for name in names if name in kept}


def _plain(value: Any) -> Plain:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):  # in whatever order its keys were typed
        return str(dict(sorted(value.items(), key=str)))
    if str(value) != object.__repr__(value):
        return str(value)
    # Its address is each process's own.
    return f"{type(value).__name__}({', '.join(f'{name}={_plain(part)}' for name, part in _declared(value).items())})"


def digest(settings: Mapping[str, Plain]) -> str:
    """SHA-256 of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(settings: Sequence[Mapping[str, Plain]]) -> list[str]:
    """Which settings differ between sites, each with all its values.

    Args:
        settings: Of each site, 0..M-1.
    """
    missing = object()
    found = []
    for name in sorted({name for of_site in settings for name in of_site}):
        sites_by_value: dict[Any, list[int]] = {}
        for site, of_site in enumerate(settings):
            value = of_site.get(name, missing)
            sites_by_value.setdefault("not there" if value is missing else repr(value), []).append(site)
        if len(sites_by_value) > 1:
            values = ", ".join(f"{value} on {_sites(sites)}" for value, sites in sites_by_value.items())
            found.append(f"{name} is {values}")
    return found


def _sites(sites: Sequence[int]) -> str:
    return f"site {sites[0]}" if len(sites) == 1 else f"sites {', '.join(map(str, sites))}"


def read_settings(texts: Sequence[str | bytes]) -> list[dict[str, Plain]]:
    """What the sites say that their settings are.

    Args:
        texts: Of each site, 0..M-1, JSON of `shared_settings`.

    Raises:
        MeetingError: If a site says something else.
    """
    found = []
    for site, text in enumerate(texts):
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            told = None
        plain = (str, int, float, bool, type(None))
        if not isinstance(told, dict) or not all(isinstance(value, plain) for value in told.values()):
            rule = f"what site {site} tells of its settings has no sense"
            raise MeetingError("configuration", rule, "give every site the same version of fomoe-pl")
        found.append(told)
    return found


def check_equal(settings: Sequence[Mapping[str, Plain]]) -> None:
    """Refuse sites that would train something else than the others.

    Args:
        settings: Of each site, 0..M-1.

    Raises:
        ConfigError: Naming the settings that differ, with all values.
    """
    found = differences(settings)
    if found:
        named = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
        raise MeetingError("configuration", f"differs between sites: {named}", "give every site the same values")


class RunKey:
    """What the processes of a run know and strangers do not.

    It names the place in the store where the processes meet, and it signs what they ask and answer there. It keeps
    processes of other runs, and those that merely find an open port, out of a run. It encrypts nothing: whoever can
    read the traffic between the sites can read what they send (see docs/network.md).

    Args:
        key: The secret; None for a run without one.

    Raises:
        ConfigError: If the key is too short.
    """

    def __init__(self, key: str | None) -> None:
        if key is not None and len(key) < LEAST_KEY:
            rule = f"must have at least {LEAST_KEY} characters, and has {len(key)}"
            hint = f"type export {RUN_KEY}=$(openssl rand -hex 16), and give every site that value"
            raise MeetingError(RUN_KEY, rule, hint, mine=True)
        self._key = None if key is None else key.encode()

    @classmethod
    def of_environment(cls) -> RunKey:
        """The key in the environment; an empty one is none."""
        return cls(os.environ.get(RUN_KEY) or None)

    def sign(self, *words: object) -> str:
        """A proof, for these words, that this process knows the key; empty without one."""
        if self._key is None:
            return ""
        return hmac.new(self._key, json.dumps([str(word) for word in words]).encode(), "sha256").hexdigest()

    def proves(self, proof: str, *words: object) -> bool:
        """Whether a proof for these words was made with the same key, or both know none."""
        return hmac.compare_digest(proof.encode(), self.sign(*words).encode())

    def refused(self, proof: str) -> MeetingError:
        """The error of this process, whose peer gave a wrong proof for what it knows itself."""
        if self._key is None:
            rule, hint = "the run has a key, and this process has none", f"set {RUN_KEY} to the value that site 0 has"
        elif not proof:
            rule, hint = "this process has a run key, and site 0 has none", f"give {RUN_KEY} to site 0 too, or unset it"
        else:
            rule, hint = "this process has another run key than site 0", f"set {RUN_KEY} to the value that site 0 has"
        return MeetingError(RUN_KEY, rule, hint, mine=True)


def parse(data: bytes, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    """Read a message of the meeting.

    Args:
        data: What somebody has written into the store.
        kinds: The fields that it must have, and their types.

    Returns:
        Its fields; None for what is no such message.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or any(not isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return None
    return found
