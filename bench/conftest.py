"""The fixture `measure`, and the results file at the end of the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import records
import timing
import torch

from pnfs.runtime import keep_heap

_results: list[records.Result] = []
_roofs = functools.cache(timing.measure_roofs)


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--compile-models",
        action="store_true",
        help="compare whole networks with torch.compile too, which takes minutes",
    )
    parser.addoption(
        "--repetitions",
        type=int,
        default=0,
        help="in place of timing, run every case this often and compare the results bit for bit",
    )
    parser.addoption(
        "--results", type=Path, help="the folder that the JSON goes into; default bench/results"
    )


def pytest_configure() -> None:
    keep_heap()  # as training and prediction do, and for every contestant alike


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark: Any, request: Any) -> Callable[[harness.Case], records.Result | None]:
    """Call it with a `harness.Case`: checks the output, times it, records the result."""
    times = request.config.getoption("repetitions")

    def run(case: harness.Case) -> records.Result | None:
        if times:
            benchmark(lambda: None)
            differing = harness.differing(case.call, times)
            assert not differing, f"{differing} of {times} results differ from the first"
            return None
        result = harness.measure(case, benchmark, _roofs)
        if result is not None:
            _results.append(result)
        return result

    return run


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if not _results:
        return
    devices = {result.device for result in _results}
    roofs = {device: _roofs(device) for device in devices}
    paths = records.save(_results, roofs, config.getoption("results"))
    terminalreporter.section("results")
    for line in [*records.table(_results), *(f"written: {path}" for path in paths)]:
        terminalreporter.write_line(line)
