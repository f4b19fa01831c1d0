"""A model in memory: a checkpoint or an export, whole or as one site sees it, with its tokenizer.

A checkpoint needs no conversion: its tensors are loaded into the class that exports use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fomoe_pl.checkpoint.format import MANIFEST, WeightFiles
from fomoe_pl.codec import Codec
from fomoe_pl.errors import ConfigError
from fomoe_pl.hub import needs
from fomoe_pl.hub.families import OWN, Target, config_of, targets
from fomoe_pl.hub.joined import joined, local_of
from fomoe_pl.hub.pieces import target_parts
from fomoe_pl.hub.shards import read_json
from fomoe_pl.hub.source import read_source, site_view
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency, absent_ids

Device = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, of transformers.
        eod_id: The token that ends a document, and before the first of which every text begins.
        max_length: Tokens of a training sequence.
        steps: Local steps after which it was saved; None if unknown.
    """

    model: Any
    tokenizer: Any
    eod_id: int
    max_length: int
    steps: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without anything before or behind it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def load(
    path: str | list[str],
    *,
    site: int | None = None,
    data: str | None = None,
    device: Device = "auto",
    dtype: DTypeName = "float32",
    command: str = "generate",
) -> Loaded:
    """Load a checkpoint or an export.

    Args:
        path: Folder that `fomoe fit` or `fomoe export` has written, or a checkpoint's URL; of a checkpoint whose sites
            have disks of their own the folders or URLs of all of them.
        site: See the model as this site of its run does; None is the global model.
        data: Folder of the corpus whose tokenizer a checkpoint has; None is the one that its run's settings name.
        device: `auto` is a GPU where there is one.
        dtype: Of the weights.
        command: What was typed, for messages.

    Raises:
        ConfigError: If transformers is missing, it is neither, there is no tokenizer, or no such site.
    """
    needs("transformers", command)
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", device, f"torch {torch.__version__} finds no CUDA device", "use cpu or auto")
    with joined(path) as folder:
        if (folder / MANIFEST).is_file():
            loaded = _load_checkpoint(folder, local_of(path), site, data)
        elif (folder / "config.json").is_file():
            loaded = _load_export(str(folder), site)
        else:
            rule = "is neither a checkpoint nor an export"
            hint = "give a folder such as runs/quickstart/checkpoints/last.ckpt"
            raise ConfigError("model", str(folder), rule, hint)
    bias = {name: tensor.clone() for name, tensor in loaded.model.named_buffers() if "correction_bias" in name}
    loaded.model.to(device=place, dtype=getattr(torch, dtype)).eval()
    for name, tensor in bias.items():  # choosing experts is float32 in any case
        owner, _, attribute = name.rpartition(".")
        setattr(loaded.model.get_submodule(owner), attribute, tensor.to(place))
    return loaded


def _load_checkpoint(folder: Path, lies_in: Path | None, site: int | None, data: str | None) -> Loaded:
    from transformers import PreTrainedTokenizerFast

    source = read_source(folder, data, lies_in=lies_in)
    if source.tokenizer is None:
        rule = "has no tokenizer: the corpus that it was trained on is not found"
        raise ConfigError("model", str(lies_in or folder), rule, "name the corpus: --data runs/data/sample")
    model = model_of(source.files, source.config)
    if site is not None:
        apply_view(model, site_view(source.config, source.manifest, site))
    end = source.tokenizer.eod
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=source.tokenizer.library(), bos_token=end, eos_token=end, pad_token=end
    )
    eod_id = source.tokenizer.eod_id
    return Loaded(model, tokenizer, eod_id, source.sequence_length, source.manifest["optimizer_steps"])


def _load_export(path: str, site: int | None) -> Loaded:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    about = read_json("model", Path(path), "config.json")
    if not (Path(path) / "tokenizer.json").is_file():
        raise ConfigError("model", path, "has no tokenizer.json", "export it again, not as plain")
    own = about.get("model_type") == OWN
    if own:  # this project's own class rather than code out of the folder
        from fomoe_pl.hub.modeling_fomoe import FomoeForCausalLM

        model: Any = FomoeForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    training = about.get("fomoe") or {}
    if site is not None:
        if not own or "identity" not in training:
            rule = "is not possible for this export: other classes have no ghosts"
            raise ConfigError("site", site, rule, "give the checkpoint, or an export with --format fomoe")
        from fomoe_pl.hub.importing import architecture

        apply_view(model, site_view(architecture(OWN, about), training, site))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    ends = about.get("eos_token_id")
    eod_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends
    if not isinstance(eod_id, int):
        raise ConfigError(
            "model", path, "does not say which token ends a document", "set eos_token in tokenizer_config"
        )
    return Loaded(model, tokenizer, eod_id, about["max_position_embeddings"], training.get("optimizer_steps"))


def model_of(files: WeightFiles, config: ModelConfig) -> Any:
    """Return the global model of a checkpoint as a `FomoeForCausalLM`, float32 on the CPU.

    Args:
        files: The checkpoint's tensors.
        config: Its architecture.
    """
    from fomoe_pl.hub.modeling_fomoe import FomoeConfig, FomoeForCausalLM

    with torch.device("meta"):
        model = FomoeForCausalLM(FomoeConfig(**config_of(OWN, config)))
    state = {target.name: _assembled(files, target) for target in targets(OWN, config)}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = ["lm_head.weight"] if config.tie_embeddings else []
    assert (missing, unexpected) == (tied, []), (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _assembled(files: WeightFiles, target: Target) -> Tensor:
    if not target.stacked:
        [tensor] = target_parts(files, target)
        return tensor.contiguous()
    tensor = torch.empty(target.shape)
    for row, part in zip(tensor, target_parts(files, target), strict=True):
        row.copy_(part)
    return tensor


def apply_view(model: Any, residency: Residency) -> None:
    """Let a `FomoeForCausalLM` see only the experts that a site holds, as in that site's training.

    Ghosts: a pick of an absent expert is skipped, nothing replaces it, and gates are not renormalised. Partitioned: a
    token chooses among the residents alone. Shadow: absent experts are what copies of them decode to.

    Args:
        model: With all experts; changed in place.
        residency: The site's.
    """
    for layer, ids in zip(model.model.layers, residency.experts, strict=True):
        router = layer.mlp.gate
        n_experts = layer.mlp.experts.num_experts
        if len(ids) == n_experts:
            continue
        ids_R = torch.tensor(ids, dtype=torch.int64)
        if residency.routing == "ghost":
            here_E = torch.zeros(n_experts).index_fill(0, ids_R, 1.0)
            router.register_buffer("here", here_E, persistent=False)
            router.register_forward_hook(_skip_ghosts)
            continue
        if residency.routing == "shadow":
            _copy_absent(layer.mlp.experts, absent_ids(n_experts, ids), residency.shadow.codec)
            continue
        router.register_buffer("ids", ids_R, persistent=False)
        router.weight = nn.Parameter(router.weight.detach()[ids_R], requires_grad=False)
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias = router.e_score_correction_bias[ids_R]
        router.top_k = min(router.top_k, len(ids))
        router.register_forward_hook(_name_residents)


@torch.no_grad()
def _copy_absent(experts: nn.Module, absent: tuple[int, ...], codec: Codec) -> None:
    for weight in experts.parameters():  # (E, ...), each row as a site packs it
        for expert in absent:
            row = weight[expert]
            row.copy_(codec.decode(codec.encode(row.flatten()), row.numel()).view(row.shape))


def _skip_ghosts(router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE, gates_TK, ids_TK = output
    return logits_TE, gates_TK * router.here.to(gates_TK.dtype)[ids_TK], ids_TK


def _name_residents(router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits_TR, gates_TK, rows_TK = output
    return logits_TR, gates_TK, router.ids[rows_TK]
