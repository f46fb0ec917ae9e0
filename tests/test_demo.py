"""The demo: every stage, the summary and its pictures; marked slow, the figures it promises."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from runs import SETTINGS

from pnfs.config import load_config
from pnfs.data import load_people
from pnfs.demo import run_demo
from pnfs.errors import PnfsError


def check_pictures(summary: dict) -> None:
    names = (
        "architecture (png)",
        "pruned architecture (png)",
        "training curves",
        "search of α and β",
        "pruned against whole, AP",
        "predictions beside the truth",
    )
    assert set(names) <= set(summary["pictures"])
    for path in summary["pictures"].values():
        assert Path(path).is_file(), path
        if path.endswith(".png"):
            assert min(cv2.imread(path).shape[:2]) > 100


def test_a_small_demo_goes_through_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SETTINGS, "train.epochs=1", "search.log_every=1"]
    result = run_demo(tmp_path / "demo", settings=settings)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["AP"] == result.metrics["AP"] and "AP50" in summary
    assert summary["people"] == result.people > 0
    assert summary["seconds"] == pytest.approx(sum(summary["seconds_by_stage"].values()), abs=0.3)
    pruned = summary["pruned"]
    assert pruned["removal_error"] <= 1e-6 and pruned["conv_macs"][1] <= pruned["conv_macs"][0]
    assert 0 <= pruned["AP"] <= 1
    check_pictures(summary)
    shown = capsys.readouterr().out
    for path in (*summary["pictures"].values(), summary["run"], "summary.json", "AP50"):
        assert path in shown

    with pytest.raises(PnfsError, match="holds an earlier demo; add --overwrite"):
        run_demo(tmp_path / "demo", settings=settings)
    again = run_demo(tmp_path / "demo", overwrite=True, settings=settings)
    assert again.metrics == result.metrics


def test_the_demo_scores_exactly_200_unseen_people(tmp_path: Path) -> None:
    config = load_config("tiny", [f"data.root={tmp_path}", "data.synthetic.train_images=1"])
    unseen = load_people(config.data, config.model.skeleton_table, "val")
    assert len(unseen) == 200


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo")
    assert result.people == 200
    assert result.metrics["AP"] >= 0.75
    assert result.metrics["AP50"] >= 0.95
    assert result.pruned["AP"] >= 0.6
    assert result.pruned["conv_macs"][1] < 0.9 * result.pruned["conv_macs"][0]
    check_pictures(json.loads((tmp_path / "demo" / "summary.json").read_text()))
