"""Calls of batch_norm_act, random ones, and their comparison with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from numerics import error_of, value_and_gradients
from torch import Tensor

from pnfs.kernels import batch_norm_act, native, use_backend
from pnfs.kernels.checks import ACTIVATIONS, Activation

DTYPES = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
if native.triton_interpreted():  # which cuts bfloat16 off
    DTYPES[torch.bfloat16] = 2**-7
# torch.batch_norm in float32 takes x·scale less mean·scale, which costs digits that ours keep.
TORCH_TOLERANCE = 3e-4

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "batch_norm_act")[0],
    reason=native.has_function("_cpu", "batch_norm_act")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_triton = pytest.mark.parametrize(("backend", "device"), BACKENDS[2:])
of_every_kind = pytest.mark.parametrize(
    ("activation", "residual", "given_stats"),
    [(a, r, g) for a in ACTIVATIONS for r in (False, True) for g in (False, True)],
)


@dataclass(frozen=True)
class Case:
    """The tensors of one call, and its activation."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    var: Tensor | None
    residual: Tensor | None
    activation: Activation

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        return replace(self, **{name: change(value) for name, value in self.tensors.items()})

    def results(self) -> list[Tensor]:
        """y, the statistics that were found, and the gradients of all tensors."""
        names = list(self.tensors)
        own: list[Tensor] = []

        def call(*tensors: Tensor) -> Tensor:
            case = replace(self, **dict(zip(names, tensors, strict=True)))
            y, mean, var = batch_norm_act(
                case.x, case.weight, case.bias, mean=case.mean, var=case.var,
                residual=case.residual, activation=case.activation,
            )  # fmt: skip
            assert not mean.requires_grad and not var.requires_grad
            own[:] = [mean, var]
            return y

        y, *gradients = value_and_gradients(call, list(self.tensors.values()))
        return [y, *own, *gradients]


def random_case(
    shape: tuple[int, int, int, int],
    activation: Activation = "relu6",
    *,
    residual: bool = False,
    given_stats: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    offset: float = 1,
) -> Case:
    """Channels-last maps of mean `offset`; what the activation takes lies off its edges, where
    rounding decides."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def map_() -> Tensor:
        n, c, h, w = shape
        return normal(n, h, w, c).permute(0, 3, 1, 2)

    c = shape[1]
    stats = [normal(c), normal(c).square() + 0.1] if given_stats else [None, None]
    added = map_().to(dtype) if residual else None
    weight, bias = normal(c).abs() + 0.5, 2 * normal(c) + 1
    case = Case((2 * map_() + offset).to(dtype), weight, bias, *stats, added, activation)
    for _ in range(3):
        plain = replace(case, activation="none")
        with use_backend("torch"), torch.no_grad():
            z = batch_norm_act(**{name: value.double() for name, value in plain.tensors.items()})[0]
        near = (z.abs() < 1e-4) | ((z - 6).abs() < 1e-4)
        if not near.any():
            break
        case = replace(case, x=torch.where(near, case.x + 0.0625, case.x))
    return case


def check(case: Case, backend: str, device: str, magnified: float = 1) -> list[Tensor]:
    """`magnified`: how often rounding counts, where a deviation or a sum nearly cancels."""
    tolerance = magnified * DTYPES[case.x.dtype]
    if backend == "torch":
        tolerance = max(tolerance, TORCH_TOLERANCE)
    with use_backend("torch"):
        want = case.map(Tensor.double).results()
    with use_backend(backend):
        have = case.map(lambda tensor: tensor.to(device)).results()
    y = have[0]
    assert y.dtype == case.x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = torch.float32 if case.mean is None else None
    dtypes = [found or tensor.dtype for tensor in have[1:3]]
    dtypes = [case.x.dtype, *dtypes, *(tensor.dtype for tensor in case.tensors.values())]
    for result, right, dtype in zip(have, want, dtypes, strict=True):
        assert result.dtype == dtype
        assert error_of(result, right) <= tolerance
    return have
