"""`fomoe evaluate`: lm-evaluation-harness on checkpoints, exports, and single sites' views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fomoe_pl.callbacks.report import REPORT_NAME
from fomoe_pl.checkpoint.format import MANIFEST, read_manifest
from fomoe_pl.errors import check_range
from fomoe_pl.files import prepare, write_whole
from fomoe_pl.hub import needs
from fomoe_pl.hub.card import with_evaluations
from fomoe_pl.hub.joined import local_of
from fomoe_pl.hub.loading import Device, DTypeName, load
from fomoe_pl.hub.source import report_of, run_of

RESULTS = "evaluations.json"


def evaluate(
    model: str | list[str],
    tasks: str = "sample",
    site: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    data: str | None = None,
    device: Device = "auto",
    dtype: DTypeName = "float32",
    output: str | None = None,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness.

    Results are printed and stored with the model: in its run's `report.json`, which `fomoe compare` and later
    exports read, or in an export's `evaluations.json` and model card.

    Args:
        model: Checkpoint or export; where sites have disks of their own, the folders or URLs of one step of all sites.
        tasks: Separated by commas: `sample` is what is shipped, `sample_bpb` and `sample_choice`; paths of `.yaml`
            files; or names of the harness's tasks, which fetch their data from the network.
        site: Measure the model as this site of its run sees it, with that site's experts alone; null is the global
            model.
        num_fewshot: Examples before each question; null is each task's own number.
        limit: Most rows of each task; null is all. Then nothing is stored.
        batch_size: Sequences that are scored together.
        data: Folder of the corpus whose tokenizer a checkpoint has; null is the one that the run's settings name.
        device: `auto` is a GPU where there is one.
        dtype: Of the weights.
        output: File for the results as JSON.

    Raises:
        ConfigError: If lm-evaluation-harness is missing, the folder is no model, or a task is not known.
    """
    needs("transformers", "evaluate")
    needs("lm_eval", "evaluate")
    for key, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        check_range(key, value, "leave it out", least=least)
    if output is not None:
        prepare("output", Path(output))
    from fomoe_pl.hub.harness import FomoeLM
    from fomoe_pl.hub.tasks import load_tasks, run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = load_tasks(names, num_fewshot=num_fewshot)  # before the model
    loaded = load(model, site=site, data=data, device=device, dtype=dtype, command="evaluate")
    found = run_tasks(FomoeLM(loaded, batch_size=batch_size), chosen, limit=limit)
    if num_fewshot is not None:
        found = {f"{task}, {num_fewshot} shots": metrics for task, metrics in found.items()}
    view = "global" if site is None else f"site {site}"
    name = model if isinstance(model, str) else ", ".join(model)
    print(f"{name}, {view}:")
    for task, metrics in found.items():
        print(f"  {task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if output is not None:
        about = {"model": name, "view": view, "steps": loaded.steps, "num_fewshot": num_fewshot, "limit": limit}
        write_whole(Path(output), json.dumps(about | {"tasks": found}, indent=2) + "\n")
    if limit is not None:
        return
    if (local := local_of(model)) is None:
        print("not stored: the model is on no disk of this machine; use --output FILE")
    else:
        note(local, view, loaded.steps, found)


def note(model: Path, view: str, steps: int | None, found: dict[str, Any]) -> None:
    """Store results with a model; those of other tasks and views are kept.

    Args:
        model: Checkpoint or export.
        view: `global` or `site N`.
        steps: Local steps after which the model was saved.
        found: Task -> metric -> value.
    """
    if (model / MANIFEST).is_file():
        manifest = read_manifest(model)
        run = run_of(model, manifest)
        if run is None or not report_of(run, manifest["optimizer_steps"]):
            print(f"not stored: {model} has no {REPORT_NAME} of its own step next to it; use --output FILE")
            return
        path = run / REPORT_NAME
        report = json.loads(path.read_text())
        report["evaluations"] = merged(report.get("evaluations", {}), view, steps, found)
        write_whole(path, json.dumps(report, indent=2) + "\n")
    else:
        path = model / RESULTS
        before = json.loads(path.read_text()) if path.is_file() else {}
        results = merged(before, view, steps, found)
        write_whole(path, json.dumps(results, indent=2) + "\n")
        card = model / "README.md"
        if card.is_file():
            write_whole(card, with_evaluations(card.read_text(encoding="utf-8"), results))
    print(f"noted in {path}")


def merged(before: dict[str, Any], view: str, steps: int | None, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return results by view, with new ones added: `{view: {steps, limit, tasks: {task: {metric: value}}}}`.

    Args:
        before: Earlier results; those of a view at another step, or of fewer rows, are dropped.
        view: Of the new ones.
        steps: Of the new ones.
        found: The new ones.
    """
    known = before.get(view, {})
    same = known.get("steps") == steps and known.get("limit") is None
    return {
        **before,
        view: {"steps": steps, "limit": None, "tasks": {**(known.get("tasks", {}) if same else {}), **found}},
    }
