"""Times of calls, and what the device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

ROUND_SECONDS = 2e-3  # a round repeats the call until it lasts this long
ROUNDS = (7, 30)  # fewest and most; between them as many as take MEASURE_SECONDS
MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class Roofs:
    """What the device can do at best, measured: bytes per second of a large copy, read plus
    written, and floating-point operations per second of a large float32 matrix product."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Spread:
    """Times of one call in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float


class Round(NamedTuple):
    """Enough calls to last ROUND_SECONDS."""

    run: Callable[[], float]  # seconds per call
    count: int
    seconds: float  # what a round takes


def repeated(call: Callable[[], Any], device: str) -> Round:
    """A round of `call` that waits for the device at its end."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return time.perf_counter() - start

    run(1)
    count = 1
    while (seconds := run(count)) < ROUND_SECONDS:
        count = max(count + 1, int(count * min(10.0, 1.2 * ROUND_SECONDS / seconds)))
    return Round(lambda: run(count) / count, count, seconds)


def round_count(seconds: float) -> int:
    """How many rounds of `seconds` each to take."""
    return max(ROUNDS[0], min(ROUNDS[1], int(MEASURE_SECONDS / seconds)))


def time_call(call: Callable[[], Any], device: str) -> list[float]:
    """Seconds per call, one figure per round."""
    round_ = repeated(call, device)
    return [round_.run() for _ in range(round_count(round_.seconds))]


def measure_roofs(device: str) -> Roofs:
    """Time a copy too large for the caches, and a matrix product large enough to hide its reads."""
    source = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(time_call(lambda: target.copy_(source), device))
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    product = statistics.median(time_call(lambda: left @ right, device))
    flops = 2 * size**3 / product
    if device == "cpu":  # the BLAS that torch comes with is slow on some processors, oneDNN is not
        x = torch.randn(8, 256, 64, 64).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 1, 1)
        with torch.no_grad():
            seconds = time_call(lambda: torch.nn.functional.conv2d(x, weight), device)
        flops = max(flops, 2 * 256 * x.numel() / statistics.median(seconds))
    return Roofs(bytes=2 * source.nbytes / copy, flops=flops)


def rates(bytes_: int, flops: int, seconds: float, roofs: Roofs) -> dict[str, float]:
    """The fields of `Result` that say how near a call comes to the roofs."""
    return {
        "gb_s": bytes_ / seconds / 1e9,
        "percent_of_copy": 100 * bytes_ / seconds / roofs.bytes,
        "gflop_s": flops / seconds / 1e9,
        "percent_of_fma": 100 * flops / seconds / roofs.flops,
    }


def spread(seconds: list[float]) -> Spread:
    ordered = sorted(second * 1e6 for second in seconds)
    fifth = len(ordered) // 5
    return Spread(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth])
