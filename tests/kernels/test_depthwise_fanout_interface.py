"""What callers and torch rely on in depthwise_fanout: what is refused and by which words, opcheck,
torch.compile, every value written and the same in every run."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from depthwise_fanout_cases import ALL, STORAGE_CPU, call, check, needs_cpp, random_case, run, using
from numerics import (
    ISAS,
    memory_filled_with_nan,
    opcheck,
    results_by_threads,
    value_and_gradients,
)
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import depthwise_fanout, use_backend
from pnfs.kernels.checks import STORAGE


def test_without_stats_there_are_none() -> None:
    for backend in ("torch", "auto"):
        with use_backend(backend):
            ((_, mean, var),) = depthwise_fanout(
                torch.ones(1, 1, 4, 3, 3), ["avg_pool"], stats=False
            )
        assert mean.shape == var.shape == (0,)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_value_is_written_and_equal_in_every_run(isa: str, stride: int) -> None:
    for shape in ((3, 3, 80, 17, 19), (1, 1, 16, 40, 33)):
        case = random_case(shape, stride=stride)
        with using("cpp", isa), memory_filled_with_nan():
            runs = results_by_threads(lambda case=case: run(case))  # type: ignore[misc]
        assert not any(tensor.isnan().any() for tensor in runs[0])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize("norm", [0, 4])
def test_opcheck(dtype: torch.dtype, norm: int) -> None:
    for stats in (True, False):
        case = random_case((2, 2, 5, 3, 4), norm=norm, dtype=dtype, stats=stats, stride=2)
        x, w1, w2, *given_ = case.tensors
        moments = [*given_, *[None] * (4 - norm)]
        args = (x, [1, 0, 2, -1], [w1, w2], *moments, 2, "relu6", stats, 1e-5)
        opcheck("depthwise_fanout_cpp", *args)


@needs_cpp
def test_torch_compile_keeps_the_op_and_its_gradient() -> None:
    case = random_case((2, 2, 16, 4, 4))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * result for result in call(replace(case, tensors=tensors)))

    have = value_and_gradients(compiled, case.tensors)
    results = 3 * len(ALL)
    for i, (a, b) in enumerate(zip(have, run(case), strict=True)):
        assert torch.equal(a, 2 * b), f"{'result' if i < results else 'gradient'} {i}"


@needs_cpp
def test_what_cpp_cannot_run_goes_to_the_reference() -> None:
    for case, reason in (
        (random_case((2, 1, 4, 3, 3)).double(), "x is float64, takes float32, bfloat16"),
        (random_case((2, 0, 4, 3, 3)), "the batch is empty"),
    ):
        with use_backend("cpp"), pytest.raises(PnfsError, match=reason):
            call(case)
        run(case)


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 1, 4, 3, 3),
    "kinds": ["conv", "max_pool"],
    "weights": [torch.zeros(2, 4, 3, 3)],
    "mean": torch.zeros(2, 4),
    "var": torch.ones(2, 4),
    "gamma": torch.ones(2, 4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 3, 3)}, "x must have shape"),
        ({"x": torch.zeros(2, 1, 4, 3, 3).int()}, "x must be float32 or bfloat16"),
        ({"x": torch.zeros(2, 1, 4, 0, 3)}, "must have parts, channels and pixels"),
        ({"x": torch.zeros(2, 1, 4, 3, 3).double()}, r"weights\[0\] must be float64, not float32"),
        ({"kinds": []}, "kinds must name 1 to 8 stencils, not 0"),
        ({"kinds": ["conv"] * 9}, "kinds must name 1 to 8 stencils, not 9"),
        ({"kinds": ["conv", "maxpool"]}, "kind 'maxpool' is unknown; use conv, .*max_pool"),
        ({"activation": "relu7"}, "activation 'relu7' is unknown; use none, relu, relu6"),
        ({"weights": []}, "weights must have one entry per convolution, 1, not 0"),
        ({"dilations": [1, 2]}, "dilations must have one entry per convolution, 1, not 2"),
        ({"dilations": [0]}, "dilations must be at least 1"),
        ({"stride": 3}, "stride must be 1 or 2, not 3"),
        ({"weights": [torch.zeros(2, 4, 1, 3, 3)]}, r"weights\[0\] must have shape \(2, 4, 3, 3\)"),
        ({"mean": None}, "mean and var must be given both or neither"),
        ({"mean": None, "var": None}, "gamma and beta need mean and var"),
        ({"var": torch.ones(2, 5)}, r"var must have shape \(2, 4\)"),
        ({"beta": torch.zeros(2, 4, device="meta")}, "beta is on meta but x is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PnfsError, match=message):
        depthwise_fanout(**{**GOOD, **change})


@pytest.mark.parametrize(("backend", "device"), [("cuda", "cpu")])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("channels", [24, 37, 40])
def test_blocks_in_any_order_write_every_value(
    backend: str, device: str, dtype: torch.dtype, channels: int
) -> None:
    """In packets of 16 bytes and without, in one chunk of channels and in two."""
    for stride in (1, 2):
        case = random_case((1, 2, channels, 9, 17), stride=stride, dtype=dtype)
        with memory_filled_with_nan():
            first = check(case, backend, device, "")
            with mock.patch.dict(os.environ, PNFS_EMULATED_ORDER="reversed"), use_backend(backend):
                other = run(case, device)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("backend", "device"), [("cuda", "cpu")])
def test_cuda_takes_dilations_1_and_2(backend: str, device: str) -> None:
    case = random_case((1, 1, 4, 3, 3), ("conv",), (3,))
    with use_backend(backend), pytest.raises(PnfsError, match="dilation 3, takes 1 and 2"):
        call(case)
