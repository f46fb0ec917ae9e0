"""vector_heatmap: every backend against the float64 reference, and that against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keypoint_vectors import (
    APART,
    DTYPES,
    EXAMPLES,
    LAYOUTS,
    ONE,
    ROUNDING,
    SHARED,
    Parts,
    assert_close_to,
    backends,
    doubled,
    draw_kind,
    random_vectors,
    skip_if_interpreted,
    skip_unless_taken,
)
from numerics import examples, opcheck
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import native, use_backend, vector_heatmap

on_every_backend = backends("vector_heatmap")
needs_cpp = pytest.mark.skipif(
    not native.has_function("_cpu", "vector_heatmap")[0], reason="pnfs._cpu is not built"
)


def keypoints_of(parts: Parts) -> int:
    return 1 + max(k for part in parts for k in part)


def scores_and_gradients(
    vectors: list[Tensor], parts: Parts, incoming: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    scores = vector_heatmap(vectors, parts, keypoints_of(parts))
    grad = incoming.to(dtype=scores.dtype, device=scores.device)
    return scores, torch.autograd.grad(scores, vectors, grad)


def check(vectors: list[Tensor], parts: Parts, backend: str) -> None:
    n, _, _, h, w = vectors[0].shape
    dtype = vectors[0].dtype
    incoming = torch.randn(n, keypoints_of(parts), h, w).to(dtype)
    with use_backend(backend):
        scores, gradients = scores_and_gradients(vectors, parts, incoming)
    with use_backend("torch"):
        want, want_gradients = scores_and_gradients(doubled(vectors), parts, incoming.double())
    assert scores.dtype == dtype
    assert scores.is_contiguous()
    assert all(g.dtype == dtype for g in gradients)
    assert_close_to([scores, *gradients], [want.detach(), *want_gradients], ROUNDING[dtype])


@pytest.mark.parametrize("d", [1, 3])
def test_the_reference_equals_a_loop_over_pixels(d: int) -> None:
    vectors = doubled(random_vectors(SHARED, (2, d, 3, 2)))
    with use_backend("torch"):
        scores = vector_heatmap(vectors, SHARED, 5).detach().numpy()
    want = np.zeros((2, 5, 3, 2))
    for part, tensor in zip(SHARED, vectors, strict=True):
        for n, j, y, x in np.ndindex(2, len(part), 3, 2):
            v = tensor[n, j, :, y, x].detach().numpy()
            squared = float(v @ v)
            want[n, part[j], y, x] += v[0] if d == 1 else squared / (1 + squared)
    np.testing.assert_allclose(scores, want, atol=1e-13)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 4, 8, 13, 16])
def test_equals_the_float64_reference(
    backend: str, device: str, dtype: torch.dtype, d: int
) -> None:
    skip_unless_taken(backend, dtype)
    if d in (4, 16):
        skip_if_interpreted(backend, device, "d = 8 runs the same lines")
    for layout in ("contiguous", "channels-last"):
        options = {"layout": layout, "dtype": dtype, "device": device}
        check(random_vectors(SHARED, (2, d, 2, 19), **options), SHARED, backend)


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 8])
def test_every_layout(backend: str, device: str, layout: str, d: int) -> None:
    vectors = random_vectors(APART, (2, d, 3, 17), layout=layout, device=device)
    check(vectors, APART, backend)


@on_every_backend
def test_any_shape(backend: str, device: str) -> None:
    @examples(EXAMPLES, device)
    @given(data=st.data())
    def any_case(data: st.DataObject) -> None:
        parts, shape, layout = draw_kind(data)
        vectors = random_vectors(parts, shape, layout=layout, device=device)
        check(vectors, parts, backend)

    any_case()


@on_every_backend
def test_a_large_case_runs_on_several_threads_and_past_the_caches(
    backend: str, device: str
) -> None:
    skip_if_interpreted(backend, device, "too many programs")
    for layout in ("contiguous", "channels-last"):
        check(
            random_vectors(((0,),), (24, 8, 160, 160), layout=layout, device=device),
            ((0,),),
            backend,
        )


@on_every_backend
def test_no_images_give_an_empty_batch(backend: str, device: str) -> None:
    check(random_vectors(SHARED, (0, 8, 4, 3), device=device), SHARED, backend)


@on_every_backend
def test_very_long_and_zero_vectors(backend: str, device: str) -> None:
    vectors = [torch.zeros(1, 1, 8, 2, 16, device=device)]
    vectors[0][..., 1, :] = 1e15
    with use_backend(backend):
        scores, (gradient,) = scores_and_gradients(
            [v.requires_grad_() for v in vectors], ((0,),), torch.ones(1, 1, 2, 16)
        )
    assert scores[0, 0].tolist() == [[0.0] * 16, [1.0] * 16]
    assert gradient.abs().max() < 1e-40


def test_gradcheck() -> None:
    for d in (1, 3):
        vectors = doubled(random_vectors(SHARED, (1, d, 2, 2)))
        assert torch.autograd.gradcheck(lambda *v: vector_heatmap(v, SHARED, 5), vectors)


@needs_cpp
def test_the_kernels_gradient_is_the_slope_of_the_kernel() -> None:
    vectors = random_vectors(SHARED, (1, 8, 2, 3))
    directions = random_vectors(SHARED, (1, 8, 2, 3), seed=1)
    with use_backend("cpp"):
        _, gradients = scores_and_gradients(vectors, SHARED, torch.ones(1, 5, 2, 3))
        step = 1e-2
        ahead, behind = (
            vector_heatmap(
                [v + sign * step * u for v, u in zip(vectors, directions, strict=True)], SHARED, 5
            )
            for sign in (1, -1)
        )
    slope = (ahead.double() - behind.double()).sum() / (2 * step)
    along = sum((g.double() * u).sum() for g, u in zip(gradients, directions, strict=True))
    assert slope.item() == pytest.approx(along.item(), rel=1e-3)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("d", [1, 8, 11])
def test_every_value_is_written_and_equal_in_every_run(
    monkeypatch: pytest.MonkeyPatch, layout: str, d: int
) -> None:
    vectors = random_vectors(SHARED, (3, d, 21, 19), layout=layout)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))
    threads = torch.get_num_threads()
    incoming = torch.randn(3, 5, 21, 19)
    runs = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                scores, gradients = scores_and_gradients(vectors, SHARED, incoming)
            runs.append([scores, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert not any(tensor.isnan().any() for tensor in runs[0])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True))


@needs_cpp
def test_gradients_keep_the_layout_of_a_convolution() -> None:
    x = torch.randn(2, 24, 5, 6).contiguous(memory_format=torch.channels_last)
    v = x.unflatten(1, (3, 8)).requires_grad_()
    with use_backend("cpp"):
        _, (gradient,) = scores_and_gradients([v], ((0, 1, 2),), torch.ones(2, 3, 5, 6))
    assert gradient.stride() == v.stride()
    assert gradient.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "columns"])
def test_opcheck(layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        vectors = random_vectors(SHARED, (2, 4, 3, 2), layout=layout, dtype=dtype)
        flat = [k for part in SHARED for k in part]
        opcheck("vector_heatmap_cpp", vectors, flat, 5)


@needs_cpp
def test_float16_on_the_cpu_is_the_references() -> None:
    vectors = random_vectors(ONE, (1, 8, 2, 2), dtype=torch.float16)
    assert vector_heatmap(vectors, ONE, 4).dtype == torch.float16
    with use_backend("cpp"), pytest.raises(PnfsError, match="dtype is float16, takes float32, bf"):
        vector_heatmap(vectors, ONE, 4)


def test_more_parts_than_a_gpu_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple((k,) for k in range(9))
    monkeypatch.setattr(native, "backend_available", lambda *_: (True, ""))
    monkeypatch.setattr(native, "backend_fits", lambda *_: (True, ""))
    for shape, message in [((1, 4, 1, 1), "9 parts, takes up to 8"), ((1, 257, 1, 1), "d is 257")]:
        few = parts if shape[1] == 4 else parts[:1]
        with use_backend("triton"), pytest.raises(PnfsError, match=message):
            vector_heatmap(random_vectors(few, shape), few, len(few))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": []}, "an entry per part, not 0 and 2"),
        ({"parts": ((2, 0),)}, "an entry per part, not 2 and 1"),
        (
            {"parts": ((2, 0), (1, 4, 4))},
            r"parts\[1\] is \[1, 4, 4\]; it must hold distinct .* 0..4",
        ),
        ({"parts": ((2, -1), (1, 4, 3))}, r"parts\[0\]"),
        ({"parts": ((2, 1), (1, 4, 3))}, "no part predicts keypoint 0"),
        ({"parts": ((2, 0, 1), (4, 3))}, r"vectors\[0\] must have shape"),
        ({"num_keypoints": 6}, "no part predicts keypoint 5"),
        ({1: torch.zeros(2, 3, 8, 4, 4)}, r"vectors\[1\] must have shape \(2, 3, 8, 4, 3\)"),
        ({1: torch.zeros(2, 3, 8, 4, 3).bfloat16()}, r"vectors\[1\] must be float32, not bf"),
        ({0: torch.zeros(2, 2, 32)}, r"vectors\[0\] must have shape"),
        ({0: torch.zeros(2, 2, 8, 4, 3).int()}, r"vectors\[0\] must be float32 or"),
        ({1: torch.zeros(2, 3, 8, 4, 3, device="meta")}, r"vectors\[1\] is on meta"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    vectors = random_vectors(APART, (2, 8, 4, 3))
    for index in (0, 1):
        vectors[index] = change.pop(index, vectors[index])
    arguments = {"vectors": vectors, "parts": APART, "num_keypoints": 5, **change}
    with pytest.raises(PnfsError, match=message):
        vector_heatmap(**arguments)


def test_vectors_without_cells_are_refused() -> None:
    with pytest.raises(PnfsError, match="must have components and cells"):
        vector_heatmap([torch.zeros(1, 1, 8, 0, 3)], ((0,),), 1)
