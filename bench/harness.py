"""What every benchmark shares: check first, then time; ratios in the same run; JSON results.

A benchmark builds a `Case` and hands it to the fixture `measure`. An output that differs from the
float64 reference by more than the tolerance fails the benchmark: no speed is reported for it.

    pytest bench/                       # all, on the CPU and on a GPU if there is one
    pytest bench/ --benchmark-disable   # the checks alone
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from records import Result
from timing import Roofs, rates, repeated, round_count, spread
from torch import Tensor

from pnfs import kernels
from pnfs.costs import count_calls

# Ways to a result whose every call PyTorch's dispatcher sees: their traffic can be counted.
COUNTED = ("torch", "eager")
SETTLE_SECONDS = 2e-3  # between two ways: the threads of the one wait actively for a while
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
    tolerance: largest |output - want| / (1 + |want|) of `call`; of the other ways ‖·‖ over ‖·‖.
    bytes: that the call must at least read and write.
    flops: floating-point operations, a multiply-add counted as two; 0 where memory alone decides.
    images: that one call takes, where images per second mean something.
    against: other ways to the same result by name, timed in the same run; "torch" is the reference,
        "compile" what torch.compile makes of it. They may prepare themselves at their first call.
    approximate: those of `against` whose output is close, not equal, and not compared.
    tolerance_against: largest `distance_of` of the others' outputs.
    skipped: ways that cannot run here, with the reason.
    """

    op: str
    name: str
    backend: str
    device: str
    call: Callable[[], Any]
    want: Any
    tolerance: float
    bytes: int
    flops: int = 0
    images: int | None = None
    against: dict[str, Callable[[], Any]] = field(default_factory=dict)
    approximate: tuple[str, ...] = ()
    tolerance_against: float = 1e-2
    skipped: dict[str, str] = field(default_factory=dict)


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

    The outputs' gradients are fixed random numbers, the same for every dtype; that of a scalar, a
    loss, is 1, as `backward()` makes it.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    seeds: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        outputs = _tuple(run(*leaves))
        if not seeds:
            generator = torch.Generator().manual_seed(1)
            for out in outputs:
                scalar = out.dim() == 0
                seed = torch.ones(()) if scalar else torch.randn(out.shape, generator=generator)
                seeds.append(torch.empty_like(out).copy_(seed))
        return (*outputs, *torch.autograd.grad(outputs, leaves, seeds))

    return call


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on the reference, compiled by torch.compile at the first call, for its shapes alone."""
    made: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        with kernels.use_backend("torch"):
            if not made:
                torch.compiler.reset()  # else it counts the shapes of other cases and gives up
                made.append(torch.compile(run, fullgraph=True, dynamic=False))
            return made[0](*args)

    return call


def references(run: Callable[..., Any], inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """`Case.against` of an op that is differentiated: the reference eagerly and compiled."""
    return {
        "torch": forward_backward(on_backend("torch", run), inputs),
        "compile": forward_backward(compiled(run), inputs),
    }


def gradient_case(
    op: str,
    name: str,
    run: Callable[..., Any],
    inputs: list[Tensor],
    *,
    others: dict[str, Callable[..., Any]] | None = None,
    **fields: Any,
) -> Case:
    """The case of a differentiable op, forward and backward in float32, beside its reference.

    Args:
        name: sizes. run: takes `inputs`, float32 on the case's device, and calls the op.
        others: further ways to the result of `run` by name, which take the same.
        fields: the others of `Case`, backend, device, tolerance and bytes among them.
    """
    right = forward_backward(on_backend("torch", run), [tensor.double() for tensor in inputs])
    return Case(
        op=op,
        name=f"{name} float32 forward+backward",
        call=forward_backward(on_backend(fields["backend"], run), inputs),
        want=right(),
        against={
            **references(run, inputs),
            **{way: forward_backward(other, inputs) for way, other in (others or {}).items()},
        },
        **fields,
    )


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


def distance_of(output: Any, want: Any) -> float:
    """Largest ‖output - want‖ / ‖want‖ of the tensors: for the other ways, where rounding may let
    a ReLU of a value near 0 pass its gradient or not.

    A tensor of under 1e-3 of the largest one's norm counts as if it had that: gradients that are 0
    but for rounding exist, such as those of a shift before a normalisation.
    """
    pairs = list(zip(_tuple(output), _tuple(want), strict=True))
    if any(have.shape != right.shape for have, right in pairs):
        return float("inf")
    distances, norms = [], []
    for have, right in pairs:
        have, right = have.detach().double().cpu(), right.detach().double().cpu()
        same = (have == right) | (have.isnan() & right.isnan())
        distances.append((have - right).masked_fill(same, 0.0).norm())
        norms.append(right.nan_to_num(0, 0, 0).norm())
    least = max(1e-30, 1e-3 * max(norms))
    ratios = [d / n.clamp(min=least) for d, n in zip(distances, norms, strict=True)]
    return float(torch.stack(ratios).max())  # NaN if one is


def differing(call: Callable[[], Any], times: int) -> int:
    """How many of `times` results differ in any bit from the first one."""
    first, wrong = [tensor.clone() for tensor in _tuple(call())], 0
    while times > 0:
        count = min(times, 50)  # looking at a comparison waits for the device
        same = [
            torch.stack([torch.eq(a, b).all() for a, b in zip(first, _tuple(call()), strict=True)])
            for _ in range(count)
        ]
        wrong += sum(not flags.all() for flags in torch.stack(same))
        times -= count
    return wrong


def refuse_wrong(case: Case, way: str, error: float, tolerance: float) -> None:
    """
    Raises:
        AssertionError: the error is larger than allowed, or NaN.
    """
    assert error <= tolerance, (
        f"{case.op} {case.name}, {way}: the output is wrong by {error:.3g}, "
        f"allowed is {tolerance:.3g}; no speed is reported"
    )


def measure(case: Case, benchmark: Any, roofs: Callable[[str], Roofs]) -> Result | None:
    """Check, then time all ways in turn, round by round, so that what disturbs the machine disturbs
    them alike. None when pytest-benchmark is told to disable timing.

    Raises:
        AssertionError: an output is wrong.
    """
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    error = error_of(case.call(), case.want)
    refuse_wrong(case, f"backend {case.backend}", error, case.tolerance)
    peak = torch.cuda.max_memory_allocated() / 2**20 if case.device == "cuda" else None
    if benchmark.disabled:
        benchmark(case.call)
        return None
    for name, call in case.against.items():
        output = call()
        if name not in case.approximate:
            refuse_wrong(case, name, distance_of(output, case.want), case.tolerance_against)
    ways = {"ours": case.call, **case.against}
    traffic = {name: count_calls(ways[name]) for name in ways if name in ("ours", *COUNTED)}
    rounds = {name: repeated(call, case.device) for name, call in ways.items()}
    others: dict[str, list[float]] = {name: [] for name in case.against}

    def rounds_of_others() -> None:
        for name, seconds in others.items():
            seconds.append(rounds[name].run())
            time.sleep(SETTLE_SECONDS)

    benchmark.pedantic(
        rounds["ours"].run,
        setup=rounds_of_others,
        rounds=round_count(sum(round_.seconds for round_ in rounds.values())),
        iterations=1,
    )
    seconds = [second / rounds["ours"].count for second in benchmark.stats.stats.data]
    roof = roofs(case.device)
    result = Result(
        op=case.op,
        case=case.name,
        backend=case.backend,
        device=case.device,
        time=spread(seconds),
        error=error,
        **rates(case.bytes, case.flops, statistics.median(seconds), roof),
        images=case.images,
        peak_mib=peak,
        traffic=traffic,
        against={name: spread(theirs) for name, theirs in others.items()},
        ratio={
            name: statistics.median(a / b for a, b in zip(theirs, seconds, strict=True))
            for name, theirs in others.items()
        },
        skipped=case.skipped,
    )
    benchmark.extra_info.update(asdict(result))
    return result
