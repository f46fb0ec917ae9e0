"""bench/gpu.py: its stages are guarded, and a dry run on the CPU goes through all of them."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_stages_that_fail_hang_or_are_missing_do_not_stop_the_rest(
    gpu: ModuleType, tmp_path: Path
) -> None:
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    todo = [
        gpu.Stage("fails", python("print('before'); raise SystemExit(3)"), 60),
        gpu.Stage("hangs", python(hang), 5.5),
        gpu.Stage("missing", python("pass"), 60, "no compute-sanitizer"),
        gpu.Stage("works", python("print('done')"), 60),
    ]
    with open(tmp_path / "log", "w+") as log:
        outcomes = gpu.run_all(todo, 100, log)
    assert [outcome.status for outcome in outcomes] == ["failed", "too long", "not run", "passed"]
    assert "before" in outcomes[0].tail and outcomes[2].tail == "no compute-sanitizer"
    assert outcomes[3].tail.strip() == "done"  # its own output alone
    for text in ("=== fails", "before", "=== works", "done"):
        assert text in (tmp_path / "log").read_text()


def test_no_stage_starts_when_the_time_is_over(gpu: ModuleType) -> None:
    started = time.monotonic()
    (outcome,) = gpu.run_all([gpu.Stage("late", python("pass"), 60)], 1, io.StringIO())
    assert (outcome.status, outcome.tail) == ("not run", "no time was left")
    assert time.monotonic() - started < 1


def test_rows_of_one_case_become_one(gpu: ModuleType) -> None:
    def row(way: str) -> dict[str, Any]:
        filled = {"against": {way: 1}, "ratio": {way: 2.0}, "peaks": {way: 3.0, "ours": 4.0}}
        return {"op": "evaluation", "case": "one", "time": way, **filled}

    (merged,) = gpu.merged([row("reference"), row("compile")])
    assert merged["time"] == "reference"
    assert merged["ratio"] == {"reference": 2.0, "compile": 2.0}
    assert merged["peaks"] == {"reference": 3.0, "compile": 3.0, "ours": 4.0}


def test_all_stages_fit_into_one_command_on_a_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    names = [stage.name for stage in gpu.stages(False, tmp_path)]
    assert names == [stage.name for stage in gpu.stages(True, tmp_path)]
    wanted = {"build", "kernel tests", "ops", "whole models", "memcheck", "racecheck"}
    assert wanted | {"feeding", "tuning"} < set(names)
    assert gpu.BUDGET < 600


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(gpu: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 180
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["dry_run"] and path.name.startswith("dry-run-")
    status = {stage["name"]: stage["status"] for stage in content["stages"]}
    assert status.pop("memcheck") == status.pop("racecheck") == "not run"
    assert set(status.values()) == {"passed"}, status
    assert any("in kernels" in line for line in content["profile"])
    rows = {(row["op"], row["case"]) for row in content["results"]}
    for precision in ("fp32", "bf16"):
        for op in ("training step", "evaluation"):
            assert (op, f"ours-1 64x64 batch 2 {precision}") in rows
    assert "training from files" in {op for op, _ in rows}
    assert not content["failures"]
    assert content["tuned"]["choices"]
