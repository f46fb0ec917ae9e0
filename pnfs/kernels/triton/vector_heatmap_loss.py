"""Triton kernels of `vector_heatmap_loss`; see `pnfs.kernels.vector_heatmap_loss`, and
`pnfs.kernels.triton.vector_heatmap` for what the arguments mean.

A program reads the vectors of one map at a block of cells, writes their gradients, and leaves its
part of the loss in a buffer that one reduction adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.tuning import Config, Tunable
from pnfs.kernels.triton.vector_heatmap import (
    VECTORS,
    exact_sizes,
    gradient_of,
    grid_of,
    score_of,
    strides_of,
    table_of,
    tile_mask,
    tile_of,
    tile_offsets,
)

SCALE_BLOCK, NUM_WARPS_SCALE = 2048, 4


@triton.jit
def _target_cell(coordinate, stride, size):
    """min(int(coordinate / stride + ½), size - 1) as a float; NaN stays NaN."""
    at = tl.div_rn(coordinate, stride) + 0.5
    whole = tl.where(at < 0, tl.ceil(at), tl.floor(at))
    last = size - 1.0  # size is a constant where it is 1
    return tl.where(whole > last, last, whole)


@triton.jit
def vector_heatmap_loss_kernel(
    vectors, strides, gradients, gradient_strides, table, joints, weights, grad, partial,
    k_count, cells, w, exponent, stride, share,
    PARTS: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    WRITE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """joints: (N, K, 2); weights: (N, K); partial: one number per program; exponent = -1 / 2σ²;
    share = 1 / (N · K · cells). WRITE: gradients are wanted. SCALED: times `grad`, a scalar."""
    row = tl.program_id(0).to(tl.int64)
    n = row // k_count
    k = row % k_count
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights + row)
    inside = cell < cells
    # A masked keypoint is not read. (Triton's interpreter does not broadcast a scalar comparison.)
    counts = inside & (weight + tl.zeros((BLOCK,), tl.float32) != 0)
    mask = tile_mask(counts, D, DEPTH)
    score = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(PARTS):
        slot = tl.load(table + k * PARTS + p)
        if slot >= 0:
            at = vectors[p] + tile_offsets(n, slot, cell, w, strides[p], DEPTH)
            score += score_of(tl.load(at, mask=mask, other=0.0).to(tl.float32), D)

    center_x = _target_cell(tl.load(joints + row * 2), stride, w)
    center_y = _target_cell(tl.load(joints + row * 2 + 1), stride, cells // w)
    dx = (cell % w).to(tl.float32) - center_x
    dy = (cell // w).to(tl.float32) - center_y
    target = tl.exp(exponent * (dx * dx + dy * dy))
    difference = tl.where(counts, score - target, 0.0)
    loss = 0.5 * share * weight * tl.sum(difference * difference, axis=0)
    tl.store(partial + row * tl.num_programs(1) + tl.program_id(1), loss)

    if WRITE:
        gain = weight * share
        if SCALED:
            gain *= tl.load(grad)
        whole = tile_mask(inside, D, DEPTH)
        for p in tl.static_range(PARTS):
            slot = tl.load(table + k * PARTS + p)
            if slot >= 0:
                at = vectors[p] + tile_offsets(n, slot, cell, w, strides[p], DEPTH)
                v = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # in cache
                to = gradients[p] + tile_offsets(n, slot, cell, w, gradient_strides[p], DEPTH)
                gradient = gradient_of(v, gain * difference, D)
                tl.store(to, gradient.to(gradients[p].dtype.element_ty), mask=whole)


LOSS = Tunable(vector_heatmap_loss_kernel, *VECTORS)


@triton.jit
def scale_kernel(tensors, sizes, factor, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Multiplies tensors of `sizes` elements without gaps by a scalar, unless that is 1."""
    by = tl.load(factor)
    if by != 1:
        element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for p in tl.static_range(PARTS):
            if tl.program_id(1) == p:
                mask = element < sizes[p]
                value = tl.load(tensors[p] + element, mask=mask).to(tl.float32) * by
                tl.store(tensors[p] + element, value.to(tensors[p].dtype.element_ty), mask=mask)


def launch(
    vectors: list[Tensor],
    joints: Tensor,
    weights: Tensor,
    keypoints: list[int],
    sigma: float,
    stride: float,
    gradients: list[Tensor],
    grad: Tensor | None = None,
) -> Tensor:
    """Launch on the current stream. Returns the loss; writes `gradients`, unless there are none,
    times `grad` if given. Joints and weights are contiguous."""
    n, k = weights.shape
    d, h, w = vectors[0].shape[2:]
    if n == 0:
        return weights.new_zeros(())
    written = gradients or vectors

    def run(config: Config) -> Tensor:
        tile = tile_of(d, len(vectors), config.scale)
        grid = grid_of(n, k, h * w, tile["BLOCK"])
        partial = torch.empty(grid, dtype=torch.float32, device=weights.device)
        vector_heatmap_loss_kernel[grid](
            tuple(vectors), strides_of(vectors), tuple(written), strides_of(written),
            table_of(vectors, keypoints, k), joints, weights,
            weights if grad is None else grad, partial,
            k, h * w, w, -0.5 / (sigma * sigma), stride, 1 / (n * k * h * w),
            **tile, WRITE=bool(gradients), SCALED=grad is not None,
            num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip
        return partial

    with torch.cuda.device_of(weights):
        exact = (*exact_sizes(vectors), bool(gradients), grad is not None)
        return LOSS.launch(run, vectors[0], n, *exact).sum()


def launch_scale(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors without gaps in place by a scalar tensor, unless that is 1."""
    sizes = tuple(tensor.numel() for tensor in tensors)
    if not any(sizes):
        return
    with torch.cuda.device_of(factor):
        scale_kernel[(triton.cdiv(max(sizes), SCALE_BLOCK), len(tensors))](
            tuple(tensors), sizes, factor, PARTS=len(tensors), BLOCK=SCALE_BLOCK,
            num_warps=NUM_WARPS_SCALE, **OPTIONS,
        )  # fmt: skip
