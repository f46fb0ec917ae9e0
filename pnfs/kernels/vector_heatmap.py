"""Keypoint vectors to score maps: the squashed length, summed over the parts (Eq. 4-6).

Axes: N images, K keypoints of the skeleton, k keypoints of one part, d components, h and w cells.
Vectors may be contiguous or channels-last (all parts alike), as a 1×1 convolution leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import STORAGE, STORAGE_CPU, Verdict
from pnfs.kernels.registry import Backend, register_op

HALVES = (torch.bfloat16, torch.float16)
MAX_PARTS, MAX_DEPTH = 8, 256  # that a GPU kernel takes


def vector_heatmap(
    vectors: Sequence[Tensor], parts: Sequence[Sequence[int]], num_keypoints: int
) -> Tensor:
    """Score maps of all keypoints, differentiable in `vectors`.

    With v_p the vector that part p predicts for a keypoint at a pixel, its score there is
    Σ_p ‖v_p‖² / (1 + ‖v_p‖²) over the parts that predict it. d = 1 is a plain score map ("vector in
    pixel" off): Σ_p v_p. Arithmetic is in float32 (float64 for float64).

    Args:
        vectors: per part (N, k, d, h, w), before the squash, float32, bfloat16 or float16 (float64:
            by the reference backend).
        parts: per part the keypoint indices of its k maps.
        num_keypoints: K.

    Returns:
        (N, K, h, w), contiguous, the dtype of `vectors`.

    Raises:
        PnfsError: a shape, dtype or device that does not fit, an index outside 0..K-1 or twice in
            a part, a keypoint that no part predicts.
    """
    scores: Tensor = OP(*check_vectors(vectors, parts, num_keypoints), num_keypoints)
    return scores


def check_vectors(
    vectors: Sequence[Tensor], parts: Sequence[Sequence[int]], num_keypoints: int
) -> tuple[list[Tensor], list[int]]:
    """The vectors as a list and the keypoints of all parts back to back, as the backends take them.

    Raises:
        PnfsError: see `vector_heatmap`.
    """
    if not vectors or len(vectors) != len(parts):
        given = f"{len(vectors)} and {len(parts)}"
        raise PnfsError(f"vectors and parts must have an entry per part, not {given} entries")
    keypoints = _keypoints_of_parts(tuple(tuple(part) for part in parts), num_keypoints)
    n, _, d, h, w = vectors[0].shape if vectors[0].dim() == 5 else (None,) * 5
    first = vectors[0].dtype
    for i, (v, part) in enumerate(zip(vectors, parts, strict=True)):
        dtypes = (*STORAGE, torch.float64) if i == 0 else (first,)
        checks.check_tensor(f"vectors[{i}]", v, (n, len(part), d, h, w), *dtypes)
    checks.check_same_device(**{f"vectors[{i}]": v for i, v in enumerate(vectors)})
    if not (d and h and w):
        raise PnfsError(f"vectors must have components and cells, not {tuple(vectors[0].shape)}")
    return list(vectors), list(keypoints)


@lru_cache(maxsize=64)
def _keypoints_of_parts(parts: tuple[tuple[int, ...], ...], num_keypoints: int) -> tuple[int, ...]:
    for i, part in enumerate(parts):
        if len(set(part)) != len(part) or any(not 0 <= k < num_keypoints for k in part):
            raise PnfsError(
                f"parts[{i}] is {list(part)}; it must hold distinct indices 0..{num_keypoints - 1}"
            )
    flat = tuple(k for part in parts for k in part)
    if missing := set(range(num_keypoints)).difference(flat):
        raise PnfsError(f"no part predicts keypoint {min(missing)}; add it to a part")
    return flat


def squash_score(vectors: Tensor) -> Tensor:
    """Length of the squashed vector at every pixel: ‖v‖² / (1 + ‖v‖²) (Eq. 4, 5).

    Args:
        vectors: (N, k, d, h, w).

    Returns:
        Scores (N, k, h, w) in [0, 1).
    """
    squared = vectors.square().sum(dim=2)
    return squared / (1 + squared)


def vector_heatmap_reference(
    vectors: list[Tensor], keypoints: list[int], num_keypoints: int
) -> Tensor:
    """The definition; see `vector_heatmap`. `keypoints`: those of all parts, back to back."""
    by_keypoint: list[list[Tensor]] = [[] for _ in range(num_keypoints)]
    slots = iter(keypoints)
    for v in vectors:
        wide = v.float() if v.dtype in HALVES else v
        scores = wide.squeeze(2) if v.shape[2] == 1 else squash_score(wide)
        for column in scores.unbind(1):
            by_keypoint[next(slots)].append(column)
    merged = [sum(maps[1:], maps[0]) for maps in by_keypoint]
    return torch.stack(merged, dim=1).to(vectors[0].dtype)


def lined_up(vectors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The vectors as the C++ kernels walk them, and whether along adjacent pixels.

    They walk pixels that are adjacent (contiguous) or components that are (channels-last), in all
    parts alike; other layouts are copied.
    """
    if all(v.shape[4] == 1 or v.stride(4) == 1 for v in vectors):
        return list(vectors), True
    if all(v.shape[2] == 1 or v.stride(2) == 1 for v in vectors):
        return list(vectors), False
    return [v.contiguous() for v in vectors], True


def empty_gradients(vectors: Sequence[Tensor], contiguous: bool) -> list[Tensor]:
    """Memory for the gradients of the vectors, contiguous or channels-last."""
    gradients = []
    for v in vectors:
        n, k, d, h, w = v.shape
        shape = v.shape if contiguous else (n, h, w, k, d)
        gradient = torch.empty(shape, dtype=v.dtype, device=v.device)
        gradients.append(gradient if contiguous else gradient.permute(0, 3, 4, 1, 2))
    return gradients


def addresses_and_strides(tensors: Sequence[Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    """As the C++ kernels take a list of tensors."""
    return [v.data_ptr() for v in tensors], [v.stride() for v in tensors]


def shape_of(vectors: Sequence[Tensor], num_keypoints: int) -> tuple[int, int, int, int, int]:
    """(N, K, d, h, w)."""
    n, _, d, h, w = vectors[0].shape
    return n, num_keypoints, d, h, w


# The backends take the arguments of the reference; their gradients take that of the scores first.


def _fake(vectors: list[Tensor], keypoints: list[int], num_keypoints: int) -> Tensor:
    n, k, _, h, w = shape_of(vectors, num_keypoints)
    return torch.empty((n, k, h, w), dtype=vectors[0].dtype, device=vectors[0].device)


def _fake_backward(
    grad: Tensor, vectors: list[Tensor], keypoints: list[int], num_keypoints: int
) -> list[Tensor]:
    return empty_gradients(*lined_up(vectors))


def _cpp(vectors: list[Tensor], keypoints: list[int], num_keypoints: int) -> Tensor:
    vectors, _ = lined_up(vectors)
    scores = _fake(vectors, keypoints, num_keypoints)
    size = shape_of(vectors, num_keypoints)
    native.call(
        "_cpu", "vector_heatmap",
        *addresses_and_strides(vectors), [v.shape[1] for v in vectors], keypoints,
        scores.data_ptr(), size, checks.DTYPE_CODES[scores.dtype],
        shapes=f"N, K, d, h, w = {size}",
    )  # fmt: skip
    return scores


def _cpp_backward(
    grad: Tensor, vectors: list[Tensor], keypoints: list[int], num_keypoints: int
) -> list[Tensor]:
    vectors, contiguous = lined_up(vectors)
    gradients = empty_gradients(vectors, contiguous)
    grad = grad.contiguous()
    size = shape_of(vectors, num_keypoints)
    native.call(
        "_cpu", "vector_heatmap_backward",
        *addresses_and_strides(vectors), *addresses_and_strides(gradients),
        [v.shape[1] for v in vectors], keypoints, grad.data_ptr(), size,
        checks.DTYPE_CODES[grad.dtype],
        shapes=f"N, K, d, h, w = {size}",
    )  # fmt: skip
    return gradients


def _triton(vectors: list[Tensor], keypoints: list[int], num_keypoints: int) -> Tensor:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.vector_heatmap import launch

    scores = _fake(vectors, keypoints, num_keypoints)
    launch(vectors, keypoints, scores)
    return scores


def _triton_backward(
    grad: Tensor, vectors: list[Tensor], keypoints: list[int], num_keypoints: int
) -> list[Tensor]:
    from pnfs.kernels.triton.vector_heatmap import launch_backward

    gradients = empty_gradients(*lined_up(vectors))
    launch_backward(grad.contiguous(), vectors, keypoints, gradients)
    return gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    vectors, *ctx.table = inputs
    ctx.save_for_backward(*vectors)


def can_run_cpp(vectors: list[Tensor], *_: Any) -> Verdict:
    """Whether the C++ kernels take these vectors: storage type."""
    return checks.has_dtype("the vectors' dtype", vectors[0].dtype, STORAGE_CPU)


def can_run_triton(vectors: list[Tensor], *_: Any) -> Verdict:
    """Whether the Triton kernels take these vectors: storage type, number of parts, d."""
    if len(vectors) > MAX_PARTS:
        return checks.no(f"there are {len(vectors)} parts, takes up to {MAX_PARTS}")
    if vectors[0].shape[2] > MAX_DEPTH:
        return checks.no(f"d is {vectors[0].shape[2]}, takes up to {MAX_DEPTH}")
    return checks.has_dtype("the vectors' dtype", vectors[0].dtype, STORAGE)


OP = register_op("vector_heatmap", vector_heatmap_reference)


def _backward(launch: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return launch(grad, list(ctx.saved_tensors), *ctx.table), None, None


_BACKENDS: tuple[tuple[Backend, Any, Any, Any], ...] = (
    ("cpp", _cpp, _cpp_backward, can_run_cpp),
    ("triton", _triton, _triton_backward, can_run_triton),
)
for _backend, _fn, _fn_backward, _can_run in _BACKENDS:
    OP.register_differentiable(
        _backend, _fn, _fake, _fn_backward, _fake_backward, _can_run,
        setup_context=_setup_context, backward=_backward,
    )  # fmt: skip
