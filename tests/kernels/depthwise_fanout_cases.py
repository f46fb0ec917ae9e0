"""Calls of depthwise_fanout, random ones, and their comparison with the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from numerics import ISAS, error_of, value_and_gradients
from torch import Tensor

from pnfs.kernels import depthwise_fanout, native, use_backend

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

    def to(self, device: str) -> Case:
        return replace(self, tensors=tuple(tensor.to(device) for tensor in self.tensors))

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
    tensors = case.to(device).tensors
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
