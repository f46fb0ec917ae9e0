"""bench/report.py: the newest result of each device becomes tables and charts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("report")


@pytest.fixture
def prediction(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("prediction")


def row(op: str, median: float, **ratio: float) -> dict[str, Any]:
    def time(value: float) -> dict[str, float]:
        return {"median_us": value, "p20_us": value, "p80_us": value}

    return {
        "op": op, "case": "a case", "backend": "cpp", "time": time(median), "images": 8,
        "gb_s": 20.0, "percent_of_copy": 50.0, "gflop_s": 300.0, "percent_of_fma": 75.0,
        "against": {name: time(median * value) for name, value in ratio.items()}, "ratio": ratio,
    }  # fmt: skip


def write(folder: Path, date: str, rows: list[dict[str, Any]], **more: Any) -> None:
    content = {
        **more, "device": "A CPU", "threads": 2, "versions": {"torch": "2"}, "commit": "abc",
        "date": date, "copy_gb_s": 40.0, "fma_gflop_s": 400.0, "results": rows,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{date}.json").write_text(json.dumps(content))


def test_the_newest_results_become_tables_and_charts(report: ModuleType, tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    write(results, "2026-01-01", [row("mixed_sum", 9e3, torch=9.0)])
    rows = [row("evaluation", 2e4, eager=4.0), row("mixed_sum", 1e3, torch=3.0, compile=1.75)]
    write(results, "2026-02-01", rows)
    text = report.write_report(results, docs, predicted=False).read_text()
    assert "2026-02-01" in text and "2026-01-01" not in text
    assert (
        "| mixed_sum | a case | cpp | 1 | 1 to 1 | 300 GFLOP/s, 75 % | torch 3.00, compile 1.75 |"
        in text
    )
    for name in ("speed-a-cpu-whole.png", "speed-a-cpu-ops.png"):
        assert f"images/{name}" in text and (docs / "images" / name).stat().st_size > 5000


def test_a_part_that_is_measured_again_replaces_its_rows_alone(
    report: ModuleType, tmp_path: Path
) -> None:
    both = [row("evaluation", 2e4, eager=4.0), row("mixed_sum", 9e3, torch=9.0)]
    write(tmp_path / "results", "2026-01-01", both)
    write(tmp_path / "results", "2026-02-01", [row("mixed_sum", 1e3, torch=3.0)])
    text = report.write_report(tmp_path / "results", tmp_path, predicted=False).read_text()
    assert "| mixed_sum | a case | cpp | 1 |" in text and "| evaluation | a case |" in text
    assert "9.00" not in text
    assert "`abc`, 2026-01-01 (1 rows), commit `abc`, 2026-02-01 (1 rows); torch 2" in text


def test_no_results_are_one_line(report: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no results; run pytest bench/ first"):
        report.write_report(tmp_path, tmp_path)


def test_a_dry_run_is_no_result(report: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01", [row("mixed_sum", 9e3, torch=9.0)], dry_run=True)
    assert report.newest(tmp_path) == []


def test_predictions_stand_beside_measurements_or_say_that_there_are_none(
    prediction: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "BATCHES", (24,))
    predicted = list(prediction.steps())
    monkeypatch.setattr(prediction, "steps", lambda: predicted)
    op, case = "training step", "ours-1 256x192 batch 24 fp32"
    cpu = {"device": "A CPU", "results": [row("mixed_sum", 1e3, torch=3.0)]}
    nothing = "\n".join(prediction.lines([cpu]))
    assert f"| {op}, {case} |" in nothing and "×)" not in nothing
    known = next(p for o, c, _, p in predicted if (o, c) == (op, case))
    assert known.memory > known.arithmetic > 0 and known.launched >= known.launching
    took = row(op, 2e6 * known.replayed) | {"case": case}
    took["against"] = {"ours without graph": {"median_us": 3e6 * known.launched}}
    gpu = {"device": "NVIDIA H200", "results": [took]}
    line = next(x for x in prediction.lines([cpu, gpu]) if x.startswith(f"| {op}, {case} |"))
    assert "(2.00×)" in line and "(3.00×)" in line and "not measured" not in line
