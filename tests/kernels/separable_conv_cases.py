"""Calls of separable_conv, random ones, and their comparison with the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch
from numerics import ISAS, error_of, value_and_gradients
from torch import Tensor

from pnfs.kernels import native, separable_conv, use_backend
from pnfs.kernels.checks import Activation

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INTERPRETED = native.triton_interpreted()  # Triton's kernels run in its interpreter
if INTERPRETED:  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-6
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

    def to(self, device: str) -> Case:
        return self.with_tensors(tuple(tensor.to(device) for tensor in self.tensors.values()))


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
    tensors = list(case.to(device).tensors.values())
    return value_and_gradients(lambda *leaves: call(case.with_tensors(leaves)), tensors)


@contextmanager
def using(backend: str, isa: str) -> Iterator[None]:
    if isa and isa not in ISAS:
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
    allowed = DTYPES[case.x.dtype]
    if (backend, device) == ("triton", "cuda") and case.x.dtype != torch.float32:
        # Tensor cores take factors of the map's type, as in torch's own convolutions: their
        # rounding adds to that of the result.
        allowed *= 2
    names = ["y", "mean_y", "var_y"][: 3 if case.stats else 1]
    names += [f"gradient of {name}" for name in case.tensors]
    for name, result, right in zip(names, have, want, strict=True):
        error = error_of(result, right)
        assert error <= allowed, f"{name} is off by {error:.2e}"
    return have
