"""Triton kernels of `vector_heatmap`: one program per map and block of cells; see
`pnfs.kernels.vector_heatmap`.

`vectors`, `strides` and the like are tuples with an entry per part: an address, or five strides (n,
keypoint of the part, component, y, x). `table` (K, PARTS) int32 says which map of a part is
keypoint k, -1 if none. DEPTH is d rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.tuning import Config, Tunable

TILE = 1024  # elements of one part that a program holds
VECTORS = (Config(4), Config(4, 2.0), Config(2, 0.5), Config(8, 2.0))


@triton.jit
def tile_offsets(n, slot, cell, w, stride, DEPTH: tl.constexpr):
    """Offsets (BLOCK, DEPTH) of the vectors at some cells of one map."""
    y = (cell // w).to(tl.int64)
    x = (cell % w).to(tl.int64)
    component = tl.arange(0, DEPTH).to(tl.int64)
    start = n * stride[0] + slot.to(tl.int64) * stride[1]
    return start + (y * stride[3] + x * stride[4])[:, None] + component[None, :] * stride[2]


@triton.jit
def tile_mask(inside, D: tl.constexpr, DEPTH: tl.constexpr):
    return inside[:, None] & (tl.arange(0, DEPTH) < D)[None, :]


@triton.jit
def squash_factor(v):
    """‖v‖² and 1 / (1 + ‖v‖²) of vectors (BLOCK, DEPTH), float32."""
    squared = tl.sum(v * v, axis=1)
    return squared, 1 / (1 + squared)


@triton.jit
def score_of(v, D: tl.constexpr):
    """Scores (BLOCK,) of vectors (BLOCK, DEPTH), float32."""
    if D == 1:
        score = tl.sum(v, axis=1)
    else:
        squared, q = squash_factor(v)
        score = squared * q
    return score


@triton.jit
def gradient_of(v, grad, D: tl.constexpr):
    """Gradients (BLOCK, DEPTH) of vectors from those of their scores (BLOCK,), float32."""
    if D == 1:
        gradient = tl.zeros_like(v) + grad[:, None]
    else:
        _, q = squash_factor(v)
        gradient = v * (2 * grad * q * q)[:, None]
    return gradient


@triton.jit
def vector_heatmap_kernel(
    vectors, strides, table, scores, k_count, cells, w,
    PARTS: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores: (N, K, cells), contiguous."""
    row = tl.program_id(0).to(tl.int64)
    n = row // k_count
    k = row % k_count
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    mask = tile_mask(inside, D, DEPTH)
    score = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(PARTS):
        slot = tl.load(table + k * PARTS + p)
        if slot >= 0:
            at = vectors[p] + tile_offsets(n, slot, cell, w, strides[p], DEPTH)
            score += score_of(tl.load(at, mask=mask, other=0.0).to(tl.float32), D)
    tl.store(scores + row * cells + cell, score.to(scores.dtype.element_ty), mask=inside)


@triton.jit
def vector_heatmap_backward_kernel(
    vectors, strides, gradients, gradient_strides, table, grad_scores, k_count, cells, w,
    PARTS: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_scores: (N, K, cells), contiguous."""
    row = tl.program_id(0).to(tl.int64)
    n = row // k_count
    k = row % k_count
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    mask = tile_mask(inside, D, DEPTH)
    grad = tl.load(grad_scores + row * cells + cell, mask=inside, other=0.0).to(tl.float32)
    for p in tl.static_range(PARTS):
        slot = tl.load(table + k * PARTS + p)
        if slot >= 0:
            at = vectors[p] + tile_offsets(n, slot, cell, w, strides[p], DEPTH)
            v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            to = gradients[p] + tile_offsets(n, slot, cell, w, gradient_strides[p], DEPTH)
            gradient = gradient_of(v, grad, D)
            tl.store(to, gradient.to(gradients[p].dtype.element_ty), mask=mask)


FORWARD, BACKWARD = (
    Tunable(kernel, *VECTORS) for kernel in (vector_heatmap_kernel, vector_heatmap_backward_kernel)
)


@lru_cache(maxsize=64)
def _table(
    keypoints: tuple[int, ...], counts: tuple[int, ...], num_keypoints: int, device: str
) -> Tensor:
    rows = [[-1] * len(counts) for _ in range(num_keypoints)]
    flat = iter(keypoints)
    for part, count in enumerate(counts):
        for slot in range(count):
            rows[next(flat)][part] = slot
    return torch.tensor(rows, dtype=torch.int32, device=device)


def table_of(vectors: Sequence[Tensor], keypoints: Sequence[int], num_keypoints: int) -> Tensor:
    """The kernels' `table`, made once per device."""
    counts = tuple(v.shape[1] for v in vectors)
    return _table(tuple(keypoints), counts, num_keypoints, str(vectors[0].device))


def tile_of(d: int, parts: int, scale: float) -> dict[str, int]:
    """The constants that all kernels take."""
    depth = triton.next_power_of_2(d)
    return {"PARTS": parts, "D": d, "DEPTH": depth, "BLOCK": max(16, int(scale * TILE) // depth)}


def grid_of(n: int, num_keypoints: int, cells: int, block: int) -> tuple[int, int]:
    """Maps, the keypoints of an image next to each other, and blocks of cells."""
    return n * num_keypoints, triton.cdiv(cells, block)


def exact_sizes(vectors: Sequence[Tensor]) -> tuple[int, ...]:
    """What a tuned choice is for, beside the batch: maps of each part, d, h and w."""
    return *(v.shape[1] for v in vectors), *vectors[0].shape[2:]


def strides_of(vectors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Five strides per part, in elements."""
    return tuple(v.stride() for v in vectors)


def launch(vectors: list[Tensor], keypoints: list[int], scores: Tensor) -> None:
    """Launch on the current stream; writes `scores` (N, K, h, w)."""
    n, k, h, w = scores.shape
    if n == 0:
        return

    def run(config: Config) -> None:
        tile = tile_of(vectors[0].shape[2], len(vectors), config.scale)
        vector_heatmap_kernel[grid_of(n, k, h * w, tile["BLOCK"])](
            tuple(vectors), strides_of(vectors), table_of(vectors, keypoints, k), scores,
            k, h * w, w, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(scores):
        FORWARD.launch(run, vectors[0], n, *exact_sizes(vectors))


def launch_backward(
    grad: Tensor, vectors: list[Tensor], keypoints: list[int], gradients: list[Tensor]
) -> None:
    """Launch on the current stream; writes `gradients`. `grad` (N, K, h, w) is contiguous."""
    n, k, h, w = grad.shape
    if n == 0:
        return

    def run(config: Config) -> None:
        tile = tile_of(vectors[0].shape[2], len(vectors), config.scale)
        vector_heatmap_backward_kernel[grid_of(n, k, h * w, tile["BLOCK"])](
            tuple(vectors), strides_of(vectors), tuple(gradients), strides_of(gradients),
            table_of(vectors, keypoints, k), grad,
            k, h * w, w, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(grad):
        BACKWARD.launch(run, vectors[0], n, *exact_sizes(vectors))
