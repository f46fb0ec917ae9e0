"""Triton kernel of `decode_heatmaps`: one program per map; see `pnfs.kernels.decode_heatmaps`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.tuning import Config, Tunable

TILE_CELLS = 1024  # cells per step; a tile spans whole rows, so that no cell needs a division


@triton.jit
def _merged(
    a, b, y, x, mask, w, SHIFT: tl.constexpr, FLIP: tl.constexpr,
    a_y, a_x, b_y, b_x,
):  # fmt: skip
    """Merged values at cells (y, x), float32; masked ones are -inf."""
    value = tl.load(a + y * a_y + x * a_x, mask=mask, other=float("-inf")).to(tl.float32)
    if FLIP:
        column = w - 1 - x
        if SHIFT:
            column = tl.where(x == 0, column, column + 1)
        other = tl.load(b + y * b_y + column * b_x, mask=mask, other=float("-inf"))
        value = (value + other.to(tl.float32)) * 0.5
    return value


@triton.jit
def decode_heatmaps_kernel(
    heatmaps, flipped, permutation, matrices, xy, score,
    k, h, w,
    a_n, a_k, a_y, a_x,
    b_n, b_k, b_y, b_x,
    FLIP: tl.constexpr, PERMUTE: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """heatmaps, flipped: (N, K, h, w) with strides a_*, b_*; matrices: (N, 2, 3) float64."""
    row = tl.program_id(0).to(tl.int64)
    n = row // k
    keypoint = row % k
    a = heatmaps + n * a_n + keypoint * a_k
    b = flipped
    rows_used = h
    if FLIP:
        source = keypoint
        if PERMUTE:
            source = tl.load(permutation + keypoint)
            # A wrong index reads nothing; the maximum stays -inf.
            rows_used = tl.where((source >= 0) & (source < k), h, 0)
        b = flipped + n * b_n + source * b_k

    x = tl.arange(0, COLUMNS)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    at = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for start in range(0, rows_used, ROWS):
        y = start + rows
        value = _merged(
            a, b, y.to(tl.int64), x.to(tl.int64), (y < rows_used) & (x < w),
            w, SHIFT, FLIP, a_y, a_x, b_y, b_x,
        )  # fmt: skip
        larger = value > best  # false for NaN
        best = tl.where(larger, value, best)
        at = tl.where(larger, y * w + x, at)
    top = tl.max(best)
    peak = tl.where(top > 0, tl.min(tl.where(best == top, at, h * w)), 0)
    px = peak % w
    py = peak // w

    inside = (px > 1) & (px < w - 1) & (py > 1) & (py < h - 1)
    x64 = px.to(tl.int64)
    y64 = py.to(tl.int64)
    left = _merged(a, b, y64, x64 - 1, inside, w, SHIFT, FLIP, a_y, a_x, b_y, b_x)
    right = _merged(a, b, y64, x64 + 1, inside, w, SHIFT, FLIP, a_y, a_x, b_y, b_x)
    above = _merged(a, b, y64 - 1, x64, inside, w, SHIFT, FLIP, a_y, a_x, b_y, b_x)
    below = _merged(a, b, y64 + 1, x64, inside, w, SHIFT, FLIP, a_y, a_x, b_y, b_x)
    step_x = (right > left).to(tl.int32) - (right < left).to(tl.int32)
    step_y = (below > above).to(tl.int32) - (below < above).to(tl.int32)
    cell_x = px.to(tl.float64) + step_x.to(tl.float64) * 0.25
    cell_y = py.to(tl.float64) + step_y.to(tl.float64) * 0.25

    m = matrices + n * 6
    image_x = tl.load(m) * cell_x + tl.load(m + 1) * cell_y + tl.load(m + 2)
    image_y = tl.load(m + 3) * cell_x + tl.load(m + 4) * cell_y + tl.load(m + 5)
    tl.store(xy + row * 2, image_x.to(tl.float32))
    tl.store(xy + row * 2 + 1, image_y.to(tl.float32))
    tl.store(score + row, top)


DECODE = Tunable(decode_heatmaps_kernel, Config(4), Config(8), Config(8, 2.0), Config(2, 0.5))


def _tile(w: int, scale: float) -> dict[str, int]:
    columns = triton.next_power_of_2(w)
    return {"ROWS": max(1, int(scale * TILE_CELLS) // columns), "COLUMNS": columns}


def launch(
    heatmaps: Tensor,
    matrices: Tensor,
    flipped: Tensor | None,
    permutation: Tensor | None,
    shift: bool,
    xy: Tensor,
    score: Tensor,
) -> None:
    """Launch on the current stream; writes `xy` (N, K, 2) and `score` (N, K), float32."""
    n, k, h, w = heatmaps.shape
    if n * k == 0:
        return
    other = heatmaps if flipped is None else flipped
    kind = {"FLIP": flipped is not None, "PERMUTE": permutation is not None, "SHIFT": shift}

    def run(config: Config) -> None:
        decode_heatmaps_kernel[(n * k,)](
            heatmaps, other, matrices if permutation is None else permutation, matrices, xy, score,
            k, h, w, *heatmaps.stride(), *other.stride(),
            **kind, **_tile(w, config.scale), num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip

    with torch.cuda.device_of(heatmaps):
        DECODE.launch(run, heatmaps, n, k, h, w, *kind.values())
