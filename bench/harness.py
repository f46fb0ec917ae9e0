"""What every benchmark shares: check first, then time; ratios in the same run; JSON results.

A benchmark builds a `Case` and hands it to the fixture `measure`. An output that differs from the
float64 reference by more than the tolerance fails the benchmark: no speed is reported for it.

    pytest bench/                       # all, on the CPU and on a GPU if there is one
    pytest bench/ --benchmark-disable   # the checks alone
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pnfs import kernels
from pnfs.info import collect_info, cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
ROUND_SECONDS = 2e-3  # a round repeats the call until it lasts this long
ROUNDS = 30
# Maps of the part fabrics of preset ours-1 at 256×192: (channels, height, width) of each level.
FABRIC_LEVELS = ((64, 64, 48), (128, 32, 24), (256, 16, 12))
PARTS = 3


@dataclass(frozen=True)
class Case:
    """One measurement.

    op, name, backend: the key of the result; `name` says sizes and dtype.
    device: "cpu" or "cuda".
    call: runs the op once on `backend` and returns its output, a tensor or a tuple of tensors.
    want: the right output, usually the reference's in float64.
    tolerance: largest |output - want| / (1 + |want|).
    bytes: that the call must at least read and write.
    against: other ways to the same result by name, timed in the same run; "torch": the reference.
    """

    op: str
    name: str
    backend: str
    device: str
    call: Callable[[], Any]
    want: Any
    tolerance: float
    bytes: int
    against: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One row of the JSON; times in microseconds, bandwidth in 1e9 bytes per second."""

    op: str
    case: str
    backend: str
    device: str
    median_us: float
    p20_us: float
    p80_us: float
    error: float
    gb_s: float
    percent_of_copy: float
    peak_mib: float | None
    against_us: dict[str, float]
    ratio: dict[str, float]  # how many times longer the other way takes


def backends(op: str) -> list[Any]:
    """(backend, device) of every compiled backend of `op` that runs here, for parametrize."""
    pairs = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
    found = [
        pytest.param(row.backend, pairs[row.backend], id=row.backend)
        for row in kernels.explain()
        if row.op == op and row.available and row.backend in pairs
        if pairs[row.backend] == "cpu" or torch.cuda.is_available()
    ]
    reason = f"no compiled backend of {op} runs here, see `pnfs info`"
    return found or [pytest.param("", "", marks=pytest.mark.skip(reason=reason))]


def on_backend(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` under `use_backend(backend)`."""

    def run(*args: Any) -> Any:
        with kernels.use_backend(backend):
            return call(*args)

    return run


def keypoint_vectors(parts: list[tuple[int, ...]], count: int, device: str) -> list[Tensor]:
    """Per part 8-vectors (count, k, 8, 64, 48), channels-last as a 1×1 convolution leaves them."""
    return [
        torch.randn(count, 64, 48, 8 * len(keypoints), device=device)
        .permute(0, 3, 1, 2)
        .unflatten(1, (len(keypoints), 8))
        for keypoints in parts
    ]


def forward_backward(run: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """A call that gives the outputs of `run(*inputs)` and the gradients of all inputs.

    The outputs' gradients are fixed random numbers, the same for every dtype.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        shapes = [out.shape for out in _tuple(run(*leaves))]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(shape, generator=generator).to(inputs[0].device) for shape in shapes]

    def call() -> tuple[Tensor, ...]:
        outputs = _tuple(run(*leaves))
        grads = [seed.to(out.dtype) for seed, out in zip(seeds, outputs, strict=True)]
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    return call


def _tuple(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def error_of(output: Any, want: Any) -> float:
    """Largest |output - want| / (1 + |want|) over all tensors; infinite where shapes differ."""
    if isinstance(output, Tensor):
        if output.shape != want.shape:
            return float("inf")
        have, right = output.detach().double().cpu(), want.detach().double().cpu()
        same = (have == right) | (have.isnan() & right.isnan())
        error = ((have - right).abs() / (1 + right.abs())).masked_fill(same, 0.0)
        return float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
    return max(error_of(a, b) for a, b in zip(output, want, strict=True))


def repeated(call: Callable[[], Any], device: str) -> tuple[Callable[[], None], int]:
    """A round: enough calls to last ROUND_SECONDS, waiting for the device at the end."""
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
    return lambda: (run(count), None)[1], count


def time_call(call: Callable[[], Any], device: str) -> list[float]:
    """Seconds per call, one figure per round; fewer rounds where they would take over a second."""
    round_, count = repeated(call, device)
    seconds: list[float] = []
    while len(seconds) < ROUNDS and (len(seconds) < 5 or sum(seconds) * count < 1):
        start = time.perf_counter()
        round_()
        seconds.append((time.perf_counter() - start) / count)
    return seconds


def copy_bandwidth(device: str) -> float:
    """Measured bytes per second, read plus written, of a copy too large for the caches."""
    source = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(time_call(lambda: target.copy_(source), device))
    return 2 * source.nbytes / seconds


def measure(case: Case, benchmark: Any, bandwidth: Callable[[str], float]) -> Result | None:
    """Check, then time. None when pytest-benchmark is told to disable timing.

    Raises:
        AssertionError: the output is wrong.
    """
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    error = error_of(case.call(), case.want)
    assert error <= case.tolerance, (
        f"{case.op} {case.name} on {case.backend}: the output is wrong by {error:.3g}, "
        f"allowed is {case.tolerance:.3g}; no speed is reported"
    )
    if benchmark.disabled:
        benchmark(case.call)
        return None
    against = {
        name: statistics.median(time_call(call, case.device)) for name, call in case.against.items()
    }
    round_, count = repeated(case.call, case.device)
    benchmark.pedantic(round_, rounds=ROUNDS, iterations=1)
    seconds = sorted(second / count for second in benchmark.stats.stats.data)
    median = statistics.median(seconds)
    rate = case.bytes / median
    result = Result(
        op=case.op,
        case=case.name,
        backend=case.backend,
        device=case.device,
        median_us=median * 1e6,
        p20_us=seconds[len(seconds) // 5] * 1e6,
        p80_us=seconds[len(seconds) * 4 // 5] * 1e6,
        error=error,
        gb_s=rate / 1e9,
        percent_of_copy=100 * rate / bandwidth(case.device),
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if case.device == "cuda" else None,
        against_us={name: value * 1e6 for name, value in against.items()},
        ratio={name: value / median for name, value in against.items()},
    )
    benchmark.extra_info.update(asdict(result))
    return result


def commit() -> str:
    """The commit that was measured, with "-dirty" where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def save(results: list[Result], bandwidths: dict[str, float]) -> list[Path]:
    """Write bench/results/<device>-<torch>-<commit>.json per device; rows of an earlier run under
    the same key stay unless measured again."""
    info = collect_info()
    paths = []
    for device in sorted({result.device for result in results}):
        name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        key = f"{name}-{torch.__version__}-{commit()}"
        path = RESULTS / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key).lower()}.json"
        rows = {(r.op, r.case, r.backend): asdict(r) for r in results if r.device == device}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))["results"]
            rows = {(r["op"], r["case"], r["backend"]): r for r in old} | rows
        content = {
            "device": name,
            "threads": torch.get_num_threads(),
            "versions": info.versions,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "copy_gb_s": bandwidths[device] / 1e9,
            "results": [rows[key] for key in sorted(rows)],
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def table(results: list[Result]) -> list[str]:
    """The results as lines of text."""
    lines = []
    for r in results:
        ratios = ", ".join(f"{value:.2f}x {name}" for name, value in r.ratio.items())
        lines.append(
            f"{r.op} {r.case} [{r.backend}]: {r.median_us:.1f} us "
            f"({r.p20_us:.1f} to {r.p80_us:.1f}), {r.gb_s:.1f} GB/s = {r.percent_of_copy:.0f} % "
            f"of copy; {ratios}; error {r.error:.1e}"
        )
    return lines
