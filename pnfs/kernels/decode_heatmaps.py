"""Heatmaps to keypoints: flip average, argmax, quarter offset and inverse affine in one pass.

Axes: N people, K keypoints, h and w heatmap cells. Sources: the decoding of HRNet and
SimpleBaseline (Xiao et al., 2018, section 3), which the published PNFS code follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import STORAGE, Verdict
from pnfs.kernels.registry import register_op


def decode_heatmaps(
    heatmaps: Tensor,
    matrices: Tensor,
    *,
    flipped: Tensor | None = None,
    permutation: Tensor | Sequence[int] | None = None,
    shift: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keypoint coordinates and scores of a batch of heatmaps.

    The maps are merged, `m = (heatmaps + mirror(flipped)[:, permutation]) / 2` (or `m = heatmaps`),
    and the cell of a keypoint is the argmax of its map, the first in row-major order among equals.
    A NaN never wins. Where the maximum is positive and 1 < px < w-1 and 1 < py < h-1, the
    coordinate moves by 1/4 cell towards the larger of the two neighbours, on each axis; equal
    neighbours, or one that is NaN, move nothing. Where the maximum is not positive the cell is
    (0, 0), without offset. Nothing is differentiable here: the outputs carry no gradient.

    Args:
        heatmaps: (N, K, h, w), float32, bfloat16 or float16; arithmetic is in float32. (float64 is
            taken too, by the reference backend.)
        matrices: (N, 2, 3) float32 or float64: cell (x, y, 1) -> image pixel. Applied in float64.
        flipped: scores of the mirrored input, as `heatmaps`, or None.
        permutation: (K,) int64 tensor or sequence, keypoint k of a mirrored image is keypoint
            `permutation[k]`; None is the identity. Without `flipped` it is not used. A tensor on
            the device of `heatmaps` spares a copy per call.
        shift: average with the mirrored map moved one cell to the right (column 0 stays), as HRNet
            does.

    Returns:
        xy: (N, K, 2) float32, image pixels.
        score: (N, K) float32, the maximum of the merged map (-inf where all of it is NaN).

    Raises:
        PnfsError: a shape, dtype or device that does not fit, or an index outside 0..K-1.
    """
    checks.check_tensor("heatmaps", heatmaps, (None,) * 4, *STORAGE, torch.float64)
    n, k, h, w = heatmaps.shape
    if h == 0 or w == 0:
        raise PnfsError(f"heatmaps must have cells, not shape {tuple(heatmaps.shape)}")
    checks.check_tensor("matrices", matrices, (n, 2, 3), torch.float32, torch.float64)
    order: Tensor | None = None
    if flipped is not None:
        checks.check_tensor("flipped", flipped, (n, k, h, w), heatmaps.dtype)
        flipped = flipped.detach()
        if permutation is not None:
            order = _permutation_tensor(permutation, k, heatmaps.device)
    checks.check_same_device(
        heatmaps=heatmaps, matrices=matrices, flipped=flipped, permutation=order
    )
    args = (heatmaps.detach(), matrices.detach().double(), flipped, order, bool(shift))
    return cast(tuple[Tensor, Tensor], OP(*args))


def _permutation_tensor(
    permutation: Tensor | Sequence[int], k: int, device: torch.device
) -> Tensor:
    if not isinstance(permutation, Tensor):
        indices = list(permutation)
        if len(indices) != k:
            raise PnfsError(f"permutation must have {k} indices, one per keypoint, not {indices}")
        _check_indices(indices, k)
        return torch.tensor(indices, dtype=torch.int64, device=device)
    checks.check_tensor("permutation", permutation, (k,), torch.int64)
    # On a GPU the values stay unread: reading them would wait for the device. There the kernel
    # reads nothing for a wrong index.
    readable = type(permutation) is Tensor and not torch.compiler.is_compiling()
    if permutation.device.type == "cpu" and readable:
        _check_indices(permutation.tolist(), k)
    return permutation.contiguous()


def _check_indices(indices: list[int], k: int) -> None:
    bad = [index for index in indices if not 0 <= index < k]
    if bad:
        raise PnfsError(f"permutation has index {bad[0]}; indices must be 0..{k - 1}")


def merge_flipped(
    heatmaps: Tensor, flipped: Tensor | None, permutation: Tensor | None, shift: bool
) -> Tensor:
    """Heatmaps averaged with those of the mirrored input, (N, K, h, w), float32 or float64."""
    maps = heatmaps if heatmaps.dtype == torch.float64 else heatmaps.float()
    if flipped is None:
        return maps
    mirrored = (flipped if permutation is None else flipped[:, permutation]).flip(3)
    if shift:
        mirrored = torch.cat((mirrored[..., :1], mirrored[..., :-1]), dim=3)
    return (maps + mirrored) * 0.5


def decode_heatmaps_reference(
    heatmaps: Tensor,
    matrices: Tensor,
    flipped: Tensor | None,
    permutation: Tensor | None,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    """The definition; see `decode_heatmaps`. `matrices` is float64."""
    maps = merge_flipped(heatmaps, flipped, permutation, shift)
    h, w = maps.shape[2:]
    flat = maps.flatten(2)
    score, index = flat.nan_to_num(float("-inf"), float("inf"), float("-inf")).max(dim=2)
    index = index * (score > 0)
    px, py = index % w, index // w

    def sign_of_difference(step: int) -> Tensor:
        after = flat.gather(2, (index + step).clamp(max=h * w - 1)[..., None])
        before = flat.gather(2, (index - step).clamp(min=0)[..., None])
        return ((after > before).double() - (after < before).double())[..., 0]

    inside = (px > 1) & (px < w - 1) & (py > 1) & (py < h - 1)
    x = px + 0.25 * sign_of_difference(1) * inside
    y = py + 0.25 * sign_of_difference(w) * inside
    row_x, row_y = matrices[:, None].unbind(2)  # (N, 1, 3) each
    xy = torch.stack([m[..., 0] * x + m[..., 1] * y + m[..., 2] for m in (row_x, row_y)], dim=2)
    return xy.float(), score.float()


# The backends take the arguments of the reference.


def _empty(heatmaps: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, k = heatmaps.shape[:2]
    device = heatmaps.device
    return (
        torch.empty((n, k, 2), dtype=torch.float32, device=device),
        torch.empty((n, k), dtype=torch.float32, device=device),
    )


def _cpp(
    heatmaps: Tensor,
    matrices: Tensor,
    flipped: Tensor | None,
    permutation: Tensor | None,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    xy, score = _empty(heatmaps)
    matrices = matrices.contiguous()
    native.call(
        "_cpu", "decode_heatmaps",
        heatmaps.data_ptr(), heatmaps.stride(),
        0 if flipped is None else flipped.data_ptr(),
        (0, 0, 0, 0) if flipped is None else flipped.stride(),
        0 if permutation is None else permutation.data_ptr(),
        matrices.data_ptr(), xy.data_ptr(), score.data_ptr(),
        tuple(heatmaps.shape), shift, checks.DTYPE_CODES[heatmaps.dtype],
        shapes=f"heatmaps {tuple(heatmaps.shape)}",
    )  # fmt: skip
    return xy, score


def _triton(
    heatmaps: Tensor,
    matrices: Tensor,
    flipped: Tensor | None,
    permutation: Tensor | None,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    # Imported at the first call: triton takes a second to load and exists on Linux alone.
    from pnfs.kernels.triton.decode_heatmaps import launch

    xy, score = _empty(heatmaps)
    launch(heatmaps, matrices.contiguous(), flipped, permutation, shift, xy, score)
    return xy, score


def _can_run(heatmaps: Tensor, *_: Any) -> Verdict:
    return checks.has_dtype("heatmaps", heatmaps.dtype, STORAGE)


OP = register_op("decode_heatmaps", decode_heatmaps_reference)
OP.register_native("cpp", _cpp, _empty, _can_run)
OP.register_native("triton", _triton, _empty, _can_run)
