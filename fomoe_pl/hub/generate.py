"""`fomoe generate`: text from a checkpoint or an export, as it is made."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fomoe_pl.errors import ConfigError, check_seed
from fomoe_pl.hub.loading import Device, DTypeName, Loaded, load


def generate(
    model: str | list[str],
    prompt: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    site: int | None = None,
    data: str | None = None,
    device: Device = "auto",
    dtype: DTypeName = "float32",
) -> None:
    """Continue a text, printing it as it is made.

    Args:
        model: Checkpoint or export; where sites have disks of their own, the folders or URLs of one step of all sites.
        prompt: What the text begins with. Null: lines are read from standard input; each is answered with a line, and
            what was said before is remembered.
        max_new_tokens: Most tokens of an answer.
        temperature: Of the drawing; 0 takes the most likely token.
        top_p: Draw among the most likely tokens that together have this probability.
        seed: Of the drawing.
        site: Let the model be as this site of its run sees it, with that site's experts alone; null is the global
            model.
        data: Folder of the corpus whose tokenizer a checkpoint has; null is the one that the run's settings name.
        device: `auto` is a GPU where there is one.
        dtype: Of the weights.

    Raises:
        ConfigError: For settings out of range, or a folder that is no model.
    """
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", max_new_tokens, "must be at least 1", "100 is the default")
    if temperature < 0:
        raise ConfigError("temperature", temperature, "must not be negative", "0 takes the most likely token")
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "must be above 0 and at most 1", "1 draws among all tokens")
    check_seed("seed", seed)
    loaded = load(model, site=site, data=data, device=device, dtype=dtype)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if prompt is not None:
        print(prompt, end="", flush=True)
        continuation(loaded, [loaded.eod_id, *loaded.encode(prompt)], sampling)
        return
    said = [loaded.eod_id]
    for line in sys.stdin:
        said += loaded.encode(line)
        said = continuation(loaded, said, sampling | {"stop_strings": "\n"})


def continuation(loaded: Loaded, ids: list[int], settings: dict[str, Any]) -> list[int]:
    """Continue token ids, and print what comes; return all ids, without an end of document.

    Args:
        loaded: The model.
        ids: What it begins with.
        settings: For transformers' `generate`.
    """
    from transformers import TextStreamer

    length = len(ids) + settings["max_new_tokens"]
    if length > loaded.max_length:
        warning = f"text and answer may come to {length} tokens; the model was trained on {loaded.max_length} at a time"
        print(f"fomoe: {warning}", file=sys.stderr)
    ids_1S = torch.tensor([ids], device=loaded.model.device)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        [made] = loaded.model.generate(
            ids_1S, attention_mask=torch.ones_like(ids_1S), streamer=streamer, tokenizer=loaded.tokenizer,
            eos_token_id=loaded.eod_id, pad_token_id=loaded.eod_id, **settings,
        ).tolist()  # fmt: skip
    return made[:-1] if made[-1] == loaded.eod_id else made
