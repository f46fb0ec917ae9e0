"""Triton kernels of `batch_norm_act`; see `pnfs.kernels.batch_norm_act`, and
`pnfs.kernels.triton.maps` for tiles and statistics.

Two launches each way where the statistics are the batch's: one that leaves sums, and one that goes
over the map again, each of whose programs merges the sums of its channels first. With given
statistics either pass is one launch: the backward one writes x's gradient where it takes the sums,
and the last program merges these.

Arguments that several kernels take:
    x, residual, y, gy, gx, g_residual: (pixels, C).
    mean, var, weight, bias: (C,).
    partials: (2, blocks, C), sums of g and of g times the normalised x; g is the gradient behind
        the activation.
    RESIDUAL: whether there is one. ACTIVATION: an index into `ACTIVATIONS`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, cuda

from pnfs.kernels.tickets import counters
from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.maps import (
    MAPS,
    SUMS,
    TILE_MERGE,
    UNSPECIALISED,
    blocks_of,
    grid_of,
    is_last,
    launch_statistics,
    load_float,
    merged_statistics,
    new_partials,
    place,
    rows_of,
    store_as,
    sums_blocks,
    tile_at,
    tile_of,
    totals,
)
from pnfs.kernels.triton.tuning import Config, Tunable

TILE = 2048  # of the kernels that leave no sums
TILE_GRADIENT = 2048  # of the backward pass's that does; it has three maps in registers


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """NaN stays."""
    if ACTIVATION >= 1:
        z = tl.where(z < 0, 0.0, z)
    if ACTIVATION == 2:
        z = tl.where(z > 6, 6.0, z)
    return z


@triton.jit
def behind(g, z, ACTIVATION: tl.constexpr):
    """The gradient of z where g is that of `activated(z)`."""
    if ACTIVATION >= 1:
        g = tl.where(z <= 0, 0.0, g)
    if ACTIVATION == 2:
        g = tl.where(z >= 6, 0.0, g)
    return g


@triton.jit
def load_norm(mean, var, column, channels, eps):
    """Mean and 1 / sqrt(var + eps), (COLS,)."""
    inside = column < channels
    middle = tl.load(mean + column, mask=inside, other=0.0)
    return middle, tl.rsqrt(tl.load(var + column, mask=inside, other=1.0) + eps)


@triton.jit
def load_affine(weight, bias, column, channels):
    inside = column < channels
    scale = tl.load(weight + column, mask=inside, other=0.0)
    return scale, tl.load(bias + column, mask=inside, other=0.0)


@triton.jit
def write_y(
    x, residual, y, block, steps, pixels, channels, column, middle, scale, shift,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """act(scale (x - middle) + shift + residual) of the pixels of a program."""
    for step in tl.range(steps, disable_licm=True):
        first = rows_of(block, step, steps, ROWS)
        start, places, mask = tile_at(first, pixels, channels, column, ROWS)
        z = load_float(x + start + places, mask) - middle[None, :]
        z = z * scale[None, :] + shift[None, :]
        if RESIDUAL:
            z += load_float(residual + start + places, mask)
        store_as(y + start + places, activated(z, ACTIVATION), mask)


@triton.jit
def sums_of(
    gy, x, residual, gx, g_residual, block, steps, pixels, channels, column, norm,
    BATCH: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums (COLS,) of g and of g times the normalised x over the pixels of a program; writes, with
    RESIDUAL, its gradient, and, unless BATCH, that of x. norm: mean, 1 / deviation, weight, bias.
    """
    middle, rstd, scale, shift = norm
    total = tl.zeros((ROWS, column.shape[0]), tl.float32)
    moment = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for step in tl.range(steps, disable_licm=True):
        first = rows_of(block, step, steps, ROWS)
        start, places, mask = tile_at(first, pixels, channels, column, ROWS)
        normalised = (load_float(x + start + places, mask) - middle[None, :]) * rstd[None, :]
        z = normalised * scale[None, :] + shift[None, :]
        if RESIDUAL:
            z += load_float(residual + start + places, mask)
        g = behind(load_float(gy + start + places, mask), z, ACTIVATION)
        if RESIDUAL:
            store_as(g_residual + start + places, g, mask)
        if not BATCH:
            store_as(gx + start + places, g * (scale * rstd)[None, :], mask)
        total += g
        moment += g * normalised
    return tl.sum(total, axis=0), tl.sum(moment, axis=0)


@triton.jit
def write_gx(
    gy, x, gx, block, steps, pixels, channels, column, norm, total, moment,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x's gradient through the batch's statistics, of the pixels of a program. total, moment: the
    means over all pixels of what `sums_of` sums. norm: as there."""
    middle, rstd, scale, shift = norm
    for step in tl.range(steps, disable_licm=True):
        first = rows_of(block, step, steps, ROWS)
        start, places, mask = tile_at(first, pixels, channels, column, ROWS)
        normalised = (load_float(x + start + places, mask) - middle[None, :]) * rstd[None, :]
        z = normalised * scale[None, :] + shift[None, :]
        g = behind(load_float(gy + start + places, mask), z, ACTIVATION)
        g = (g - total[None, :] - normalised * moment[None, :]) * (scale * rstd)[None, :]
        store_as(gx + start + places, g, mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def batch_norm_act_kernel(
    x, residual, mean, var, weight, bias, y, partials, pixels, channels, eps, steps, per_block,
    blocks, BATCH: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """BATCH: mean and var come from `partials`, (blocks, 2, C), and are written."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    block, column = place(channels, COLS)
    if BATCH:
        inside = column < channels
        middle, variance = merged_statistics(
            partials, 0, pixels, per_block, blocks, channels, column, MERGE
        )
        middle = middle.to(tl.float32)
        variance = variance.to(tl.float32)
        if block == 0:
            tl.store(mean + column, middle, mask=inside)
            tl.store(var + column, variance, mask=inside)
        rstd = tl.rsqrt(variance + eps)
    else:
        middle, rstd = load_norm(mean, var, column, channels, eps)
    scale, shift = load_affine(weight, bias, column, channels)
    scale *= rstd
    write_y(
        x, residual, y, block, steps, pixels, channels, column, middle, scale, shift, RESIDUAL,
        ACTIVATION, ROWS,
    )  # fmt: skip


@triton.jit
def store_merged_gradients(
    var, weight, results, partials, column, channels, blocks, eps, ROWS: tl.constexpr
):
    """results: the gradients of weight, bias, mean and var, from the sums of all blocks."""
    g_weight, g_bias, g_mean, g_var = results
    inside = column < channels
    total, moment = totals(partials, column, blocks, channels, True, ROWS)
    variance = tl.load(var + column, mask=inside, other=1.0).to(tl.float64)
    rstd = 1 / tl.sqrt(variance + eps)
    slope = tl.load(weight + column, mask=inside, other=0.0) * rstd
    tl.store(g_bias + column, total.to(tl.float32), mask=inside)
    tl.store(g_weight + column, moment.to(tl.float32), mask=inside)
    tl.store(g_mean + column, (-slope * total).to(tl.float32), mask=inside)
    tl.store(g_var + column, (-0.5 * slope * rstd * moment).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sums_kernel(
    gy, x, residual, mean, var, weight, bias, gx, g_residual, partials, results, counters,
    pixels, channels, eps, steps, BATCH: tl.constexpr, RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """Writes `partials`, with RESIDUAL its gradient, and, unless BATCH, that of x; the last
    program of some channels then `results`, see `store_merged_gradients`."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    block, column = place(channels, COLS)
    middle, rstd = load_norm(mean, var, column, channels, eps)
    scale, shift = load_affine(weight, bias, column, channels)
    total, moment = sums_of(
        gy, x, residual, gx, g_residual, block, steps, pixels, channels, column,
        (middle, rstd, scale, shift), BATCH, RESIDUAL, ACTIVATION, ROWS,
    )  # fmt: skip
    inside = column < channels
    to = partials + block * channels + column
    across = tl.cdiv(channels, COLS)
    blocks = tl.num_programs(0) // across
    tl.store(to, total, mask=inside)
    tl.store(to + blocks * channels, moment, mask=inside)
    if not BATCH:  # noqa: SIM102  (one is known when compiling)
        if is_last(counters + tl.program_id(0) % across, blocks):
            store_merged_gradients(
                var, weight, results, partials, column, channels, blocks, eps, MERGE
            )


@triton.jit(do_not_specialize=UNSPECIALISED)
def gradient_kernel(
    gy, x, mean, var, weight, bias, gx, g_weight, g_bias, partials, pixels, channels, eps, steps,
    blocks, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """gx through the batch's statistics, and the gradients of weight and bias.

    ACTIVATION: 0 too where gy is the gradient behind it.
    """
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    block, column = place(channels, COLS)
    inside = column < channels
    total, moment = totals(partials, column, blocks, channels, True, MERGE)
    if block == 0:
        tl.store(g_bias + column, total.to(tl.float32), mask=inside)
        tl.store(g_weight + column, moment.to(tl.float32), mask=inside)
    total = (total / pixels).to(tl.float32)
    moment = (moment / pixels).to(tl.float32)
    middle, rstd = load_norm(mean, var, column, channels, eps)
    scale, shift = load_affine(weight, bias, column, channels)
    write_gx(
        gy, x, gx, block, steps, pixels, channels, column, (middle, rstd, scale, shift), total,
        moment, ACTIVATION, ROWS,
    )  # fmt: skip


FORWARD, GRADIENT = (Tunable(kernel, *MAPS) for kernel in (batch_norm_act_kernel, gradient_kernel))
BACKWARD_SUMS = Tunable(sums_kernel, *SUMS)


def _pixels(x: Tensor) -> int:
    n, _, h, w = x.shape
    return n * h * w


def _pass(x: Tensor, scale: float = 1.0) -> tuple[dict[str, int], int, int]:
    """Tile, steps and programs per channels of a kernel that leaves no sums."""
    c = x.shape[1]
    tile, steps, blocks = blocks_of(_pixels(x), 1, c, tile_of(c, scale * TILE))
    return {**tile, "MERGE": TILE_MERGE // tile["COLS"]}, steps, blocks


def _gradient_blocks(x: Tensor, scale: float = 1.0) -> tuple[dict[str, int], int, int]:
    """As `_pass`, for a kernel that does."""
    c = x.shape[1]
    tile = tile_of(c, scale * TILE_GRADIENT)
    tile, steps, blocks = blocks_of(_pixels(x), 1, c, tile, merged=True)
    return {**tile, "MERGE": TILE_MERGE // tile["COLS"]}, steps, blocks


def partial_bytes(x: Tensor, *, backward: bool, merged_once: bool = False) -> int:
    """Of the sums that programs leave: written once; read by the last program with the channels if
    `merged_once`, else by every one of the next launch."""
    c = x.shape[1]
    blocks = (_gradient_blocks(x) if backward else sums_blocks(1, _pixels(x), c))[2]
    return 4 * 2 * c * blocks * (1 + (1 if merged_once else _pass(x)[2]))


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    batch: bool,
    eps: float,
    y: Tensor,
) -> None:
    """Launch on the current stream; writes `y`, and with `batch` `mean` and `var`. x has pixels;
    small tensors are contiguous."""
    n, c, h, w = x.shape
    kind = {"BATCH": batch, "RESIDUAL": residual is not None, "ACTIVATION": activation}
    with cuda.device_of(x):
        partials, per_block = launch_statistics(x[None]) if batch else (mean[None, None], 0)

        def run(config: Config) -> None:
            tile, steps, programs = _pass(x, config.scale)
            batch_norm_act_kernel[grid_of(programs, 1, c, tile)](
                x, x if residual is None else residual, mean, var, weight, bias, y, partials,
                n * h * w, c, eps, steps, per_block, partials.shape[1], **kind, **tile,
                num_warps=config.num_warps, **OPTIONS,
            )  # fmt: skip

        FORWARD.launch(run, x, n, c, h, w, *kind.values())


def launch_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    batch: bool,
    eps: float,
    gradients: list[Tensor],
) -> None:
    """Launch on the current stream; writes `gradients`, those of x, weight, bias, mean, var and
    residual. x has pixels; small tensors are contiguous."""
    gx, g_weight, g_bias, g_mean, g_var, g_residual = gradients
    n, c, h, w = x.shape
    pixels = n * h * w
    norm = (mean, var, weight, bias)
    results = None if batch else (g_weight, g_bias, g_mean, g_var)
    kind: dict[str, Any] = {"RESIDUAL": residual is not None, "ACTIVATION": activation}

    def sums(config: Config) -> Tensor:
        tile, steps, blocks = _gradient_blocks(x, config.scale)
        partials = new_partials((2, blocks, c), x)
        merges = None if batch else counters(triton.cdiv(c, tile["COLS"]), x.device)
        sums_kernel[grid_of(blocks, 1, c, tile)](
            gy, x, x if residual is None else residual, *norm, gx, g_residual, partials, results,
            merges, pixels, c, eps, steps, BATCH=batch, **kind, **tile,
            num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip
        return partials

    with cuda.device_of(x):
        partials = BACKWARD_SUMS.launch(sums, x, n, c, h, w, batch, *kind.values())
        if not batch:
            return
        masked = residual is not None  # its gradient is the one behind the activation
        behind_it = 0 if masked else activation

        def gradient(config: Config) -> None:
            tile, steps, programs = _pass(x, config.scale)
            gradient_kernel[grid_of(programs, 1, c, tile)](
                g_residual if masked else gy, x, *norm, gx, g_weight, g_bias, partials,
                pixels, c, eps, steps, partials.shape[1], ACTIVATION=behind_it, **tile,
                num_warps=config.num_warps, **OPTIONS,
            )  # fmt: skip

        GRADIENT.launch(gradient, x, n, c, h, w, behind_it)
