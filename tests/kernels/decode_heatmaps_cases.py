"""Calls of decode_heatmaps, random ones, and their comparison with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pnfs.kernels import decode_heatmaps, native, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "decode_heatmaps")[0],
    reason=native.has_function("_cpu", "decode_heatmaps")[1] or "-",
)
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param("triton", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    heatmaps: Tensor
    matrices: Tensor
    flipped: Tensor | None = None
    permutation: Tensor | tuple[int, ...] | None = None
    shift: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with both maps changed."""
        flipped = None if self.flipped is None else change(self.flipped)
        return replace(self, heatmaps=change(self.heatmaps), flipped=flipped)


def random_case(
    shape: tuple[int, int, int, int],
    seed: int = 0,
    *,
    flip: bool = True,
    shift: bool = False,
    dtype: torch.dtype = torch.float32,
    levels: int = 255,
) -> Case:
    """Multiples of 1/256, which every dtype and every average holds exactly; few levels give many
    equal maxima."""
    n, k = shape[:2]
    generator = torch.Generator().manual_seed(seed)
    low = -levels if seed % 3 else -2 * levels

    def maps() -> Tensor:
        return (torch.randint(low, levels + 1, shape, generator=generator) / 256).to(dtype)

    return Case(
        maps(),
        torch.randn(n, 2, 3, generator=generator, dtype=torch.float64),
        maps() if flip else None,
        tuple(torch.randperm(k, generator=generator).tolist()) if flip else None,
        shift,
    )


def run(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    xy, score = decode_heatmaps(
        move(case.heatmaps),
        move(case.matrices),
        flipped=move(case.flipped),
        permutation=move(case.permutation),
        shift=case.shift,
    )
    assert xy.dtype == score.dtype == torch.float32
    return xy.cpu(), score.cpu()


def expected(case: Case) -> tuple[Tensor, Tensor]:
    with use_backend("torch"):
        return run(case.map(Tensor.double))


def check(case: Case, backend: str, device: str) -> tuple[Tensor, Tensor]:
    n, k = case.heatmaps.shape[:2]
    with use_backend(backend):
        xy, score = run(case, device)
    assert xy.shape == (n, k, 2)
    assert score.shape == (n, k)
    want_xy, want_score = expected(case)
    assert torch.equal(score, want_score)
    torch.testing.assert_close(xy, want_xy, rtol=1e-6, atol=1e-5)
    return xy, score


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels-last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "gaps":  # a part of a larger tensor
        padded = torch.full([side + 2 for side in tensor.shape], math.inf, dtype=tensor.dtype)
        inner = padded[1:-1, 1:-1, 1:-1, 1:-1]
        inner.copy_(tensor)
        return inner
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, math.inf)), dim=-1)[..., 0]
    return tensor
