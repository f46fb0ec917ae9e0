"""Pictures of whole runs: search, predictions, comparisons, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import has_colour, one_line, read, write_metrics
from runs import small_config

from pnfs.checkpoint import save_weights
from pnfs.config import load_config
from pnfs.costs import count_costs
from pnfs.data import load_people
from pnfs.errors import PnfsError
from pnfs.estimator import PoseEstimator
from pnfs.model import build_model
from pnfs.plotting import (
    TradeOff,
    pareto_front,
    plot_comparison,
    plot_predictions,
    plot_run,
    plot_search,
    plot_tradeoff,
    read_tradeoff,
)
from pnfs.plotting.search import entropies, read_trajectories
from pnfs.plotting.style import OPERATION_COLOURS, PART_COLOURS, TRANSFORM_COLOURS
from pnfs.search import Monitor
from pnfs.train import train


def test_a_run_is_drawn_from_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_metrics(run / "metrics.jsonl")
    config = load_config("tiny")
    save_weights(run / "model.safetensors", build_model(config.model), config, {"step": 1})
    notes: list[str] = []
    nowhere = f"data.root={tmp_path / 'people'}"
    pictures = plot_run(run, overrides=[nowhere], note=notes.append)
    names = ["architecture.svg", "architecture.png", "curves.png"]
    assert [path.name for path in pictures] == names
    [note] = notes
    assert "no predictions" in note and "--data" in note
    assert not (tmp_path / "people").exists(), "drawing a run draws no people"
    elsewhere = plot_run(run / "model.safetensors", tmp_path / "out", overrides=[nowhere])
    assert [path.name for path in elsewhere] == ["architecture.svg", "architecture.png"]
    assert all(path.parent == tmp_path / "out" for path in elsewhere)
    with pytest.raises(PnfsError, match="no such run folder"):
        plot_run(tmp_path / "rum")


# -- the search ----------------------------------------------------------------------------------


def search_rows(model: Any, steps: int) -> list[dict[str, Any]]:
    """Rows as training writes them, α and β moving."""
    rows = []
    for step in range(1, steps + 1):
        for i, parameter in enumerate(model.architecture_parameters()):
            parameter.data.flatten()[0] = 0.3 * step * (i + 1)
        rows.append(
            {"event": "search", "step": step, "temperature": 1 / step, **Monitor(model).row()}
        )
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_trajectories_are_the_rows(tmp_path: Path) -> None:
    model = build_model(load_config("tiny").model)
    rows = search_rows(model, 5)
    found = read_trajectories([{"event": "train", "step": 1}, *rows], model)
    assert [panel.name for panel in found] == ["backbone", *model.config.part_table]
    for p, panel in enumerate(found[1:]):
        assert panel.steps.tolist() == [1, 2, 3, 4, 5]
        assert panel.alpha.tolist() == [row["fabrics"]["parts"]["alpha"][p] for row in rows]
        assert panel.beta.tolist() == [row["fabrics"]["parts"]["beta"][p] for row in rows]


def test_entropy_is_a_share_of_the_largest() -> None:
    weights = np.array([[[0.25] * 4, [1.0, 0, 0, 0]], [[0.25] * 4, [0.25] * 4]])
    assert entropies(weights) == pytest.approx([0.5, 1.0])
    assert entropies(np.ones((2, 3, 1))) == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("steps", [1, 40])
def test_a_search_is_drawn(tmp_path: Path, steps: int) -> None:
    model = build_model(load_config("tiny").model)
    metrics = write_rows(tmp_path / "run", search_rows(model, steps))
    [path] = plot_search(model, metrics, tmp_path / "search.png", title="t")
    image = read(path)
    for name in ("skip", "separable", "zero"):
        assert has_colour(image, OPERATION_COLOURS[name], 2000), name
    for colour in (*PART_COLOURS[:3], *TRANSFORM_COLOURS.values()):
        assert has_colour(image, colour, 100)
    again = plot_search(model, metrics, tmp_path / "again.png", title="t")[0]
    assert again.read_bytes() == path.read_bytes()


def test_a_search_of_another_model_or_none_is_one_line(tmp_path: Path) -> None:
    model = build_model(load_config("tiny").model)
    other = build_model(load_config("tiny", ["model.parts=5"]).model)
    metrics = write_rows(tmp_path / "a", search_rows(other, 2))
    with pytest.raises(PnfsError, match="belong to another model") as caught:
        plot_search(model, metrics, tmp_path / "a.png")
    assert one_line(str(caught.value))
    with pytest.raises(PnfsError, match="no rows about a search"):
        plot_search(model, write_metrics(tmp_path / "b" / "metrics.jsonl"), tmp_path / "a.png")


# -- score against cost --------------------------------------------------------------------------


def point(label: str, macs: float, score: float, metric: str = "AP", depth: int = 8) -> TradeOff:
    return TradeOff(label, int(macs * 1e9), 0, metric, score, depth)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [
        point("a", 1, 0.5),
        point("b", 2, 0.4),
        point("c", 2, 0.6),
        point("d", 2, 0.55),
        point("e", 3, 0.6),
        point("f", 9, 0.7),
    ]
    assert [p.label for p in pareto_front(points)] == ["a", "c", "f"]
    assert [p.label for p in pareto_front(points[::-1])] == ["a", "c", "f"]


@pytest.mark.parametrize("largest", [4, 40])
def test_a_trade_off_shows_front_and_rest(tmp_path: Path, largest: float) -> None:
    points = [point("a", 1, 0.5), point("b", 2, 0.4, depth=1), point("c", largest, 0.6)]
    [path] = plot_tradeoff(points, tmp_path / "t.png", title="t")
    assert has_colour(read(path), "#0072B2", 200) and has_colour(read(path), "#9A9A9A", 50)
    plot_tradeoff(points[:1], tmp_path / "one.png")
    with pytest.raises(PnfsError, match="AP of a and PCKh@0.5 of d do not share an axis"):
        plot_tradeoff([points[0], point("d", 1, 90, "PCKh@0.5")], tmp_path / "t.png")
    with pytest.raises(PnfsError, match="no run given"):
        plot_tradeoff([], tmp_path / "t.png")


def saved(folder: Path, facts: dict[str, Any], *settings: str) -> Path:
    config = load_config("tiny", list(settings))
    folder.mkdir()
    save_weights(folder / "model.safetensors", build_model(config.model), config, facts)
    return folder


def test_scores_come_from_the_evaluation_the_model_or_the_metrics(tmp_path: Path) -> None:
    run = saved(tmp_path / "a", {"metrics": {"AP": 0.5}})
    found = read_tradeoff(run)
    costs = count_costs(build_model(load_config("tiny").model), (128, 96))
    assert (found.label, found.metric, found.score) == ("a", "AP", 0.5)
    assert (found.macs, found.params, found.vector_dim) == (costs.conv_macs, costs.params, 8)
    (run / "eval").mkdir()
    (run / "eval" / "metrics.json").write_text('{"metrics": {"AP": 0.6}}')
    assert read_tradeoff(run).score == 0.6
    pruned = saved(tmp_path / "b", {"pruned_from": "a"})
    with pytest.raises(PnfsError, match="no score yet; run pnfs eval"):
        read_tradeoff(pruned)
    plain = saved(tmp_path / "c", {})
    write_rows(plain, [{"event": "eval", "step": 3, "AP": 0.7}])
    assert read_tradeoff(plain).score == 0.7


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [
        saved(tmp_path / "with", {"metrics": {"AP": 0.5}}),
        saved(tmp_path / "without", {"metrics": {"AP": 0.4}}, "model.vector_dim=1"),
    ]
    for scale, run in enumerate(runs, start=1):
        write_metrics(run / "metrics.jsonl", scale=scale)
    pictures = plot_comparison(runs, tmp_path / "out")
    assert [path.name for path in pictures] == ["curves.png", "tradeoff.png"]
    assert has_colour(read(pictures[0]), "#0072B2", 200)
    assert has_colour(read(pictures[0]), "#D55E00", 200)
    with pytest.raises(PnfsError, match="the same run twice"):
        plot_comparison([runs[0], runs[0]], tmp_path / "out")


# -- predictions ---------------------------------------------------------------------------------


def test_predictions_stand_beside_the_truth(tmp_path: Path) -> None:
    config = small_config(tmp_path / "people", "train.epochs=1", "search.log_every=1")
    train(config, tmp_path / "run", quiet=True)
    names = [path.name for path in plot_run(tmp_path / "run")]
    assert names[2:] == ["curves.png", "search.png", "predictions.png"]
    sheet = read(tmp_path / "run" / "predictions.png")
    assert sheet.shape[1] > 4 * 96
    for colour in PART_COLOURS[:3]:
        assert has_colour(sheet, colour, 50)
    people = load_people(config.data, config.model.skeleton_table, "val")
    estimator = PoseEstimator(tmp_path / "run")
    [path] = plot_predictions(estimator, people, tmp_path / "new" / "few.jpg", images=1)
    assert read(path).shape[0] < sheet.shape[0]
