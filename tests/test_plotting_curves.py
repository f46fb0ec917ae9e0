"""Training curves: whatever is missing in metrics.jsonl, of one run and of several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pictures import has_colour, one_line, read, write_metrics

from pnfs.errors import PnfsError
from pnfs.plotting import plot_curves
from pnfs.plotting.metrics import read_curves


def test_curves_are_read_whatever_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"step": 10, "epoch": 0, "loss": 0.5, "lr": 0.001}',
        '{"step": 20, "loss": NaN, "lr": null}',
        '{"event": "note", "step": 20, "text": "resumed"}',
        "",
        '{"step": 30, "loss": 0.25}',
        '{"event": "eval", "step": 30, "AP": 0.5, "AP(M)": NaN, "AP(L)": -1, "boxes": "truth"}',
        '{"event": "eval", "step": 40, "epoch": 2, "AP": 0.75, "seconds": 3}',
        '{"event": "train", "st',
    ]
    path.write_text("\n".join(rows))
    curves = read_curves(path)
    assert curves.loss == ([10, 30], [0.5, 0.25])
    assert curves.learning_rate == ([10], [0.001])
    assert curves.scores == {"AP": ([30, 40], [0.5, 0.75])}
    assert read_curves(tmp_path) == curves


def test_curves_of_one_run_and_of_several(tmp_path: Path) -> None:
    one = write_metrics(tmp_path / "a" / "metrics.jsonl", tail='{"event": "tra')
    two = write_metrics(tmp_path / "b" / "metrics.jsonl", scale=2.0)
    [alone] = plot_curves(one, tmp_path / "one.png")
    [both] = plot_curves({"with vector": one, "without": two}, tmp_path / "both.png")
    plot_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "folders")
    assert (tmp_path / "folders.svg").is_file() and (tmp_path / "folders.png").is_file()
    blue, red = "#0072B2", "#D55E00"
    left = slice(None), slice(0, 800)
    assert has_colour(read(alone)[left], blue, 200) and not has_colour(read(alone)[left], red, 1)
    assert has_colour(read(both)[left], blue, 200) and has_colour(read(both)[left], red, 200)
    again = plot_curves(one, tmp_path / "again.png")[0]
    assert again.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    "line", ['{"step": 1, "loss": 0.5}', '{"event": "eval", "step": 1, "AP": 0}']
)
def test_a_single_row_is_enough(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert plot_curves(tmp_path, tmp_path / "a.png")[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "no loss and no score"),
        ('{"note": 1}\n', "no loss and no score"),
        ('not JSON\n{"step": 1, "loss": 1}\n', "line 1 is not a JSON object"),
    ],
)
def test_bad_metrics_give_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PnfsError, match=message) as caught:
        plot_curves(path, tmp_path / "a.png")
    assert one_line(str(caught.value))
    with pytest.raises(PnfsError, match="no run given"):
        plot_curves([], tmp_path / "a.png")


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", rows=3)
    code = (
        "import matplotlib, sys\n"
        "matplotlib.rcParams['font.size'] = 31\n"
        "from pnfs.plotting import plot_curves\n"
        f"plot_curves({str(tmp_path)!r}, {str(tmp_path / 'a.svg')!r})\n"
        "assert matplotlib.rcParams['font.size'] == 31\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
