"""What the Triton kernels of channels-last maps share: tiles, grids, and statistics in two steps.

A map of P parts is P matrices (pixels, C), parts any distance apart. A program has ROWS pixels, and
then the next ROWS as often as `steps` says, of COLS channels of one part. UNIT divides C: so many
channels, from a multiple of it, may be loaded at once. Whatever changes with the
batch alone is kept out of the compiled kernels: see `UNSPECIALISED`.

Statistics are taken in two steps: every program stores mean and squared deviation of its pixels,
and whoever wants them merges those of all programs in float64, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.triton import OPTIONS
from pnfs.kernels.triton.tuning import Config, Tunable

WIDTHS = (32, 16)  # channels of a program: whole sectors of memory, and few sums to merge
# Programs of a kernel that leaves sums to merge, roughly: enough to fill a GPU, few enough to leave
# few sums.
PROGRAMS = 1024
# The same where every program of the next kernel merges the sums for itself, which spares a launch;
# and how many of them it has to read at most.
PROGRAMS_MERGED, BLOCKS_MERGED = 256, 128
# Arguments that follow the batch: without this Triton would compile a kernel anew where one of them
# becomes 1 or a multiple of 16, or ceases to be one. And channels, of which UNIT says more.
UNSPECIALISED = ("pixels", "steps", "blocks", "per_block", "g_stride", "channels", "added")
TILE_SUMS = 4096
TILE_MERGE, NUM_WARPS_MERGE = 1024, 4


@triton.jit
def rectified(z):
    """max(z, 0); NaN stays."""
    return tl.where(z < 0, 0.0, z)


@triton.jit
def passed(g, z):
    """The gradient of `rectified(z)` where g arrives."""
    return tl.where(z <= 0, 0.0, g)


@triton.jit
def place(channels, COLS: tl.constexpr):
    """This program's number among those with its channels, and these; the programs that share rows
    are neighbours."""
    across = tl.cdiv(channels, COLS)
    program = tl.program_id(0)
    return program // across, program % across * COLS + tl.arange(0, COLS)


@triton.jit
def rows_of(block, step, steps, ROWS: tl.constexpr):
    """The first pixel of a step of a program, 64 bits."""
    return (block.to(tl.int64) * steps + step) * ROWS


@triton.jit
def tile_at(first, pixels, channels, column, ROWS: tl.constexpr):
    """Offset of pixel `first` in a part, places (ROWS, COLS) from there, which of them exist."""
    row = tl.arange(0, ROWS)
    left = tl.minimum(pixels - first, ROWS).to(tl.int32)
    mask = (row < left)[:, None] & (column < channels)[None, :]
    return first * channels, row[:, None] * channels + column[None, :], mask


@triton.jit
def load_float(at, mask):
    """float32; 0 where masked."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_as(at, value, mask):
    """In the type of the memory."""
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def one_of_rows(mean, squares, count):
    """Merges the rows of `mean` and `squares` (ROWS, COLS), each of `count` (ROWS,) values, into
    one mean and sum of squared deviations, (COLS,).

    The mean is corrected once, so that equal values have no deviation.
    """
    each = count[:, None]
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    middle = tl.sum(mean * each, axis=0) / total
    middle += tl.sum((mean - middle[None, :]) * each, axis=0) / total
    rest = mean - middle[None, :]
    return middle, tl.sum(squares + rest * rest * each, axis=0)


@triton.jit
def store_statistics(to, mean, squares, count, column, channels):
    """`one_of_rows`, `to` (2, C)."""
    middle, squares = one_of_rows(mean, squares, count)
    inside = column < channels
    tl.store(to + column, middle, mask=inside)
    tl.store(to + channels + column, squares, mask=inside)


@triton.jit
def statistics_of_rows(x, block, steps, pixels, channels, column, ROWS: tl.constexpr):
    """What `one_of_rows` takes, of the pixels of a program: row by row, step after step."""
    mean = tl.zeros((ROWS, column.shape[0]), tl.float32)
    squares = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for step in tl.range(steps, disable_licm=True):
        first = rows_of(block, step, steps, ROWS)
        start, places, mask = tile_at(first, pixels, channels, column, ROWS)
        value = load_float(x + start + places, mask)
        distance = tl.where(mask, value - mean, 0.0)
        mean += distance * (1 / (step + 1.0))
        squares += distance * tl.where(mask, value - mean, 0.0)
    rest = pixels - rows_of(block, 0, steps, ROWS) - tl.arange(0, ROWS)
    count = tl.minimum(tl.maximum((rest + ROWS - 1) // ROWS, 0), steps).to(tl.float32)
    return mean, squares, count


@triton.jit
def is_last(counter, programs):
    """Whether all others of `programs` that ask with this counter have asked before: what they have
    stored can be read then. The counter is zero before the first and after the last."""
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit(do_not_specialize=UNSPECIALISED)
def statistics_kernel(
    x, x_stride, partials, pixels, channels, steps,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """partials: (P, blocks, 2, C), for `merged_statistics`."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    part = tl.program_id(1).to(tl.int64)
    block, column = place(channels, COLS)
    mean, squares, count = statistics_of_rows(
        x + part * x_stride, block, steps, pixels, channels, column, ROWS
    )
    blocks = tl.num_programs(0) // tl.cdiv(channels, COLS)
    to = partials + (part * blocks + block) * 2 * channels
    store_statistics(to, mean, squares, count, column, channels)


@triton.jit
def merged_statistics(
    partials, part, pixels, per_block, blocks, channels, column, ROWS: tl.constexpr
):
    """Mean and biased variance (COLS,), float64, of a part's pixels from `partials` (P, blocks, 2,
    C), each block but the last of `per_block` pixels: sums about the first block's mean."""
    inside = column < channels
    start = partials + part * blocks * 2 * channels + column
    pivot = tl.load(start, mask=inside, other=0.0).to(tl.float64)
    total = tl.zeros((ROWS, column.shape[0]), tl.float64)
    squares = tl.zeros((ROWS, column.shape[0]), tl.float64)
    for begin in range(0, blocks, ROWS):
        block = (begin + tl.arange(0, ROWS)).to(tl.int64)
        mask = (block < blocks)[:, None] & inside[None, :]
        at = start[None, :] + (block * 2 * channels)[:, None]
        count = tl.minimum(pixels - block * per_block, per_block).to(tl.float64)[:, None]
        distance = tl.load(at, mask=mask, other=0.0).to(tl.float64) - pivot[None, :]
        distance = tl.where(mask, distance, 0.0)
        total += distance * count
        squares += tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
        squares += distance * distance * count
    shift = tl.sum(total, axis=0) / pixels
    spread = tl.sum(squares, axis=0) / pixels - shift * shift
    return pivot + shift, tl.where(spread < 0, 0.0, spread)  # NaN stays


@triton.jit
def store_merged_statistics(
    partials, offset, mean, var, part, pixels, per_block, blocks, channels, column, added,
    ROWS: tl.constexpr,
):  # fmt: skip
    """mean, var: (P, C); see `merged_statistics`. offset (P, C), or None, is added to the mean if
    `added`."""
    inside = column < channels
    own_mean, own_var = merged_statistics(
        partials, part, pixels, per_block, blocks, channels, column, ROWS
    )
    to = part * channels + column
    if offset is not None:
        shift = tl.load(offset + to, mask=inside, other=0.0).to(tl.float64)
        own_mean += tl.where(added != 0, shift, 0.0)
    tl.store(mean + to, own_mean.to(tl.float32), mask=inside)
    tl.store(var + to, own_var.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def merge_statistics_kernel(
    partials, offset, mean, var, pixels, per_block, blocks, channels, added,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """See `store_merged_statistics`."""
    part = tl.program_id(1).to(tl.int64)
    _, column = place(channels, COLS)
    store_merged_statistics(
        partials, offset, mean, var, part, pixels, per_block, blocks, channels, column, added, ROWS
    )


@triton.jit
def totals(start, column, blocks, channels, BOTH: tl.constexpr, ROWS: tl.constexpr):
    """Of two sums (COLS,), float64, over all blocks, (2, blocks, C) from `start`, both or the
    second alone; 0 past the last channel."""
    first = tl.zeros((ROWS, column.shape[0]), tl.float64)
    second = tl.zeros((ROWS, column.shape[0]), tl.float64)
    for begin in range(0, blocks, ROWS):
        block = begin + tl.arange(0, ROWS)
        mask = (block < blocks)[:, None] & (column < channels)[None, :]
        at = start + (block.to(tl.int64) * channels)[:, None] + column[None, :]
        if BOTH:
            first += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        second += tl.load(at + blocks * channels, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


# Configurations of a kernel that leaves sums to merge, and of one that leaves none.
SUMS = (Config(8), Config(4), Config(4, 0.5), Config(16))
MAPS = (Config(4), Config(8), Config(8, 2.0), Config(4, 0.5))
STATISTICS = Tunable(statistics_kernel, *SUMS)


def tile_of(channels: int, elements: float) -> dict[str, int]:
    """ROWS and COLS of a program that holds so many elements, with the fewest idle lanes."""
    widths = [width for width in WIDTHS if width <= channels]
    widths = widths or [triton.next_power_of_2(channels)]
    columns = min(widths, key=lambda width: triton.cdiv(channels, width) * width)
    unit = math.gcd(channels, 16)
    # Where they are loaded one by one, each address takes registers.
    rows = int(elements) // columns if unit % 4 == 0 else int(elements) // columns // 4
    return {"ROWS": max(1, rows), "COLS": columns, "UNIT": unit}


def grid_of(blocks: int, parts: int, channels: int, tile: dict[str, int]) -> tuple[int, int]:
    """See `place`; parts on the second axis."""
    return blocks * triton.cdiv(channels, tile["COLS"]), parts


def blocks_of(
    rows: int, parts: int, channels: int, tile: dict[str, int], *, merged: bool = False
) -> tuple[dict[str, int], int, int]:
    """The tile, the steps of a program over so many rows, and the programs per part and channels;
    by shapes alone, as the order of the sums depends on them. `merged`: every program of the next
    kernel merges the sums for itself."""
    tiles = triton.cdiv(rows, tile["ROWS"])
    programs, _ = grid_of(tiles, parts, channels, tile)
    steps = max(1, programs * parts // (PROGRAMS_MERGED if merged else PROGRAMS))
    if merged:
        steps = max(steps, triton.cdiv(tiles, BLOCKS_MERGED))
    return tile, steps, triton.cdiv(tiles, steps)


def merge_tile(channels: int) -> dict[str, int]:
    """ROWS and COLS of a program that merges what others left, and does nothing else."""
    columns = min(WIDTHS[-1], triton.next_power_of_2(channels))
    return {"ROWS": TILE_MERGE // columns, "COLS": columns}


def new_partials(shape: Sequence[int], like: Tensor) -> Tensor:
    """What programs leave for a second kernel to add up, float32."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=like.device)


def sums_blocks(p: int, pixels: int, c: int, scale: float = 1.0) -> tuple[dict[str, int], int, int]:
    """As `blocks_of`, for a kernel that has two sums of a channel, and a next one that merges."""
    return blocks_of(pixels, p, c, tile_of(c, scale * TILE_SUMS), merged=True)


def launch_statistics(x: Tensor) -> tuple[Tensor, int]:
    """Launch `statistics_kernel` on the current stream for x (P, N, C, H, W), which has pixels. The
    partial statistics (P, blocks, 2, C), and the pixels of each."""
    p, n, c, h, w = x.shape

    def run(config: Config) -> tuple[Tensor, int]:
        tile, steps, blocks = sums_blocks(p, n * h * w, c, config.scale)
        partials = new_partials((p, blocks, 2, c), x)
        statistics_kernel[grid_of(blocks, p, c, tile)](
            x, x.stride(0), partials, n * h * w, c, steps,
            **tile, num_warps=config.num_warps, **OPTIONS,
        )  # fmt: skip
        return partials, steps * tile["ROWS"]

    return STATISTICS.launch(run, x, n, p, c, h, w)


def launch_merge_statistics(
    partials: Tensor,
    mean: Tensor,
    var: Tensor,
    pixels: int,
    per_block: int,
    offset: Tensor | None = None,
) -> None:
    """Launch `merge_statistics_kernel` on the current stream; writes `mean` and `var` (P, C), those
    of the pixels plus `offset` (P, C)."""
    p, blocks, _, c = partials.shape
    tile = merge_tile(c)
    # One kernel with an offset and without, lest one is compiled where a batch grows.
    added, offset = int(offset is not None), partials if offset is None else offset
    merge_statistics_kernel[grid_of(1, p, c, tile)](
        partials, offset, mean, var, pixels, per_block, blocks, c, added, **tile,
        num_warps=NUM_WARPS_MERGE, **OPTIONS,
    )  # fmt: skip
