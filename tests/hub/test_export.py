"""Exports compute what the model computes, for every switch, with and without cache, and never hold the model."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fomoe_pl.checkpoint.format import WeightFiles
from fomoe_pl.errors import ConfigError
from fomoe_pl.hub.export import export
from fomoe_pl.hub.families import exact_families
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.transformer import Transformer
from tests.hub.models import FAMILY_SETTINGS, SWITCHES, TINY, make_model, write_checkpoint

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs" / "model").glob("*.yaml"))


def exported(folder: Path, model: Transformer, root: str, **settings: Any) -> Path:
    write_checkpoint(folder / "one.ckpt", model)
    export(str(folder / "one.ckpt"), str(folder / "out"), data=root, **settings)
    return folder / "out"


def loaded(folder: Path, **settings: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **settings
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    return model.logits(model(ids)[0])


@torch.no_grad()
def check_same(theirs: Any, ours: Transformer) -> None:
    """Logits with and without cache and behind padding, and a greedy continuation."""
    ids = torch.randint(0, ours.config.vocab_size, (2, 11))
    expected = logits_of(ours, ids)
    assert expected.std() > 0.1
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(theirs(ids).logits, expected, **close)

    first = theirs(ids[:, :6], use_cache=True)
    pieces = [first.logits]
    for i in range(6, 11):
        step = theirs(ids[:, i : i + 1], cache=first.cache, use_cache=True)
        pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **close)

    n_pad = 3
    padded = torch.cat([torch.full((2, n_pad), 7), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :n_pad] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    behind = theirs(padded, attention_mask=mask, position_ids=positions).logits[:, n_pad:]
    torch.testing.assert_close(behind, expected, **close)

    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    behind_padding = theirs.generate(padded, attention_mask=mask, **greedy)
    for _ in range(8):
        ids = torch.cat([ids, logits_of(ours, ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(made, ids)
    assert torch.equal(behind_padding[:, n_pad:], ids)


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch(name: str, tmp_path: Path, root: str) -> None:
    ours = make_model(SWITCHES[name])
    check_same(loaded(exported(tmp_path, ours, root)), ours)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_in_small(path: Path, tmp_path: Path, root: str) -> None:
    settings = yaml.safe_load(path.read_text())["model"]["architecture"]
    small = {key: value for key, value in settings.items() if key not in TINY and key != "head_dim"}
    ours = make_model(small)
    check_same(loaded(exported(tmp_path, ours, root)), ours)


def test_every_setting_that_changes_logits_is_a_switch_here() -> None:
    """A new setting of the architecture must be added to the switches above, or be known not to matter."""
    plain = {"init_std", "aux_loss_weight", "z_loss_weight", "bias_update_rate", "expert_backend",
             "activation_checkpointing", "loss_chunk_bytes"}  # fmt: skip
    varied = {key for settings in SWITCHES.values() for key in settings} | {*TINY}
    assert {*ModelConfig.__dataclass_fields__} - varied - plain == set()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["silu", "swiglu"])
def test_every_implementation(attention: str, experts: str, kind: str, tmp_path: Path, root: str) -> None:
    ours = make_model({"expert": kind, "n_kv_heads": 2})
    theirs = loaded(exported(tmp_path, ours, root), attn_implementation=attention, experts_implementation=experts)
    assert theirs.config._experts_implementation == experts
    check_same(theirs, ours)


def test_training_goes_on_in_transformers(tmp_path: Path, root: str) -> None:
    ours = make_model({"n_shared_experts": 1})
    theirs = loaded(exported(tmp_path, ours, root)).train()
    ids = torch.randint(0, 257, (2, 11))
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    ours.loss(ours(ids)[0], targets).backward()
    theirs(ids, labels=ids).loss.backward()
    kept = {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    expert = ours.layers[1].moe.experts.w_in.grad
    torch.testing.assert_close(kept["model.layers.1.mlp.experts.up_proj"], expert, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        kept["model.layers.0.self_attn.q_proj.weight"], ours.layers[0].attention.q.weight.grad, rtol=1e-4, atol=1e-6
    )
    theirs.zero_grad()
    theirs.gradient_checkpointing_enable()
    theirs(ids, labels=ids).loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[name], rtol=1e-4, atol=1e-6, msg=name)
    with_balance = theirs(ids, labels=ids, output_router_logits=True)
    assert len(with_balance.router_logits) == 3
    assert with_balance.aux_loss > 0.9


def test_save_pretrained_and_load_again(tmp_path: Path, root: str) -> None:
    ours = make_model({"balance": "bias", "expert": "swiglu"})
    theirs = loaded(exported(tmp_path, ours, root))
    theirs.save_pretrained(tmp_path / "again")
    check_same(loaded(tmp_path / "again"), ours)


def test_bfloat16_is_rounded_but_for_the_balance_bias(tmp_path: Path, root: str) -> None:
    ours = make_model({"balance": "bias"})
    out = exported(tmp_path, ours, root, dtype="bfloat16")
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], ours.embedding.weight.bfloat16())
    theirs = loaded(out)
    assert theirs.dtype == torch.bfloat16
    bias = theirs.model.layers[0].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, ours.layers[0].moe.router.balance_bias)


@pytest.mark.parametrize("name", FAMILY_SETTINGS)
def test_native_classes(name: str, tmp_path: Path, root: str) -> None:
    ours = make_model(FAMILY_SETTINGS[name])
    assert name in exact_families(ours.config)
    out = exported(tmp_path, ours, root, format=name)
    assert not list(out.glob("*.py"))
    theirs = loaded(out)
    assert type(theirs).__module__.startswith("transformers.models.")
    check_same(theirs, ours)


@pytest.mark.parametrize(
    ("settings", "format", "told"),
    [
        ({}, "olmoe", "gate 'sigmoid', not 'softmax'"),
        ({**FAMILY_SETTINGS["olmoe"], "norm": "layernorm"}, "olmoe", "norm 'layernorm', not 'rmsnorm'"),
        ({**FAMILY_SETTINGS["olmoe"], "head_dim": 16}, "olmoe", "head_dim 16, not d_model / n_heads"),
        ({**FAMILY_SETTINGS["qwen3_moe"], "n_shared_experts": 1}, "qwen3_moe", "n_shared_experts 1, not 0"),
        ({**FAMILY_SETTINGS["mixtral"], "normalize_gates": False}, "mixtral", "normalize_gates False, not True"),
        ({**FAMILY_SETTINGS["dots1"], "parametrization": "completep"}, "dots1", "not 'standard'"),
    ],
)
def test_what_is_not_exact_is_refused(
    settings: dict[str, Any], format: str, told: str, tmp_path: Path, root: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        exported(tmp_path, make_model(settings), root, format=format)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_tokenizer_is_that_of_the_corpus(tmp_path: Path, root: str) -> None:
    out = exported(tmp_path, make_model({}), root)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    text = "Früh am Morgen,\n  「空」 \t!"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 256
    assert "sea" in (out / "README.md").read_text()


def test_without_a_tokenizer_nothing_is_exported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one.ckpt", make_model({}))
    with pytest.raises(ConfigError, match="--data"):
        export(str(tmp_path / "one.ckpt"), str(tmp_path / "out"))


def test_a_place_where_nothing_can_be_written(tmp_path: Path, root: str) -> None:
    write_checkpoint(tmp_path / "one.ckpt", make_model({}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="its folder cannot be made"):
        export(str(tmp_path / "one.ckpt"), str(tmp_path / "file" / "out"), data=root)
    with pytest.raises(ConfigError, match="is a URL"):
        export(str(tmp_path / "one.ckpt"), "s3://bucket/out", data=root)


def test_a_vocabulary_larger_than_the_tokenizers(tmp_path: Path, root: str) -> None:
    ours = make_model({"vocab_size": 320, "tie_embeddings": False})
    out = exported(tmp_path, ours, root)
    check_same(loaded(out), ours)
    assert len(transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)) == 257


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path, root: str) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 257, the checkpoint 200"):
        exported(tmp_path, make_model({"vocab_size": 200}), root)
    run = tmp_path / "run"
    checkpoint = write_checkpoint(run / "checkpoints" / "last.ckpt", make_model({}))
    (run / "config.yaml").write_text("{}")
    (run / "report.json").write_text(json.dumps({"data": {"tokenizer": "another"}}))
    with pytest.raises(ConfigError, match="another tokenizer"):
        export(str(checkpoint), str(tmp_path / "other"), data=root)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def note(self, tensor: Tensor) -> None:
        self.tensors = [reference for reference in self.tensors if reference() is not None]
        self.tensors.append(weakref.ref(tensor))
        alive = [found for reference in self.tensors if (found := reference()) is not None and not found.is_meta]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        self.peak = max(self.peak, sum(sizes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.note(result)
        return result


@pytest.mark.parametrize("format", ["fomoe", "qwen3_moe", "plain"])
def test_memory_is_that_of_one_tensor(format: str, tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model({**FAMILY_SETTINGS["qwen3_moe"], "n_experts": 24, "d_expert": 48})
    write_checkpoint(tmp_path / "one.ckpt", model)
    live, read = Live(), WeightFiles.read

    def counted(self: WeightFiles, key: str) -> Tensor:
        tensor = read(self, key)
        live.note(tensor)
        return tensor

    monkeypatch.setattr(WeightFiles, "read", counted)
    with live:
        export(str(tmp_path / "one.ckpt"), str(tmp_path / "out"), data=root, format=format)  # type: ignore[arg-type]
    largest = max(model.embedding.weight.nbytes, model.layers[0].moe.experts.w_in[0].nbytes)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert live.peak > 0
    # What is read, and its copy of another type or in another order.
    assert live.peak <= 2 * largest + 1024
    assert live.peak < whole / 8
