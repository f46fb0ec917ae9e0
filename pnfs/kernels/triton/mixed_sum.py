"""Triton kernels of `mixed_sum`; see `pnfs.kernels.mixed_sum`. `scale_mix` without upsampling runs
on them too.

A map is a matrix (pixels of a part, C), parts any distance apart. Sums over pixels are taken in two
steps: each program leaves its own in a buffer, and one more kernel adds those in a fixed order.

Arguments that several kernels take, one entry per term of the sum unless said otherwise:
    maps, strides: the maps and the distances of their parts in elements.
    norms: mean, variance and, if there are four, scale and shift of the normalised terms; each a
        tuple of (P, C), one per normalised term.
    weights: (P, terms).
    SLOTS: the index of the term's entries in `norms`; -1: it is not normalised.
    RELUS: whether the term has a ReLU.
The rest is as in `pnfs.kernels.triton.maps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.maps import (
    MAPS,
    UNSPECIALISED,
    blocks_of,
    grid_of,
    new_partials,
    passed,
    place,
    rectified,
    tile_of,
    totals,
)
from pnfs.kernels.triton.tuning import Config, Tunable

NUM_WARPS_MERGE = 4
WIDTH_MERGE = 64
TILE, TILE_MERGE = 1024, 1024  # elements that a program holds, at most


@triton.jit
def norm_of(norms, slot: tl.constexpr, at, mask, eps):
    """Mean, scale and shift (COLS,) of a normalised term: act(scale · (y - mean) + shift)."""
    mean = tl.load(norms[0][slot] + at, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.load(norms[1][slot] + at, mask=mask, other=1.0) + eps)
    shift = tl.zeros_like(mean)
    if len(norms) == 4:
        scale *= tl.load(norms[2][slot] + at, mask=mask, other=0.0)
        shift = tl.load(norms[3][slot] + at, mask=mask, other=0.0)
    return mean, scale, shift


@triton.jit(do_not_specialize=UNSPECIALISED)
def mixed_sum_kernel(
    maps, strides, norms, weights, out, pixels, channels, eps,
    SLOTS: tl.constexpr, RELUS: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out: (P, pixels, C). RELU: of the sum."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    part = tl.program_id(1).to(tl.int64)
    block, column = place(channels, COLS)
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = column < channels
    mask = (row < pixels)[:, None] & inside[None, :]
    at = (row * channels)[:, None] + column[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for s in tl.static_range(len(SLOTS)):
        term = tl.load(maps[s] + part * strides[s] + at, mask=mask, other=0.0).to(tl.float32)
        if SLOTS[s] >= 0:
            mean, scale, shift = norm_of(norms, SLOTS[s], part * channels + column, inside, eps)
            term = (term - mean[None, :]) * scale[None, :] + shift[None, :]
        if RELUS[s]:
            term = rectified(term)
        total += tl.load(weights + part * len(SLOTS) + s) * term
    if RELU:
        total = rectified(total)
    to = out + part * pixels * channels + at
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def term_gradient(
    y, g, to, mask, norm, weight, first, second, SLOT: tl.constexpr, RELU: tl.constexpr
):  # fmt: skip
    """Stores the gradient of a term's map y, and adds what the sums over pixels need: `first` the
    gradient behind the ReLU, `second` that times y, centred."""
    mean, scale, shift = norm
    gain = weight
    if SLOT >= 0:
        y -= mean[None, :]
        if RELU:
            g = passed(g, y * scale[None, :] + shift[None, :])
        first += g
        gain = weight * scale[None, :]
    second += g * y
    tl.store(to, (gain * g).to(to.dtype.element_ty), mask=mask)
    return first, second


@triton.jit
def store_sums(partials, first, second, part, block, column, channels, SLOTS: tl.constexpr):
    """Leaves a program's sums in `partials`, (P, terms, 2, blocks, C)."""
    blocks = tl.num_programs(0) // tl.cdiv(channels, column.shape[0])
    inside = column < channels
    for s in tl.static_range(len(SLOTS)):
        to = partials + ((part * len(SLOTS) + s) * 2 * blocks + block) * channels + column
        if SLOTS[s] >= 0:
            tl.store(to, tl.sum(first[s], axis=0), mask=inside)
        tl.store(to + blocks * channels, tl.sum(second[s], axis=0), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def mixed_sum_backward_kernel(
    g, g_stride, h, maps, strides, norms, weights, g_maps, partials, pixels, channels, eps, steps,
    SLOTS: tl.constexpr, RELUS: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """g_maps: (P, pixels, C) each. RELU: of the sum, whose result was h. A program takes `steps`
    times ROWS pixels."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    part = tl.program_id(1).to(tl.int64)
    block, column = place(channels, COLS)
    inside = column < channels
    zero = tl.zeros((ROWS, COLS), tl.float32)
    first = (zero,) * len(SLOTS)
    second = (zero,) * len(SLOTS)
    for step in tl.range(steps, disable_licm=True):
        row = (block.to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        at = (row * channels)[:, None] + column[None, :]
        own = part * pixels * channels + at
        incoming = tl.load(g + part * g_stride + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            incoming = passed(incoming, tl.load(h + own, mask=mask, other=0.0).to(tl.float32))
        new_first = ()
        new_second = ()
        for s in tl.static_range(len(SLOTS)):
            y = tl.load(maps[s] + part * strides[s] + at, mask=mask, other=0.0).to(tl.float32)
            norm = (0.0, 0.0, 0.0)
            if SLOTS[s] >= 0:
                norm = norm_of(norms, SLOTS[s], part * channels + column, inside, eps)
            weight = tl.load(weights + part * len(SLOTS) + s)
            sums = term_gradient(
                y, incoming, g_maps[s] + own, mask, norm, weight, first[s], second[s],
                SLOTS[s], RELUS[s],
            )  # fmt: skip
            new_first = new_first + (sums[0],)
            new_second = new_second + (sums[1],)
        first = new_first
        second = new_second
    store_sums(partials, first, second, part, block, column, channels, SLOTS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def merge_kernel(
    partials, norms, weights, g_norms, g_weights, blocks, channels, eps,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program per term and part: from the sums of all blocks to the gradients of weights and of
    `norms`, whose entries lie in `g_norms`, (normalised terms, P, C) each. In float64."""
    term = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    start = partials + (part * len(SLOTS) + term) * 2 * blocks * channels
    weight = tl.load(weights + part * len(SLOTS) + term).to(tl.float64)
    g_weight = tl.zeros((COLS,), tl.float64)
    for begin in range(0, channels, COLS):
        column = begin + tl.arange(0, COLS)
        inside = column < channels
        for s in tl.static_range(len(SLOTS)):
            if term == s:
                first, second = totals(start, column, blocks, channels, SLOTS[s] >= 0, ROWS)
                if SLOTS[s] >= 0:
                    at = part * channels + column
                    to = SLOTS[s] * parts * channels + at
                    variance = tl.load(norms[1][SLOTS[s]] + at, mask=inside, other=1.0)
                    scale = 1 / tl.sqrt(variance.to(tl.float64) + eps)
                    normalised = scale * second
                    slope = weight * scale
                    if len(norms) == 4:
                        gamma = tl.load(norms[2][SLOTS[s]] + at, mask=inside, other=0.0)
                        beta = tl.load(norms[3][SLOTS[s]] + at, mask=inside, other=0.0)
                        tl.store(g_norms[2] + to, (weight * normalised).to(tl.float32), mask=inside)
                        tl.store(g_norms[3] + to, (weight * first).to(tl.float32), mask=inside)
                        slope *= gamma
                        g_weight += gamma * normalised + beta * first
                    else:
                        g_weight += normalised
                    g_mean = -slope * first
                    g_variance = -0.5 * slope * scale * normalised
                    tl.store(g_norms[0] + to, g_mean.to(tl.float32), mask=inside)
                    tl.store(g_norms[1] + to, g_variance.to(tl.float32), mask=inside)
                else:
                    g_weight += second
    tl.store(g_weights + part * len(SLOTS) + term, tl.sum(g_weight, axis=0).to(tl.float32))


FORWARD, BACKWARD = (
    Tunable(kernel, *MAPS) for kernel in (mixed_sum_kernel, mixed_sum_backward_kernel)
)


def part_strides(maps: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(y.stride(0) for y in maps)


def contiguous(norms: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tuple(item.contiguous() for item in items) for items in norms)


def _partials_shape(g_maps: Sequence[Tensor], blocks: int) -> tuple[int, ...]:
    p, _, c, _, _ = g_maps[0].shape
    return p, len(g_maps), 2, blocks, c


def bytes_of_partials(g_maps: Sequence[Tensor], blocks: int) -> int:
    return 4 * math.prod(_partials_shape(g_maps, blocks))


def launch(
    maps: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    weights: Tensor,
    eps: float,
    out: Tensor,
    *,
    slots: tuple[int, ...],
    relus: tuple[bool, ...],
    relu: bool = False,
) -> None:
    """Launch on the current stream; writes `out` (P, N, C, H, W)."""
    _, n, c, h, w = out.shape
    launch_sum(
        FORWARD, partial(forward_tile, c, len(maps)), (n * h * w,), maps, norms, weights, eps, out,
        SLOTS=slots, RELUS=relus, RELU=relu,
    )  # fmt: skip


def launch_sum(
    kernel: Tunable,
    tile_for: Callable[[float], dict[str, int]],
    size: tuple[int, ...],
    maps: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    weights: Tensor,
    eps: float,
    out: Tensor,
    **kinds: Any,
) -> None:
    """Launch a kernel of the forward pass, unless `out` is empty. `tile_for`: of a scale. `size`:
    the pixels of a part that programs go over, and what else of the kernel's arguments stands
    before `channels`."""
    if out.numel() == 0:
        return
    p, n, c, height, width = out.shape
    small = contiguous(norms), weights.contiguous()

    def run(config: Config) -> None:
        tile = tile_for(config.scale)
        kernel.kernel[grid_of(triton.cdiv(size[0], tile["ROWS"]), p, c, tile)](
            tuple(maps), part_strides(maps), *small, out,
            *size, c, eps, **kinds, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(out):
        kernel.launch(run, out, n, p, c, height, width, *kinds.values())


def launch_backward(
    g: Tensor,
    maps: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    weights: Tensor,
    eps: float,
    g_maps: Sequence[Tensor],
    g_norms: Sequence[Tensor],
    g_weights: Tensor,
    *,
    slots: tuple[int, ...],
    relus: tuple[bool, ...],
    h: Tensor | None = None,
) -> None:
    """Launch on the current stream; writes `g_maps`, `g_norms` and `g_weights`. With `h`, the sum
    went through a ReLU that gave h."""
    p, n, c, height, width = g.shape
    pixels = n * height * width
    launch_gradients(
        BACKWARD, partial(backward_blocks, p, pixels, c, len(maps)), (pixels,),
        g, g if h is None else h, maps, norms, weights, eps, g_maps, g_norms, g_weights,
        SLOTS=slots, RELUS=relus, RELU=h is not None,
    )  # fmt: skip


def launch_gradients(
    kernel: Tunable,
    plan_for: Callable[[float], tuple[dict[str, int], int, int]],
    size: tuple[int, ...],
    g: Tensor,
    h: Tensor,
    maps: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    weights: Tensor,
    eps: float,
    g_maps: Sequence[Tensor],
    g_norms: Sequence[Tensor],
    g_weights: Tensor,
    **kinds: Any,
) -> None:
    """Launch a kernel of the backward pass, unless `g` is empty, and the one that merges its sums.
    `plan_for`: of a scale, as of `backward_blocks`; `size` as of `launch_sum`."""
    p, n, c, height, width = g.shape
    norms, weights = contiguous(norms), weights.contiguous()

    def run(config: Config) -> tuple[Tensor, int]:
        tile, steps, blocks = plan_for(config.scale)
        partials = new_partials(_partials_shape(g_maps, blocks), g)
        if g.numel():
            kernel.kernel[grid_of(blocks, p, c, tile)](
                g, g.stride(0), h, tuple(maps), part_strides(maps), norms, weights,
                tuple(g_maps), partials, *size, c, eps, steps, **kinds, **tile,
                num_warps=config.num_warps, **OPTIONS,
            )  # fmt: skip
        return partials, blocks

    with torch.cuda.device_of(g):
        partials, blocks = kernel.launch(run, g, n, p, c, height, width, *kinds.values())
        merge_kernel[(len(maps), p)](
            partials, norms, weights, tuple(g_norms), g_weights, blocks, c, eps,
            SLOTS=kinds["SLOTS"], **_merge_tile(c), num_warps=NUM_WARPS_MERGE, **OPTIONS,
        )  # fmt: skip


def forward_tile(c: int, terms: int, scale: float = 1.0) -> dict[str, int]:
    return tile_of(c, scale * (TILE if terms <= 3 else TILE // 2 if terms <= 6 else TILE // 4))


def backward_blocks(
    p: int, pixels: int, c: int, terms: int, scale: float = 1.0
) -> tuple[dict[str, int], int, int]:
    """Tile, steps of a program and programs per part of `mixed_sum_backward_kernel`."""
    # Every term has two sums in registers.
    elements = TILE // 2 if terms <= 3 else TILE // 4 if terms <= 6 else TILE // 8
    return blocks_of(pixels, p, c, tile_of(c, scale * elements))


def _merge_tile(c: int) -> dict[str, int]:
    columns = min(WIDTH_MERGE, triton.next_power_of_2(c))
    return {"ROWS": TILE_MERGE // columns, "COLS": columns}
