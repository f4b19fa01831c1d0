"""Tasks to evaluate: shipped ones, custom task files, and the harness's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fomoe_pl.errors import ConfigError

FOLDER = Path(__file__).with_name("tasks")
GROUPS = {"sample": ("sample_bpb", "sample_choice")}
FEWSHOT_SEED = 1234  # the harness's own


def shipped() -> list[str]:
    """Names of the tasks that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolved(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return local tasks as settings, and the names that are the harness's own.

    Args:
        names: `sample` (all that are shipped), a shipped task, the path of a `.yaml` file, or a task of the harness.

    Raises:
        ConfigError: If a file is missing, or uses what only a folder given to the harness can (`!function`).
    """
    if not names:
        raise ConfigError("tasks", list(names), "names no task", f"use sample, or some of {', '.join(shipped())}")
    local, others = [], []
    for name in [single for given in names for single in GROUPS.get(given, (given,))]:
        if name in shipped():
            local.append(_read(FOLDER / f"{name}.yaml"))
        elif name.endswith((".yaml", ".yml")):
            local.append(_read(Path(name)))
        else:
            others.append(name)
    return local, others


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("tasks", str(path), "there is no such file", f"shipped are {', '.join(shipped())}")
    try:
        task: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = task["task"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        rule = f"is no task file that can be read by itself ({str(error).splitlines()[0]})"
        raise ConfigError(
            "tasks", str(path), rule, "see the harness's task guide; !function is not supported"
        ) from None
    files = task.get("dataset_kwargs", {}).get("data_files")
    if isinstance(files, dict):  # next to the task file, whatever the current folder is
        for split, file in files.items():
            files[split] = str((path.parent / file).resolve())
            if not Path(files[split]).is_file():
                raise ConfigError("tasks", str(path), f"{name} needs {files[split]}, which is missing", "copy it there")
            if Path(files[split]).stat().st_size == 0:
                raise ConfigError("tasks", str(path), f"{files[split]} has no rows", "write them there")
    return task


def load_tasks(names: Sequence[str], *, generates: bool = True, num_fewshot: int | None = None) -> Any:
    """Load tasks and their data, as the harness wants them.

    Args:
        names: As of `resolved`.
        generates: Whether the model that they are for can make texts, not only score them.
        num_fewshot: Examples before each question; None is each task's own number.

    Raises:
        ConfigError: As `resolved`, and if the harness does not know a task or cannot use its file, its data cannot be
            had, or it generates text and the model does not.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    local, others = resolved(names)
    for task in local:
        _check_metrics(task)
    manager = TaskManager(include_defaults=bool(others))  # reading all of them takes a while
    unknown = [name for name in others if not manager.match_tasks([name])]
    if unknown:
        rule = f"{', '.join(unknown)}: neither shipped, nor a .yaml file, nor a task of the harness"
        raise ConfigError("tasks", list(names), rule, f"shipped are {', '.join(shipped())}")
    try:
        loaded = manager.load([*local, *others])
    except OSError as error:  # no network, or no such data set there
        message = " ".join(str(error).split())
        rule = f"the data of a task cannot be loaded ({message})"
        raise ConfigError("tasks", list(names), rule, f"without a network use {', '.join(shipped())}") from None
    except Exception as error:  # whatever a task file can get wrong: the harness has no error of its own for it
        rule = f"a task or its data cannot be read ({_root(error)})"
        raise ConfigError("tasks", list(names), rule, "see the harness's task guide, and the rows' columns") from error
    for task in local:
        if str(task["task"]) in loaded["tasks"]:  # a group is a list of others
            _check_columns(task, loaded["tasks"][task["task"]])
    generating = [n for n, task in loaded["tasks"].items() if task.get_config("output_type") == "generate_until"]
    if generating and not generates:
        rule = f"{', '.join(generating)}: tasks that generate text are not measured in training"
        raise ConfigError("tasks", list(names), rule, "use fomoe evaluate on a checkpoint")
    for task in loaded["tasks"].values():  # as the harness's own command line does
        own = task.get_config("num_fewshot")
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_metrics(task: dict[str, Any]) -> None:
    """The harness would look for the others in a library that asks the network."""
    from lm_eval.api import metrics  # noqa: F401  fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY

    for about in task.get("metric_list") or []:
        if not isinstance(about, dict):
            raise ConfigError("tasks", task["task"], f"metric_list has {about!r}", "type - metric: acc")
        name = about.get("metric")
        if name not in METRIC_REGISTRY and not about.get("hf_evaluate"):
            near = get_close_matches(str(name), METRIC_REGISTRY, 1)
            rule = f"{task['task']} has a metric {name!r}, which the harness does not have"
            raise ConfigError("tasks", task["task"], rule, f"did you mean {near[0]}?" if near else "see its task guide")


def _check_columns(task: dict[str, Any], loaded: Any) -> None:
    """A word that is no column would be taken for the text of every question itself."""
    columns = loaded.features
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        word = task.get(key)
        if isinstance(word, str) and word.isidentifier() and word not in columns:
            rule = f"{key} of {task['task']} is {word!r}, which its rows do not have"
            raise ConfigError("tasks", task["task"], rule, f"they have {', '.join(columns)}")


def run_tasks(lm: Any, loaded: Any, *, limit: int | None = None) -> Any:
    """Run tasks through the harness.

    Args:
        lm: The model, as the harness wants it.
        loaded: From `load_tasks`.
        limit: Most rows of each task; None is all.

    Returns:
        Task -> metric -> value, standard errors as `<metric>_stderr`; None on processes that do not collect.
    """
    from lm_eval.api import task as harness_task
    from lm_eval.evaluator import evaluate
    from tqdm import tqdm

    harness_task.tqdm = partial(tqdm, disable=True)  # a bar for each task and site, gone in an instant
    found = evaluate(lm, task_dict=loaded, limit=limit, log_samples=False)
    return None if found is None else {task: _metrics(values) for task, values in sorted(found["results"].items())}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; numbers alone."""
    kept = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, int | float) and "," in key:
            kept[metric if filtered == "none" else f"{metric} ({filtered})"] = float(value)
    return kept
