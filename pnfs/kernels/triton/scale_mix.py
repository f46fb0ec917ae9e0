"""Triton kernels of `scale_mix`; see `pnfs.kernels.scale_mix`, and `pnfs.kernels.triton.mixed_sum`,
whose kernels serve where nothing is upsampled, for what the arguments mean.

Programs go over the pixels of half resolution, h × w per image, and at each over the four pixels of
the output that lie in it. With the ends aligned and 2 h samples over h, sample 2 y is
((h2 - y) x[y] + y x[y - 1]) / h2 and sample 2 y + 1 is ((h + y) x[y] + (h - 1 - y) x[y + 1]) / h2,
h2 = 2 h - 1, along either axis: a pixel and its neighbour on that side. The gradient of x[y]
gathers the samples 2 y - 1 to 2 y + 2 that read it.

UPS: per source whether it is upsampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from pnfs.kernels.triton import mixed_sum
from pnfs.kernels.triton.maps import (
    MAPS,
    UNSPECIALISED,
    blocks_of,
    passed,
    place,
    rectified,
    tile_of,
)
from pnfs.kernels.triton.mixed_sum import (
    launch_gradients,
    launch_sum,
    norm_of,
    store_sums,
    term_gradient,
)
from pnfs.kernels.triton.tuning import Config, Tunable

TILE = 512  # elements of half resolution that a program holds, at most


@triton.jit
def _neighbour(i, size, SIDE: tl.constexpr):
    """The pixel before (SIDE 0) or after i, i itself at the end, and its share in a sample."""
    if SIDE == 0:
        at = tl.maximum(i - 1, 0)
        share = i
    else:
        at = tl.minimum(i + 1, size - 1)
        share = size - 1 - i
    return at, share.to(tl.float32) / (2 * size - 1)


@triton.jit
def _reader(i, size, OFFSET: tl.constexpr):
    """The sample 2 i + OFFSET - 1, the weight with which it reads pixel i, whether it exists."""
    at = 2 * i + OFFSET - 1
    if OFFSET == 0:
        share = size - i
    elif OFFSET == 1:
        share = 2 * size - 1 - i
    elif OFFSET == 2:
        share = size + i
    else:
        share = i + 1
    exists = (at >= 0) & (at < 2 * size)
    return at, share.to(tl.float32) / (2 * size - 1), exists


@triton.jit
def _offsets(image, y, x, h, w, channels, column):
    """Offsets (ROWS, COLS) of pixels in a part whose images are h × w."""
    row = (image.to(tl.int64) * h + y) * w + x
    return (row * channels)[:, None] + column[None, :]


@triton.jit
def _row(source, image, y, x, h, w, channels, column, mask, mean):
    """Row y of the source, centred: left of x, at x, right of x."""
    left, _ = _neighbour(x, w, 0)
    right, _ = _neighbour(x, w, 1)
    before = tl.load(source + _offsets(image, y, left, h, w, channels, column), mask=mask, other=0)
    here = tl.load(source + _offsets(image, y, x, h, w, channels, column), mask=mask, other=0)
    after = tl.load(source + _offsets(image, y, right, h, w, channels, column), mask=mask, other=0)
    mean = mean[None, :]
    return before.to(tl.float32) - mean, here.to(tl.float32) - mean, after.to(tl.float32) - mean


@triton.jit
def _between(middle, other, share):
    """Two rows of `_row`, mixed."""
    left = middle[0] + share * (other[0] - middle[0])
    here = middle[1] + share * (other[1] - middle[1])
    right = middle[2] + share * (other[2] - middle[2])
    return left, here, right


@triton.jit(do_not_specialize=UNSPECIALISED)
def scale_mix_kernel(
    maps, strides, norms, weights, out, pixels, h, w, channels, eps,
    SLOTS: tl.constexpr, RELUS: tl.constexpr, UPS: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out: (P, N, 2 h, 2 w, C). RELU: of the sum. pixels = N h w."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    part = tl.program_id(1).to(tl.int64)
    block, column = place(channels, COLS)
    pixel = block * ROWS + tl.arange(0, ROWS)
    inside = column < channels
    mask = (pixel < pixels)[:, None] & inside[None, :]
    x = pixel % w
    y = pixel // w % h
    image = pixel // w // h

    zero = tl.zeros((ROWS, COLS), tl.float32)
    totals = (zero,) * 4
    for s in tl.static_range(len(SLOTS)):
        source = maps[s] + part * strides[s]
        weight = tl.load(weights + part * len(SLOTS) + s)
        new = ()
        if UPS[s]:
            mean, scale, shift = norm_of(norms, SLOTS[s], part * channels + column, inside, eps)
            middle = _row(source, image, y, x, h, w, channels, column, mask, mean)
            for dy in tl.static_range(2):
                beside, share_y = _neighbour(y, h, dy)
                other = _row(source, image, beside, x, h, w, channels, column, mask, mean)
                left, here, right = _between(middle, other, share_y[:, None])
                for dx in tl.static_range(2):
                    _, share_x = _neighbour(x, w, dx)
                    far = right if dx else left
                    term = here + share_x[:, None] * (far - here)
                    term = term * scale[None, :] + shift[None, :]
                    new = new + (totals[2 * dy + dx] + weight * term,)
        else:
            for q in tl.static_range(4):
                at = _offsets(image, 2 * y + q // 2, 2 * x + q % 2, 2 * h, 2 * w, channels, column)
                term = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
                if SLOTS[s] >= 0:
                    mean, scale, shift = norm_of(
                        norms, SLOTS[s], part * channels + column, inside, eps
                    )
                    term = (term - mean[None, :]) * scale[None, :] + shift[None, :]
                if RELUS[s]:
                    term = rectified(term)
                new = new + (totals[q] + weight * term,)
        totals = new
    for q in tl.static_range(4):
        total = totals[q]
        if RELU:
            total = rectified(total)
        at = _offsets(image, 2 * y + q // 2, 2 * x + q % 2, 2 * h, 2 * w, channels, column)
        to = out + part * pixels * 4 * channels + at
        tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def scale_mix_backward_kernel(
    g, g_stride, h_out, maps, strides, norms, weights, g_maps, partials,
    pixels, h, w, channels, eps, steps,
    SLOTS: tl.constexpr, RELUS: tl.constexpr, UPS: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """g, h_out: (P, N, 2 h, 2 w, C). RELU: of the sum, whose result was h_out. A program takes
    `steps` times ROWS pixels of half resolution."""
    channels = channels // UNIT * UNIT  # says that UNIT divides it
    part = tl.program_id(1).to(tl.int64)
    block, column = place(channels, COLS)
    inside = column < channels
    own = part * pixels * channels
    zero = tl.zeros((ROWS, COLS), tl.float32)
    first = (zero,) * len(SLOTS)
    second = (zero,) * len(SLOTS)
    for step in tl.range(steps, disable_licm=True):
        pixel = (block * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & inside[None, :]
        x = pixel % w
        y = pixel // w % h
        image = pixel // w // h

        gathered = zero
        inner = ()
        for dy in tl.static_range(4):
            sample_y, share_y, exists_y = _reader(y, h, dy)
            for dx in tl.static_range(4):
                sample_x, share_x, exists_x = _reader(x, w, dx)
                at = _offsets(image, sample_y, sample_x, 2 * h, 2 * w, channels, column)
                exists = mask & (exists_y & exists_x)[:, None]
                incoming = tl.load(g + part * g_stride + at, mask=exists, other=0.0)
                incoming = incoming.to(tl.float32)
                if RELU:
                    result = tl.load(h_out + own * 4 + at, mask=exists, other=0.0)
                    incoming = passed(incoming, result.to(tl.float32))
                gathered += (share_y * share_x)[:, None] * incoming
                if dy // 2 != dy % 2 and dx // 2 != dx % 2:
                    inner = inner + (incoming,)

        new_first = ()
        new_second = ()
        for s in tl.static_range(len(SLOTS)):
            source = maps[s] + part * strides[s]
            norm = (0.0, 0.0, 0.0)
            if SLOTS[s] >= 0:
                norm = norm_of(norms, SLOTS[s], part * channels + column, inside, eps)
            weight = tl.load(weights + part * len(SLOTS) + s)
            sums = (first[s], second[s])
            if UPS[s]:
                at = _offsets(image, y, x, h, w, channels, column)
                value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
                sums = term_gradient(
                    value, gathered, g_maps[s] + own + at, mask, norm, weight, *sums,
                    SLOTS[s], False,
                )  # fmt: skip
            else:
                for q in tl.static_range(4):
                    at = _offsets(
                        image, 2 * y + q // 2, 2 * x + q % 2, 2 * h, 2 * w, channels, column
                    )
                    value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
                    sums = term_gradient(
                        value, inner[q], g_maps[s] + own * 4 + at, mask, norm, weight, *sums,
                        SLOTS[s], RELUS[s],
                    )  # fmt: skip
            new_first = new_first + (sums[0],)
            new_second = new_second + (sums[1],)
        first = new_first
        second = new_second
    store_sums(partials, first, second, part, block, column, channels, SLOTS)


FORWARD = Tunable(scale_mix_kernel, *MAPS)
# A larger tile spills registers.
BACKWARD = Tunable(scale_mix_backward_kernel, Config(4), Config(8), Config(4, 0.5))


def launch(
    maps: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    weights: Tensor,
    eps: float,
    out: Tensor,
    *,
    slots: tuple[int, ...],
    relus: tuple[bool, ...],
    ups: tuple[bool, ...],
    relu: bool,
) -> None:
    """Launch on the current stream; writes `out` (P, N, C, H, W)."""
    if not any(ups):
        mixed_sum.launch(maps, norms, weights, eps, out, slots=slots, relus=relus, relu=relu)
        return
    _, n, c, height, width = out.shape
    h, w = height // 2, width // 2
    launch_sum(
        FORWARD, partial(forward_tile, c, ups), (n * h * w, h, w), maps, norms, weights, eps, out,
        SLOTS=slots, RELUS=relus, UPS=ups, RELU=relu,
    )  # fmt: skip


def launch_backward(
    g: Tensor,
    h: Tensor,
    maps: Sequence[Tensor],
    norms: Sequence[Sequence[Tensor]],
    weights: Tensor,
    eps: float,
    g_maps: Sequence[Tensor],
    g_norms: Sequence[Tensor],
    g_weights: Tensor,
    *,
    slots: tuple[int, ...],
    relus: tuple[bool, ...],
    ups: tuple[bool, ...],
    relu: bool,
) -> None:
    """Launch on the current stream; writes `g_maps`, `g_norms` and `g_weights`. `h` is the
    result of the forward pass."""
    if not any(ups):
        mixed_sum.launch_backward(
            g, maps, norms, weights, eps, g_maps, g_norms, g_weights,
            slots=slots, relus=relus, h=h if relu else None,
        )  # fmt: skip
        return
    _, n, _, height, width = g.shape
    size = (n * height * width // 4, height // 2, width // 2)
    launch_gradients(
        BACKWARD, partial(backward_blocks, g.shape, ups), size,
        g, h, maps, norms, weights, eps, g_maps, g_norms, g_weights,
        SLOTS=slots, RELUS=relus, UPS=ups, RELU=relu,
    )  # fmt: skip


def forward_tile(c: int, ups: Sequence[bool], scale: float = 1.0) -> dict[str, int]:
    # Registers: a source adds to four sums, an upsampled one from nine pixels.
    many = len(ups) > 3 or sum(ups) > 1
    return tile_of(c, scale * (TILE // 4 if len(ups) > 4 else TILE // 2 if many else TILE))


def backward_blocks(
    shape: Sequence[int], ups: Sequence[bool], scale: float = 1.0
) -> tuple[dict[str, int], int, int]:
    """Tile, steps of a program and programs per part of the backward pass from h of this shape."""
    p, n, c, h, w = shape
    if not any(ups):
        return mixed_sum.backward_blocks(p, n * h * w, c, len(ups), scale)
    tile = tile_of(c, scale * (TILE // 2 if len(ups) <= 3 else TILE // 4))
    return blocks_of(n * h * w // 4, p, c, tile)
