"""strided_conv: every backend and instruction set against the float64 reference, and that against
plain layers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    ISAS,
    check_every_value_is_written_and_equal_in_every_run,
    error_of,
    examples,
    memory_filled_with_nan,
    opcheck,
    results_by_threads,
    value_and_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import SharedMap, native, strided_conv, use_backend
from pnfs.kernels.registry import op_costs

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "strided_conv")[0],
    reason=native.has_function("_cpu", "strided_conv")[1] or "-",
)
INTERPRETED = native.triton_interpreted()  # Triton's kernels run in its interpreter
if INTERPRETED:  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-6
BACKENDS = [
    pytest.param("torch", "cpu", ""),
    *(pytest.param("cpp", "cpu", isa, marks=needs_cpp) for isa in ("avx512", "avx2", "portable")),
    pytest.param("triton", "cpu", ""),
    pytest.param("triton", "cuda", "", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS)
on_every_kernel = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS[1:])
on_triton = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS[4:])

Inputs = list[Tensor]  # x, weight, and bias if there is one


def random_inputs(
    shape: tuple[int, int, int, int, int],
    out: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    p, n, c, h, w = shape
    x = torch.randn(p, n, h, w, c, generator=generator).permute(0, 1, 4, 2, 3).to(dtype)
    weight = torch.randn(p, out, c, 3, 3, generator=generator) / (3 * c**0.5)
    return [x, weight, *([torch.randn(p, out, generator=generator)] if bias else [])]


def call(*inputs: Tensor, stats: bool = True) -> tuple[Tensor, ...]:
    y, mean, var = strided_conv(*inputs, stats=stats)
    return (y, mean, var) if stats else (y,)


@contextmanager
def using(backend: str, isa: str) -> Iterator[None]:
    if isa and isa not in ISAS:
        pytest.skip(f"this CPU has no {isa}")
    with mock.patch.dict(os.environ, PNFS_ISA=isa), use_backend(backend):
        yield


def check(
    inputs: Inputs, backend: str, device: str, isa: str, *, stats: bool = True
) -> list[Tensor]:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return call(*leaves, stats=stats)

    with use_backend("torch"):
        want = value_and_gradients(run, [tensor.double() for tensor in inputs])
    with using(backend if inputs[0].numel() else "auto", isa):
        have = value_and_gradients(run, [tensor.to(device) for tensor in inputs])
    p, n, _, h, w = inputs[0].shape
    assert have[0].dtype == inputs[0].dtype
    assert have[0].shape == (p, n, inputs[1].shape[1], (h + 1) // 2, (w + 1) // 2)
    assert have[0].permute(0, 1, 3, 4, 2).is_contiguous()
    names = ["y", "mean_y", "var_y"][: 3 if stats else 1]
    names += [f"gradient of {name}" for name in ("x", "weight", "bias")[: len(inputs)]]
    allowed = DTYPES[inputs[0].dtype] * (2 if device == "cuda" else 1)  # factors are rounded too
    for name, result, right in zip(names, have, want, strict=True):
        error = error_of(result, right)
        assert error <= allowed, f"{name} is off by {error:.2e}"
    return have


def test_the_reference_equals_plain_layers() -> None:
    x, weight, bias = (t.double() for t in random_inputs((3, 2, 5, 6, 7), 4))

    def plain(*leaves: Tensor) -> tuple[Tensor, ...]:
        y = torch.stack(
            [F.conv2d(*part, stride=2, padding=1) for part in zip(*leaves, strict=True)]
        )
        by_channel = y.transpose(1, 2).flatten(2)
        return y, by_channel.mean(2), by_channel.var(2, correction=0)

    with use_backend("torch"):
        have = value_and_gradients(call, [x, weight, bias])
    for a, b in zip(have, value_and_gradients(plain, [x, weight, bias]), strict=True):
        assert error_of(a, b) < 1e-12


def test_gradcheck_of_the_reference() -> None:
    leaves = [t.double().requires_grad_() for t in random_inputs((2, 2, 2, 3, 4), 2)]
    with use_backend("torch"):
        assert torch.autograd.gradcheck(call, leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stats", [True, False])
def test_equals_the_float64_reference(
    backend: str, device: str, isa: str, dtype: torch.dtype, bias: bool, stats: bool
) -> None:
    for size in ((5, 4),) if INTERPRETED else ((14, 18), (13, 17)):
        c, out = (20, 12) if INTERPRETED else (36, 80)
        inputs = random_inputs((2, 2, c, *size), out, bias=bias, dtype=dtype)
        check(inputs, backend, device, isa, stats=stats)


@on_every_backend
def test_any_shape(backend: str, device: str, isa: str) -> None:
    @examples(6 if INTERPRETED else 25, device)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        check_any_shape(data, backend, device, isa)

    any_case()


def check_any_shape(data: st.DataObject, backend: str, device: str, isa: str) -> None:
    channels = st.one_of(
        st.integers(1, 20), st.sampled_from([32] if INTERPRETED else [32, 48, 64, 80, 130])
    )
    shape = (
        data.draw(st.integers(1, 2 if INTERPRETED else 8)),
        data.draw(st.integers(0, 3)),
        data.draw(channels),
        data.draw(st.integers(1, 7 if INTERPRETED else 17)),
        data.draw(st.integers(1, 9 if INTERPRETED else 23)),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    # The gradient through var_y is 2 (y - mean_y) / count, of a y that was rounded to its storage:
    # over a handful of bfloat16 values that rounding is all there is of it.
    enough = dtype != torch.bfloat16 or shape[1] * shape[3] * shape[4] >= 256
    inputs = random_inputs(
        shape,
        data.draw(channels),
        bias=data.draw(st.booleans()),
        dtype=dtype,
        seed=data.draw(st.integers(0, 99)),
    )
    check(inputs, backend, device, isa, stats=data.draw(st.booleans()) and enough)


@on_every_kernel
@pytest.mark.parametrize(
    ("shape", "out"),
    [((1, 1, 70, 3, 2), 130), ((2, 1, 8, 25, 22), 8)]  # blocks of every axis
    if INTERPRETED
    else [
        ((1, 1, 16, 64, 48), 16),  # an image in blocks
        ((2, 14, 32, 16, 12), 130),  # several images to a piece of the weights' gradient
        ((1, 6, 32, 112, 104), 96),  # results that bypass the caches
        ((1, 1, 16, 5, 700), 16),  # rows longer than a block
        ((1, 2, 100, 8, 6), 300),
    ],
)
def test_every_way_to_cut_the_work(
    backend: str, device: str, isa: str, shape: tuple[int, int, int, int, int], out: int
) -> None:
    check(random_inputs(shape, out), backend, device, isa)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str, isa: str) -> None:
    x, weight = random_inputs((2, 3, 20, 16, 15), 24, bias=False)
    x[..., 1:, 1:] += 1e3
    inputs = [x[..., 1:, 1:].abs().clone(), weight.abs(), torch.full((2, 24), 1e3)]
    with use_backend("torch"):
        want = call(*(tensor.double() for tensor in inputs))
    with using(backend, isa):
        have = [result.cpu() for result in call(*(tensor.to(device) for tensor in inputs))]
    torch.testing.assert_close(have[1].double(), want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(have[2].double(), want[2], rtol=1e-4, atol=0)


@on_every_backend
def test_any_layout(backend: str, device: str, isa: str) -> None:
    x, weight, bias = random_inputs((2, 1, 8, 4, 3) if INTERPRETED else (3, 2, 16, 6, 5), 8)
    plain = check([x, weight, bias], backend, device, isa)
    contiguous = check([x.contiguous(), weight, bias], backend, device, isa)
    strided = check([torch.stack((x,) * 2, -1)[..., 0], weight, bias], backend, device, isa)
    turned = check([x, weight.mT.contiguous().mT, bias], backend, device, isa)
    check([x[:1].expand_as(x), weight, bias], backend, device, isa)
    for other in (contiguous, strided, turned):
        assert torch.equal(plain[0], other[0])


@on_every_backend
def test_results_without_a_gradient(backend: str, device: str, isa: str) -> None:
    """A loss of y alone, and one of the statistics alone."""
    inputs = random_inputs((1, 1, 8, 3, 4) if INTERPRETED else (2, 2, 16, 5, 6), 24)
    for kept in (slice(0, 1), slice(1, 2), slice(2, 3)):

        def some(*leaves: Tensor, kept: slice = kept) -> tuple[Tensor, ...]:
            return call(*leaves)[kept]

        with use_backend("torch"):
            want = value_and_gradients(some, [t.double() for t in inputs])
        with using(backend, isa):
            have = value_and_gradients(some, [t.to(device) for t in inputs])
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= DTYPES[torch.float32]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_map_with_several_readers(
    backend: str, device: str, isa: str, dtype: torch.dtype
) -> None:
    """Two convolutions read x, and after them a square, or nothing."""
    inputs = random_inputs((1, 2, 8, 5, 4) if INTERPRETED else (2, 3, 20, 9, 7), 16, dtype=dtype)

    def readers(share: bool, used: bool) -> Any:
        def call_all(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            shared: Any = SharedMap(x)
            first = call(shared if share else x, *weights)
            second = call(shared if share else x, *weights, stats=False)
            return (*first, *second, *([shared.map.square()] if used else []))

        return call_all

    for used in (True, False):
        with use_backend("torch"):
            want = value_and_gradients(readers(False, used), [t.double() for t in inputs])
        with using(backend, isa), memory_filled_with_nan():
            have = value_and_gradients(readers(True, used), [t.to(device) for t in inputs])
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= 2 * DTYPES[dtype]


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_spoils_its_neighbours_alone(
    backend: str, device: str, isa: str, bad: float
) -> None:
    x, weight, bias = random_inputs((1, 2, 16, 9, 11), 20)
    x[0, 1, 3, 4, 10] = x[0, 1, 3, 7, 3] = bad
    with use_backend("torch"):
        want = call(x.double(), weight.double(), bias.double())[0]
    with using(backend, isa):
        have = call(x.to(device), weight.to(device), bias.to(device))[0].cpu()
    assert torch.equal(have.isfinite(), want.isfinite())


@on_every_backend
def test_weights_of_the_maps_type(backend: str, device: str, isa: str) -> None:
    inputs = random_inputs((2, 2, 16, 16, 10), 8, dtype=torch.bfloat16)
    have = check([tensor.bfloat16() for tensor in inputs], backend, device, isa)
    assert have[-2].dtype == torch.bfloat16


def test_without_stats_there_are_none() -> None:
    for backend in ("torch", "auto"):
        with use_backend(backend):
            _, mean, var = strided_conv(*random_inputs((1, 1, 4, 3, 3), 2), stats=False)
        assert mean.shape == var.shape == (0,)


@on_triton
def test_triton_writes_every_value_and_the_same_in_every_run(
    backend: str, device: str, isa: str
) -> None:
    inputs = [t.to(device) for t in random_inputs((2, 2, 8, 7, 6), 24)]
    with using(backend, isa):
        check_every_value_is_written_and_equal_in_every_run(
            lambda: value_and_gradients(call, inputs)
        )


@on_triton
def test_many_sums_are_merged_by_a_second_launch(
    backend: str, device: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [t.to(device) for t in random_inputs((2, 3, 20, 9, 10), 40)]
    with using(backend, isa):
        by_the_last = call(*inputs)
        monkeypatch.setattr("pnfs.kernels.triton.products.MERGED", 0)
        by_a_launch = call(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(by_the_last, by_a_launch, strict=True))


@on_triton
@pytest.mark.parametrize("stats", [True, False])
def test_opcheck_of_triton(backend: str, device: str, isa: str, stats: bool) -> None:
    inputs = [t.to(device) for t in random_inputs((1, 1, 5, 3, 4), 6)]
    opcheck("strided_conv_triton", *inputs, stats)


def test_what_a_gpu_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "backend_available", lambda *_: (True, ""))
    monkeypatch.setattr(native, "backend_fits", lambda *_: (True, ""))
    x, weight, bias = random_inputs((1, 1, 2, 1, 1), 2)
    meta = [tensor.to("meta") for tensor in (x, weight, bias)]
    pixels = torch.empty(1, 2**10, 2**10, 2**10, 2, device="meta").permute(0, 1, 4, 2, 3)
    for inputs, message in [
        ([tensor.double() for tensor in (x, weight, bias)], "x is float64, takes float32, bf"),
        ([x[:, :0], weight, bias], "the batch is empty"),
        ([pixels, *meta[1:]], "1073741824 pixels in a part, takes less than 1073741824"),
    ]:
        with use_backend("triton"), pytest.raises(PnfsError, match=message):
            strided_conv(*inputs)


def test_costs_of_the_gpu() -> None:
    """Statistics of 288 blocks of 64 pixels are merged by a second launch, those of 72 by the
    last program."""
    pytest.importorskip("triton", reason="triton is not installed")
    for size, launches in (((64, 48), 2), ((32, 24), 1)):
        x, weight, bias = (t.to("meta") for t in random_inputs((3, 24, 16, *size), 128))
        forward = op_costs["pnfs::strided_conv_triton"](
            (x, weight, bias, True), (x[..., ::2, ::2],)
        )
        pixels = 24 * size[0] * size[1] // 4
        assert forward.launches == launches
        assert forward.scratch == 2 * 4 * 2 * 3 * 128 * pixels // 64
        assert forward.conv_macs == pixels * weight.numel()


@needs_cpp
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_value_is_written_and_equal_in_every_run(isa: str) -> None:
    for inputs in (random_inputs((3, 3, 80, 17, 19), 70), random_inputs((1, 1, 16, 40, 34), 8)):
        with using("cpp", isa), memory_filled_with_nan():
            runs = results_by_threads(lambda i=inputs: value_and_gradients(call, i))  # type: ignore[misc]
        assert not any(tensor.isnan().any() for tensor in runs[0])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stats", [True, False])
def test_opcheck(dtype: torch.dtype, stats: bool) -> None:
    inputs = [t.requires_grad_() for t in random_inputs((2, 2, 5, 3, 4), 6, dtype=dtype)]
    torch.library.opcheck(torch.ops.pnfs.strided_conv_cpp.default, (*inputs, stats))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \(any, any, any, any, any\)"),
        ({"x": torch.zeros(2, 1, 4, 5, 5, dtype=torch.int32)}, "x must be float32"),
        ({"weight": torch.zeros(2, 3, 5, 3, 3)}, r"weight must have shape \(2, any, 4, 3, 3\)"),
        ({"weight": torch.zeros(2, 0, 4, 3, 3)}, "must have parts, channels and pixels"),
        ({"bias": torch.zeros(2, 4)}, r"bias must have shape \(2, 3\)"),
        ({"bias": torch.zeros(2, 3, dtype=torch.float64)}, "bias must be float32"),
        ({"bias": torch.zeros(2, 3, device="meta")}, "bias is on meta but x is on cpu"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    right = {
        "x": torch.zeros(2, 1, 4, 5, 5),
        "weight": torch.zeros(2, 3, 4, 3, 3),
        "bias": torch.zeros(2, 3),
    }
    with pytest.raises(PnfsError, match=message):
        strided_conv(**(right | change))
