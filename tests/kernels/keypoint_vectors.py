"""What the tests of vector_heatmap and vector_heatmap_loss share: vectors in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from pnfs.kernels import native

Parts = tuple[tuple[int, ...], ...]

ONE: Parts = ((0, 1, 2, 3),)
APART: Parts = ((2, 0), (1, 4, 3))
SHARED: Parts = ((0, 1, 2), (2, 3), (3, 1, 4, 2))
EIGHT: Parts = tuple((k, (k + 1) % 8) for k in range(8))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a result stored once, relative to the largest value. Triton's interpreter cuts bfloat16 off.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Of random shapes; Triton's interpreter takes milliseconds per program.
EXAMPLES, MAX_SIDE = (8, 8) if native.triton_interpreted() else (40, 21)
LAYOUTS = ("contiguous", "channels-last", "sliced", "columns", "mixed", "expanded")


def backends(op: str) -> Any:
    """Parametrises a test with `backend` and `device`."""
    ok, reason = native.has_function("_cpu", op)
    return pytest.mark.parametrize(
        ("backend", "device"),
        [
            pytest.param("torch", "cpu"),
            pytest.param("cpp", "cpu", marks=pytest.mark.skipif(not ok, reason=reason or "-")),
            pytest.param("triton", "cpu"),
            pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        ],
    )


def skip_unless_taken(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("float16 on the CPU is the reference's")


def skip_if_interpreted(backend: str, device: str, reason: str) -> None:
    if (backend, device) == ("triton", "cpu"):
        pytest.skip(f"Triton's interpreter: {reason}")


def draw_kind(data: st.DataObject) -> tuple[Parts, tuple[int, int, int, int], str]:
    """Parts, shape (N, d, h, w) and layout of some vectors, for `random_vectors`."""
    parts = data.draw(st.sampled_from([ONE, APART, SHARED, EIGHT]))
    side = st.integers(1, MAX_SIDE)
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 24), side, side))
    return parts, shape, data.draw(st.sampled_from(LAYOUTS))


def random_vectors(
    parts: Sequence[Sequence[int]],
    shape: tuple[int, int, int, int],
    *,
    layout: str = "channels-last",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> list[Tensor]:
    """Per part (N, k, d, h, w) with shape (N, d, h, w), as leaves that require a gradient."""
    n, d, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for index, part in enumerate(parts):
        k = len(part)
        v = torch.randn(n, k, d, h, w, generator=generator).to(dtype) * 0.6
        if layout == "channels-last" or (layout == "mixed" and index % 2):
            v = v.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        elif layout == "sliced":  # some components of longer vectors
            wide = torch.zeros(n, h, w, k, d + 3, dtype=dtype).permute(0, 3, 4, 1, 2)
            wide[:, :, 1 : d + 1] = v
            v = wide[:, :, 1 : d + 1]
        elif layout == "columns":  # every second column of an image
            wide = torch.zeros(n, k, d, h, 2 * w, dtype=dtype)
            wide[..., ::2] = v
            v = wide[..., ::2]
        elif layout == "expanded" and n:  # all images share one memory
            v = v[:1].expand(n, k, d, h, w)
        vectors.append(v.to(device).requires_grad_())
    return vectors


def doubled(vectors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64 on the CPU, as new leaves."""
    return [v.detach().cpu().double().requires_grad_() for v in vectors]


def assert_close_to(have: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """|have - want| ≤ tolerance · the largest |want|, tensor by tensor."""
    assert len(have) == len(want)
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape
        if b.numel():
            bound = tolerance * b.abs().max().item()
            assert (a.detach().cpu().double() - b).abs().max().item() <= bound + 1e-30
