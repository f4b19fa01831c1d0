"""Published models become checkpoints with the same logits, and back with the same bits; nothing is guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.errors import ConfigError
from fomoe_pl.hub.export import export
from fomoe_pl.hub.families import config_of
from fomoe_pl.hub.importing import import_model
from fomoe_pl.hub.source import read_source
from tests.hub.models import FAMILY_SETTINGS, SWITCHES, make_model, write_checkpoint
from tests.training import Run, fit

transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 3}
NATIVE: dict[str, dict[str, Any]] = {
    "Olmoe": {**EXPERTS, "num_key_value_heads": 4, "intermediate_size": 24, "num_experts": 6},
    "Qwen3Moe": {**EXPERTS, "moe_intermediate_size": 24, "num_experts": 6, "head_dim": 16, "norm_topk_prob": True},
    "Mixtral": {**EXPERTS, "intermediate_size": 24, "num_local_experts": 6},
    "Dots1": {**EXPERTS, "moe_intermediate_size": 24, "n_routed_experts": 6, "n_shared_experts": 2},
    "Glm4Moe": {**EXPERTS, "moe_intermediate_size": 24, "n_routed_experts": 6, "first_k_dense_replace": 0,
                "partial_rotary_factor": 1.0, "use_qk_norm": True, "head_dim": 16},
    "MiniMaxM2": {**EXPERTS, "intermediate_size": 24, "num_local_experts": 6, "head_dim": 16},
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "Llama": {"intermediate_size": 24}, "Mistral": {"intermediate_size": 24, "sliding_window": None},
    "Qwen3": {"intermediate_size": 24, "head_dim": 16},
}  # fmt: skip


def made_by_transformers(name: str, folder: Path, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **(NATIVE | DENSE)[name], **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                buffer.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return model


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def check_same_bits(one: Path, other: Path) -> None:
    ours, theirs = bits(one), bits(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == t.dtype and torch.equal(ours[name], t) for name, t in theirs.items())


@torch.no_grad()
def check_same_logits(theirs: Any, checkpoint: Path) -> None:
    ours = load_global_model(checkpoint)
    ids = torch.randint(0, 257, (2, 11))
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours.logits(ours(ids)[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_models_of_transformers(name: str, tmp_path: Path, root: str) -> None:
    theirs = made_by_transformers(name, tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "one.ckpt"))
    check_same_logits(theirs, tmp_path / "one.ckpt")
    export(str(tmp_path / "one.ckpt"), str(tmp_path / "out"), data=root, format=theirs.config.model_type)
    check_same_bits(tmp_path / "out", tmp_path / "theirs")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 512


@pytest.mark.parametrize("name", [*SWITCHES, *(f"native {name}" for name in FAMILY_SETTINGS)])
def test_export_import_export(name: str, tmp_path: Path, root: str) -> None:
    format = name.removeprefix("native ") if name.startswith("native ") else "fomoe"
    model = make_model(SWITCHES.get(name) or FAMILY_SETTINGS.get(format, {}))
    write_checkpoint(tmp_path / "one.ckpt", model)
    export(str(tmp_path / "one.ckpt"), str(tmp_path / "first"), data=root, format=format, max_shard_gb=2e-5)  # type: ignore[arg-type]
    import_model(str(tmp_path / "first"), str(tmp_path / "two.ckpt"))
    export(str(tmp_path / "two.ckpt"), str(tmp_path / "second"), format=format)  # type: ignore[arg-type]  # its own tokenizer
    check_same_bits(tmp_path / "first", tmp_path / "second")
    config = load_global_model(tmp_path / "two.ckpt").config
    sized = {"n_kv_heads": model.config.kv_heads, "head_dim": model.config.head_size}
    if model.config.parametrization == "standard":  # which has no base
        sized |= {"base_width": config.base_width, "base_depth": config.base_depth}
    assert config == type(config)(**{**model.config.__dict__, **sized})
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "first" / file).read_text() == (tmp_path / "second" / file).read_text()


@pytest.mark.parametrize("name", DENSE)
def test_upcycling_computes_what_the_dense_model_does(name: str, tmp_path: Path) -> None:
    theirs = made_by_transformers(name, tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "one.ckpt"), n_experts=4, top_k=2)
    check_same_logits(theirs, tmp_path / "one.ckpt")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "noisy.ckpt"), n_experts=4, top_k=2, noise=0.5)
    w_in = load_global_model(tmp_path / "noisy.ckpt").layers[1].moe.experts.w_in
    assert 0.05 < (w_in[0] - w_in[1]).std() < 0.5


def test_training_goes_on_from_an_import(tmp_path: Path, root: str) -> None:
    made_by_transformers("Qwen3Moe", tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "one.ckpt"))
    config = load_global_model(tmp_path / "one.ckpt").config
    settings = yaml.safe_load((tmp_path / "one.ckpt" / "model.yaml").read_text())["model"]["architecture"]
    assert {"base_width", "tie_embeddings"} <= settings.keys(), "defaults too"
    assert type(config)(**settings) == config
    run = Run(root=root, folder=str(tmp_path), strategy="single", architecture=config.__dict__, optimizer={"lr": 1e-30},
              trainer={"max_steps": 2})  # fmt: skip
    trainer = fit(run, 0, 1, ckpt_path=str(tmp_path / "one.ckpt"))
    assert trainer.global_step == 2
    before = load_global_model(tmp_path / "one.ckpt").state_dict()
    after = trainer.lightning_module.transformer.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(after[name], value) for name, value in before.items()), "at this learning rate"


def test_a_checkpoint_beside_a_run_is_not_that_runs(tmp_path: Path, root: str) -> None:
    write_checkpoint(tmp_path / "one.ckpt", make_model({"vocab_size": 300}))
    export(str(tmp_path / "one.ckpt"), str(tmp_path / "out"), data=root)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"root": root, "sequence_length": 16}}))
    import_model(str(tmp_path / "out"), str(tmp_path / "two.ckpt"))
    source = read_source(tmp_path / "two.ckpt")
    assert (source.run, source.corpus, source.sequence_length) == (None, None, 2048)
    assert source.tokenizer is not None, "its own"


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


Q = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(Q), f"lacks tensors: {Q}"),
        (lambda t: t.update(extra=torch.zeros(2)), "has tensors without a counterpart here: extra"),
        (lambda t: t.update({Q: t[Q].T}), r"k_proj.weight is \[32, 64\], not \[64, 32\], as if transposed"),
        (lambda t: t.update({Q: t[Q][:3]}), r"is \[3, 32\], not \[64, 32\]$|is \[3, 32\], not \[64, 32\]\."),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), "is I8, not one of F32"),
        (lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"), "lacks tensors: .*experts.5.up_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_errors(change: Any, told: str, tmp_path: Path) -> None:
    made_by_transformers("Qwen3Moe", tmp_path / "theirs", num_key_value_heads=4)
    edit(tmp_path / "theirs", change)
    with pytest.raises(ConfigError, match=told):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "one.ckpt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("Olmoe", {"clip_qkv": 5.0}, "clip_qkv 5.0, not None"),
        ("Qwen3Moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\], not \[\]"),
        ("Glm4Moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, not 1.0"),
        ("Dots1", {"first_k_dense_replace": 1}, "first_k_dense_replace 1, not 0"),
        ("Qwen3Moe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("Qwen3Moe", {"hidden_act": "gelu"}, "hidden_act 'gelu', not 'silu'"),
    ],
)
def test_what_computes_something_else_is_refused(
    name: str, settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    made_by_transformers(name, tmp_path / "theirs", **settings)
    with pytest.raises(ConfigError, match=told):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "one.ckpt"))


def test_other_bad_input(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        import_model(str(source), str(tmp_path / "one.ckpt"))
    source.mkdir()
    for text in ("{not json", "[]"):
        (source / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="no JSON object"):
            import_model(str(source), str(tmp_path / "one.ckpt"))
    own = config_of("fomoe", make_model({}).config)
    (source / "config.json").write_text(json.dumps({**own, "rope_parameters": {"rope_type": "linear"}}))
    with pytest.raises(ConfigError, match="rope_type 'linear', not 'default'"):
        import_model(str(source), str(tmp_path / "one.ckpt"))
    del own["num_experts"]
    (source / "config.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=r"config\.json lacks num_experts"):
        import_model(str(source), str(tmp_path / "one.ckpt"))
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="no counterpart"):
        import_model(str(source), str(tmp_path / "one.ckpt"))
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="--n_experts 8"):
        import_model(str(source), str(tmp_path / "one.ckpt"))
    (source / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    with pytest.raises(ConfigError, match="has its own experts"):
        import_model(str(source), str(tmp_path / "one.ckpt"), n_experts=4)
