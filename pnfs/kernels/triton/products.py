"""What the Triton kernels share that multiply matrices: the factors, sizes of tiles, and sums over
programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels import native
from pnfs.kernels.triton import OPTIONS

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SHARE_PIXELS = 128  # of a program that sums over pixels, a multiple of it
MERGED = 20480  # numbers at most that a program merges behind the others
SUM_TILE, NUM_WARPS_SUM = {"ROWS": 16, "COLS": 64}, 4
# Arguments that follow the batch; see `pnfs.kernels.triton.maps`.
UNSPECIALISED = ("pixels", "images", "share", "splits", "rows", "dilation", "merges")


def factors(dtype: torch.dtype) -> dict[str, Any]:
    """What is multiplied, and how. Triton's interpreter knows no products of bfloat16."""
    if native.triton_interpreted():
        return {"FACTOR": tl.float32, "PRECISION": "ieee"}
    one_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"FACTOR": KINDS[dtype], "PRECISION": "tf32" if one_tf32 else "tf32x3"}


def side(length: int, limit: int) -> int:
    """Elements of an axis that a program holds; matrix products take 16 at least."""
    return max(16, min(limit, triton.next_power_of_2(length)))


def units(c: int, o: int) -> dict[str, int]:
    return {"C_UNIT": math.gcd(c, 16), "O_UNIT": math.gcd(o, 16)}


def rows(pixels: int, scale: float, c: int, o: int) -> int:
    """Of a tile. Where channels are loaded one by one, each address takes registers."""
    vectors = c % 4 == 0 and o % 4 == 0
    return max(16, int(pixels * scale)) if vectors else 16


def merges(blocks: int, o: int, tile: dict[str, int]) -> bool:
    """Whether the last program of some outputs merges the statistics that `blocks` have left."""
    return 2 * blocks * min(o, tile["BLOCK_O"]) <= MERGED


def statistics_cost(p: int, o: int, pixels: int, tile: dict[str, int]) -> tuple[int, int]:
    """Of a forward pass with statistics of p parts' o outputs: launches, and numbers that programs
    leave to be merged."""
    blocks = triton.cdiv(pixels, tile["BLOCK_M"])
    return 1 if merges(blocks, o, tile) else 2, 2 * p * o * blocks


def shares(pixels: int, blocks: int, programs: int) -> tuple[int, int]:
    """How many programs share the pixels of each of `blocks` blocks of sums, where about `programs`
    are wanted in all, and pixels of each; by shapes alone, as the sums' order depends on them."""
    pieces = triton.cdiv(pixels, SHARE_PIXELS)
    of_share = triton.cdiv(pieces, triton.cdiv(programs, blocks))
    return triton.cdiv(pieces, of_share), of_share * SHARE_PIXELS


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


def launch_sums(partials: Tensor, results: Sequence[Tensor], widths: Sequence[int]) -> None:
    """Launch `sum_kernel` on the current stream; partials (P, rows, sum of `widths`)."""
    p, rows, count = partials.shape
    sum_kernel[(triton.cdiv(count, SUM_TILE["COLS"]), p)](
        partials, tuple(results), tuple(widths), rows, count,
        **SUM_TILE, num_warps=NUM_WARPS_SUM, **OPTIONS,
    )  # fmt: skip
