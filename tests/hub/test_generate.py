"""Generation from checkpoints and exports: greedy is the model's own, drawing repeats, lines are answered."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.cli import main
from fomoe_pl.errors import ConfigError
from fomoe_pl.hub.export import export
from fomoe_pl.hub.generate import generate
from fomoe_pl.hub.loading import load
from tests.hub.models import make_model, write_checkpoint

pytest.importorskip("transformers")

EOD = 256


@pytest.fixture(scope="module")
def folders(root: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint and exports of the same model."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = write_checkpoint(folder / "one.ckpt", make_model({"gate": "softmax", "norm": "rmsnorm"}))
    export(str(checkpoint), str(folder / "out"), data=root)
    return {"checkpoint": checkpoint, "export": folder / "out"}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out: str = capsys.readouterr().out
    return out


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_greedy_is_the_models_own(
    kind: str, folders: dict[str, Path], root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_global_model(folders["checkpoint"])
    ids = [EOD, *b"A ship"]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model.logits(model(torch.tensor([ids]))[0])[0, -1].argmax()))
            if ids[-1] == EOD:
                break
    tokenizer = load(str(folders["export"]), device="cpu").tokenizer
    expected = tokenizer.decode(ids[1:], skip_special_tokens=True)
    generate(str(folders[kind]), "A ship", max_new_tokens=12, temperature=0.0, data=root, device="cpu")
    assert said(capsys).removesuffix("\n") == expected


def test_drawing_repeats_with_its_seed(folders: dict[str, Path], root: str, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(**settings: Any) -> str:
        generate(str(folders["checkpoint"]), "A ship", max_new_tokens=20, data=root, device="cpu", **settings)
        return said(capsys)

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(top_p=1e-6) == drawn(temperature=0.0), "the likeliest token alone is left"
    assert drawn(temperature=1e-4) == drawn(temperature=0.0)


def test_lines_are_answered_and_remembered(
    folders: dict[str, Path], root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fomoe_pl.hub import generate as module

    asked: list[list[int]] = []
    answer = module.continuation

    def noted(loaded: Any, ids: list[int], settings: dict[str, Any]) -> list[int]:
        asked.append(list(ids))
        return answer(loaded, ids, settings)

    monkeypatch.setattr(module, "continuation", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd you\n"))
    generate(str(folders["export"]), max_new_tokens=5, device="cpu")
    assert asked[0] == [EOD, *b"Hello\n"]
    assert asked[1][: len(asked[0])] == asked[0]
    assert len(asked[1]) > len(asked[0]) + len(b"And you\n")
    assert bytes(asked[1][-8:]) == b"And you\n"


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"max_new_tokens": 0}, "max_new_tokens = 0"), ({"temperature": -1.0}, "temperature = -1.0"),
     ({"seed": -1}, "seed = -1"),
     ({"top_p": 0.0}, "top_p = 0.0"), ({"top_p": 1.5}, "top_p = 1.5"), ({"site": 1}, "trained by 1 sites")],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any], told: str, folders: dict[str, Path], root: str) -> None:
    with pytest.raises(ConfigError, match=told):
        generate(str(folders["checkpoint"]), "A", data=root, device="cpu", **settings)


def test_long_and_empty_prompts(folders: dict[str, Path], root: str, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in folders:
        told = []
        for prompt in ("", "A ship " * 300):
            generate(str(folders[kind]), prompt, max_new_tokens=3, temperature=0.0, data=root, device="cpu")
            out, err = capsys.readouterr()
            assert out.startswith(prompt)
            told.append(err)
        assert told == ["", "fomoe: text and answer may come to 2104 tokens; the model was trained on 2048 at a time\n"]


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint nor an export"):
        generate(str(tmp_path), "A")


def test_where_transformers_is_missing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fomoe_pl.hub.find_spec", lambda package: None)
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(folders["checkpoint"]), "--prompt", "A"])
    assert ended.value.code == 2
    assert ': pip install "transformers' in capsys.readouterr().err


def test_exporting_needs_neither_transformers_nor_the_harness(
    folders: dict[str, Path], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformers", "lm_eval", "datasets")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("transformers", "lm_eval", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    main(["export", str(folders["checkpoint"]), str(tmp_path / "out"), "--data", root])
    assert (tmp_path / "out" / "modeling_fomoe.py").is_file()


@pytest.mark.parametrize("command", ["export", "import", "generate", "evaluate"])
def test_commands_explain_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"fomoe {command}" in said(capsys)
    with pytest.raises(SystemExit) as ended:
        main([command, "one", "two", "--nonsense", "1"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
