"""Settings of copies and of formats that cannot work are refused in one message, before any process starts."""

from functools import wraps
from typing import Any

import pytest
from lightning.pytorch import Trainer

from fomoe_pl.cli import main
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.settings import FederationConfig


@pytest.mark.parametrize(
    ("settings", "key", "told"),
    [
        ({"routing": "shadow", "shadow_bits": 3}, "shadow_bits", "Use 2, 4, 8, 16, 32"),
        ({"routing": "shadow", "shadow_refresh": 0}, "shadow_refresh", "at least 1"),
        ({"shadow_bits": 2}, "shadow_bits", "has no effect with routing ghost"),
        ({"routing": "partitioned", "shadow_refresh": 2}, "shadow_refresh", "has no effect with routing partitioned"),
        ({"shadow_input_gradient": False}, "shadow_input_gradient", "set routing to shadow"),
        ({"routing": "shadows"}, "routing", "shadow"),
        ({"wire_codec": "int2"}, "wire_codec", "int4"),
        ({"error_feedback": True}, "error_feedback", "type wire_codec int4"),
        ({"moments_codec": "int4", "inner_moments": "average"}, "moments_codec", "Type int8"),
        ({"moments_codec": "int8"}, "moments_codec", "set inner_moments to average"),
        ({"moments_every": 2}, "moments_every", "set inner_moments to average"),
        ({"moments_every": (1, 0), "inner_moments": "average"}, "moments_every", "type 1 or more"),
        ({"wire_codec": "topk"}, "wire_codec", "Set error_feedback to true"),
        ({"feedback_decay": 0.9}, "feedback_decay", "without error_feedback"),
        ({"feedback_decay": 0, "wire_codec": "topk", "error_feedback": True}, "feedback_decay", "1 adds all"),
        ({"moments_codec": "topk", "inner_moments": "average"}, "moments_codec", "Type int8"),
        ({"fragments": 0}, "fragments", "at least 1"),
        ({"fragments": 3, "local_steps": 8}, "fragments", "Type one of 1, 2, 4, 8, or another local_steps"),
        ({"fragments": 2, "local_steps": {0: 1, 4: 8}}, "fragments", "must divide the 1 steps of a round"),
        ({"delay": 4, "fragments": 2, "local_steps": 8}, "delay", "Type 0 to 3, or fewer fragments"),
        ({"delay": -1}, "delay", "at least 0"),
        ({"alpha": 1.5}, "alpha", "at most 1"),
        ({"alpha": -0.1}, "alpha", "0 takes the agreed values alone"),
        ({"delay": 1, "placement": "random"}, "delay", "type a larger reshuffle_rounds"),
        ({"fragments": 2, "placement": "random"}, "fragments", "experts move after each round"),
        ({"router_every": 5}, "router_every", "Type one of 1, 2, 4, 8, 16"),
        ({"router_every": 8, "delay": 2, "routing": "partitioned"}, "router_every", "type delay 0 or routing ghost"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], key: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        FederationConfig(**settings)
    assert error.value.key == key
    assert told in str(error.value)


@pytest.mark.parametrize(("every", "due"), [(1, 4 * [(True, True)]), (2, 2 * [(False, False), (True, True)]),
                                             ((1, 4), [*3 * [(True, False)], (True, True)])])  # fmt: skip
def test_moments_are_due_every_so_many_rounds(every: Any, due: list[tuple[bool, bool]]) -> None:
    settings = FederationConfig(inner_moments="average", moments_every=every)
    assert [settings.moments_due(rounds) for rounds in range(1, 5)] == due


def test_the_description_names_formats_and_periods() -> None:
    told = FederationConfig(
        inner_moments="average", moments_every=(1, 4), moments_codec="int8", wire_codec="int4", error_feedback=True
    ).describe(4)
    assert "moments: average every [1, 4] rounds in int8, changes in int4 with error feedback" in told


def test_there_are_no_more_fragments_than_layers_and_what_is_outside() -> None:
    settings = FederationConfig(fragments=4)
    settings.check_fragments(3)
    with pytest.raises(ConfigError, match=r"fragments = 4: .*2 layers, and what is outside of them is a fragment too"):
        settings.check_fragments(2)


def test_a_round_is_closed_where_nothing_may_be_on_its_way() -> None:
    turns = FederationConfig(fragments=2, placement="random", reshuffle_rounds=3)
    assert [turns.closes(rounds, 8 * rounds, 40) for rounds in range(1, 6)] == [False, False, True, False, True]
    assert FederationConfig().closes(1, 32, 64)


@pytest.mark.parametrize("routing", ["ghost", "partitioned", "shadow"])
def test_defaults_go_with_any_routing(routing: Any) -> None:
    """A file that names them may be followed by one with another routing."""
    FederationConfig(routing=routing, shadow_bits=4, shadow_refresh=1, shadow_input_gradient=True)


def test_fit_tells_of_copies_without_their_routing_in_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "fit", wraps(Trainer.fit)(lambda *_, **__: pytest.fail("it was to be refused")))
    command = ["fit", "-c", "quickstart", "-c", "strategy/fomoe_shadow"]
    command += ["--trainer.strategy.init_args.routing", "ghost", "--trainer.strategy.init_args.shadow_bits", "2"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    told = capsys.readouterr().err
    assert told.count("shadow_bits") == 1
    assert "has no effect with routing ghost" in told
    assert "Traceback" not in told


def test_sites_with_fewer_experts_than_tokens_pick_are_all_alike() -> None:
    """All sites then pick as many as they have (the paper's 8 sites with 8 experts, overlap 1, top-2)."""
    FederationConfig(overlap=1, routing="partitioned").check(8, 8, top_k=2)
    with pytest.raises(ConfigError, match=r"leaves a site 1 experts of a layer, .* other sites pick 2"):
        FederationConfig(overlap=1, routing="partitioned", capacities=(3, 1)).check(4, 2, top_k=2)
    FederationConfig(overlap=1, routing="ghost", capacities=(3, 1)).check(4, 2, top_k=2)
