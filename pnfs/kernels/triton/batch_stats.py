"""Triton kernels of `batch_stats`; see `pnfs.kernels.batch_stats`. The forward pass is that of
`pnfs.kernels.triton.maps`: one read of x, then a merge of what its programs left."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, cuda

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.maps import (
    MAPS,
    UNSPECIALISED,
    grid_of,
    launch_merge_statistics,
    launch_statistics,
    load_float,
    place,
    rows_of,
    store_as,
    sums_blocks,
    tile_at,
    tile_of,
)
from pnfs.kernels.triton.tuning import Config, Tunable

TILE = 2048


@triton.jit(do_not_specialize=UNSPECIALISED)
def batch_stats_backward_kernel(
    x, x_stride, mean, g_mean, g_var, gx, pixels, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """gx = (g_mean + 2 g_var (x - mean)) / pixels, (P, pixels, C)."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    part = tl.program_id(1).to(tl.int64)
    block, column = place(channels, COLS)
    start, places, mask = tile_at(rows_of(block, 0, 1, ROWS), pixels, channels, column, ROWS)
    inside = column < channels
    at = part * channels + column
    level = tl.load(g_mean + at, mask=inside, other=0.0) / pixels
    slope = 2 * tl.load(g_var + at, mask=inside, other=0.0) / pixels
    middle = tl.load(mean + at, mask=inside, other=0.0)
    value = load_float(x + part * x_stride + start + places, mask)
    gradient = level[None, :] + slope[None, :] * (value - middle[None, :])
    store_as(gx + part * pixels * channels + start + places, gradient, mask)


BACKWARD = Tunable(batch_stats_backward_kernel, *MAPS)


def partial_elements(x: Tensor) -> int:
    """Numbers that pass from the first launch to the second."""
    p, n, c, h, w = x.shape
    return 2 * p * c * sums_blocks(p, n * h * w, c)[2]


def launch(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Launch on the current stream; writes `mean` and `var` (P, C). x has pixels."""
    _, n, _, h, w = x.shape
    with cuda.device_of(x):
        partials, per_block = launch_statistics(x)
        launch_merge_statistics(partials, mean, var, n * h * w, per_block)


def launch_backward(x: Tensor, mean: Tensor, g_mean: Tensor, g_var: Tensor, gx: Tensor) -> None:
    """Launch on the current stream; writes `gx`. x has pixels, the small tensors are contiguous."""
    p, n, c, h, w = x.shape

    def run(config: Config) -> None:
        tile = tile_of(c, config.scale * TILE)
        batch_stats_backward_kernel[grid_of(triton.cdiv(n * h * w, tile["ROWS"]), p, c, tile)](
            x, x.stride(0), mean, g_mean, g_var, gx, n * h * w, c,
            **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with cuda.device_of(x):
        BACKWARD.launch(run, x, n, p, c, h, w)
