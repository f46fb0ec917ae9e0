"""The kernels of `pnfs.kernels.triton.separable_conv`.

P parts, C and O channels, N H W pixels of a part; maps are (P, pixels, channels), x's parts x_part
elements apart. The normalised z and the depthwise result t live in registers alone.

Forward. A program has a block of pixels and as many outputs as its registers hold. Of every few
channels it reads the nine neighbours of x, eight of them from cache, and multiplies by the weights,
which stay in the L2 cache. With statistics it leaves mean and squared deviation of its block for a
second launch: those before the bias, which may be far above the deviation and would cost it digits.

Backward. `product_gradient_kernel` walks over a share of the pixels with a block of the weights'
gradient in registers, recomputes t, and writes t's gradient; that leads to x's where there is no
depthwise convolution. Otherwise `stencil_gradient_kernel` reads t's gradient and x once each, and
writes x's. t's gradient is float32, so that x's is rounded once. Both leave their sums in one row
of `partials` per share, which a last launch adds up in a fixed order.

Products of float32 maps are three of TF32 each ("tf32x3"), as good as float32; one where
torch.backends.cuda.matmul.fp32_precision is "tf32". Factors of half types are rounded to the map's
type, as torch's convolutions do. Sums are float32 in a program, float64 over programs.

Arguments that several kernels take:
    norm: mean, var, gamma, beta, (P, C) each or None.
    ACTIVATION: an index into `ACTIVATIONS`, of the normalised x.
    FACTOR, PRECISION: what is multiplied, and how.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pnfs.kernels.triton.batch_norm_act import activated, behind
from pnfs.kernels.triton.maps import load_float, store_as, store_statistics

# Arguments that follow the batch; see `pnfs.kernels.triton.maps`.
UNSPECIALISED = ("pixels", "steps", "rows", "dilation")


@triton.jit
def tile_from(first, places, channels):
    """Offsets of a tile whose `places` count from pixel `first`, in 64 bits."""
    return first.to(tl.int64) * channels + places


@triton.jit
def load_norm(norm, at, mask, eps):
    """Mean, 1 / sqrt(var + eps), scale and shift of some channels: z = act(scale (x - mean) +
    shift)."""
    middle = tl.zeros(at.shape, tl.float32)
    rstd = middle
    scale = middle
    shift = middle
    if norm[0] is not None:
        middle = tl.load(norm[0] + at, mask=mask, other=0.0)
        rstd = 1 / tl.sqrt(tl.load(norm[1] + at, mask=mask, other=1.0) + eps)
        scale = rstd
        if norm[2] is not None:
            scale *= tl.load(norm[2] + at, mask=mask, other=0.0)
        if norm[3] is not None:
            shift = tl.load(norm[3] + at, mask=mask, other=0.0)
    return middle, rstd, scale, shift


@triton.jit
def load_z(at, mask, values, NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr):
    """A tile of z; 0 where masked. `values`: of `load_norm`."""
    z = load_float(at, mask)
    if NORMALISED:
        z = (z - values[0][None, :]) * values[2][None, :] + values[3][None, :]
        z = tl.where(mask, activated(z, ACTIVATION), 0.0)
    return z


@triton.jit
def load_t(
    part, depthwise, first, row, column, inside, places, at, c_mask, channels, h, w, dilation,
    values, NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """A tile of t; `at` is the channels' place in (P, C)."""
    if depthwise is not None:
        t = tl.zeros(places.shape, tl.float32)
        for i in range(3):  # three rows one after the other: fewer registers than nine taps at once
            dy = (i - 1) * dilation
            in_rows = inside & (row + dy >= 0) & (row + dy < h)
            for j in tl.static_range(3):
                dx = (j - 1) * dilation
                there = in_rows & (column + dx >= 0) & (column + dx < w)
                mask = there[:, None] & c_mask[None, :]
                source = part + tile_from(first + dy * w + dx, places, channels)
                z = load_z(source, mask, values, NORMALISED, ACTIVATION)
                tap = tl.load(depthwise + at * 9 + i * 3 + j, mask=c_mask, other=0.0)
                t += z * tap[None, :]
    else:
        mask = inside[:, None] & c_mask[None, :]
        source = part + tile_from(first, places, channels)
        t = load_z(source, mask, values, NORMALISED, ACTIVATION)
    return t


@triton.jit
def load_weights(pointwise, p, o, c, outputs, channels, mask):
    """pointwise[p, o, c], in the broadcast shape of o and c."""
    at = pointwise + (p * outputs).to(tl.int64) * channels + o * channels + c
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def separable_conv_kernel(
    x, pointwise, depthwise, bias, norm, y, partials,
    x_part, channels, outputs, pixels, h, w, dilation, eps,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y, and with STATS partials (P, blocks of pixels, 2, O), of y without its bias."""
    block = tl.program_id(0)
    p = tl.program_id(2)
    first = block * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    row, column, inside = m // w % h, m % w, m < pixels
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_mask = o < outputs
    part = x + p.to(tl.int64) * x_part
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for c_first in tl.range(0, channels, BLOCK_C, num_stages=1, disable_licm=True):
        c = c_first + tl.arange(0, BLOCK_C)
        c_mask = c < channels
        at = p * channels + c
        values = load_norm(norm, at, c_mask, eps)
        places = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
        t = load_t(
            part, depthwise, first, row, column, inside, places, at, c_mask, channels, h, w,
            dilation, values, NORMALISED, ACTIVATION,
        )  # fmt: skip
        both = c_mask[:, None] & o_mask[None, :]
        weights = load_weights(pointwise, p, o[None, :], c[:, None], outputs, channels, both)
        total = tl.dot(t.to(FACTOR), weights.to(FACTOR), total, input_precision=PRECISION)
    if STATS:
        to = partials + (p.to(tl.int64) * tl.num_programs(0) + block) * 2 * outputs
        count = inside.to(tl.float32)
        store_statistics(to, total, tl.zeros_like(total), count, o, outputs)
    if bias is not None:
        total += tl.load(bias + p * outputs + o, mask=o_mask, other=0.0)[None, :]
    places = tl.arange(0, BLOCK_M)[:, None] * outputs + o[None, :]
    own = y + p.to(tl.int64) * pixels * outputs
    store_as(own + tile_from(first, places, outputs), total, inside[:, None] & o_mask[None, :])


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


@triton.jit(do_not_specialize=UNSPECIALISED)
def product_gradient_kernel(
    x, pointwise, depthwise, norm, gy, of_stats, gt, more, partials,
    x_part, channels, outputs, pixels, h, w, dilation, eps, c_blocks, steps, sums_count,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr, BIAS: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """gt (P, pixels, C), which is x's gradient without depthwise, and the sums for pointwise
    (O, C), bias (O) and, without depthwise, `norm`.

    of_stats: y, mean_y and the gradients of mean_y and var_y. more: is added to x's gradient.
    """
    split = tl.program_id(1)
    p = tl.program_id(2)
    c_block = tl.program_id(0) % c_blocks
    o_block = tl.program_id(0) // c_blocks
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)
    o = o_block * BLOCK_O + tl.arange(0, BLOCK_O)
    c_mask = c < channels
    o_mask = o < outputs
    at = p * channels + c
    values = load_norm(norm, at, c_mask, eps)
    part = x + p.to(tl.int64) * x_part
    own = p.to(tl.int64) * pixels * channels
    places = tl.arange(0, BLOCK_M)[:, None] * channels + c[None, :]
    sums = (tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32))
    of_bias = tl.zeros((BLOCK_O,), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for step in tl.range(0, steps, num_stages=1, disable_licm=True):
        first = (split * steps + step) * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        row, column, inside = m // w % h, m % w, m < pixels
        g = load_y_gradient(
            gy, of_stats, p, first, o, outputs, pixels, inside, o_mask, STATS, BLOCK_M
        )
        t = load_t(
            part, depthwise, first, row, column, inside, places, at, c_mask, channels, h, w,
            dilation, values, NORMALISED, ACTIVATION,
        )  # fmt: skip
        total = tl.dot(tl.trans(g.to(FACTOR)), t.to(FACTOR), total, input_precision=PRECISION)
        if BIAS:
            of_bias += tl.sum(g, axis=0)
        if o_block == 0:  # the others have the weights' gradient alone
            gradient = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
            for o_first in tl.range(0, outputs, BLOCK_O, num_stages=1, disable_licm=True):
                every = o_first + tl.arange(0, BLOCK_O)
                every_mask = every < outputs
                g = load_y_gradient(
                    gy, of_stats, p, first, every, outputs, pixels, inside, every_mask, STATS,
                    BLOCK_M,
                )  # fmt: skip
                both = every_mask[:, None] & c_mask[None, :]
                weights = load_weights(
                    pointwise, p, every[:, None], c[None, :], outputs, channels, both
                )
                gradient = tl.dot(
                    g.to(FACTOR), weights.to(FACTOR), gradient, input_precision=PRECISION
                )
            mask = inside[:, None] & c_mask[None, :]
            to = tile_from(first, places, channels)
            if depthwise is not None:
                store_as(gt + own + to, gradient, mask)
            else:
                raw = gradient
                if NORMALISED:
                    raw = load_float(part + to, mask)
                sums = store_x_gradient(
                    gt, more, own + to, mask, gradient, raw, values, sums, NORMALISED, ACTIVATION
                )
    to = partials + (p.to(tl.int64) * tl.num_programs(1) + split) * sums_count
    weights_at = to + o.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(weights_at, total, mask=o_mask[:, None] & c_mask[None, :])
    to += outputs * channels
    if BIAS:
        if c_block == 0:
            tl.store(to + o, of_bias, mask=o_mask)
        to += outputs
    if depthwise is None:  # noqa: SIM102  (one is known when compiling)
        if o_block == 0:
            store_norm_sums(to, norm, sums[0], sums[1], values, c, channels, c_mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def stencil_gradient_kernel(
    x, depthwise, norm, gt, more, gx, partials,
    x_part, channels, pixels, h, w, dilation, eps, steps, sums_count, sums_first,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx, and the sums for `norm` and depthwise (C, 9), from `sums_first` of a row on."""
    split = tl.program_id(1)
    p = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
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
        first = (split * steps + step) * BLOCK_M
        m = first + tl.arange(0, BLOCK_M)
        row, column, inside = m // w % h, m % w, m < pixels
        mask = inside[:, None] & c_mask[None, :]
        to = tile_from(first, places, channels)
        z = load_z(part + to, mask, values, NORMALISED, ACTIVATION)
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
            raw = load_float(part + to, mask)
        sums = store_x_gradient(
            gx, more, own + to, mask, gradient, raw, values, sums, NORMALISED, ACTIVATION
        )
    to = partials + (p.to(tl.int64) * tl.num_programs(1) + split) * sums_count + sums_first
    to = store_norm_sums(to, norm, sums[0], sums[1], values, c, channels, c_mask)
    for tap in tl.static_range(9):
        tl.store(to + c * 9 + tap, tl.sum(taps[tap], axis=0), mask=c_mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sum_kernel(partials, results, widths, rows, sums_count, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ over the rows of partials (P, rows, sums_count), cut into results of `widths` per part."""
    p = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = partials + (p * rows + row)[:, None] * sums_count + column[None, :]
        mask = (row < rows)[:, None] & (column < sums_count)[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
    result = tl.sum(total, axis=0).to(tl.float32)
    for i in tl.static_range(len(widths)):
        mask = (column >= 0) & (column < widths[i])
        tl.store(results[i] + p * widths[i] + column, result, mask=mask)
        column -= widths[i]
