"""Triton kernels of `strided_conv`; see `pnfs.kernels.strided_conv`.

P parts, C and O channels, N H W pixels of a part of x, N h w of one of y; maps are (P, pixels,
channels), x's parts x_part elements apart. All is a matrix product whose rows are gathered: tap by
tap and some channels at a time, weights from cache. Products and sums are as in
`pnfs.kernels.triton.separable_kernels`, and so are the statistics.

The backward pass is one launch whose programs share two tasks, and one that adds up sums. Some
have a block of one tap's weights, for a share of y's pixels. The others have pixels of x of one
parity each way, which the same taps have read: one tap where row and column are even, four where
both are odd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.tickets import counters
from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.maps import (
    TILE_MERGE,
    is_last,
    launch_merge_statistics,
    load_float,
    new_partials,
    store_as,
    store_merged_statistics,
    store_statistics,
)
from pnfs.kernels.triton.products import (
    UNSPECIALISED,
    factors,
    launch_sums,
    merges,
    rows,
    shares,
    side,
    statistics_cost,
    units,
)
from pnfs.kernels.triton.tuning import Config, Tunable

PIXELS, STEP_CHANNELS, MAX_OUTPUTS = 64, 32, 64  # of a program of the forward pass
GRADIENT_PIXELS, GRADIENT_CHANNELS, GRADIENT_OUTPUTS = 32, 64, 64
PROGRAMS = 1152  # with weights, roughly: more of them would move more sums


@triton.jit
def image_place(m, height, width):
    """Image, row and column of pixel m of maps of this size."""
    row = m // width
    return row // height, row % height, m % width


@triton.jit
def load_pixels(part, pixel, there, c, channels, c_mask):
    """Some channels (BLOCK_M, BLOCK_C) of these pixels of a part, float32; 0 where not `there`."""
    at = part + pixel.to(tl.int64)[:, None] * channels + c[None, :]
    return load_float(at, there[:, None] & c_mask[None, :])


@triton.jit
def load_taps(weight, p, o, c, tap, outputs, channels, mask):
    """weight[p, o, c, tap], in the broadcast shape of o and c."""
    at = weight + ((p * outputs).to(tl.int64) * channels + o * channels + c) * 9 + tap
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_g(gy, of_stats, p, pixel, there, o, outputs, pixels, o_mask, STATS: tl.constexpr):
    """The gradient of the whole y at these pixels: gy + (g_mean_y + 2 g_var_y (y - mean_y)) / N."""
    first = p.to(tl.int64) * pixels * outputs
    g = load_pixels(gy + first, pixel, there, o, outputs, o_mask)
    if STATS:
        y, mean_y, g_mean_y, g_var_y = of_stats
        at = p * outputs + o
        level = tl.load(g_mean_y + at, mask=o_mask, other=0.0) / pixels
        slope = 2 * tl.load(g_var_y + at, mask=o_mask, other=0.0) / pixels
        middle = tl.load(mean_y + at, mask=o_mask, other=0.0)
        value = load_pixels(y + first, pixel, there, o, outputs, o_mask) - middle[None, :]
        g += tl.where(there[:, None], level[None, :] + slope[None, :] * value, 0.0)
    return g


@triton.jit(do_not_specialize=UNSPECIALISED)
def strided_conv_kernel(
    x, weight, bias, y, partials, statistics, counters,
    x_part, channels, outputs, pixels, h, w, merges,
    STATS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    C_UNIT: tl.constexpr, O_UNIT: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """y, and with STATS partials (P, blocks of pixels, 2, O), of y without its bias; statistics:
    mean and var, written if `merges`. pixels: of y."""
    channels = channels // C_UNIT * C_UNIT  # says that it is a multiple
    outputs = outputs // O_UNIT * O_UNIT
    block, p = tl.program_id(0), tl.program_id(2)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < pixels
    image, row, column = image_place(m, (h + 1) // 2, (w + 1) // 2)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_mask = o < outputs
    part = x + p.to(tl.int64) * x_part
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for step in tl.range(0, 9 * tl.cdiv(channels, BLOCK_C), num_stages=1, disable_licm=True):
        tap = step % 9
        c = step // 9 * BLOCK_C + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        up, left = 2 * row + tap // 3 - 1, 2 * column + tap % 3 - 1
        there = inside & (up >= 0) & (up < h) & (left >= 0) & (left < w)
        value = load_pixels(part, (image * h + up) * w + left, there, c, channels, c_mask)
        both = c_mask[:, None] & o_mask[None, :]
        taps = load_taps(weight, p, o[None, :], c[:, None], tap, outputs, channels, both)
        total = tl.dot(value.to(FACTOR), taps.to(FACTOR), total, input_precision=PRECISION)
    if STATS:
        to = partials + (p.to(tl.int64) * tl.num_programs(0) + block) * 2 * outputs
        count = inside.to(tl.float32)
        store_statistics(to, total, tl.zeros_like(total), count, o, outputs)
    if bias is not None:
        total += tl.load(bias + p * outputs + o, mask=o_mask, other=0.0)[None, :]
    at = y + (p.to(tl.int64) * pixels + m)[:, None] * outputs + o[None, :]
    store_as(at, total, inside[:, None] & o_mask[None, :])
    if STATS:  # noqa: SIM102  (one is known when compiling)
        if merges:
            counter = counters + p * tl.num_programs(1) + tl.program_id(1)
            if is_last(counter, tl.num_programs(0)):
                store_merged_statistics(
                    partials, bias, statistics[0], statistics[1], p.to(tl.int64), pixels, BLOCK_M,
                    tl.num_programs(0), outputs, o, 1, MERGE,
                )  # fmt: skip


@triton.jit
def taps_gradient(
    x, gy, of_stats, to, p, tap, c_block, o_block, begin, steps,
    x_part, channels, outputs, pixels, h, w,
    STATS: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A block of the gradient of weight (O, C, 9) at one tap, from y's pixels `begin` on, and
    behind it that of bias (O)."""
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    o = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    c_mask, o_mask = c < channels, o < outputs
    part = x + p.to(tl.int64) * x_part
    of_bias = tl.zeros((BLOCK_O,), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for step in tl.range(0, steps, num_stages=1, disable_licm=True):
        m = begin + step * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < pixels
        image, row, column = image_place(m, (h + 1) // 2, (w + 1) // 2)
        up, left = 2 * row + tap // 3 - 1, 2 * column + tap % 3 - 1
        there = inside & (up >= 0) & (up < h) & (left >= 0) & (left < w)
        value = load_pixels(part, (image * h + up) * w + left, there, c, channels, c_mask)
        g = load_g(gy, of_stats, p, m, inside, o, outputs, pixels, o_mask, STATS)
        total = tl.dot(tl.trans(g.to(FACTOR)), value.to(FACTOR), total, input_precision=PRECISION)
        if BIAS:
            of_bias += tl.sum(g, axis=0)
    at = to + (o.to(tl.int64)[:, None] * channels + c[None, :]) * 9 + tap
    tl.store(at, total, mask=o_mask[:, None] & c_mask[None, :])
    if BIAS:  # noqa: SIM102  (one is known when compiling)
        if tap == 4 and c_block == 0:
            tl.store(to + outputs.to(tl.int64) * channels * 9 + o, of_bias, mask=o_mask)


@triton.jit
def map_gradient(
    weight, gy, of_stats, more, gx, p, odd_row, odd_column, first, c_block,
    channels, outputs, pixels, images, h, w,
    STATS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Some channels of gx at pixels of one parity each way, from the `first` of these on.

    y's row r has read x's row 2 r by tap 1, and 2 r + 1 by tap 2, as y's row r + 1 has by tap 0.
    """
    out_h, out_w = (h + 1) // 2, (w + 1) // 2
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    image, row, column = image_place(first + tl.arange(0, BLOCK_M), out_h, out_w)
    up, left = 2 * row + odd_row, 2 * column + odd_column
    inside = (image < images) & (up < h) & (left < w)
    across = 1 + odd_column
    taps = (1 + odd_row) * across
    gradient = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in tl.range(0, taps * tl.cdiv(outputs, BLOCK_O), num_stages=1, disable_licm=True):
        down, right = step % taps // across, step % taps % across
        tap = (1 + odd_row - 2 * down) * 3 + 1 + odd_column - 2 * right
        o = step // taps * BLOCK_O + tl.arange(0, BLOCK_O)
        o_mask = o < outputs
        there = inside & (row + down < out_h) & (column + right < out_w)
        pixel = (image * out_h + row + down) * out_w + column + right
        g = load_g(gy, of_stats, p, pixel, there, o, outputs, pixels, o_mask, STATS)
        both = o_mask[:, None] & c_mask[None, :]
        factor = load_taps(weight, p, o[:, None], c[None, :], tap, outputs, channels, both)
        gradient = tl.dot(g.to(FACTOR), factor.to(FACTOR), gradient, input_precision=PRECISION)
    pixel = ((p.to(tl.int64) * images + image) * h + up) * w + left
    at = pixel[:, None] * channels + c[None, :]
    mask = inside[:, None] & c_mask[None, :]
    if more is not None:
        gradient += load_float(more + at, mask)
    store_as(gx + at, gradient, mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def strided_gradients_kernel(
    x, weight, gy, of_stats, more, gx, partials,
    x_part, channels, outputs, pixels, images, h, w, splits, share, sums_count,
    STATS: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    C_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """gx, and rows of sums for weight (O, C, 9) and bias (O), partials (P, splits, sums_count)."""
    channels = channels // C_UNIT * C_UNIT  # says that it is a multiple
    outputs = outputs // O_UNIT * O_UNIT
    program, p = tl.program_id(0), tl.program_id(1)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    of_split = 9 * c_blocks * tl.cdiv(outputs, BLOCK_O)
    if program < splits * of_split:
        split, block = program // of_split, program % of_split
        to = partials + (p.to(tl.int64) * splits + split) * sums_count
        taps_gradient(
            x, gy, of_stats, to, p, block % 9, block // 9 % c_blocks, block // 9 // c_blocks,
            split * share, share // BLOCK_M, x_part, channels, outputs, pixels, h, w,
            STATS, BIAS, FACTOR, PRECISION, BLOCK_M, BLOCK_C, BLOCK_O,
        )  # fmt: skip
    else:
        program -= splits * of_split
        parity, block = program // c_blocks % 4, program // c_blocks // 4
        map_gradient(
            weight, gy, of_stats, more, gx, p, 1 - parity // 2, 1 - parity % 2, block * BLOCK_M,
            program % c_blocks, channels, outputs, pixels, images, h, w,
            STATS, FACTOR, PRECISION, BLOCK_M, BLOCK_C, BLOCK_O,
        )  # fmt: skip


FORWARD = Tunable(strided_conv_kernel, Config(4), Config(8), Config(8, 0.5))
GRADIENTS = Tunable(strided_gradients_kernel, Config(4), Config(8))


def _tile(c: int, o: int, scale: float = 1.0) -> dict[str, int]:
    sides = {"BLOCK_C": side(c, STEP_CHANNELS), "BLOCK_O": side(o, MAX_OUTPUTS)}
    merge = max(1, TILE_MERGE // sides["BLOCK_O"])
    return {"BLOCK_M": rows(PIXELS, scale, c, o), **sides, "MERGE": merge, **units(c, o)}


def _gradient_tile(c: int, o: int, scale: float = 1.0) -> dict[str, int]:
    sides = {"BLOCK_C": side(c, GRADIENT_CHANNELS), "BLOCK_O": side(o, GRADIENT_OUTPUTS)}
    return {"BLOCK_M": rows(GRADIENT_PIXELS, scale, c, o), **sides, **units(c, o)}


def _pixels(x: Tensor) -> int:
    """Of a part of y."""
    _, n, _, h, w = x.shape
    return n * ((h + 1) // 2) * ((w + 1) // 2)


def _shares(x: Tensor, o: int) -> tuple[int, int]:
    """Of the backward pass; see `shares`."""
    p, _, c, _, _ = x.shape
    tile = _gradient_tile(c, o)
    blocks = 9 * triton.cdiv(c, tile["BLOCK_C"]) * triton.cdiv(o, tile["BLOCK_O"])
    return shares(_pixels(x), p * blocks, PROGRAMS)


def forward_cost(x: Tensor, o: int) -> tuple[int, int]:
    """Of the forward pass with statistics; see `statistics_cost`."""
    return statistics_cost(len(x), o, _pixels(x), _tile(x.shape[2], o))


def partial_elements_backward(x: Tensor, o: int, has_bias: bool) -> int:
    """Numbers that pass to the last launch of the backward pass."""
    return len(x) * _shares(x, o)[0] * o * (9 * x.shape[2] + has_bias)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    mean_y: Tensor,
    var_y: Tensor,
) -> None:
    """Launch on the current stream; writes `y` and, unless they are empty, `mean_y` and `var_y`.
    Weights are contiguous."""
    p, n, c, h, w = x.shape
    o, pixels = weight.shape[1], _pixels(x)
    stats = mean_y.numel() > 0
    kind = {"STATS": stats, **factors(x.dtype)}

    def run(config: Config) -> None:
        tile = _tile(c, o, config.scale)
        blocks, across = triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(o, tile["BLOCK_O"])
        partials = new_partials((p, blocks, 2, o), x) if stats else None
        at_once = merges(blocks, o, tile)
        strided_conv_kernel[(blocks, across, p)](
            x, weight, bias, y, partials, (mean_y, var_y) if stats else None,
            counters(p * across, x.device) if stats else None,
            x.stride(0), c, o, pixels, h, w, int(at_once),
            **kind, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip
        if partials is not None and not at_once:
            launch_merge_statistics(partials, mean_y, var_y, pixels, tile["BLOCK_M"], bias)

    with torch.cuda.device_of(x):
        FORWARD.launch(run, x, n, p, c, o, h, w, *kind.values())


def launch_backward(
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    gy: Tensor,
    of_stats: Sequence[Tensor | None],
    more: Tensor | None,
    gradients: list[Tensor],
) -> None:
    """Launch on the current stream; writes `gradients`, those of x, weight and bias. `of_stats`: y,
    mean_y, and the gradients of mean_y and var_y. Small tensors are contiguous; parts of y, gy and
    `more` lie back to back."""
    gx, g_weight, g_bias = gradients
    p, n, c, h, w = x.shape
    o, pixels = weight.shape[1], _pixels(x)
    splits, share = _shares(x, o)
    widths = (o * c * 9, o if has_bias else 0)
    partials = new_partials((p, splits, sum(widths)), x)
    of_stats = tuple(of_stats)
    kind: dict[str, Any] = {"STATS": of_stats[0] is not None, "BIAS": has_bias}
    kind |= factors(x.dtype)

    def run(config: Config) -> None:
        tile = _gradient_tile(c, o, config.scale)
        c_blocks = triton.cdiv(c, tile["BLOCK_C"])
        of_weights = 9 * splits * c_blocks * triton.cdiv(o, tile["BLOCK_O"])
        of_map = 4 * c_blocks * triton.cdiv(pixels, tile["BLOCK_M"])
        strided_gradients_kernel[(of_weights + of_map, p)](
            x, weight, gy, of_stats, more, gx, partials,
            x.stride(0), c, o, pixels, n, h, w, splits, share, sum(widths),
            **kind, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        GRADIENTS.launch(run, x, n, p, c, o, h, w, *kind.values(), more is not None)
        launch_sums(partials, (g_weight, g_bias), widths)
