"""separable_conv: every backend and instruction set against the float64 reference, and that against
plain layers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    check_every_value_is_written_and_equal_in_every_run,
    error_of,
    memory_filled_with_nan,
    opcheck,
    value_and_gradients,
)
from torch import Tensor
from torch.nn import functional as F

from pnfs.errors import PnfsError
from pnfs.kernels import SharedMap, checks, native, separable_conv, use_backend
from pnfs.kernels.checks import ACTIVATIONS, STORAGE_CPU, Activation, activate

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INTERPRETED = native.triton_interpreted()  # Triton's kernels run in its interpreter
if INTERPRETED:  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-6
# It takes milliseconds per program: few random shapes and small maps.
EXAMPLES, SIDE = (2, 4) if INTERPRETED else (25, 14)
SHAPE, OUT = ((2, 1, 36, 5, 4), 20) if INTERPRETED else ((2, 2, 36, 7, 9), 80)
AFFINE = "depthwise bias normalised gamma beta"

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "separable_conv")[0],
    reason=native.has_function("_cpu", "separable_conv")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu", ""),
    *(pytest.param("cpp", "cpu", isa, marks=needs_cpp) for isa in ("avx512", "avx2", "portable")),
    pytest.param("triton", "cpu", ""),
    pytest.param("triton", "cuda", "", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS)
on_every_kernel = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS[1:])
on_triton = pytest.mark.parametrize(("backend", "device", "isa"), BACKENDS[4:])


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    x: Tensor
    pointwise: Tensor
    depthwise: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    activation: Activation = "relu"
    dilation: int = 1
    stats: bool = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Case:
        return replace(self, **dict(zip(self.tensors, tensors, strict=True)))

    def double(self) -> Case:
        return self.with_tensors(tuple(tensor.double() for tensor in self.tensors.values()))


def random_case(
    shape: tuple[int, int, int, int, int],
    out: int,
    options: str = "depthwise bias normalised",
    *,
    activation: Activation = "relu",
    dilation: int = 1,
    stats: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """`options`: which of depthwise, bias, normalised (mean and var), gamma and beta there are."""
    generator = torch.Generator().manual_seed(seed)
    p, n, c, h, w = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return Case(
        normal(p, n, h, w, c).permute(0, 1, 4, 2, 3).to(dtype),
        normal(p, out, c) / c**0.5,
        normal(p, c, 3, 3) / 3 if "depthwise" in options else None,
        normal(p, out) if "bias" in options else None,
        normal(p, c) / 4 if "normalised" in options else None,
        normal(p, c).square() + 0.1 if "normalised" in options else None,
        normal(p, c) + 1 if "gamma" in options else None,
        normal(p, c) + 0.5 if "beta" in options else None,
        activation,
        dilation,
        stats,
    )


def call(case: Case) -> tuple[Tensor, ...]:
    y, mean, var = separable_conv(
        case.x, case.pointwise, depthwise=case.depthwise, bias=case.bias, mean=case.mean,
        var=case.var, gamma=case.gamma, beta=case.beta, activation=case.activation,
        dilation=case.dilation, stats=case.stats,
    )  # fmt: skip
    return (y, mean, var) if case.stats else (y,)


def run(case: Case, device: str = "cpu") -> list[Tensor]:
    """The results and the gradients of all tensors."""
    tensors = [tensor.to(device) for tensor in case.tensors.values()]
    return value_and_gradients(lambda *leaves: call(case.with_tensors(leaves)), tensors)


@cache
def cpu_has(isa: str) -> bool:
    tiny = random_case((1, 1, 1, 1, 1), 1)
    with mock.patch.dict(os.environ, PNFS_ISA=isa), use_backend("cpp"):
        try:
            call(tiny)
        except RuntimeError:
            return False
    return True


@contextmanager
def using(backend: str, isa: str) -> Iterator[None]:
    if isa and not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    with mock.patch.dict(os.environ, PNFS_ISA=isa), use_backend(backend):
        yield


def check(case: Case, backend: str, device: str, isa: str) -> list[Tensor]:
    with use_backend("torch"):
        want = run(case.double())
    with using(backend if case.x.numel() else "auto", isa):
        have = run(case, device)
    p, n, _, h, w = case.x.shape
    assert have[0].dtype == case.x.dtype
    assert have[0].shape == (p, n, case.pointwise.shape[1], h, w)
    assert have[0].permute(0, 1, 3, 4, 2).is_contiguous()
    names = ["y", "mean_y", "var_y"][: 3 if case.stats else 1]
    names += [f"gradient of {name}" for name in case.tensors]
    for name, result, right in zip(names, have, want, strict=True):
        error, allowed = error_of(result, right), DTYPES[case.x.dtype]
        assert error <= allowed, f"{name} is off by {error:.2e}"
    return have


def layers(case: Case) -> tuple[Tensor, ...]:
    """The same by torch's modules, part by part; normalises by the batch's own statistics."""
    outputs = []
    for p, x in enumerate(case.x):
        if case.mean is not None:
            affine = [None if t is None else t[p] for t in (case.gamma, case.beta)]
            x = activate(F.batch_norm(x, None, None, *affine, training=True), case.activation)
        if case.depthwise is not None:
            d = case.dilation
            x = F.conv2d(x, case.depthwise[p, :, None], padding=d, dilation=d, groups=x.shape[1])
        bias = None if case.bias is None else case.bias[p]
        outputs.append(F.conv2d(x, case.pointwise[p, :, :, None, None], bias))
    y = torch.stack(outputs)
    by_channel = y.transpose(1, 2).flatten(2)
    return y, by_channel.mean(2), by_channel.var(2, correction=0)


@pytest.mark.parametrize("options", ["", "bias", "depthwise", "depthwise bias normalised", AFFINE])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_reference_equals_plain_layers(
    options: str, activation: Activation, dilation: int
) -> None:
    case = random_case(
        (3, 2, 5, 6, 7), 4, options, activation=activation, dilation=dilation
    ).double()
    weights = [t for name, t in case.tensors.items() if name not in ("mean", "var")]

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = tensors[0].transpose(1, 2).flatten(2)
        own = {}
        if case.mean is not None:
            own = {"mean": x.mean(2), "var": x.var(2, correction=0)}
        return call(replace(replace(case, mean=None, var=None).with_tensors(tensors), **own))

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        stripped = replace(case, mean=None, var=None).with_tensors(tensors)
        return layers(replace(stripped, mean=case.mean))

    with use_backend("torch"):
        have = value_and_gradients(op, weights)
    for a, b in zip(have, value_and_gradients(plain, weights), strict=True):
        assert error_of(a, b) < 1e-12


@pytest.mark.parametrize("options", ["", "depthwise bias normalised", AFFINE])
def test_gradcheck_of_the_reference(options: str) -> None:
    case = random_case((1, 2, 2, 3, 2), 2, options, dilation=2).double()
    leaves = tuple(tensor.requires_grad_() for tensor in case.tensors.values())
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda *t: call(case.with_tensors(t)), leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize(
    "options", ["", "bias", "normalised", "depthwise", "depthwise bias normalised"]
)
@pytest.mark.parametrize("stats", [True, False])
def test_equals_the_float64_reference(
    backend: str, device: str, isa: str, dtype: torch.dtype, options: str, stats: bool
) -> None:
    if INTERPRETED and dtype != torch.float32 and not stats:
        pytest.skip("Triton's interpreter: the type changes loads and stores alone")
    for dilation in (2,) if INTERPRETED else (1, 2):
        case = random_case(SHAPE, OUT, options, dilation=dilation, stats=stats, dtype=dtype)
        check(case, backend, device, isa)


@on_every_backend
@pytest.mark.parametrize("dtype", STORAGE_CPU)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options", ["normalised", "normalised beta", "normalised gamma beta", AFFINE]
)
def test_every_normalisation_and_activation(
    backend: str, device: str, isa: str, dtype: torch.dtype, activation: Activation, options: str
) -> None:
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("Triton's interpreter: the type changes loads and stores alone")
    case = random_case(SHAPE, OUT, options, activation=activation, dtype=dtype)
    check(case, backend, device, isa)


@on_every_backend
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_shape(backend: str, device: str, isa: str, data: st.DataObject) -> None:
    wide = [32] if INTERPRETED else [32, 48, 64, 80, 130]
    channels = st.one_of(st.integers(1, 20), st.sampled_from(wide))
    shape = (
        data.draw(st.integers(1, 2 if INTERPRETED else 8)),
        data.draw(st.integers(0, 3)),
        data.draw(channels),
        data.draw(st.integers(1, min(SIDE, 9))),
        data.draw(st.integers(1, SIDE)),
    )
    options = " ".join(data.draw(st.sets(st.sampled_from(["depthwise", "bias", "normalised"]))))
    if "normalised" in options:
        options += " " + " ".join(data.draw(st.sets(st.sampled_from(["gamma", "beta"]))))
    dtype = data.draw(st.sampled_from(STORAGE_CPU))
    # The gradient through var_y is 2 (y - mean_y) / count, of a y that was rounded to its storage:
    # over a handful of bfloat16 values that rounding is all there is of it.
    enough = dtype != torch.bfloat16 or shape[1] * shape[3] * shape[4] >= 64
    case = random_case(
        shape,
        data.draw(channels),
        options,
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        dilation=data.draw(st.integers(1, 3)),
        stats=data.draw(st.booleans()) and enough,
        dtype=dtype,
        seed=data.draw(st.integers(0, 99)),
    )
    check(case, backend, device, isa)


@on_every_kernel
@pytest.mark.parametrize(
    ("shape", "out", "dilation"),
    [
        ((1, 1, 16, 64, 48), 16, 1),  # an image in bands
        ((1, 1, 16, 64, 48), 16, 2),
        ((2, 7, 32, 16, 12), 130, 1),  # several images to a piece of the weights' gradient
        ((1, 6, 32, 112, 104), 32, 1),  # results that bypass the caches
        ((1, 1, 16, 3, 200), 16, 1),  # rows longer than a block
        ((1, 2, 16, 8, 6), 300, 2),
    ],
)
def test_every_way_to_cut_the_work(
    backend: str,
    device: str,
    isa: str,
    shape: tuple[int, int, int, int, int],
    out: int,
    dilation: int,
) -> None:
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter: too many programs")
    check(random_case(shape, out, dilation=dilation), backend, device, isa)


@on_every_backend
def test_a_mean_far_above_the_deviation(backend: str, device: str, isa: str) -> None:
    """Of x and of y: no more digits are lost than the float32 inputs lack already."""
    # Triton's statistics are those before the bias and need no more pixels than this; elsewhere the
    # rounding of y, which is that of its mean, must average out.
    case = random_case((1, 2, 20, 6, 5) if INTERPRETED else (2, 3, 20, 16, 15), 24)
    offset = 1e3 * case.var.sqrt()  # type: ignore[union-attr]
    shifted = replace(
        case,
        x=case.x + offset[:, None, :, None, None],
        mean=case.mean + offset,
        bias=case.bias * 1e3,
    )  # type: ignore[operator]
    check(shifted, backend, device, isa)
    # Without a normalisation y inherits the offset: a deviation of 1 about a mean of 1000.
    shape = (1, 3, 20, 16, 15) if INTERPRETED else (2, 3, 20, 16, 15)
    plain = random_case(shape, 24, "")
    plain = replace(plain, x=plain.x + 1e3, pointwise=plain.pointwise.abs())
    with use_backend("torch"):
        want = call(plain.double())
    with using(backend, isa):
        have = call(plain)
    assert (want[1] / want[2].sqrt()).min() > 1e3
    torch.testing.assert_close(have[1].double(), want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(have[2].double(), want[2], rtol=1e-4, atol=0)


@on_every_backend
def test_any_layout(backend: str, device: str, isa: str) -> None:
    case = random_case((2, 1, 16, 6, 5) if INTERPRETED else (3, 2, 16, 6, 5), 8)
    plain = check(case, backend, device, isa)
    contiguous = check(replace(case, x=case.x.contiguous()), backend, device, isa)
    strided = check(replace(case, x=torch.stack((case.x,) * 2, -1)[..., 0]), backend, device, isa)
    shared = check(replace(case, x=case.x[:1].expand_as(case.x)), backend, device, isa)
    turned = replace(case, pointwise=case.pointwise.mT.contiguous().mT)
    for other in (contiguous, strided, check(turned, backend, device, isa)):
        assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[0][1], shared[0][1])


@on_every_backend
def test_results_without_a_gradient(backend: str, device: str, isa: str) -> None:
    """A loss of y alone, and one of the statistics alone."""
    case = random_case((1, 1, 16, 5, 6) if INTERPRETED else (2, 2, 16, 5, 6), 24)
    for kept in (slice(0, 1), slice(1, 2), slice(2, 3)):

        def some(*leaves: Tensor, kept: slice = kept, case: Case = case) -> tuple[Tensor, ...]:
            return call(case.with_tensors(leaves))[kept]

        with use_backend("torch"):
            want = value_and_gradients(some, [t.double() for t in case.tensors.values()])
        with using(backend, isa):
            have = value_and_gradients(some, [t.to(device) for t in case.tensors.values()])
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= DTYPES[torch.float32]


@on_every_backend
def test_two_in_a_row_are_a_separable_convolution(backend: str, device: str, isa: str) -> None:
    """Statistics of the first go to the second: together the gradient of a batch normalisation."""
    p, n = (1, 1) if INTERPRETED else (2, 3)
    first = random_case((p, n, 16, 6, 5), 24, "depthwise")
    second = random_case((p, n, 24, 6, 5), 16, "depthwise")

    def chain(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, pointwise, depthwise, pointwise_2, depthwise_2 = leaves
        y, mean, var = separable_conv(x, pointwise, depthwise=depthwise)
        return separable_conv(y, pointwise_2, depthwise=depthwise_2, mean=mean, var=var)

    def modules(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, pointwise, depthwise, pointwise_2, depthwise_2 = leaves
        y, mean, var = layers(Case(x, pointwise, depthwise))
        return layers(Case(y, pointwise_2, depthwise_2, mean=mean, var=var))

    inputs = [first.x, first.pointwise, first.depthwise, second.pointwise, second.depthwise]
    want = value_and_gradients(modules, [tensor.double() for tensor in inputs])  # type: ignore[union-attr]
    with using(backend, isa):
        have = value_and_gradients(chain, [tensor.to(device) for tensor in inputs])  # type: ignore[union-attr]
    for result, right in zip(have, want, strict=True):
        assert error_of(result, right) <= 2 * DTYPES[torch.float32]


@on_every_backend
@pytest.mark.parametrize("options", ["", "bias", "depthwise normalised"])
@pytest.mark.parametrize("dtype", STORAGE_CPU)
def test_gradients_of_a_map_with_several_readers(
    backend: str, device: str, isa: str, options: str, dtype: torch.dtype
) -> None:
    """Two convolutions read x, and after them a square, or nothing."""
    if INTERPRETED and dtype != torch.float32:
        pytest.skip("Triton's interpreter: the type changes loads and stores alone")
    case = random_case(
        (1, 1, 20, 5, 4) if INTERPRETED else (2, 3, 20, 9, 7), 16, options, dtype=dtype
    )

    def readers(share: bool, used: bool) -> Any:
        def call_all(*leaves: Tensor) -> tuple[Tensor, ...]:
            own = case.with_tensors(leaves)
            x: Any = SharedMap(own.x)
            first = call(replace(own, x=x) if share else own)
            second = call(replace(own, x=x if share else own.x, dilation=2))
            return (*first, *second, *([x.map.square()] if used else []))

        return call_all

    for used in (True, False):
        with use_backend("torch"):
            tensors = [t.double() for t in case.tensors.values()]
            want = value_and_gradients(readers(False, used), tensors)
        with using(backend, isa), memory_filled_with_nan():
            tensors = [t.to(device) for t in case.tensors.values()]
            have = value_and_gradients(readers(True, used), tensors)
        for result, right in zip(have, want, strict=True):
            assert error_of(result, right) <= 2 * DTYPES[dtype]


@on_every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_spoils_its_neighbours_alone(
    backend: str, device: str, isa: str, bad: float
) -> None:
    case = random_case((1, 2, 16, 7, 8), 20, "depthwise normalised", stats=False)
    case.x[0, 1, 3, 2, 4] = bad
    with use_backend("torch"):
        want = call(case.double())[0]
    with using(backend, isa):
        have = call(case)[0]
    assert torch.equal(have.isfinite(), want.isfinite())
    assert (~have.isfinite()).any(2)[0].sum() == 9


@on_every_backend
def test_weights_of_the_maps_type(backend: str, device: str, isa: str) -> None:
    case = random_case((2, 2, 16, 5, 6), 8, dtype=torch.bfloat16)
    half = {name: getattr(case, name).bfloat16() for name in ("pointwise", "depthwise", "bias")}
    have = check(replace(case, **half), backend, device, isa)
    assert have[-5].dtype == torch.bfloat16


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
@pytest.mark.parametrize("options", ["bias", "depthwise normalised gamma beta"])
def test_float16_on_a_gpu(backend: str, device: str, isa: str, options: str) -> None:
    case = random_case((2, 2, 20, 5, 6), 24, options, dtype=torch.float16)
    check(case, backend, device, isa)


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
