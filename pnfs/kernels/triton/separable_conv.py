"""Launches of the Triton kernels of `separable_conv`; see `pnfs.kernels.separable_conv`, and
`pnfs.kernels.triton.separable_kernels` for what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels import native
from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.maps import launch_merge_statistics, new_partials
from pnfs.kernels.triton.separable_kernels import (
    product_gradient_kernel,
    separable_conv_kernel,
    stencil_gradient_kernel,
    sum_kernel,
)
from pnfs.kernels.triton.tuning import Config, Tunable

NUM_WARPS_SUM = 4
PIXELS = 16  # of a program of the forward pass, of a step of the backward's
STEP_CHANNELS = {4: 32, 2: 64}  # by bytes of one: that the forward pass reads of a pixel at a time
MAX_OUTPUTS = 64  # of a program of the forward pass
GRADIENT_CHANNELS = 64  # of a program of the backward pass, and bytes of its outputs' factors
GRADIENT_BYTES = 128
STENCIL_CHANNELS = 32
PROGRAMS = 256  # of a kernel that leaves sums, roughly: more of them would move more sums
SUM_TILE = {"ROWS": 16, "COLS": 64}

# With more pixels in a program registers spill; and both kernels of the backward pass must have
# the same, as they share the rows of sums.
WARPS = (Config(8), Config(4))
FORWARD = Tunable(separable_conv_kernel, *WARPS)
PRODUCT = Tunable(product_gradient_kernel, *WARPS)
STENCIL = Tunable(stencil_gradient_kernel, *WARPS)

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# mean, var, gamma and beta, or None for each that there is not.
Norm = Sequence[Tensor | None]


def _factors(dtype: torch.dtype) -> dict[str, Any]:
    """What is multiplied, and how. Triton's interpreter knows no products of bfloat16."""
    if native.triton_interpreted():
        return {"FACTOR": tl.float32, "PRECISION": "ieee"}
    one_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"FACTOR": KINDS[dtype], "PRECISION": "tf32" if one_tf32 else "tf32x3"}


def _side(length: int, limit: int) -> int:
    """Elements of an axis that a program holds; matrix products take 16 at least."""
    return max(16, min(limit, triton.next_power_of_2(length)))


def _forward_tile(c: int, o: int, item: int) -> dict[str, int]:
    sides = {"BLOCK_C": _side(c, STEP_CHANNELS[item]), "BLOCK_O": _side(o, MAX_OUTPUTS)}
    return {"BLOCK_M": PIXELS, **sides}


def _gradient_tile(c: int, o: int, item: int) -> dict[str, int]:
    outputs = _side(o, GRADIENT_BYTES // item)
    return {"BLOCK_M": PIXELS, "BLOCK_C": _side(c, GRADIENT_CHANNELS), "BLOCK_O": outputs}


def _shares(x: Tensor, o: int) -> tuple[int, int, int]:
    """Blocks of channels times outputs, shares of the pixels, and steps of a share."""
    p, n, c, h, w = x.shape
    tile = _gradient_tile(c, o, x.element_size())
    tiles = triton.cdiv(c, tile["BLOCK_C"]) * triton.cdiv(o, tile["BLOCK_O"])
    blocks = triton.cdiv(n * h * w, PIXELS)
    steps = triton.cdiv(blocks, triton.cdiv(PROGRAMS, p * tiles))
    return tiles, triton.cdiv(blocks, steps), steps


def _widths(
    pointwise: Tensor, depthwise: Tensor | None, norm: Norm, has_bias: bool
) -> tuple[int, ...]:
    """Of one part: sums for pointwise, bias, mean, var, gamma, beta, depthwise."""
    _, o, c = pointwise.shape
    of_norm = [0 if tensor is None else c for tensor in norm]
    return o * c, o if has_bias else 0, *of_norm, 0 if depthwise is None else 9 * c


def partial_elements(x: Tensor, pointwise: Tensor) -> int:
    """Numbers that pass from the first launch of the forward pass to the second."""
    p, n, _, h, w = x.shape
    return 2 * p * pointwise.shape[1] * triton.cdiv(n * h * w, PIXELS)


def partial_elements_backward(
    x: Tensor, pointwise: Tensor, depthwise: Tensor | None, norm: Norm, has_bias: bool
) -> int:
    """Numbers that pass to the last launch of the backward pass."""
    splits = _shares(x, pointwise.shape[1])[1]
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
    kind |= _factors(x.dtype)

    tile = _forward_tile(c, o, x.element_size())
    blocks = triton.cdiv(pixels, PIXELS)
    partials = new_partials((p, blocks, 2, o), x) if stats else mean_y

    def run(config: Config) -> None:
        separable_conv_kernel[(blocks, triton.cdiv(o, tile["BLOCK_O"]), p)](
            x, pointwise, depthwise, bias, tuple(norm), y, partials,
            x.stride(0), c, o, pixels, h, w, dilation, eps,
            **kind, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        exact = (p, c, o, h, w, dilation, depthwise is not None, *kind.values())
        FORWARD.launch(run, x, n, *exact)
        if stats:
            launch_merge_statistics(partials, mean_y, var_y, pixels, PIXELS, bias)


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
    tile = _gradient_tile(c, o, x.element_size())
    tiles, splits, steps = _shares(x, o)
    widths = _widths(pointwise, depthwise, norm, has_bias)
    count = sum(widths)
    partials = new_partials((p, splits, count), x)
    gt = gx if depthwise is None else torch.empty_like(gx, dtype=torch.float32)
    kind: dict[str, Any] = {"NORMALISED": norm[0] is not None, "ACTIVATION": activation}
    norm = tuple(norm)
    of_product = {**kind, "STATS": of_stats[0] is not None, "BIAS": has_bias, **_factors(x.dtype)}

    def product(config: Config) -> None:
        product_gradient_kernel[(tiles, splits, p)](
            x, pointwise, depthwise, norm, gy, tuple(of_stats), gt,
            more if depthwise is None else None, partials,
            x.stride(0), c, o, pixels, h, w, dilation, eps,
            triton.cdiv(c, tile["BLOCK_C"]), steps, count,
            **of_product, **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    def stencil(config: Config) -> None:
        block = _side(c, STENCIL_CHANNELS)
        stencil_gradient_kernel[(triton.cdiv(c, block), splits, p)](
            x, depthwise, norm, gt, more, gx, partials,
            x.stride(0), c, pixels, h, w, dilation, eps, steps, count, widths[0] + widths[1],
            **kind, BLOCK_M=PIXELS, BLOCK_C=block, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    exact = (p, c, h, w, dilation, more is not None)
    with torch.cuda.device_of(x):
        PRODUCT.launch(product, x, n, *exact, o, depthwise is not None, *of_product.values())
        if depthwise is not None:
            STENCIL.launch(stencil, x, n, *exact, *kind.values())
        sum_kernel[(triton.cdiv(count, SUM_TILE["COLS"]), p)](
            partials, (g_pointwise, g_bias, *g_norm, g_depthwise), widths, splits, count,
            **SUM_TILE, num_warps=NUM_WARPS_SUM, **OPTIONS,
        )  # fmt: skip
