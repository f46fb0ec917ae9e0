"""The benchmarks: no speed for a wrong output; results keyed by device, versions and commit."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[None]:
    """Modules of bench/ can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield


@pytest.fixture(scope="module")
def harness(bench: None) -> ModuleType:
    return importlib.import_module("harness")


@pytest.fixture(scope="module")
def records(bench: None) -> ModuleType:
    return importlib.import_module("records")


def roofs(harness: ModuleType) -> Callable[[str], Any]:
    return lambda device: harness.Roofs(bytes=1e9, flops=2e9)


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(
        self,
        round_: Callable[[], float],
        setup: Callable[[], None],
        rounds: int,
        iterations: int,
    ) -> None:
        self.rounds = rounds
        for _ in range(rounds):
            setup()
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
        "flops": 4,
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
        harness.measure(case(harness, output), benchmark, roofs(harness))
    assert benchmark.rounds == 0


def test_no_way_to_the_result_may_be_wrong_unless_it_is_called_approximate(
    harness: ModuleType,
) -> None:
    right, wrong = torch.full((4,), 2.0), torch.full((4,), 2.1)
    ways = {"against": {"close": lambda: wrong}}
    with pytest.raises(AssertionError, match="close: the output is wrong"):
        harness.measure(case(harness, right, **ways), Benchmark(), roofs(harness))
    known = case(harness, right, **ways, approximate=("close",))
    assert "close" in harness.measure(known, Benchmark(), roofs(harness)).ratio


def test_a_right_output_is_timed_and_compared(harness: ModuleType, records: ModuleType) -> None:
    right = torch.full((4,), 2.0)
    result = harness.measure(
        case(
            harness,
            right,
            call=lambda: right + 0,
            against={"torch": lambda: right.clone(), "slow": lambda: slowly(right)},
            images=1,
            skipped={"openvino": "not installed"},
        ),
        Benchmark(),
        roofs(harness),
    )
    assert result.error == 0
    assert 0 < result.time.p20_us <= result.time.median_us <= result.time.p80_us
    assert result.ratio["slow"] > 1
    assert result.against["slow"].median_us > 1000
    assert result.percent_of_copy == pytest.approx(100 * result.gb_s)
    assert result.percent_of_fma == pytest.approx(50 * result.gflop_s)
    assert result.traffic == {"ours": (1, 32), "torch": (1, 32)}
    line, skipped = records.table([result])
    assert "double 4 floats [cpp]" in line and "images/s" in line
    assert "openvino: not installed" in skipped


def slowly(tensor: torch.Tensor) -> torch.Tensor:
    time.sleep(1e-3)
    return tensor


def test_gradients_are_compared_and_the_compiled_reference_computes_them_too(
    harness: ModuleType,
) -> None:
    ways = harness.references(lambda x, y: (x * y, x.sum()), [torch.ones(3), torch.rand(3)])
    product, total, g_x, g_y = ways["torch"]()
    assert total == 3 and product.shape == g_x.shape == g_y.shape
    torch.manual_seed(5)  # the gradients that come in are the same ones every time
    assert harness.error_of(ways["torch"](), (product, total, g_x, g_y)) == 0
    assert harness.error_of(ways["compile"](), (product, total, g_x, g_y)) < 1e-6


def test_results_are_keyed_and_merged(
    harness: ModuleType, records: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "commit", lambda: "0123456789ab")
    right = torch.full((4,), 2.0)
    for name in ("first", "second", "first"):
        result = harness.measure(case(harness, right, name=name), Benchmark(), roofs(harness))
        (path,) = records.save([result], {"cpu": harness.Roofs(bytes=1e9, flops=2e9)})
    assert path.name.endswith(f"{torch.__version__.replace('+', '-')}-0123456789ab.json")
    content = json.loads(path.read_text())
    assert [row["case"] for row in content["results"]] == ["first", "second"]
    assert content["commit"] == "0123456789ab"
    assert content["versions"]["torch"] == torch.__version__
    assert (content["copy_gb_s"], content["fma_gflop_s"]) == (1.0, 2.0)


def test_the_evaluation_benchmark_leaves_the_training_benchmarks_network_alone(
    bench: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both read one cached network. In evaluation mode its gradients are others, of which plain
    modules in training mode were far."""
    bench_predict = importlib.import_module("bench_predict")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.BatchNorm2d(1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.setattr(bench_predict, "ours", lambda: network)
    settled = bench_predict.settled.__wrapped__()
    assert network.training and not settled.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
