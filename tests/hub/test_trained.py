"""Exports of trained checkpoints: the same values, readable by others, and refused where one is damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor

from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.cli import main
from tests.distributed import run_distributed
from tests.training import Run, fit, launched_as

SITES = 2
OLMOE: dict[str, Any] = {
    "gate": "softmax", "expert": "swiglu", "norm_placement": "pre", "norm": "rmsnorm", "embedding_norm": False,
    "qk_norm": "full", "tie_embeddings": False, "parametrization": "standard",
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fomoe": ({"balance": "bias", "bias_update_rate": 0.01, "n_shared_experts": 1}, {"routing": "partitioned"}),
    "olmoe": (OLMOE, {}),
}


def _train(rank: int, root: str, folder: str) -> None:
    with launched_as(rank, SITES, folder):
        for name, (architecture, settings) in KINDS.items():
            run = Run(root=root, folder=folder, architecture=architecture,
                      settings={"local_steps": 2, "overlap": 1, **settings},
                      trainer={"max_steps": 2, "enable_checkpointing": True})  # fmt: skip
            fit(run, rank, SITES, [ModelCheckpoint(folder, filename=name, every_n_train_steps=2)])


@pytest.fixture(scope="module")
def trained(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_distributed(_train, SITES, root, str(folder))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors, found as others find them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found = {name: tensor for file in {*weight_map.values()} for name, tensor in load_file(folder / file).items()}
    assert found.keys() == weight_map.keys()
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shard_gb", [5.0, 4e-6])
def test_values_are_the_checkpoints(trained: Path, tmp_path: Path, name: str, shard_gb: float) -> None:
    main(
        [
            "export",
            str(trained / f"{name}.ckpt"),
            str(tmp_path / "out"),
            "--format",
            "plain",
            "--max_shard_gb",
            str(shard_gb),
        ]
    )
    model = load_global_model(trained / f"{name}.ckpt")
    expected = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in model.state_dict()}}
    tensors = read(tmp_path / "out")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["n_experts"], config["optimizer_steps"]) == ("fomoe_pl", 4, 2)
    several = list((tmp_path / "out").glob("model-*.safetensors"))
    assert bool(several) == (shard_gb < 1)
    for path in several:  # a file above the limit has one tensor
        assert path.stat().st_size < 6000 or len(load_file(path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bfloat16_is_rounded(trained: Path, tmp_path: Path) -> None:
    main(["export", str(trained / "fomoe.ckpt"), str(tmp_path / "out"), "--format", "plain", "--dtype", "bfloat16"])
    for name, value in load_global_model(trained / "fomoe.ckpt").named_parameters():
        assert torch.equal(read(tmp_path / "out")[name], value.to(torch.bfloat16)), name


def test_transformers_computes_the_same_with_olmoes_names(trained: Path, root: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    main(["export", str(trained / "olmoe.ckpt"), str(tmp_path / "out"), "--format", "olmoe", "--data", root])
    theirs, unused = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(unused.values()), unused
    ours, tokens = load_global_model(trained / "olmoe.ckpt"), torch.randint(0, 257, (2, 11))
    with torch.no_grad():
        expected = ours.logits(ours(tokens)[0])
        assert expected.std() > 1e-3
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_olmoe_is_refused(
    trained: Path, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(trained / "fomoe.ckpt"), str(tmp_path / "out"), "--format", "olmoe", "--data", root])
    assert "gate 'sigmoid', not 'softmax'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no complete checkpoint"),
        (lambda folder: (folder / "experts-00001.safetensors").unlink(), "experts-00001.safetensors is missing"),
        (lambda folder: flip(folder / "experts-00001.safetensors"), "the hash of experts-00001.safetensors differs"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    trained: Path, root: str, tmp_path: Path, damage: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "olmoe.ckpt", tmp_path / "copy.ckpt")
    damage(tmp_path / "copy.ckpt")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "copy.ckpt"), str(tmp_path / "out"), "--data", root])
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy.ckpt"], "nothing is left behind"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_what_is_there_is_not_replaced(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(trained / "olmoe.ckpt"), str(tmp_path)])
    assert "is there already" in capsys.readouterr().err
