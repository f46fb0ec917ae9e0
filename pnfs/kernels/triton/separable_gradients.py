"""The backward kernels of `pnfs.kernels.triton.separable_conv`; letters and arguments as in
`pnfs.kernels.triton.separable_kernels`.

With a depthwise convolution there are two launches, whose programs share two tasks each.
`factors_kernel` recomputes t, and takes t's gradient from y's: both are written, t's gradient in
float32, so that x's is rounded once. `gradients_kernel` then walks over a share of the pixels,
with a block of pointwise's gradient in registers, or for some channels of x's gradient with the
sums for the small tensors. Recomputing t where it is multiplied would spare its way through
memory; but nine neighbours and a matrix product together need so many registers that too few
programs are at work. Without depthwise t is the normalised x, its gradient leads to x's at once,
and `gradients_kernel` has it all. Programs leave their sums in one row of `partials` per share,
which a last launch adds up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pnfs.kernels.triton.batch_norm_act import behind
from pnfs.kernels.triton.maps import load_float, store_as
from pnfs.kernels.triton.products import UNSPECIALISED
from pnfs.kernels.triton.separable_kernels import (
    load_norm,
    load_t,
    load_weights,
    load_z,
    tile_from,
)


@triton.jit
def load_y_gradient(
    gy, of_stats, p, first, o, outputs, pixels, inside, o_mask,
    STATS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of the whole y: gy + (g_mean_y + 2 g_var_y (y - mean_y)) / pixels."""
    mask = inside[:, None] & o_mask[None, :]
    places = tl.arange(0, BLOCK_M)[:, None] * outputs + o[None, :]
    from_start = p.to(tl.int64) * pixels * outputs + tile_from(first, places, outputs)
    g = load_float(gy + from_start, mask)
    if STATS:
        y, mean_y, g_mean_y, g_var_y = of_stats
        at = p * outputs + o
        level = tl.load(g_mean_y + at, mask=o_mask, other=0.0) / pixels
        slope = 2 * tl.load(g_var_y + at, mask=o_mask, other=0.0) / pixels
        middle = tl.load(mean_y + at, mask=o_mask, other=0.0)
        value = load_float(y + from_start, mask) - middle[None, :]
        g += tl.where(inside[:, None], level[None, :] + slope[None, :] * value, 0.0)
    return g


@triton.jit
def store_norm_sums(to, norm, first, second, values, c, channels, c_mask):
    """Gradients of those of `norm` that there are, from the sums of z's gradient behind the
    activation and of that times the normalised x. Returns where the next sums go."""
    _, rstd, scale, _ = values
    if norm[0] is not None:
        tl.store(to + c, -scale * first, mask=c_mask)
        tl.store(to + channels + c, -0.5 * scale * rstd * second, mask=c_mask)
        to += 2 * channels
        if norm[2] is not None:
            tl.store(to + c, second, mask=c_mask)
            to += channels
        if norm[3] is not None:
            tl.store(to + c, first, mask=c_mask)
            to += channels
    return to


@triton.jit
def store_x_gradient(
    gx, more, at, mask, g, raw, values, sums, NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Writes x's gradient from z's, g, and adds to the sums that `store_norm_sums` takes."""
    if NORMALISED:
        middle, rstd, scale, shift = values
        distance = raw - middle[None, :]
        g = behind(g, distance * scale[None, :] + shift[None, :], ACTIVATION)
        g = tl.where(mask, g, 0.0)
        normalised = distance * rstd[None, :]
        sums = (sums[0] + tl.sum(g, axis=0), sums[1] + tl.sum(g * normalised, axis=0))
        g *= scale[None, :]
    if more is not None:
        g += load_float(more + at, mask)
    store_as(gx + at, g, mask)
    return sums


@triton.jit
def write_t(
    x, depthwise, norm, t, p, c_block, begin, steps, x_part, channels, pixels, h, w, dilation, eps,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some channels of t, for the pixels from `begin` on."""
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    at = p * channels + c
    values = load_norm(norm, at, c_mask, eps)
    part = x + p.to(tl.int64) * x_part
    own = t + p.to(tl.int64) * pixels * channels
    places = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    for step in tl.range(0, steps, num_stages=1, disable_licm=True):
        first = begin + step * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        row, column, inside = m // w % h, m % w, m < pixels
        value = load_t(
            part, depthwise, first, row, column, inside, places, at, c_mask, channels, h, w,
            dilation, values, NORMALISED, ACTIVATION, 3,
        )  # fmt: skip
        mask = inside[:, None] & c_mask[None, :]
        store_as(own + tile_from(first, places, channels), value, mask)


@triton.jit
def weights_gradient(
    factors, norm, gy, of_stats, to, p, c_block, o_block, begin, steps,
    part, channels, outputs, pixels, eps,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr, BIAS: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A block of the gradient of pointwise (O, C), from the pixels `begin` on, and behind it that
    of bias (O). factors: what pointwise was multiplied by, t or, to be normalised, x; its parts
    are `part` elements apart."""
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    o = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    c_mask, o_mask = c < channels, o < outputs
    values = load_norm(norm, p * channels + c, c_mask, eps)
    source = factors + p.to(tl.int64) * part
    places = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    of_bias = tl.zeros((BLOCK_O,), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for step in tl.range(0, steps, num_stages=1, disable_licm=True):
        first = begin + step * BLOCK_M
        inside = first + tl.arange(0, BLOCK_M) < pixels
        mask = inside[:, None] & c_mask[None, :]
        at = source + tile_from(first, places, channels)
        t = load_z(at, mask, values, NORMALISED, ACTIVATION)
        g = load_y_gradient(
            gy, of_stats, p, first, o, outputs, pixels, inside, o_mask, STATS, BLOCK_M
        )
        total = tl.dot(tl.trans(g.to(FACTOR)), t.to(FACTOR), total, input_precision=PRECISION)
        if BIAS:
            of_bias += tl.sum(g, axis=0)
    weights_at = to + o.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(weights_at, total, mask=o_mask[:, None] & c_mask[None, :])
    if BIAS:  # noqa: SIM102  (one is known when compiling)
        if c_block == 0:
            tl.store(to + outputs * channels + o, of_bias, mask=o_mask)


@triton.jit
def factors_gradient(
    x, pointwise, norm, gy, of_stats, gt, more, to, p, c_block, begin, steps,
    x_part, channels, outputs, pixels, eps,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Some channels of gt, the gradient of what pointwise was multiplied by, for the pixels from
    `begin` on. WHOLE: that was x, normalised: gt is x's, and the sums for `norm` go `to`."""
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    values = load_norm(norm, p * channels + c, c_mask, eps)
    part = x + p.to(tl.int64) * x_part
    own = p.to(tl.int64) * pixels * channels
    places = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    sums = (tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32))
    for step in tl.range(0, steps, num_stages=1, disable_licm=True):
        first = begin + step * BLOCK_M
        inside = first + tl.arange(0, BLOCK_M) < pixels
        gradient = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for o_first in tl.range(0, outputs, BLOCK_O, num_stages=1, disable_licm=True):
            o = o_first + tl.arange(0, BLOCK_O)
            o_mask = o < outputs
            g = load_y_gradient(
                gy, of_stats, p, first, o, outputs, pixels, inside, o_mask, STATS, BLOCK_M
            )
            both = o_mask[:, None] & c_mask[None, :]
            weights = load_weights(pointwise, p, o[:, None], c[None, :], outputs, channels, both)
            gradient = tl.dot(g.to(FACTOR), weights.to(FACTOR), gradient, input_precision=PRECISION)
        mask = inside[:, None] & c_mask[None, :]
        at = tile_from(first, places, channels)
        if WHOLE:
            raw = gradient
            if NORMALISED:
                raw = load_float(part + at, mask)
            sums = store_x_gradient(
                gt, more, own + at, mask, gradient, raw, values, sums, NORMALISED, ACTIVATION
            )
        else:
            store_as(gt + own + at, gradient, mask)
    if WHOLE:
        store_norm_sums(to, norm, sums[0], sums[1], values, c, channels, c_mask)


@triton.jit
def stencil_gradient(
    x, depthwise, norm, gt, more, gx, to, p, c_block, begin, steps,
    x_part, channels, pixels, h, w, dilation, eps,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some channels of gx, for the pixels from `begin` on, and the sums for `norm` and depthwise
    (C, 9)."""
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    at = p * channels + c
    values = load_norm(norm, at, c_mask, eps)
    part = x + p.to(tl.int64) * x_part
    own = p.to(tl.int64) * pixels * channels
    places = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    sums = (tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32))
    zero = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    taps = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for step in tl.range(0, steps, num_stages=1, disable_licm=True):
        first = begin + step * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        row, column, inside = m // w % h, m % w, m < pixels
        mask = inside[:, None] & c_mask[None, :]
        here = tile_from(first, places, channels)
        z = load_z(part + here, mask, values, NORMALISED, ACTIVATION)
        gradient = zero
        added = ()
        for tap in tl.static_range(9):
            # t at (row - dy, column - dx) has read this pixel through the tap
            dy = (tap // 3 - 1) * dilation
            dx = (tap % 3 - 1) * dilation
            there = inside & (row - dy >= 0) & (row - dy < h)
            there = there & (column - dx >= 0) & (column - dx < w)
            source = gt + own + tile_from(first - dy * w - dx, places, channels)
            g = load_float(source, there[:, None] & c_mask[None, :])
            weight = tl.load(depthwise + at * 9 + tap, mask=c_mask, other=0.0)
            gradient += g * weight[None, :]
            added = added + (taps[tap] + g * z,)
        taps = added
        raw = z
        if NORMALISED:
            raw = load_float(part + here, mask)
        sums = store_x_gradient(
            gx, more, own + here, mask, gradient, raw, values, sums, NORMALISED, ACTIVATION
        )
    to = store_norm_sums(to, norm, sums[0], sums[1], values, c, channels, c_mask)
    for tap in tl.static_range(9):
        tl.store(to + c * 9 + tap, tl.sum(taps[tap], axis=0), mask=c_mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def factors_kernel(
    x, pointwise, depthwise, norm, gy, of_stats, t, gt,
    x_part, channels, outputs, pixels, h, w, dilation, eps, share,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    STENCIL_M: tl.constexpr, STENCIL_C: tl.constexpr,
    C_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """t and gt, (P, pixels, C), some programs the one, some the other."""
    channels = channels // C_UNIT * C_UNIT  # says that it is a multiple
    outputs = outputs // O_UNIT * O_UNIT
    p = tl.program_id(2)
    begin = tl.program_id(1) * share
    of_t = tl.cdiv(channels, STENCIL_C)
    block = tl.program_id(0)
    if block < of_t:
        write_t(
            x, depthwise, norm, t, p, block, begin, share // STENCIL_M,
            x_part, channels, pixels, h, w, dilation, eps,
            NORMALISED, ACTIVATION, STENCIL_M, STENCIL_C,
        )  # fmt: skip
    else:
        none = (None, None, None, None)
        factors_gradient(
            x, pointwise, none, gy, of_stats, gt, None, gt, p, block - of_t, begin,
            share // BLOCK_M, x_part, channels, outputs, pixels, eps,
            False, 0, STATS, False, FACTOR, PRECISION, BLOCK_M, BLOCK_C, BLOCK_O,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def gradients_kernel(
    x, pointwise, depthwise, norm, gy, of_stats, t, gt, more, gx, partials,
    x_part, channels, outputs, pixels, h, w, dilation, eps, share, sums_count, sums_first,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr, BIAS: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    STENCIL_M: tl.constexpr, STENCIL_C: tl.constexpr,
    C_UNIT: tl.constexpr, O_UNIT: tl.constexpr,
):  # fmt: skip
    """gx, and rows of sums for all that is small: pointwise (O, C), bias (O), from `sums_first` on
    `norm` and depthwise (C, 9); some programs those of pointwise and bias, some the rest.

    of_stats: y, mean_y and the gradients of mean_y and var_y. t, gt: of `factors_kernel`, with
    depthwise. more: is added to x's gradient.
    """
    channels = channels // C_UNIT * C_UNIT  # says that it is a multiple
    outputs = outputs // O_UNIT * O_UNIT
    split, p = tl.program_id(1), tl.program_id(2)
    begin = split * share
    to = partials + (p.to(tl.int64) * tl.num_programs(1) + split) * sums_count
    c_blocks = tl.cdiv(channels, BLOCK_C)
    of_weights = c_blocks * tl.cdiv(outputs, BLOCK_O)
    block = tl.program_id(0)
    none = (None, None, None, None)
    if block < of_weights:
        if depthwise is None:
            weights_gradient(
                x, norm, gy, of_stats, to, p, block % c_blocks, block // c_blocks, begin,
                share // BLOCK_M, x_part, channels, outputs, pixels, eps,
                NORMALISED, ACTIVATION, STATS, BIAS, FACTOR, PRECISION, BLOCK_M, BLOCK_C, BLOCK_O,
            )  # fmt: skip
        else:
            weights_gradient(
                t, none, gy, of_stats, to, p, block % c_blocks, block // c_blocks, begin,
                share // BLOCK_M, pixels * channels, channels, outputs, pixels, eps,
                False, 0, STATS, BIAS, FACTOR, PRECISION, BLOCK_M, BLOCK_C, BLOCK_O,
            )  # fmt: skip
    else:
        if depthwise is None:
            factors_gradient(
                x, pointwise, norm, gy, of_stats, gx, more, to + sums_first, p,
                block - of_weights, begin, share // BLOCK_M,
                x_part, channels, outputs, pixels, eps,
                NORMALISED, ACTIVATION, STATS, True, FACTOR, PRECISION, BLOCK_M, BLOCK_C, BLOCK_O,
            )  # fmt: skip
        else:
            stencil_gradient(
                x, depthwise, norm, gt, more, gx, to + sums_first, p, block - of_weights, begin,
                share // STENCIL_M, x_part, channels, pixels, h, w, dilation, eps,
                NORMALISED, ACTIVATION, STENCIL_M, STENCIL_C,
            )  # fmt: skip
