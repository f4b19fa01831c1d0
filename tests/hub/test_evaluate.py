"""The harness's numbers are a plain loop's; a checkpoint, its export and the run's own model have the same scores."""

import importlib
import json
import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from fomoe_pl.callbacks import RunReport
from fomoe_pl.checkpoint.loading import load_global_model
from fomoe_pl.compare.runs import Run as ComparedRun
from fomoe_pl.compare.table import evaluation_columns, row, tables
from fomoe_pl.data import Manifest
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.settings import FederationConfig
from fomoe_pl.hub.card import evaluations
from fomoe_pl.hub.evaluate import evaluate, merged
from fomoe_pl.hub.export import export
from fomoe_pl.hub.loading import load
from fomoe_pl.model.residency import Residency, Shadow
from fomoe_pl.model.transformer import Transformer
from tests.distributed import run_distributed
from tests.hub.models import make_model, write_checkpoint
from tests.training import Run, fit, launched_as

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from fomoe_pl.hub.callback import TaskEvaluation
from fomoe_pl.hub.harness import FomoeLM, Scored, batches_by_length
from fomoe_pl.hub.tasks import FOLDER, load_tasks, run_tasks, shipped

EOD = 256
SITES = 2


@torch.no_grad()
def log_probabilities(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Of each token after the first."""
    log_p = model.logits(model(torch.tensor([ids[:-1]]))[0])[0].log_softmax(dim=-1)
    return log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def plain_bits_per_byte(model: Transformer, texts: list[str], length: int) -> float:
    """Each text by itself after an end of document, in windows that do not overlap but for one token."""
    nats, n_bytes = 0.0, 0
    for text in texts:
        ids = [EOD, *text.encode()]
        n_bytes += len(ids) - 1
        starts = list(range(0, len(ids) - 1, length))
        for start in starts[:-1]:
            nats -= float(log_probabilities(model, ids[start : start + length + 1]).sum())
        last = len(ids) - 1 - starts[-1]  # the harness gives the last window all the context that fits
        before = max(0, len(ids) - 1 - length)
        nats -= float(log_probabilities(model, ids[before:])[-last:].sum())
    return nats / n_bytes / math.log(2)


def plain_accuracy(model: Transformer, questions: list[dict[str, Any]], length: int) -> float:
    right = 0
    for question in questions:
        found = []
        for choice in question["choices"]:
            # As the harness does: blanks at a context's end belong to what follows.
            context = question["context"].rstrip()
            continuation = (question["context"] + choice).encode()[len(context.encode()) :]
            ids = [*context.encode(), *continuation][-(length + 1) :]
            n = min(len(continuation), length)
            found.append(float(log_probabilities(model, ids)[-n:].sum()))
        right += int(max(range(4), key=lambda i: found[i]) == question["label"])
    return right / len(questions)


def rows_of(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "one.ckpt", make_model({"vocab_size": 257}))


def test_numbers_are_a_plain_loops(tmp_path: Path, root: str) -> None:
    length = 256  # shorter than a passage, which is read in windows
    model = make_model({"n_layers": 1})
    write_checkpoint(tmp_path / "one.ckpt", model)
    lm = FomoeLM(str(tmp_path / "one.ckpt"), data=root, device="cpu", max_length=length, batch_size=7)
    found = run_tasks(lm, load_tasks(["sample"]))
    texts = [found["text"] for found in rows_of("sample_bpb")]
    assert found["sample_bpb"]["bits_per_byte"] == pytest.approx(plain_bits_per_byte(model, texts, length), rel=1e-5)
    assert found["sample_choice"]["acc"] == pytest.approx(plain_accuracy(model, rows_of("sample_choice"), length))


def test_one_batch_or_many(checkpoint: Path, root: str) -> None:
    sequences = [Scored(list(range(n)), max(1, n // 2)) for n in (9, 3, 30, 2, 17, 9)]
    assert [len(batch) for batch in batches_by_length(sequences, 4)] == [4, 2]
    one, many = (FomoeLM(str(checkpoint), data=root, device="cpu", batch_size=n).score(sequences) for n in (1, 4))
    assert [score.nats for score in one] == pytest.approx([score.nats for score in many], rel=1e-5)
    model = load_global_model(checkpoint)
    expected = [float(log_probabilities(model, s.ids)[-s.n :].sum()) for s in sequences]
    assert [score.nats for score in one] == pytest.approx(expected, rel=1e-5)


def test_generate_until(checkpoint: Path, root: str, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    lm = FomoeLM(str(checkpoint), data=root, device="cpu", batch_size=2)
    model = load_global_model(checkpoint)

    def greedy(context: str, n: int) -> str:
        ids = list(context.encode())
        for _ in range(n):
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids]))[0])[0, -1].argmax()))
        return lm.loaded.tokenizer.decode(ids[len(context.encode()) :], skip_special_tokens=True)

    contexts = ["A ship", "The old barn of", "Star"]
    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (context, dict(settings)), i) for i, context in enumerate(contexts)]
    expected = [greedy(context, 6) for context in contexts]
    assert lm.generate_until(requests) == expected
    stop = expected[0][2]
    requests[0].arguments = ("A ship", {"until": stop, "max_gen_toks": 6})
    assert lm.generate_until(requests) == [expected[0][: expected[0].index(stop)], *expected[1:]]


@pytest.mark.parametrize("routing", ["ghost", "partitioned", "shadow"])
@pytest.mark.parametrize("settings", [{}, {"gate": "softmax", "normalize_gates": True, "balance": "bias"}])
@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_a_sites_view_is_what_its_training_sees(
    routing: Any, settings: dict[str, Any], kind: str, tmp_path: Path, root: str
) -> None:
    model = make_model({"n_experts": 6, "top_k": 3, **settings})
    copied: dict[str, Any] = {"shadow_bits": 2} if routing == "shadow" else {}
    run = FederationConfig(overlap=1, routing=routing, placement="random", placement_seed=3, **copied)
    path = write_checkpoint(tmp_path / "one.ckpt", model, run, n_sites=3)
    if kind == "export":
        export(str(path), str(tmp_path / "out"), data=root)
        path = tmp_path / "out"
    placement = run.place(n_layers=3, n_experts=6, n_sites=3)
    ids = torch.randint(0, 257, (2, 11))
    for site in range(3):
        residents = placement.residents(site)
        alone = Transformer(model.config, Residency(routing, residents, Shadow(2))).eval()
        state = model.state_dict()
        for name, layer in alone.expert_tensors().items():
            state[name] = state[name][list(residents[layer])]
        alone.load_state_dict(state)
        with alone.refreshing() as copies:
            for name, layer in alone.shadow_tensors().items():
                whole = dict(model.named_parameters())[name.replace(".shadow.", ".experts.")]
                absent = list(alone.residency.absent(layer, model.config))
                copies[name].copy_(alone.residency.shadow.codec.encode(whole[absent].flatten(1)))
        seen = load(str(path), site=site, data=root, device="cpu").model
        with torch.no_grad():
            expected = alone.logits(alone(ids)[0])
            torch.testing.assert_close(seen(ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert (expected - model.logits(model(ids)[0])).abs().max() > 0.01, "else there is nothing to see"
    with pytest.raises(ConfigError, match="Use 0 to 2"):
        load(str(path), site=3, data=root)


def fewer_rows(folder: Path, n: int) -> list[str]:
    """The shipped tasks as files of one's own, with their first rows."""
    for task in shipped():
        (folder / f"{task}.yaml").write_text((FOLDER / f"{task}.yaml").read_text())
        rows = (FOLDER / f"{task}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{task}.jsonl").write_text("".join(rows[:n]))
    return [str(folder / f"{task}.yaml") for task in shipped()]


def _train(rank: int, root: str, folder: str, tasks: list[str]) -> None:
    with launched_as(rank, SITES, folder):
        run = Run(root=root, folder=folder, settings={"local_steps": 2, "overlap": 1},
                  data={"sequence_length": 128}, trainer={"max_steps": 4, "enable_checkpointing": True})  # fmt: skip
        watch = TaskEvaluation(tasks, every_n_rounds=2, batch_size=16, window=3)
        fit(
            run,
            rank,
            SITES,
            [watch, RunReport(folder), ModelCheckpoint(folder, filename="last", every_n_train_steps=4)],
        )


def test_checkpoint_export_and_training_agree(tmp_path: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tasks").mkdir()
    tasks = fewer_rows(tmp_path / "tasks", 16)
    run_distributed(_train, SITES, root, str(tmp_path), tasks)
    report = json.loads((tmp_path / "report.json").read_text())
    trained = report["evaluations"]["global"]
    assert trained["steps"] == 4
    assert trained["tasks"]["sample_bpb"]["bits_per_byte"] > 1

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"root": root, "sequence_length": 128}}))
    checkpoint = tmp_path / "last.ckpt"
    evaluate(str(checkpoint), ",".join(tasks), device="cpu", output=str(tmp_path / "found.json"))
    export(str(checkpoint), str(tmp_path / "out"))
    evaluate(str(tmp_path / "out"), ",".join(tasks), device="cpu")
    exported = json.loads((tmp_path / "out" / "evaluations.json").read_text())["global"]
    after = json.loads((tmp_path / "report.json").read_text())
    for found in (after["evaluations"]["global"], exported, json.loads((tmp_path / "found.json").read_text())):
        for task, metrics in trained["tasks"].items():
            for metric, value in metrics.items():
                assert found["tasks"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)

    evaluate(str(checkpoint), tasks[0], site=1, device="cpu")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["evaluations"]["global"] == after["evaluations"]["global"], "those of other views stay"
    [headings, cells] = tables([ComparedRun("run", report)])[-1]
    assert {*headings[1:]} == {"sample_bpb bits_per_byte", "sample_bpb byte_perplexity", "sample_choice acc",
                               "sample_choice acc_norm", "sample_bpb bits_per_byte site 1",
                               "sample_bpb byte_perplexity site 1"}  # fmt: skip
    assert f"{trained['tasks']['sample_bpb']['bits_per_byte']:.4f}" in cells[0]

    shutil.rmtree(tmp_path / "out")
    export(str(checkpoint), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sample_bpb, bits_per_byte (site 1) |" in card
    assert card.count("## Evaluations") == 1
    evaluate(str(tmp_path / "out"), tasks[0], device="cpu")
    again = (tmp_path / "out" / "README.md").read_text()
    assert (again.count("## Evaluations"), again.count("## Licence")) == (1, 1)
    assert again.index("## Evaluations") < again.index("## Licence")


def test_results_of_another_step_are_dropped() -> None:
    before = merged({}, "global", 4, {"a": {"acc": 0.5}})
    assert merged(before, "global", 4, {"b": {"acc": 1.0}})["global"]["tasks"].keys() == {"a", "b"}
    assert merged(before, "global", 8, {"b": {"acc": 1.0}})["global"]["tasks"].keys() == {"b"}
    assert merged(before, "site 0", 8, {}).keys() == {"global", "site 0"}
    partly = {"global": {"steps": 4, "limit": 8, "tasks": {"a": {"acc": 0.5}}}}
    assert merged(partly, "global", 4, {"b": {"acc": 1.0}})["global"]["tasks"].keys() == {"b"}


def test_runs_are_compared_on_the_same_rows_alone() -> None:
    def run(name: str, steps: int, limit: int | None, acc: float) -> ComparedRun:
        found = {"global": {"steps": steps, "limit": limit, "tasks": {"a": {"acc": acc, "acc_stderr": 0.1}}}}
        return ComparedRun(name, {"steps": 8, "evaluations": found})

    runs = [run("whole", 8, None, 0.5), run("partly", 8, 5, 0.25), run("earlier", 4, None, 0.75)]
    columns = evaluation_columns(runs)
    assert [column.heading for column in columns] == ["a acc", "a acc first 5"]
    assert [row(r, columns) for r in runs] == [
        ["whole", "0.5000", "-"], ["partly", "-", "0.2500"], ["earlier", "0.7500 @ 4", "-"]
    ]  # fmt: skip


def test_a_card_says_what_was_measured() -> None:
    found = {
        "site 1": {"steps": 4, "limit": 5, "tasks": {"a": {"acc": 0.5}}},
        "global": {"steps": 4, "tasks": {"a": {"acc": 1.0}}},
    }
    table = evaluations(found)
    assert "| a, acc (site 1, first 5 rows) | 0.5000 |" in table
    assert "| a, acc | 1.0000 |" in table
    assert evaluations({}) == ""


def test_shipped_tasks_are_of_the_sample_corpus() -> None:
    assert shipped() == ["sample_bpb", "sample_choice"]
    assert {found["domain"] for found in rows_of("sample_bpb")} == {"drama", "prose", "speech"}
    labels = [found["label"] for found in rows_of("sample_choice")]
    assert all(labels.count(label) > len(labels) / 8 for label in range(4))


@pytest.mark.parametrize(
    ("tasks", "told"),
    [("", "names no task"), ("none.yaml", "there is no such file"), ("sample,bad.yaml", "no task file"),
     ("lost.yaml", "which is missing")],
)  # fmt: skip
def test_bad_tasks_are_told_before_a_model_is_loaded(
    tasks: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("task: x\nprocess: !function utils.f\n")
    Path("lost.yaml").write_text("task: x\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\n")
    with pytest.raises(ConfigError, match=told):
        evaluate("nothing", tasks)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("output_type: multiple_choice", "output_type: multiple_choise", "invalid output_type 'multiple_choise'"),
        ("doc_to_text: context", "doc_to_txt: context", "unexpected keyword argument 'doc_to_txt'"),
        ("doc_to_text: context", "doc_to_text: contxt", "'contxt', which its rows do not have. They have .*context"),
        ("doc_to_choice: choices", "doc_to_choice: choises", "a task or its data cannot be read"),
        ("metric: acc_norm", "metric: acc_norn", "did you mean acc_norm|Did you mean acc_norm"),
        ("- metric: acc_norm", "- acc_norm", "metric_list has 'acc_norm'"),
        ("test_split: test", "test_split: tset", "KeyError: 'tset'"),
        ("rows.jsonl", "broken.jsonl", "Expected object or value|JSON parse error"),
        ("rows.jsonl", "empty.jsonl", "has no rows"),
    ],
)
def test_a_mistake_in_a_task_file_is_told(
    right: str, wrong: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (FOLDER / "sample_choice.yaml").read_text().replace("sample_choice.jsonl", "rows.jsonl")
    assert right in text
    (tmp_path / "mine.yaml").write_text(text.replace(right, wrong))
    (tmp_path / "rows.jsonl").write_text((FOLDER / "sample_choice.jsonl").read_text())
    (tmp_path / "broken.jsonl").write_text('{"context": "a", \n')
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=told):
        evaluate("nothing", str(tmp_path / "mine.yaml"))


def test_data_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, tasks: Any) -> None:
        raise ConnectionError("Couldn't reach 'x' on the Hub")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    with pytest.raises(ConfigError, match=r"cannot be loaded .Couldn't reach 'x' on the Hub"):
        load_tasks(["sample_bpb"])


def test_a_task_file_of_ones_own(checkpoint: Path, corpus: Manifest, tmp_path: Path) -> None:
    task = yaml.safe_load((FOLDER / "sample_bpb.yaml").read_text()) | {"task": "mine"}
    task["dataset_kwargs"]["data_files"]["test"] = "mine.jsonl"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    texts = ["The ship sails at dawn.", "Hay!"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lm = FomoeLM(str(checkpoint), data=str(corpus.root), device="cpu")
    found = run_tasks(lm, load_tasks([str(tmp_path / "mine.yaml")]))
    expected = plain_bits_per_byte(load_global_model(checkpoint), texts, 2048)
    assert found["mine"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_where_the_harness_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomoe_pl.hub.find_spec", lambda package: None if package == "lm_eval" else package)
    with pytest.raises(ConfigError, match=r': pip install "lm.eval'):
        evaluate("nothing")
    with pytest.raises(ConfigError, match=r': pip install "lm.eval'):
        TaskEvaluation()


@pytest.mark.parametrize("setting", ["every_n_rounds", "every_n_steps", "limit", "batch_size", "window"])
def test_bad_settings_of_the_callback(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} = 0"):
        TaskEvaluation(**{setting: 0})


def _train_each(rank: int, root: str, folder: str) -> None:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "ghost": ("federated", {"local_steps": 2, "overlap": 1, "placement": "random"}),
        "partitioned": ("federated", {"local_steps": 2, "overlap": 1, "routing": "partitioned"}),
        "ddp": ("ddp", {}),
    }
    with launched_as(rank, SITES, folder):
        for name, (strategy, settings) in kinds.items():
            for watched in (False, True):
                watch = TaskEvaluation(["sample_choice"], every_n_rounds=1, every_n_steps=2, limit=3, batch_size=5)
                run = Run(root=root, folder=folder, strategy=strategy, settings=settings,
                          architecture={"balance": "bias"},
                          trainer={"max_steps": 4, "enable_checkpointing": True})  # fmt: skip
                saved = ModelCheckpoint(folder, filename=f"{name}-{watched}", every_n_train_steps=4)
                fit(run, rank, SITES, [*([watch] if watched else []), saved])
                if watched and rank == 0:
                    Path(folder, f"{name}.json").write_text(json.dumps(watch.evaluations))


def test_evaluating_changes_no_training_and_measures_the_agreed_model(tmp_path: Path, root: str) -> None:
    run_distributed(_train_each, SITES, root, str(tmp_path))
    for name in ("ghost", "partitioned", "ddp"):
        plain, watched = (load_global_model(tmp_path / f"{name}-{kind}.ckpt") for kind in (False, True))
        for (key, value), other in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
            assert torch.equal(value, other), (name, key)
        found = json.loads((tmp_path / f"{name}.json").read_text())["global"]
        assert (found["steps"], found["limit"]) == (4, 3)
        lm = FomoeLM(str(tmp_path / f"{name}-True.ckpt"), data=root, device="cpu", max_length=16)
        after = run_tasks(lm, load_tasks(["sample_choice"]), limit=3)
        assert found["tasks"]["sample_choice"]["acc"] == after["sample_choice"]["acc"]


def test_tasks_that_generate_are_refused_in_training(tmp_path: Path, root: str) -> None:
    task = yaml.safe_load((FOLDER / "sample_bpb.yaml").read_text()) | {
        "task": "made", "output_type": "generate_until", "doc_to_text": "text", "generation_kwargs": {"until": ["."]},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    task["dataset_kwargs"]["data_files"]["test"] = str(FOLDER / "sample_bpb.jsonl")
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(task))
    run = Run(root=root, folder=str(tmp_path), strategy="single", trainer={"max_steps": 1})
    with pytest.raises(ConfigError, match="tasks that generate text are not measured in training"):
        fit(run, 0, 1, [TaskEvaluation([str(tmp_path / "made.yaml")])])


def test_the_harness_finds_it_by_its_entry_point(checkpoint: Path, root: str) -> None:
    from lm_eval.api.registry import get_model

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["fomoe"].partition(":")
    assert getattr(importlib.import_module(module), name) is FomoeLM is get_model("fomoe")
    lm = FomoeLM.create_from_arg_string(
        f"pretrained={checkpoint},data={root}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    assert (lm.batch_size, lm.eot_token_id) == (2, EOD)
