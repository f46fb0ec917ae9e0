"""What callers and torch rely on in separable_conv: what is refused and by which words, opcheck,
torch.compile, every value written and the same in every run."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from numerics import (
    check_every_value_is_written_and_equal_in_every_run,
    memory_filled_with_nan,
    opcheck,
    value_and_gradients,
)
from separable_conv_cases import AFFINE, call, needs_cpp, on_triton, random_case, run, using
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import SharedMap, checks, native, separable_conv, use_backend
from pnfs.kernels.checks import STORAGE_CPU


def test_parts_that_share_a_map_are_not_copied() -> None:
    x = torch.randn(2, 4, 5, 16).permute(0, 3, 1, 2).expand(3, 2, 16, 4, 5)
    assert checks.as_stacked(x) is x


def test_without_stats_there_are_none() -> None:
    case = random_case((1, 1, 4, 3, 3), 2)
    for backend in ("torch", "auto"):
        with use_backend(backend):
            _, mean, var = separable_conv(case.x, case.pointwise, stats=False)
        assert mean.shape == var.shape == (0,)


@on_triton
def test_triton_writes_every_value_and_the_same_in_every_run(
    backend: str, device: str, isa: str
) -> None:
    for case in (random_case((2, 1, 20, 5, 7), 24), random_case((1, 1, 3, 1, 1), 2, "")):
        with using(backend, isa), memory_filled_with_nan():
            first, second = (run(case, device) for _ in range(2))
        assert not any(tensor.isnan().any() for tensor in first)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_triton
@pytest.mark.parametrize("options", ["", AFFINE])
def test_opcheck_of_triton(backend: str, device: str, isa: str, options: str) -> None:
    case = random_case((2, 1, 5, 3, 4), 6, options)
    tensors = (case.x, case.pointwise, case.depthwise, case.bias, case.mean, case.var)
    tensors = tuple(None if tensor is None else tensor.to(device) for tensor in tensors)
    affine = [None if tensor is None else tensor.to(device) for tensor in (case.gamma, case.beta)]
    opcheck("separable_conv_triton", *tensors, 1, True, 1e-5, *affine, "relu")


def test_what_a_gpu_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "backend_available", lambda *_: (True, ""))
    monkeypatch.setattr(native, "backend_fits", lambda *_: (True, ""))
    case = random_case((1, 1, 2, 1, 1), 2)
    pixels = torch.empty(1, 2**10, 2**10, 2**10, 2, device="meta").permute(0, 1, 4, 2, 3)
    meta = case.with_tensors(tuple(tensor.to("meta") for tensor in case.tensors.values()))
    for other, message in [
        (case.double(), "x is float64, takes float32, bfloat16, float16"),
        (replace(case, x=case.x[:, :0]), "the batch is empty"),
        (replace(meta, x=pixels), "1073741824 pixels in a part, takes less than 1073741824"),
    ]:
        with use_backend("triton"), pytest.raises(PnfsError, match=message):
            call(other)


@needs_cpp
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_value_is_written_and_equal_in_every_run(isa: str) -> None:
    for case in (random_case((3, 3, 80, 17, 19), 70), random_case((1, 1, 16, 40, 33), 8, "")):
        with using("cpp", isa):
            check_every_value_is_written_and_equal_in_every_run(partial(run, case))


@needs_cpp
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize("options", ["", "depthwise bias normalised", AFFINE])
def test_opcheck(dtype: torch.dtype, options: str) -> None:
    for stats in (True, False):
        case = random_case((2, 2, 5, 3, 4), 6, options, dtype=dtype, stats=stats)
        tensors = (case.x, case.pointwise, case.depthwise, case.bias, case.mean, case.var)
        rest = (case.dilation, stats, 1e-5, case.gamma, case.beta, case.activation)
        opcheck("separable_conv_cpp", *tensors, *rest)


@needs_cpp
def test_torch_compile_keeps_the_op_and_its_gradient() -> None:
    case = random_case((2, 2, 16, 4, 4), 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * result for result in call(case.with_tensors(tensors)))

    have = value_and_gradients(compiled, list(case.tensors.values()))
    for a, b in zip(have, run(case), strict=True):
        assert torch.equal(a, 2 * b)


@needs_cpp
def test_torch_compile_keeps_a_map_with_several_readers() -> None:
    case = random_case((2, 2, 16, 4, 4), 8)

    def readers(*tensors: Tensor) -> tuple[Tensor, ...]:
        x: Any = SharedMap(tensors[0])
        y, mean, var = call(replace(case.with_tensors(tensors), x=x))
        return y, mean, var, x.map * 3

    compiled = torch.compile(readers, fullgraph=True, backend="aot_eager")
    have = value_and_gradients(compiled, list(case.tensors.values()))
    want = value_and_gradients(readers, list(case.tensors.values()))
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


@needs_cpp
def test_an_instruction_set_that_is_unknown_is_named() -> None:
    message = "PNFS_ISA is 'avx1024'; use amx, avx512_bf16, avx512, avx2 or portable"
    case = random_case((1, 1, 4, 3, 3), 2)
    environment = mock.patch.dict(os.environ, PNFS_ISA="avx1024")
    with use_backend("cpp"), environment, pytest.raises(RuntimeError, match=message):
        run(case)


@needs_cpp
@pytest.mark.parametrize(
    ("change", "reason"),
    [("double", "x is float64, takes float32, bfloat16"), ("empty", "the batch is empty")],
)
def test_what_cpp_cannot_run_goes_to_the_reference(change: str, reason: str) -> None:
    case = random_case((2, 0 if change == "empty" else 1, 4, 3, 3), 5)
    case = case.double() if change == "double" else case
    with use_backend("cpp"), pytest.raises(PnfsError, match=reason):
        run(case)
    run(case)


GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 1, 4, 3, 3),
    "pointwise": torch.zeros(2, 5, 4),
    "depthwise": torch.zeros(2, 4, 3, 3),
    "bias": torch.zeros(2, 5),
    "mean": torch.zeros(2, 4),
    "var": torch.ones(2, 4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 4, 3, 3)}, "x must have shape"),
        ({"x": torch.zeros(2, 1, 4, 3, 3).int()}, "x must be float32 or bfloat16"),
        ({"x": torch.zeros(2, 1, 4, 0, 3)}, "must have parts, channels and pixels"),
        ({"x": torch.zeros(2, 1, 4, 3, 3).double()}, "pointwise must be float64, not float32"),
        ({"pointwise": torch.zeros(2, 5, 3)}, r"pointwise must have shape \(2, any, 4\)"),
        ({"pointwise": torch.zeros(2, 5, 4).half()}, "pointwise must be float32, not float16"),
        ({"depthwise": torch.zeros(2, 4, 1, 3, 3)}, r"depthwise must have shape \(2, 4, 3, 3\)"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(2, 5\)"),
        ({"mean": None}, "mean and var must be given both or neither"),
        ({"var": torch.ones(2, 5)}, r"var must have shape \(2, 4\)"),
        ({"gamma": torch.ones(2, 5)}, r"gamma must have shape \(2, 4\)"),
        ({"beta": torch.ones(2, 4).double()}, "beta must be float32, not float64"),
        ({"mean": None, "var": None, "gamma": torch.ones(2, 4)}, "gamma and beta need mean"),
        ({"activation": "relu5"}, "activation 'relu5' is unknown; use none, relu, relu6"),
        ({"dilation": 0}, "dilation must be at least 1, not 0"),
        ({"bias": torch.zeros(2, 5, device="meta")}, "bias is on meta but x is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {**GOOD, **change}
    with pytest.raises(PnfsError, match=message):
        separable_conv(arguments.pop("x"), arguments.pop("pointwise"), **arguments)
