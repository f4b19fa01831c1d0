"""What is known of a checkpoint besides its weights: the run that wrote it, that run's data and results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fomoe_pl.callbacks.report import REPORT_NAME
from fomoe_pl.checkpoint.format import AVERAGE, WeightFiles, dense_name
from fomoe_pl.checkpoint.loading import architecture
from fomoe_pl.data.corpora import folder_of
from fomoe_pl.data.manifest import Manifest, read_manifest
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import Placement
from fomoe_pl.hub.tokenizer import ExportedTokenizer, corpus_tokenizer, imported_tokenizer
from fomoe_pl.model.config import ModelConfig
from fomoe_pl.model.residency import Residency, Shadow
from fomoe_pl.remote import is_url

CONFIG_NAME = "config.yaml"
UNKNOWN_LENGTH = 2048
IMPORTED = "import"
"""The strategy's name in a checkpoint that was imported."""


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        files: Its tensors, read one by one.
        config: Its architecture.
        run: Folder of the run that wrote it, where it still lies in one; else None.
        settings: That run's settings; empty if unknown.
        report: That run's results; empty if unknown, or if they are those of another step.
        corpus: The corpus that it was trained on; None if unknown.
        tokenizer: Of that corpus, or of the model that was imported; None if unknown.
    """

    files: WeightFiles
    config: ModelConfig
    run: Path | None
    settings: dict[str, Any]
    report: dict[str, Any]
    corpus: Manifest | None
    tokenizer: ExportedTokenizer | None

    @property
    def manifest(self) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        return self.files.manifest

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence, of the run or of the model that was imported; 2048 if unknown."""
        imported = self.manifest.get("sequence_length", UNKNOWN_LENGTH)
        length: int = self.settings.get("data", {}).get("sequence_length", imported)
        return length

    def training(self) -> dict[str, Any]:
        """What an export keeps of the training, plain values."""
        known = ("optimizer_steps", "rounds", "n_sites", "identity", "placement")
        kept = {key: self.manifest[key] for key in known if key in self.manifest}
        return kept | {"tokens": self.report.get("tokens", {}).get("global")}


def read_source(
    checkpoint: str | Path, data: str | None = None, *, average: bool = False, lies_in: Path | None = None
) -> Source:
    """Read a checkpoint's description, and the files next to it.

    Args:
        checkpoint: Folder that `fomoe fit` has written.
        data: Folder of the corpus; None is the one that the run's settings name, if it is there.
        average: Read the moving average that `GlobalEMA` has kept, not the model itself.
        lies_in: Where the checkpoint lies in its run's folder, if this is a folder of links to it.

    Raises:
        ConfigError: If it is no complete checkpoint, has no average, or the corpus has a larger vocabulary
            or another tokenizer.
    """
    files = WeightFiles(Path(checkpoint), AVERAGE if average else "")
    if average and dense_name(AVERAGE) not in files.manifest["files"]:
        rule = "has no average of the global model"
        raise ConfigError("average", str(checkpoint), rule, "leave it out, or train with fomoe_pl.callbacks.GlobalEMA")
    config = architecture(files.folder, files.manifest)
    run = run_of(Path(checkpoint) if lies_in is None else lies_in, files.manifest)
    settings = yaml.safe_load((run / CONFIG_NAME).read_text()) if run is not None else {}
    trained_with = report_of(run).get("data", {}).get("tokenizer")
    report = report_of(run, files.manifest["optimizer_steps"])
    corpus = _corpus(config, settings, data, trained_with, files.manifest["n_sites"])
    tokenizer = imported_tokenizer(Path(checkpoint)) if corpus is None else corpus_tokenizer(corpus)
    return Source(files, config, run, settings, report, corpus, tokenizer)


def report_of(run: Path | None, steps: int | None = None) -> dict[str, Any]:
    """What a run's report says; empty without one, or if it is that of another step."""
    if run is None or not (run / REPORT_NAME).is_file():
        return {}
    report: dict[str, Any] = json.loads((run / REPORT_NAME).read_text())
    return report if steps in (None, report.get("steps")) else {}


def run_of(checkpoint: Path, manifest: dict[str, Any]) -> Path | None:
    """The folder of the run that wrote a checkpoint, where it still lies in one."""
    if manifest["identity"].get("strategy") == IMPORTED:  # wherever it was put
        return None
    for folder in list(checkpoint.resolve().parents)[:2]:
        if (folder / CONFIG_NAME).is_file():
            return folder
    return None


def _corpus(
    config: ModelConfig, settings: dict[str, Any], data: str | None, tokenizer: str | None, n_sites: int
) -> Manifest | None:
    """The corpus; where each site has its own, the first one that is here: all have the same tokenizer."""
    root = data or settings.get("data", {}).get("root")
    if root is not None and data is None:
        sites = range(n_sites) if isinstance(root, str) else root
        root = next(
            (folder for site in sites if is_url(folder := folder_of(root, site)) or Path(folder).is_dir()), None
        )
    if root is None:
        return None
    manifest = read_manifest(root)
    hint = "give the corpus that it was trained on: --data ROOT"
    if manifest.vocab_size > config.vocab_size:  # a model may have more, which no text uses
        rule = f"has a vocabulary of {manifest.vocab_size}, the checkpoint {config.vocab_size}"
        raise ConfigError("data", str(root), rule, hint)
    if tokenizer not in (None, manifest.tokenizer.sha256):
        raise ConfigError("data", str(root), "was prepared with another tokenizer than the run's corpus", hint)
    return manifest


def site_view(config: ModelConfig, training: dict[str, Any], site: int) -> Residency:
    """Return the residency of one site of a run.

    Args:
        config: The architecture.
        training: `n_sites`, `identity` and `placement` as in a checkpoint's manifest.
        site: Its number.

    Raises:
        ConfigError: If there is no such site, its copies of absent experts were older than the global model, or it is
            not known which experts it held.
    """
    n_sites, identity = training["n_sites"], training["identity"]
    if not 0 <= site < n_sites:
        raise ConfigError("site", site, f"this model was trained by {n_sites} sites", f"use 0 to {n_sites - 1}")
    if identity.get("overlap", n_sites) == n_sites:  # every process held everything
        return Residency.full(config)
    if identity.get("shadow_refresh", 1) > 1:
        rule = "copies of absent experts were older than the global model, and are not in its files"
        raise ConfigError("site", site, rule, "leave it out: the global model is what they agreed on")
    if "placement" not in training:
        rule = "an older version wrote this model, without which experts each site holds"
        raise ConfigError("site", site, rule, "leave it out, or resume the run and save again")
    placement = Placement.of_record(training["placement"], n_sites)
    return Residency(identity["routing"], placement.residents(site), Shadow(identity.get("shadow_bits", 4)))
