"""Launches of the Triton kernels of `separable_conv`; see `pnfs.kernels.separable_conv`, and
`separable_kernels` and `separable_gradients` beside it for what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pnfs.kernels.tickets import counters
from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.maps import TILE_MERGE, launch_merge_statistics, new_partials
from pnfs.kernels.triton.products import (
    SHARE_PIXELS,
    factors,
    launch_sums,
    merges,
    rows,
    shares,
    side,
    statistics_cost,
    units,
)
from pnfs.kernels.triton.separable_gradients import factors_kernel, gradients_kernel
from pnfs.kernels.triton.separable_kernels import separable_conv_kernel
from pnfs.kernels.triton.tuning import Config, Tunable

FORWARD_PIXELS = 64  # of a program of the forward pass
FEW_CHANNELS = 64  # with so many, half the pixels where each has neighbours
STEP_CHANNELS = 32  # that it reads of a pixel at a time
MAX_OUTPUTS = 128
PRODUCT_PIXELS = 32  # of a step of the backward pass, where it multiplies matrices
PRODUCT_CHANNELS, PRODUCT_OUTPUTS = 64, 64
STENCIL_PIXELS = {4: 32, 2: 16}  # the same where it has neighbours, by bytes of a value
STENCIL_CHANNELS = 32
PROGRAMS = 576  # that leave sums, roughly: more of them would move more sums

# The defaults are what was fastest on an H200 in float32 at the sizes of preset ours-1.
FORWARD = Tunable(separable_conv_kernel, Config(4), Config(4, 0.5), elsewhere=[Config(8, 0.5)])
FACTORS = Tunable(factors_kernel, Config(4), Config(8, 0.5))
GRADIENTS = Tunable(gradients_kernel, Config(4), Config(8), elsewhere=[Config(8)])

# mean, var, gamma and beta, or None for each that there is not.
Norm = Sequence[Tensor | None]


def _forward_tile(c: int, o: int, neighbours: bool, scale: float = 1.0) -> dict[str, int]:
    pixels = FORWARD_PIXELS // 2 if neighbours and c <= FEW_CHANNELS else FORWARD_PIXELS
    sides = {"BLOCK_C": side(c, STEP_CHANNELS), "BLOCK_O": side(o, MAX_OUTPUTS)}
    merge = max(1, TILE_MERGE // sides["BLOCK_O"])
    return {"BLOCK_M": rows(pixels, scale, c, o), **sides, "MERGE": merge, **units(c, o)}


def _backward_tile(c: int, o: int, item: int, scale: float = 1.0) -> dict[str, int]:
    return {
        "BLOCK_M": rows(PRODUCT_PIXELS, scale, c, o),
        "BLOCK_C": side(c, PRODUCT_CHANNELS),
        "BLOCK_O": side(o, PRODUCT_OUTPUTS),
        "STENCIL_M": rows(STENCIL_PIXELS[item], scale, c, c),
        "STENCIL_C": side(c, STENCIL_CHANNELS),
        **units(c, o),
    }


def _shares(x: Tensor, o: int) -> tuple[int, int]:
    """Of the backward pass; see `shares`."""
    p, n, c, h, w = x.shape
    tile = _backward_tile(c, o, x.element_size())
    tiles = triton.cdiv(c, tile["BLOCK_C"]) * triton.cdiv(o, tile["BLOCK_O"])
    return shares(n * h * w, p * tiles, PROGRAMS)


def _widths(
    pointwise: Tensor, depthwise: Tensor | None, norm: Norm, has_bias: bool
) -> tuple[int, ...]:
    """Of one part: sums for pointwise, bias, mean, var, gamma, beta, depthwise."""
    _, o, c = pointwise.shape
    of_norm = [0 if tensor is None else c for tensor in norm]
    return o * c, o if has_bias else 0, *of_norm, 0 if depthwise is None else 9 * c


def forward_cost(x: Tensor, pointwise: Tensor, depthwise: Tensor | None) -> tuple[int, int]:
    """Of the forward pass with statistics; see `statistics_cost`."""
    p, n, c, h, w = x.shape
    o = pointwise.shape[1]
    return statistics_cost(p, o, n * h * w, _forward_tile(c, o, depthwise is not None))


def partial_elements_backward(
    x: Tensor, pointwise: Tensor, depthwise: Tensor | None, norm: Norm, has_bias: bool
) -> int:
    """Numbers that pass to the last launch of the backward pass."""
    splits, _ = _shares(x, pointwise.shape[1])
    return len(x) * splits * sum(_widths(pointwise, depthwise, norm, has_bias))


def launch(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    activation: int,
    dilation: int,
    eps: float,
    y: Tensor,
    mean_y: Tensor,
    var_y: Tensor,
) -> None:
    """Launch on the current stream; writes `y` and, unless they are empty, `mean_y` and `var_y`.
    Small tensors are contiguous."""
    p, n, c, h, w = x.shape
    o, pixels = pointwise.shape[1], n * h * w
    stats = mean_y.numel() > 0
    kind = {"NORMALISED": norm[0] is not None, "ACTIVATION": activation, "STATS": stats}
    kind |= factors(x.dtype)

    def run(config: Config) -> None:
        tile = _forward_tile(c, o, depthwise is not None, config.scale)
        blocks, across = triton.cdiv(pixels, tile["BLOCK_M"]), triton.cdiv(o, tile["BLOCK_O"])
        partials = new_partials((p, blocks, 2, o), x) if stats else None
        at_once = merges(blocks, o, tile)
        separable_conv_kernel[(blocks, across, p)](
            x, pointwise, depthwise, bias, tuple(norm), y, partials,
            (mean_y, var_y) if stats else None, counters(p * across, x.device) if stats else None,
            x.stride(0), c, o, pixels, h, w, dilation, eps, int(at_once),
            **kind, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip
        if partials is not None and not at_once:
            launch_merge_statistics(partials, mean_y, var_y, pixels, tile["BLOCK_M"], bias)

    with torch.cuda.device_of(x):
        exact = (p, c, o, h, w, dilation, depthwise is not None, *kind.values())
        FORWARD.launch(run, x, n, *exact)


def launch_backward(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor | None,
    norm: Norm,
    activation: int,
    dilation: int,
    eps: float,
    has_bias: bool,
    gy: Tensor,
    of_stats: Sequence[Tensor | None],
    more: Tensor | None,
    gradients: list[Tensor],
) -> None:
    """Launch on the current stream; writes `gradients`, those of x, pointwise, depthwise, bias,
    mean, var, gamma and beta. `of_stats`: y, mean_y, and the gradients of mean_y and var_y. Small
    tensors are contiguous; parts of y, gy and `more` lie back to back."""
    gx, g_pointwise, g_depthwise, g_bias, *g_norm = gradients
    p, n, c, h, w = x.shape
    o, pixels = pointwise.shape[1], n * h * w
    splits, share = _shares(x, o)
    widths = _widths(pointwise, depthwise, norm, has_bias)
    count = sum(widths)
    partials = new_partials((p, splits, count), x)
    norm, of_stats = tuple(norm), tuple(of_stats)
    stats = of_stats[0] is not None
    kind: dict[str, Any] = {"NORMALISED": norm[0] is not None, "ACTIVATION": activation}
    kind |= {"STATS": stats, **factors(x.dtype)}
    t = gt = None
    if depthwise is not None:
        t, gt = torch.empty_like(gx), torch.empty_like(gx, dtype=torch.float32)

    def both_factors(config: Config) -> None:
        tile = _backward_tile(c, o, x.element_size(), config.scale)
        blocks = triton.cdiv(c, tile["STENCIL_C"]) + triton.cdiv(c, tile["BLOCK_C"])
        factors_kernel[(blocks, triton.cdiv(pixels, SHARE_PIXELS), p)](
            x, pointwise, depthwise, norm, gy, of_stats, t, gt,
            x.stride(0), c, o, pixels, h, w, dilation, eps, SHARE_PIXELS,
            **kind, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    def all_gradients(config: Config) -> None:
        tile = _backward_tile(c, o, x.element_size(), config.scale)
        of_rest = tile["BLOCK_C"] if depthwise is None else tile["STENCIL_C"]
        of_weights = triton.cdiv(c, tile["BLOCK_C"]) * triton.cdiv(o, tile["BLOCK_O"])
        gradients_kernel[(of_weights + triton.cdiv(c, of_rest), splits, p)](
            x, pointwise, depthwise, norm, gy, of_stats, t, gt, more, gx, partials,
            x.stride(0), c, o, pixels, h, w, dilation, eps, share, count, widths[0] + widths[1],
            **kind, BIAS=has_bias, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    exact = (p, c, o, h, w, dilation, *kind.values())
    with torch.cuda.device_of(x):
        if depthwise is not None:
            FACTORS.launch(both_factors, x, n, *exact)
        has = (depthwise is not None, has_bias, more is not None)
        GRADIENTS.launch(all_gradients, x, n, *exact, *has)
        launch_sums(partials, (g_pointwise, g_bias, *g_norm, g_depthwise), widths)
