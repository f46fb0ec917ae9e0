"""The benchmarks: no speed for a wrong output; results keyed by device, versions and commit."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", ROOT / "bench" / "harness.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, round_: Callable[[], None], rounds: int, iterations: int) -> None:
        self.rounds = rounds
        round_()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2e-3] * rounds))


def case(harness: ModuleType, output: Any, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "op": "double",
        "name": "4 floats",
        "backend": "cpp",
        "device": "cpu",
        "call": lambda: output,
        "want": torch.full((4,), 2.0),
        "tolerance": 1e-6,
        "bytes": 32,
    }
    return harness.Case(**{**values, **changes})


@pytest.mark.parametrize(
    "output",
    [
        torch.full((4,), 2.1),
        torch.tensor([2.0, 2.0, 2.0, float("nan")]),
        torch.tensor([2.0, 2.0, 2.0, float("inf")]),
        torch.full((5,), 2.0),
    ],
    ids=["inexact", "nan", "inf", "shape"],
)
def test_a_wrong_output_gets_no_speed(harness: ModuleType, output: torch.Tensor) -> None:
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="no speed is reported"):
        harness.measure(case(harness, output), benchmark, lambda device: 1e9)
    assert benchmark.rounds == 0


def test_a_right_output_is_timed_and_compared(harness: ModuleType) -> None:
    right = torch.full((4,), 2.0)
    result = harness.measure(
        case(harness, right, against={"torch": lambda: right.clone()}),
        Benchmark(),
        lambda device: 1e9,
    )
    assert result.error == 0
    assert 0 < result.p20_us <= result.median_us <= result.p80_us
    assert result.ratio["torch"] == pytest.approx(result.against_us["torch"] / result.median_us)
    assert result.percent_of_copy == pytest.approx(100 * result.gb_s)
    assert "double 4 floats [cpp]" in harness.table([result])[0]


def test_results_are_keyed_and_merged(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    right = torch.full((4,), 2.0)
    for name in ("first", "second", "first"):
        result = harness.measure(case(harness, right, name=name), Benchmark(), lambda device: 1e9)
        (path,) = harness.save([result], {"cpu": 1e9})
    assert path.name.endswith(f"{torch.__version__.replace('+', '-')}-0123456789ab.json")
    content = json.loads(path.read_text())
    assert [row["case"] for row in content["results"]] == ["first", "second"]
    assert content["commit"] == "0123456789ab"
    assert content["versions"]["torch"] == torch.__version__
    assert content["copy_gb_s"] == 1.0
