"""What RunPictures leaves in TensorBoard, read back with its own reader; and figures of extremes."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from fomoe_pl.callbacks import RoutingStability, RunPictures, RunReport, board, figures
from fomoe_pl.callbacks.pictures import next_drawing
from fomoe_pl.errors import ConfigError
from fomoe_pl.federation.placement import place
from tests.training import Run, fit
from tests.watched import RUNS


@pytest.fixture(params=RUNS)
def events(request: pytest.FixtureRequest, watched_runs: Path) -> EventAccumulator:
    found = EventAccumulator(str(watched_runs / request.param), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def name_of(events: EventAccumulator) -> str:
    return Path(events.path).name


def test_no_chart_of_the_layout_is_empty(events: EventAccumulator) -> None:
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) > 15
    for chart in charts:
        found = [tag for pattern in chart.multiline.tag for tag in tags if re.match(pattern, tag)]
        assert len(found) == 1, f"{chart.title} has {found}"
    titles = {chart.title for chart in charts}
    assert ("ghost fraction" in titles) == name_of(events).startswith("ghost")
    assert ("error of copies (relative)" in titles) == name_of(events).startswith("shadow")
    assert ("drift of holders (relative)" in titles) == name_of(events).endswith("_2")
    assert {f"bits per byte of {domain}" for domain in ("farm", "sea", "sky")} <= titles


def test_tags_are_such_that_custom_scalars_draw_them(events: EventAccumulator) -> None:
    """That tab finds tags with parentheses or spaces and scales its axes to them, but draws no line."""
    assert [tag for tag in events.Tags()["scalars"] if not re.fullmatch(r"[\w./-]+", tag)] == []


def test_every_chart_can_be_filled(watched_runs: Path) -> None:
    tags: set[str] = set()
    for name in RUNS:
        tags |= {*EventAccumulator(str(watched_runs / name)).Reload().Tags()["scalars"]}
    wanted = [tag for charts in board.CHARTS.values() for tag in charts.values()]
    assert [tag for tag in wanted if not any(re.match(board._pattern(tag), found) for found in tags)] == []


def test_pictures_are_there_and_not_blank(events: EventAccumulator, tmp_path: Path) -> None:
    from PIL import Image

    expected = {"load", "timeline", "domains"}
    if name_of(events) != "ddp":
        expected |= {"placement"}
    if name_of(events).endswith("_2"):
        expected |= {"drift"}
    expected |= {"ghost_1": {"ghost_share"}, "shadow_1": {"copy_share"}}.get(name_of(events), set())
    assert {tag.removeprefix("pictures/") for tag in events.Tags()["images"]} == expected
    for tag in events.Tags()["images"]:
        picture = tmp_path / "picture.png"
        picture.write_bytes(events.Images(tag)[-1].encoded_image_string)
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(maxcolors=10**6)
            assert min(image.size) > 200
        assert colours is not None
        assert len(colours) > 50, tag
    assert len(events.Tags()["histograms"]) == 2  # gates of each layer


def test_another_logger_has_the_same_curves(events: EventAccumulator) -> None:
    path = Path(events.path)
    columns = (path.parent / f"{path.name}_csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("final/")}  # these are TensorBoard's own
    assert tags <= {*columns}


def test_final_values_stand_beside_the_settings(events: EventAccumulator) -> None:
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    start = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info
    assert start.hparams["architecture/n_experts"].number_value == 4
    assert start.hparams["method"].string_value
    federated = name_of(events) != "ddp"
    shown = sorted(start.hparams)[:5]
    assert shown[:3] == (["1 K", "2 overlap", "3 routing"] if federated else ["4 rate", "5 seed", *shown[2:3]])
    (value,) = events.Scalars("final/bits_per_byte")
    assert value.value == events.Scalars("val/bits_per_byte")[-1].value
    assert "hp_metric" not in events.Tags()["scalars"]


def test_text_tells_the_method_and_the_results(events: EventAccumulator) -> None:
    def text(tag: str) -> str:
        content: bytes = events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0]
        return content.decode()

    assert "| method |" in text("run/configuration")
    assert "| bits_per_byte |" in text("run/summary")


def test_saturation_ends_at_one_and_grows_with_the_run(events: EventAccumulator) -> None:
    points = events.Scalars("routing/saturation/mean")
    assert points[-1].value == 1
    assert [p.step for p in points] == sorted(p.step for p in points)
    assert len(points) == len(events.Scalars("routing/load_entropy/mean"))


def test_pictures_stand_behind_what_they_draw(tmp_path: Path) -> None:
    pictures, stability = RunPictures(), RoutingStability()
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=str(tmp_path), callbacks=[pictures, stability])
    with pytest.raises(ConfigError, match="Put RunPictures after RoutingStability"):
        pictures._find_stability(trainer)
    with pytest.raises(ConfigError, match="draw_every = 0"):
        RunPictures(draw_every=0)


def test_without_matplotlib_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fomoe_pl.callbacks.pictures.find_spec", lambda name: None)
    pictures = RunPictures()
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), default_root_dir=str(tmp_path))
    with pytest.warns(UserWarning, match=r"pip install .matplotlib"):
        pictures.on_train_start(trainer, torch.nn.Linear(1, 1))  # type: ignore[arg-type]


class Diverged(Callback):
    """Every weight is NaN."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: object) -> None:
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)


def fit_watched(root: str, folder: Path, *before: Callback) -> Trainer:
    logger = TensorBoardLogger(folder, name="run", version="")
    run = Run(root=root, folder=str(folder), strategy="single", trainer={"max_steps": 4, "logger": logger})
    return fit(run, 0, 1, [*before, RoutingStability(1, 2), RunPictures(1, 2), RunReport()])


def test_a_diverged_run_is_drawn_to_its_end(root: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RunPictures")
        fit_watched(root, tmp_path, Diverged())
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert events.Images("pictures/load")[-1].step == 3
    assert events.Tags()["histograms"] == []
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 4


def drawn_after(rounds: int, draw_every: int) -> list[int]:
    found = [next_drawing(0, draw_every)]
    while found[-1] <= rounds:
        found.append(next_drawing(found[-1], draw_every))
    return found[:-1]


def test_drawings_become_rarer_with_the_length_of_the_run() -> None:
    assert drawn_after(1000, 64) == [64, 128, 192, 288, 432, 648, 972]
    assert drawn_after(10, 1) == [1, 2, 3, 5, 8]
    for rounds in (10**4, 10**5):
        assert len(drawn_after(10 * rounds, 64)) - len(drawn_after(rounds, 64)) in (5, 6)  # log 10 / log 1.5


@pytest.mark.parametrize("start", [0, 5])
def test_it_is_drawn_at_growing_distances_and_at_the_end(root: str, tmp_path: Path, start: int) -> None:
    """Also where the run was interrupted between two drawings. Nobody validates, so there are no domains to draw."""
    folder, path = tmp_path / "run", str(tmp_path / "saved.ckpt")
    saved = {"max_steps": start, "logger": False}
    if start:
        pictures = RunPictures(2, 1)
        run = Run(root=root, folder=str(tmp_path), strategy="single", trainer=saved)
        fit(run, 0, 1, [RoutingStability(1, 1), pictures]).save_checkpoint(path)
    logger = TensorBoardLogger(folder, name="", version="")
    run = Run(root=root, folder=str(folder), strategy="single", trainer={"max_steps": 11, "logger": logger})
    fit(run, 0, 1, [RoutingStability(1, 1), RunPictures(2, 1)], path if start else None)
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    # Rounds are steps here. The run before the checkpoint was drawn when it ended, at 5.
    assert [event.step + 1 for event in events.Images("pictures/load")] == ([8, 11] if start else [2, 4, 6, 9, 11])


def test_domain_maps_are_drawn_once_a_validation(root: str, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    settings = {"max_steps": 8, "val_check_interval": 3, "limit_val_batches": 1, "logger": logger}
    fit(Run(root=root, folder=str(tmp_path), strategy="single", trainer=settings), 0, 1,
        [RoutingStability(1, 1), RunPictures(1, 1)])  # fmt: skip
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [event.step + 1 for event in events.Images("pictures/load")] == [1, 2, 3, 5, 8]
    # Validated after 3 and 6 steps, when the rounds' own drawings were over.
    assert [event.step + 1 for event in events.Images("pictures/domains")] == [5, 8]


def test_a_drawing_that_fails_does_not_end_the_run(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("no room")

    monkeypatch.setattr("fomoe_pl.callbacks.figures.timeline", fail)
    with pytest.warns(UserWarning, match="after step 2, and does not warn again: ZeroDivisionError: no room") as told:
        fit_watched(root, tmp_path)
    assert len([w for w in told if "RunPictures" in str(w.message)]) == 1
    assert (tmp_path / "run" / "report.json").is_file()


def test_only_tensorboard_gets_pictures(tmp_path: Path) -> None:
    from fomoe_pl.callbacks.pictures import _writers

    loggers: Any = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = Trainer(accelerator="cpu", logger=loggers, default_root_dir=str(tmp_path))
    assert [folder for _, folder in _writers(trainer)] == [loggers[1].log_dir]


@pytest.mark.parametrize("n", [1, 12, 13, 61])
def test_at_most_twelve_layers_are_shown(n: int) -> None:
    shown = figures.shown_layers(n)
    assert (shown[0], shown[-1], len(shown)) == (0, n - 1, min(n, 12))
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (4, 4), (5, 3), (6, 3), (12, 4)])
def test_rows_of_panels_are_as_even_as_can_be(layers: int, columns: int) -> None:
    figure = figures.timeline(torch.ones(2, layers, 4), [0, 4, 8])
    lefts = {round(axes.get_position().x0, 6) for axes in figure.axes[:layers]}
    assert len(lefts) == columns


@pytest.mark.parametrize(
    "load",
    [torch.ones(2, 4), torch.tensor([[8.0, 0, 0, 0]]), torch.full((2, 4), torch.nan), torch.ones(1, 1)],
    ids=["even", "one expert", "nothing picked", "single"],
)
def test_extremes_can_be_drawn(load: Any) -> None:
    for figure in (
        figures.heat_map(load, "title", "unit", even=True), figures.heat_map(load, "title", "unit"),
        figures.timeline(torch.stack([load, load]), [0, 4, 8], 2), figures.timeline(load[None], [0, 4]),
        figures.domain_maps(load[:, None], ["law"]),
    ):  # fmt: skip
        figure.canvas.draw()
        axes = figure.axes
        assert axes[-1].get_ylabel()  # the colour bar's unit


def test_timeline_is_as_wide_as_the_rounds_are_long() -> None:
    load_RLE = torch.tensor([[[1.0, 1.0]], [[0.5, 1.5]], [[1.5, 0.5]]])
    axes, bar = figures.timeline(load_RLE, [0, 1, 2, 34], 4).axes
    (mesh,) = axes.collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 1, 2, 34]
    assert mesh.get_array().tolist() == load_RLE[:, 0].T.tolist()
    assert axes.get_ylim() == (1.5, -0.5)  # expert 0 above
    assert "optimizer steps" in axes.figure.get_supxlabel()
    assert "mean of 4 rounds" in axes.figure.get_supxlabel()
    assert bar.get_ylabel() == figures.EVEN


def test_one_outlier_does_not_leave_the_rest_pale() -> None:
    load_LE = torch.full((1, 16), 15.0).index_fill(1, torch.arange(1, 16), 1 / 15)
    picture, bar = figures.heat_map(load_LE, "title", "unit", even=True).axes
    assert picture.images[0].norm.vmax == 4
    assert picture.images[0].colorbar.extend == "max"  # the bar says that there is more
    assert bar.get_ylabel() == "unit"
    picture, _ = figures.heat_map(torch.tensor([[3.0, 0, 0]]), "title", "unit", even=True).axes
    assert (picture.images[0].norm.vmax, picture.images[0].colorbar.extend) == (3, "neither")


def test_placement_shows_who_holds_what() -> None:
    placement = place("fixed", n_layers=2, n_experts=4, n_sites=2, overlap=1)
    figure = figures.placement_map(placement)
    grid = figure.axes[1].images[0].get_array()
    for site in range(2):
        for expert in range(4):
            assert (grid[site, expert].min() < 1) == (site in placement.holders[1][expert])
