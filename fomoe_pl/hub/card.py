"""The model card: `README.md` of an export."""

from __future__ import annotations

from typing import Any

import yaml

from fomoe_pl.hub.families import OWN
from fomoe_pl.hub.source import Source
from fomoe_pl.model.sizes import active_parameters, parameter_counts

QUALITY = {"val/bits_per_byte": "bits per byte", "val/loss": "cross entropy, nats per token"}


def card(source: Source, format: str, name: str, license: str | None) -> str:
    """Return the card as Markdown with its YAML header.

    Args:
        source: The checkpoint.
        format: Of the export.
        name: Of the model.
        license: As Hugging Face names it; None says that none was given.
    """
    header: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "federated-learning", "fomoe-pl"],
    }  # fmt: skip
    if license:
        header["license"] = license
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n# {name}",
        "A mixture-of-experts language model, pre-trained with fomoe-pl across sites that exchange parameters only "
        "once a round (FoMoE, arXiv 2606.19025).",
        _use(format),
        _table("Model", _model(source)),
        _table("Training", _training(source)),
        _table("Data", _data(source)),
        _results(source.report),
        evaluations(source.report.get("evaluations", {})),
        f"## Licence\n{license or 'Not stated by whoever exported this model.'}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(format: str) -> str:
    trust = ", trust_remote_code=True" if format == OWN else ""
    return f"""## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
It is a base model: it continues text, and was not taught to follow instructions."""


def _model(source: Source) -> dict[str, Any]:
    config = source.config
    return {
        "parameters": f"{parameter_counts(config).total:,d}, of which {active_parameters(config):,d} for each token",
        "layers, width": f"{config.n_layers}, {config.d_model}",
        "experts of a layer": f"{config.n_experts}, {config.top_k} of them for each token, width {config.d_expert}",
        "block": f"{config.norm_placement}, {config.norm}, {config.expert} experts, {config.gate} gates",
        "vocabulary": f"{config.vocab_size:,d}",
    }


def _training(source: Source) -> dict[str, Any]:
    manifest, report = source.manifest, source.report
    tokens = report.get("tokens", {}).get("global")
    return {
        "method": report.get("method", manifest["identity"].get("strategy")),
        "sites": manifest["n_sites"],
        "local steps": f"{manifest['optimizer_steps']:,d}",
        "rounds": f"{manifest['rounds']:,d}",
        "tokens of all sites": None if tokens is None else f"{tokens:,d}",
        "sequence length": source.sequence_length if source.settings else None,
    }


def _data(source: Source) -> dict[str, Any]:
    if source.corpus is None:
        return {}
    info = source.corpus.tokenizer
    return {
        "domains": ", ".join(source.corpus.domain_names),
        "tokens": f"{sum(domain.train.tokens for domain in source.corpus.domains):,d}",
        "tokenizer": f"{info.kind}, {info.vocab_size:,d} ids",
        "fingerprint": source.corpus.fingerprint,
    }


def _results(report: dict[str, Any]) -> str:
    validation = report.get("validation", {})
    rows = {f"held-out {words}": f"{validation[key]:.4f}" for key, words in QUALITY.items() if validation.get(key)}
    return _table("Results", {**rows, "after local steps": report["steps"]}) if rows else ""


def evaluations(results: dict[str, dict[str, Any]]) -> str:
    """Return a table of what `fomoe evaluate` has measured, by view and task; empty without."""
    rows = {
        f"{task}, {metric}{_of(view, found.get('limit'))}": f"{value:.4f}"
        for view, found in results.items()
        for task, metrics in found["tasks"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
    return _table("Evaluations", rows)


def _of(view: str, limit: int | None) -> str:
    said = ([] if view == "global" else [view]) + ([] if limit is None else [f"first {limit} rows"])
    return f" ({', '.join(said)})" if said else ""


def with_evaluations(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return a card with its table of evaluations replaced, or added before the licence.

    Args:
        text: The card.
        results: As of `evaluations`.
    """
    sections = [part for part in text.split("\n## ") if not part.startswith("Evaluations\n")]
    at = next((i for i, part in enumerate(sections) if part.startswith("Licence\n")), len(sections))
    sections.insert(at, evaluations(results).removeprefix("## ") + "\n")
    return "\n## ".join(sections)


def _table(title: str, rows: dict[str, Any]) -> str:
    known = {key: value for key, value in rows.items() if value is not None}
    if not known:
        return ""
    return "\n".join([f"## {title}", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in known.items())])
