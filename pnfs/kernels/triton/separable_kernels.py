"""The forward kernel of `pnfs.kernels.triton.separable_conv`, and what the backward ones
(`pnfs.kernels.triton.separable_gradients`) share with it.

P parts, C and O channels, N H W pixels of a part; maps are (P, pixels, channels), x's parts x_part
elements apart. z is the normalised x, t the depthwise result.

A program has a block of pixels and as many outputs as its registers hold; z and t live there
alone. Of every few channels it reads the nine neighbours of x, eight of them from cache, and
multiplies by the weights, which stay in the L2 cache. With statistics it leaves mean and squared
deviation of its block, before the bias, which may be far above the deviation and would cost it
digits: for the last program of some outputs, where those are few, or for a second launch.

Products of float32 maps are three of TF32 each ("tf32x3"), as good as float32; one where
torch.backends.cuda.matmul.fp32_precision is "tf32". Factors of half types are rounded to the map's
type, as torch's convolutions do. Sums are float32 in a program, float64 over programs.

Arguments that several kernels take:
    norm: mean, var, gamma, beta, (P, C) each or None.
    ACTIVATION: an index into `ACTIVATIONS`, of the normalised x.
    FACTOR, PRECISION: what is multiplied, and how.
    C_UNIT, O_UNIT: divide channels and outputs; so many are loaded at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pnfs.kernels.triton.batch_norm_act import activated
from pnfs.kernels.triton.maps import (
    is_last,
    load_float,
    store_as,
    store_merged_statistics,
    store_statistics,
)
from pnfs.kernels.triton.products import UNSPECIALISED


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
    values, NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of t; `at` is the channels' place in (P, C). ROWS of its neighbours, 1 or 3, are read
    at once: three keep the memory busier, and take more registers."""
    if depthwise is not None:
        t = tl.zeros(places.shape, tl.float32)
        for i in tl.range(3, loop_unroll_factor=ROWS):
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
    x, pointwise, depthwise, bias, norm, y, partials, statistics, counters,
    x_part, channels, outputs, pixels, h, w, dilation, eps, merges,
    NORMALISED: tl.constexpr, ACTIVATION: tl.constexpr, STATS: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    C_UNIT: tl.constexpr, O_UNIT: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """y, and with STATS partials (P, blocks of pixels, 2, O), of y without its bias; statistics:
    mean and var, written if `merges`."""
    channels = channels // C_UNIT * C_UNIT  # says that it is a multiple
    outputs = outputs // O_UNIT * O_UNIT
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
            dilation, values, NORMALISED, ACTIVATION, 1,
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
    if STATS:  # noqa: SIM102  (one is known when compiling)
        if merges:
            counter = counters + p * tl.num_programs(1) + tl.program_id(1)
            if is_last(counter, tl.num_programs(0)):
                store_merged_statistics(
                    partials, bias, statistics[0], statistics[1], p.to(tl.int64), pixels, BLOCK_M,
                    tl.num_programs(0), outputs, o, 1, MERGE,
                )  # fmt: skip
