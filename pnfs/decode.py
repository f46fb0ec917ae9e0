"""Score maps -> keypoints in image pixels, in the two evaluation profiles.

`standard` is HRNet's and SimpleBaseline's decode: the mirrored map is shifted by one pixel before
averaging, and cell `c` stands for network-input pixel `4c`. `posenfs` is the published PNFS code's:
no shift, and cell `c` stands for network-input pixel `4c + 1/2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pnfs.config import EvalProfile
from pnfs.errors import PnfsError
from pnfs.kernels import decode_heatmaps
from pnfs.skeleton import Skeleton

STRIDE = 4  # network-input pixels per score-map cell, for every model of the package


def cell_to_image(to_image: Tensor, profile: EvalProfile, stride: int = STRIDE) -> Tensor:
    """Matrices that take score-map cells to image pixels.

    HRNet inverts the crop on the score-map grid (centre of the person <-> half the map's size) and
    not on the network-input grid. Both grids align the same centre with half their size and their
    scales differ by exactly the stride, so that inverse is the input's with `4c` put in.

    Args:
        to_image: (N, 2, 3) network-input pixel -> image pixel.
        profile: `standard` (cell c -> input pixel stride·c) or `posenfs` (stride·c + 1/2).
        stride: network-input pixels per cell.

    Returns:
        (N, 2, 3) float64, cell (x, y, 1) -> image pixel, on the device of `to_image`.
    """
    offset = 0.5 if profile == "posenfs" else 0.0
    cell_to_input = torch.tensor(
        [[stride, 0.0, offset], [0.0, stride, offset], [0.0, 0.0, 1.0]],
        dtype=torch.float64,
        device=to_image.device,
    )
    return to_image.double() @ cell_to_input


def decode(
    heatmaps: Tensor,
    to_image: Tensor,
    *,
    flipped: Tensor | None = None,
    skeleton: Skeleton,
    profile: EvalProfile = "standard",
) -> tuple[Tensor, Tensor]:
    """Keypoints of N people: flip average, argmax, quarter offset, inverse affine.

    Args:
        heatmaps: (N, K, h, w) scores, float32, bfloat16 or float16.
        to_image: (N, 2, 3) network-input pixel -> image pixel; any device.
        flipped: (N, K, h, w) scores of the mirrored input, still mirrored, or None for no flip test.
        skeleton: names which keypoints a mirror exchanges; has K keypoints.
        profile: `standard` or `posenfs`, see the module's docstring.

    Returns:
        xy (N, K, 2) float32 in image pixels and score (N, K) float32, the maximum of each map.

    Raises:
        PnfsError: the number of maps is not the skeleton's number of keypoints.
    """
    if heatmaps.ndim != 4 or heatmaps.shape[1] != skeleton.num_keypoints:
        raise PnfsError(
            f"decode: score maps of shape {tuple(heatmaps.shape)} do not fit skeleton "
            f"'{skeleton.name}'; give (N, {skeleton.num_keypoints}, h, w)"
        )
    matrices = cell_to_image(to_image, profile).to(heatmaps.device)
    permutation = None
    if flipped is not None:
        permutation = torch.tensor(skeleton.flip_permutation, device=heatmaps.device)
    xy, score = decode_heatmaps(
        heatmaps, matrices, flipped=flipped, permutation=permutation, shift=profile == "standard"
    )
    return xy, score
