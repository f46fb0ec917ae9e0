"""`batch_norm_act` with the batch's statistics in one launch each way, for wide maps.

A program has a few channels of all pixels: it takes their sums, and then goes over the pixels once
more, which lie in its L1 or in the L2 cache by then as far as they fit. Nothing passes from one
program to another, so there is no second launch and no sum to merge.

Few programs would be slower than two launches of many: one multiprocessor streams perhaps 100 GB/s
(no GPU has measured it here), the memory of an H200 4,300, so it takes 43 of them. A map comes here
by its channels alone, whatever the batch: with `PROGRAMS` programs or more. Narrower ones, where a
dozen or two would go over thousands of pixels, take two launches.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor, cuda

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.batch_norm_act import (
    load_affine,
    load_norm,
    sums_of,
    write_gx,
    write_y,
)
from pnfs.kernels.triton.maps import (
    UNSPECIALISED,
    grid_of,
    one_of_rows,
    place,
    statistics_of_rows,
)

PROGRAMS = 48
CHANNELS = 8  # of a program: a sector of memory in float32
TILE, NUM_WARPS = 8192, 16  # values of a map that are under way at once


@triton.jit(do_not_specialize=UNSPECIALISED)
def batch_norm_once_kernel(
    x, residual, mean, var, weight, bias, y, pixels, channels, eps, steps,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """y, mean and var; arguments as in `batch_norm_act_kernel`."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    block, column = place(channels, COLS)
    inside = column < channels
    means, squares, count = statistics_of_rows(x, block, steps, pixels, channels, column, ROWS)
    middle, squares = one_of_rows(means, squares, count)
    variance = squares / pixels
    tl.store(mean + column, middle, mask=inside)
    tl.store(var + column, variance, mask=inside)
    scale, shift = load_affine(weight, bias, column, channels)
    write_y(
        x, residual, y, block, steps, pixels, channels, column, middle,
        scale * tl.rsqrt(variance + eps), shift, RESIDUAL, ACTIVATION, ROWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def gradient_once_kernel(
    gy, x, residual, mean, var, weight, bias, gx, g_weight, g_bias, g_residual, pixels, channels,
    eps, steps, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """All gradients; arguments as in `sums_kernel` and `gradient_kernel`."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    block, column = place(channels, COLS)
    inside = column < channels
    middle, rstd = load_norm(mean, var, column, channels, eps)
    scale, shift = load_affine(weight, bias, column, channels)
    norm = (middle, rstd, scale, shift)
    total, moment = sums_of(
        gy, x, residual, gx, g_residual, block, steps, pixels, channels, column, norm, True,
        RESIDUAL, ACTIVATION, ROWS,
    )  # fmt: skip
    tl.store(g_bias + column, total, mask=inside)
    tl.store(g_weight + column, moment, mask=inside)
    total = total / pixels
    moment = moment / pixels
    if RESIDUAL:  # its gradient is the one behind the activation; other threads may have stored it
        tl.debug_barrier()
        write_gx(
            g_residual, x, gx, block, steps, pixels, channels, column, norm, total, moment, 0, ROWS
        )
    else:
        write_gx(
            gy, x, gx, block, steps, pixels, channels, column, norm, total, moment, ACTIVATION,
            ROWS,
        )  # fmt: skip


def takes(x: Tensor) -> bool:
    """Whether a map (N, C, H, W) has the channels for this."""
    return triton.cdiv(x.shape[1], CHANNELS) >= PROGRAMS


def _tile(channels: int) -> dict[str, int]:
    unit = math.gcd(channels, 16)
    # Where they are loaded one by one, each address takes registers.
    rows = TILE // CHANNELS // (1 if unit % 4 == 0 else 4)
    return {"ROWS": rows, "COLS": CHANNELS, "UNIT": unit}


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    eps: float,
    y: Tensor,
) -> None:
    """Launch on the current stream; writes `y`, `mean` and `var`. x has pixels; small tensors are
    contiguous."""
    n, c, h, w = x.shape
    tile = _tile(c)
    with cuda.device_of(x):
        batch_norm_once_kernel[grid_of(1, 1, c, tile)](
            x, x if residual is None else residual, mean, var, weight, bias, y,
            n * h * w, c, eps, triton.cdiv(n * h * w, tile["ROWS"]),
            RESIDUAL=residual is not None, ACTIVATION=activation, **tile,
            num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip


def launch_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    activation: int,
    eps: float,
    gradients: list[Tensor],
) -> None:
    """Launch on the current stream; writes `gradients` of x, weight, bias and the residual, which
    are the first three and the last."""
    gx, g_weight, g_bias, *_, g_residual = gradients
    n, c, h, w = x.shape
    tile = _tile(c)
    kind: dict[str, Any] = {"RESIDUAL": residual is not None, "ACTIVATION": activation}
    with cuda.device_of(x):
        gradient_once_kernel[grid_of(1, 1, c, tile)](
            gy, x, x if residual is None else residual, mean, var, weight, bias,
            gx, g_weight, g_bias, g_residual, n * h * w, c, eps,
            triton.cdiv(n * h * w, tile["ROWS"]), **kind, **tile,
            num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
