"""Changes to single callbacks, and intervals in rounds."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from fomoe_pl.adjust import changed_callbacks, changes_in_steps, in_steps, merged_changes, steps_for
from fomoe_pl.errors import ConfigError

CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def test_changes_of_files_and_options_are_merged_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("callbacks: {ModelCheckpoint: {filename: a, every_n_train_steps: 3}}\n")
    (tmp_path / "b.yaml").write_text("trainer: {max_steps: 3}\ncallbacks: {RunPictures: null}\n")
    words = ["fit", "-c", f"{tmp_path}/a.yaml", "--callbacks.ModelCheckpoint.filename=b", f"--config={tmp_path}/b.yaml",
             "--callbacks.ModelCheckpoint.save_last", "true", "--callbacks.RunReport", "{folder: x}"]  # fmt: skip
    *kept, option, merged = merged_changes(words)
    assert [*kept, option] == ["fit", "-c", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml", "--callbacks"]
    assert json.loads(merged) == {
        "ModelCheckpoint": {"filename": "b", "every_n_train_steps": 3, "save_last": True}, "RunPictures": None,
        "RunReport": {"folder": "x"},
    }  # fmt: skip


def test_a_command_without_changes_stays_as_it_was_typed() -> None:
    words = ["fit", "-c", "quickstart", "-c", "strategy/diloco", "--trainer.callbacks", "null"]
    assert merged_changes(words) == words


def entry(path: str, **settings: Any) -> Namespace:
    return Namespace(class_path=path, init_args=Namespace(**settings))


def test_one_setting_changes_and_the_list_stays() -> None:
    listed = [entry(CHECKPOINT, filename="last", every_n_train_steps=160), entry("fomoe_pl.callbacks.RunReport")]
    changed = changed_callbacks(
        listed,
        {"ModelCheckpoint": {"every_n_train_steps": 8}, "RunReport": None, "EarlyStopping": {"monitor": "val/loss"}},
    )
    assert [c.class_path.split(".")[-1] for c in changed] == ["ModelCheckpoint", "EarlyStopping"]
    assert (changed[0].init_args.filename, changed[0].init_args.every_n_train_steps) == ("last", 8)
    assert (changed[1].init_args.monitor, changed[1].init_args.patience) == ("val/loss", 3)
    assert listed[0].init_args.every_n_train_steps == 160


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ModelCheckpont": {"filename": "a"}}, "callbacks.ModelCheckpont .*Did you mean ModelCheckpoint"),
        ({"ModelCheckpoint": {"filenam": "a"}}, "callbacks.ModelCheckpoint .*filenam"),
        ({"ModelCheckpoint": {"every_n_train_steps": "often"}}, "callbacks.ModelCheckpoint .*every_n_train_steps"),
        ({"ModelCheckpoint": 3}, "must be settings by name"),
        ({"Twice": {"x": 3}}, "2 of this class"),
    ],
)
def test_what_a_callback_does_not_take_is_told(changes: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        changed_callbacks([entry(CHECKPOINT), entry("a.Twice"), entry("b.Twice")], changes)


def test_rounds_are_steps() -> None:
    assert in_steps("key", "20 rounds", 8) == 160
    assert in_steps("key", "1 round", 8) == 8
    for other in (20, 0.5, "00:01:00:00", None):
        assert in_steps("key", other, None) == other
    changes: Any = {"ModelCheckpoint": {"every_n_train_steps": "3 rounds", "filename": "last"}, "RunPictures": None}
    assert changes_in_steps(changes, 5) == {
        "ModelCheckpoint": {"every_n_train_steps": 15, "filename": "last"}, "RunPictures": None,
    }  # fmt: skip
    for k, told in ((None, "has no rounds"), ({0: 1, 16: 8}, "length of a round changes")):
        with pytest.raises(ConfigError, match=told):
            in_steps("key", "20 rounds", k)
    with pytest.raises(ConfigError, match="at least 1"):
        in_steps("key", "0 rounds", 8)


@pytest.mark.parametrize(("tokens", "k", "steps"), [(1, None, 1), (1000, None, 10), (1001, None, 11), (1001, 8, 16)])
def test_a_budget_of_tokens_is_a_number_of_steps(tokens: float, k: int | None, steps: int) -> None:
    assert steps_for(tokens, 100, k) == steps
