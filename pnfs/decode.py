"""Score maps -> keypoints in image pixels, in the two evaluation profiles, and crops -> score maps.

`standard` is HRNet's and SimpleBaseline's decode: the mirrored map is shifted by one pixel before
averaging, and cell `c` stands for network-input pixel `4c`. `posenfs` is the published PNFS code's:
no shift, and cell `c` stands for network-input pixel `4c + 1/2`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pnfs.config import EvalProfile, Precision
from pnfs.data.batch import Batch
from pnfs.errors import PnfsError
from pnfs.kernels import calls, decode_heatmaps
from pnfs.skeleton import Skeleton

STRIDE = 4  # network-input pixels per score-map cell, for every model of the package
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    cell_to_input = (stride, 0.0, offset), (0.0, stride, offset), (0.0, 0.0, 1.0)
    return to_image.double() @ _constant_of(cell_to_input, torch.float64, to_image.device)


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
        flipped: (N, K, h, w) scores of the mirrored input, still mirrored; None: no flip test.
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
    return decode_heatmaps(
        heatmaps,
        matrices,
        flipped=flipped,
        permutation=_constant_of(skeleton.flip_permutation, torch.int64, heatmaps.device),
        shift=profile == "standard",
    )


def _constant_of(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A mode's tensors, such as fake ones, must not outlive it.
    make = _constant if calls.makes_plain_tensors() else _constant.__wrapped__
    return make(values, dtype, device)


@functools.cache
@torch.inference_mode(False)
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to a device once: such a copy waits for all that a GPU has to do."""
    return torch.tensor(values, dtype=dtype, device=device)


@torch.inference_mode()
def predict_batch(
    model: nn.Module,
    batch: Batch,
    *,
    size: tuple[int, int],
    skeleton: Skeleton,
    profile: EvalProfile,
    flip: bool,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """From uint8 crops to keypoints: warp and normalise, model, flip test, decode.

    Args:
        model: images (N, 3, H, W) -> scores (N, K, H/4, W/4), in eval mode, on the batch's device.
        size: (H, W) of the network's input, the one that the batch was made for.
        flip: average with the scores of the mirrored input.
        precision: of the model's arithmetic; bf16 and fp16 run it under autocast.

    Returns:
        xy (N, K, 2) float32 in image pixels and score (N, K) float32, on the batch's device.

    Raises:
        PnfsError: the model predicts another number of keypoints than the skeleton has.
    """

    def scores(mirrored: bool) -> Tensor:
        images = batch.images(size=size, profile=profile, mirrored=mirrored)
        with torch.autocast(
            images.device.type, LOW_PRECISION.get(precision), enabled=precision in LOW_PRECISION
        ):
            return model(images)

    return decode(
        scores(False),
        batch.to_image,
        flipped=scores(True) if flip else None,
        skeleton=skeleton,
        profile=profile,
    )
