"""docs/make_search_table.py: runs become rows, rows the table of docs/search.md."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs import small_config

from pnfs.train import train

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "make_search_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_search_table", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(strategy: str, seed: int, ap: float) -> dict[str, Any]:
    return {
        "strategy": strategy, "seed": seed, "steps": 600, "AP": ap, "AP50": 1.0,
        "seconds_per_step": 0.2, "alpha_entropy": 0.9, "beta_entropy": 0.8,
    }  # fmt: skip


def test_a_finished_run_becomes_a_row(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not script.is_complete(folder)
    result = train(small_config(tmp_path / "people"), folder, quiet=True)
    assert script.is_complete(folder)
    row = script.row_of(folder, "sync", 0)
    assert row["AP"] == result.metrics["AP"] and row["steps"] == result.step
    assert row["seconds_per_step"] > 0
    assert 0.9 < row["alpha_entropy"] <= 1 and 0.9 < row["beta_entropy"] <= 1


def test_the_table_is_written_between_its_markers(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    runs = [run_of("sync", seed, ap) for seed, ap in enumerate((0.85, 0.87, 0.89))]
    content = {
        "device": "A CPU", "threads": 1, "torch": "2", "train_people": 1170, "val_people": 200,
        "runs": [*runs, run_of("random", 0, 0.5)],
    }  # fmt: skip
    for _ in range(2):
        script.write_table(content, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `sync` | 3 | 87.0 ± 2.0 | 85.0 to 89.0 | 0.20 | 2.0 | 0.90 ± 0.00 |" in text
    assert "| `random` | 1 | 50.0 | 50.0 to 50.0 |" in text
    assert "1170 drawn people, scored on 200 unseen ones" in text


def test_the_page_has_the_table_of_the_stored_runs(script: ModuleType, tmp_path: Path) -> None:
    page = SCRIPT.parent / "search.md"
    copy = tmp_path / "search.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    stored = script.json.loads((SCRIPT.parent / "search_table.json").read_text())
    script.write_table(stored, copy)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    assert not any(math.isnan(run["AP"]) for run in stored["runs"])
