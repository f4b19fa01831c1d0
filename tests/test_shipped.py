"""What is installed is found by name, in the repository as in a wheel."""

import tomllib
from pathlib import Path

import pytest
import yaml

from fomoe_pl import new, shipped
from fomoe_pl.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_what_is_looked_for_in_it() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    put = build["wheel"]["force-include"]
    assert (put["configs"], put["data/sample"]) == ("fomoe_pl/configs", "fomoe_pl/sample")
    assert [name for name in put if not (ROOT / name).exists()] == []
    assert {name.partition("/")[0] for name in put} <= {*build["sdist"]["include"]}, "a wheel may be made of an sdist"


def test_configurations_have_names_and_a_file_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = shipped.path_of_configs() / "quickstart.yaml"
    for given in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert Path(shipped.config_path(given)) == quickstart
    assert Path(shipped.config_path("strategy/diloco")).is_file()
    assert len(shipped.config_names()) == len([*(ROOT / "configs").rglob("*.yaml")])
    (tmp_path / "quickstart").touch()
    assert shipped.config_path("quickstart") == "quickstart"
    assert shipped.config_path("trainer: {max_steps: 3}") == "trainer: {max_steps: 3}"


@pytest.mark.parametrize(
    ("given", "told"), [("diloco", "strategy/diloco"), ("quikstart", "quickstart"), ("./quickstart.yaml", "--list")]
)
def test_a_wrong_name_gets_a_suggestion(given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        shipped.config_path(given)


def test_the_sample_is_a_source_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(shipped.source_path("sample")).resolve() == (ROOT / "data/sample").resolve()
    assert shipped.source_path("web=sample") == "web=sample"
    (tmp_path / "sample").mkdir()
    assert shipped.source_path("sample") == "sample"


def test_messages_name_what_can_be_installed() -> None:
    assert shipped.how_to_install("plots") == 'install it: pip install "matplotlib>=3.9"'


def test_a_new_experiment_is_the_quickstart_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    new.main(["deep/mine"])
    assert "fomoe fit -c deep/mine.yaml" in capsys.readouterr().out
    written = yaml.safe_load(Path("deep/mine.yaml").read_text())
    expected = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    expected["trainer"]["logger"]["init_args"]["name"] = "mine"
    assert written == expected
    for words, told in ((["deep/mine"], "there already"), (["a b"], "letters, digits"), (["x", "--like", "y"], "like")):
        with pytest.raises(ConfigError, match=told):
            new.main(words)
    new.main(["--list"])
    assert "strategy/diloco " in capsys.readouterr().out
