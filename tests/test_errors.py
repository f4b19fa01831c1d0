import pickle

import pytest

from fomoe_pl.errors import ConfigError
from fomoe_pl.strategies import FederatedStrategy


def test_message_names_key_value_rule_and_hint() -> None:
    error = ConfigError("strategy.overlap", 5, "overlap must not exceed the number of sites (4)", "Choose 1, 2, 3 or 4")
    assert str(error) == ("strategy.overlap = 5: overlap must not exceed the number of sites (4). Choose 1, 2, 3 or 4")
    assert (error.key, error.value) == ("strategy.overlap", 5)


def test_text_values_are_quoted() -> None:
    assert str(ConfigError("gate", "sofmax", "unknown gate", "One of: sigmoid, softmax")).startswith(
        "gate = 'sofmax': "
    )


def test_survives_the_way_out_of_a_spawned_process() -> None:
    error = ConfigError("devices", 3, "rule", "hint")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, ConfigError)
    assert str(copy) == str(error)
    with pytest.raises(ValueError, match="devices = 3"):
        raise copy


@pytest.mark.parametrize("setting", ["routing", "placement", "stop_at", "inner_moments", "wire_dtype", "outer_state"])
def test_python_callers_are_told_the_choices(setting: str) -> None:
    """A command line checks them by their types."""
    with pytest.raises(
        ConfigError, match=rf"^{setting} = 'other': is (not one of the choices. Use \w+, |no placement. Type fixed or )"
    ):
        FederatedStrategy(**{setting: "other"})
