"""depthwise_fanout: every backend and instruction set against the float64 reference, and that
against plain layers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    ISAS,
    error_of,
    memory_filled_with_nan,
    results_by_threads,
    value_and_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import depthwise_fanout, native, use_backend
from pnfs.kernels.checks import ACTIVATIONS, STORAGE

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
STORAGE_CPU = (torch.float32, torch.bfloat16)
ALL = ("conv", "avg_pool", "conv", "max_pool")
NORM = ("mean", "var", "gamma", "beta")

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "depthwise_fanout")[0],
    reason=native.has_function("_cpu", "depthwise_fanout")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu", ""),
    *(pytest.param("cpp", "cpu", isa, marks=needs_cpp) for isa in ISAS),
    pytest.param("cuda", "cpu", ""),
    pytest.param("cuda", "cuda", "", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS)


@dataclass(frozen=True)
class Case:
    """The arguments of one call; `tensors` are x, the weights, and the first of mean, var, gamma
    and beta."""

    kinds: tuple[str, ...]
    dilations: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    stride: int = 1
    activation: str = "none"
    stats: bool = True

    def double(self) -> Case:
        return replace(self, tensors=tuple(tensor.double() for tensor in self.tensors))

    def with_x(self, x: Tensor) -> Case:
        return replace(self, tensors=(x, *self.tensors[1:]))


def random_case(
    shape: tuple[int, int, int, int, int],
    kinds: tuple[str, ...] = ALL,
    dilations: tuple[int, ...] | None = None,
    *,
    norm: int = 4,
    activation: str = "relu6",
    stride: int = 1,
    stats: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """`norm`: how many of mean, var, gamma and beta there are: 0, 2, 3 or 4."""
    generator = torch.Generator().manual_seed(seed)
    p, n, c, h, w = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    # Multiples of 1/4: equal values in windows, and none that an activation may cut either way.
    x = (normal(p, n, h, w, c) * 4).round().permute(0, 1, 4, 2, 3) / 4
    weights = [normal(p, c, 3, 3) / 3 for _ in range(kinds.count("conv"))]
    moments = [normal(p, c) / 4, normal(p, c).square() + 0.1, normal(p, c) + 1, normal(p, c) + 0.5]
    dilations = dilations or tuple(range(1, len(weights) + 1))
    tensors = (x.to(dtype), *weights, *moments[:norm])
    return Case(kinds, dilations, tensors, stride, activation, stats)


def call(case: Case) -> tuple[Tensor, ...]:
    x, *rest = case.tensors
    count = case.kinds.count("conv")
    results = depthwise_fanout(
        x, case.kinds, rest[:count], case.dilations, stride=case.stride,
        **dict(zip(NORM, rest[count:], strict=False)), activation=case.activation,
        stats=case.stats,
    )  # fmt: skip
    return tuple(t for result in results for t in (result if case.stats else result[:1]))


def run(case: Case, device: str = "cpu") -> list[Tensor]:
    """The results and the gradients of all tensors."""
    tensors = [tensor.to(device) for tensor in case.tensors]
    return value_and_gradients(lambda *leaves: call(replace(case, tensors=leaves)), tensors)


@contextmanager
def using(backend: str, isa: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, PNFS_ISA=isa), use_backend(backend):
        yield


def check(case: Case, backend: str, device: str, isa: str) -> list[Tensor]:
    x = case.tensors[0]
    with use_backend("torch"):
        want = run(case.double())
    with using(backend if x.numel() else "auto", isa):
        have = run(case, device)
    p, n, c, h, w = x.shape
    assert have[0].dtype == x.dtype
    assert have[0].shape == (p, n, c, -(-h // case.stride), -(-w // case.stride))
    assert have[0].permute(0, 1, 3, 4, 2).is_contiguous()
    for i, (result, right) in enumerate(zip(have, want, strict=True)):
        error, allowed = error_of(result, right), DTYPES[x.dtype]
        assert error <= allowed, f"result {i} is off by {error:.2e}"
    return have


def layers(case: Case) -> tuple[Tensor, ...]:
    """The same by torch's modules, part by part; normalises by the batch's own statistics."""
    x_all, *rest = case.tensors
    count = case.kinds.count("conv")
    weights, gamma, beta = rest[:count], rest[count], rest[count + 1]
    results = []
    index = 0
    for kind in case.kinds:
        maps = []
        for p, x in enumerate(x_all):
            z = F.batch_norm(x, None, None, gamma[p], beta[p], training=True)
            z = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[case.activation](z)
            if kind == "conv":
                d = case.dilations[index]
                taps = weights[index][p, :, None]
                maps.append(F.conv2d(z, taps, None, case.stride, d, d, groups=len(taps)))
            elif kind == "avg_pool":
                ones = F.avg_pool2d(torch.ones_like(z), 3, case.stride, 1)
                maps.append(F.avg_pool2d(z, 3, case.stride, 1) / ones)
            else:
                maps.append(F.max_pool2d(z, 3, case.stride, 1))
        index += kind == "conv"
        y = torch.stack(maps)
        by_channel = y.transpose(1, 2).flatten(2)
        results += [y, by_channel.mean(2), by_channel.var(2, correction=0)]
    return tuple(results)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_reference_equals_plain_layers(activation: str, stride: int) -> None:
    case = random_case((2, 3, 4, 6, 7), activation=activation, stride=stride).double()
    x, w1, w2, _, _, gamma, beta = case.tensors

    def op(*leaves: Tensor) -> tuple[Tensor, ...]:
        by_channel = leaves[0].transpose(1, 2).flatten(2)
        moments = (by_channel.mean(2), by_channel.var(2, correction=0))
        return call(replace(case, tensors=(*leaves[:3], *moments, *leaves[3:])))

    leaves = [x, w1, w2, gamma, beta]
    with use_backend("torch"):
        have = value_and_gradients(op, leaves)
    want = value_and_gradients(lambda *t: layers(replace(case, tensors=t)), leaves)
    for a, b in zip(have, want, strict=True):
        assert error_of(a, b) < 1e-12


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_of_the_reference(stride: int) -> None:
    case = random_case((1, 2, 2, 3, 2), activation="none", stride=stride).double()
    spread = torch.randperm(case.tensors[0].numel()).reshape(case.tensors[0].shape) / 4.0
    leaves = tuple(t.requires_grad_() for t in case.with_x(spread.double()).tensors)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda *t: call(replace(case, tensors=t)), leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_the_float64_reference(
    backend: str, device: str, isa: str, dtype: torch.dtype, stride: int
) -> None:
    for kinds in (("conv",), ("avg_pool", "max_pool"), ALL):
        for norm, activation in ((0, "none"), (0, "relu"), (2, "relu"), (3, "none"), (4, "relu6")):
            case = random_case(
                (2, 2, 36, 7, 9), kinds, norm=norm, activation=activation, stride=stride,
                stats=norm != 2, dtype=dtype,
            )  # fmt: skip
            check(case, backend, device, isa)


@on_every_backend
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shape(backend: str, device: str, isa: str, data: st.DataObject) -> None:
    shape = (
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(0, 3)),
        data.draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 48, 64, 80, 130]))),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 14)),
    )
    kinds = tuple(data.draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=8)))
    most = 2 if backend == "cuda" else 3
    stride, dtype = data.draw(st.integers(1, 2)), data.draw(st.sampled_from(STORAGE_CPU))
    # What a bfloat16 map is rounded by shows in its distance from the mean, and in the gradient
    # through the variance of a few pixels.
    few = shape[1] * (shape[3] // stride) * (shape[4] // stride) < 64
    stats = data.draw(st.booleans()) and not (few and dtype == torch.bfloat16)
    case = random_case(
        shape,
        kinds,
        tuple(data.draw(st.integers(1, most)) for _ in range(kinds.count("conv"))),
        norm=data.draw(st.sampled_from([0, 2, 3, 4])),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        stride=stride,
        stats=stats,
        dtype=dtype,
        seed=data.draw(st.integers(0, 99)),
    )
    check(case, backend, device, isa)


@on_every_backend
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 16, 64, 48), (1, 6, 32, 112, 104), (2, 13, 8, 6, 5)])
def test_every_way_to_cut_the_work(
    backend: str, device: str, isa: str, stride: int, shape: tuple[int, int, int, int, int]
) -> None:
    """An image in bands; results that bypass the caches; several images to a piece."""
    check(random_case(shape, ("conv", "max_pool"), (2,), stride=stride), backend, device, isa)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str, isa: str) -> None:
    """Of x and of the results: no more digits are lost than the float32 inputs lack already."""
    case = random_case((2, 3, 20, 16, 15), ("avg_pool", "max_pool"), norm=0, activation="none")
    case = case.with_x(case.tensors[0] + 1e3)
    with use_backend("torch"):
        want = call(case.double())
    with using(backend, isa):
        have = call(case)
    for i in (1, 4):
        torch.testing.assert_close(have[i].double(), want[i], rtol=1e-6, atol=0)
        torch.testing.assert_close(have[i + 1].double(), want[i + 1], rtol=1e-3, atol=0)
    normalised = random_case((2, 3, 20, 16, 15))
    x, w1, w2, mean, *rest = normalised.tensors
    far = replace(
        normalised, tensors=(x + 256, w1, w2, (mean * 64).round() / 64 + 256, *rest)
    )  # exact in float32
    check(far, backend, device, isa)


@on_every_backend
def test_any_layout(backend: str, device: str, isa: str) -> None:
    case = random_case((3, 2, 16, 6, 5))
    x = case.tensors[0]
    plain = check(case, backend, device, isa)
    contiguous = check(case.with_x(x.contiguous()), backend, device, isa)
    strided = check(case.with_x(torch.stack((x, x), -1)[..., 0]), backend, device, isa)
    shared = check(case.with_x(x[:1].expand_as(x)), backend, device, isa)
    turned = tuple(t.mT.contiguous().mT if t.ndim == 4 else t for t in case.tensors)
    for other in (contiguous, strided, check(replace(case, tensors=turned), backend, device, isa)):
        assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[0][1], shared[0][1])


@on_every_backend
def test_results_without_a_gradient(backend: str, device: str, isa: str) -> None:
    """A loss of one map alone, and one of one map's statistics alone."""
    case = random_case((2, 2, 16, 5, 6))
    for kept in (0, 4, 8):

        def some(*leaves: Tensor, kept: int = kept) -> Tensor:
            used = 0 * sum(leaf.sum() for leaf in leaves)  # torch.autograd.grad wants all used
            return call(replace(case, tensors=leaves))[kept] + used

        with use_backend("torch"):
            want = value_and_gradients(some, [t.double() for t in case.tensors])
        with using(backend, isa):
            have = value_and_gradients(some, [t.to(device) for t in case.tensors])
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= DTYPES[torch.float32]


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_spoils_its_neighbours_alone(
    backend: str, device: str, isa: str, bad: float
) -> None:
    case = random_case((1, 2, 16, 7, 8), norm=0, activation="none", stats=False)
    case.tensors[0][0, 1, 3, 2, 4] = bad
    with use_backend("torch"):
        want = call(case.double())
    with using(backend, isa):
        have = call(case)
    for result, right in zip(have, want, strict=True):
        assert torch.equal(result.isfinite(), right.isfinite())
        assert torch.equal(result.isnan(), right.isnan())


@on_every_backend
def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_values(
    backend: str, device: str, isa: str
) -> None:
    flat = torch.zeros(1, 1, 5, 4, 4).requires_grad_()
    with using(backend, isa):
        ((y, _, _),) = depthwise_fanout(flat, ["max_pool"], stats=False)
        (gradient,) = torch.autograd.grad(y.sum(), flat)
    # Windows are cut at the border, so four of them start at (0, 0).
    right = torch.tensor([[4.0, 2, 2, 0], [2, 1, 1, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    assert torch.equal(gradient, right.expand(1, 1, 5, 4, 4))


@on_every_backend
def test_weights_of_the_maps_type(backend: str, device: str, isa: str) -> None:
    case = random_case((2, 2, 16, 5, 6), dtype=torch.bfloat16)
    half = tuple(t.bfloat16() if t.ndim == 4 else t for t in case.tensors)
    have = check(replace(case, tensors=half), backend, device, isa)
    assert have[13].dtype == torch.bfloat16


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
        x, w1, w2, *given_ = (tensor.requires_grad_() for tensor in case.tensors)
        moments = [*given_, *[None] * (4 - norm)]
        args = (x, [1, 0, 2, -1], [w1, w2], *moments, 2, "relu6", stats, 1e-5)
        torch.library.opcheck(torch.ops.pnfs.depthwise_fanout_cpp.default, args)


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
