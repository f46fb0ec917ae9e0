"""Vector in pixel: heads, the squash, merging parts, Gaussian targets and the loss.

Shape suffixes: N batch, K keypoints of the skeleton, k keypoints of one part, D vector components,
C channels, H W score-map height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def squash_score(vectors_NkDHW: Tensor) -> Tensor:
    """Length of the squashed vector at every pixel: ‖v‖² / (1 + ‖v‖²) (Eq. 4, 5).

    Args:
        vectors_NkDHW: keypoint vectors.

    Returns:
        Scores (N, k, H, W) in [0, 1).
    """
    squared = vectors_NkDHW.square().sum(dim=2)
    return squared / (1 + squared)


def merge_parts(
    vectors: Sequence[Tensor], part_table: Mapping[str, Sequence[int]], num_keypoints: int
) -> Tensor:
    """Score maps of all keypoints, summed over the parts that predict each (Eq. 6, inner sum).

    Args:
        vectors: per part (N, k, D, H, W), before the squash. D = 1 is a plain score map ("vector in
            pixel" off): it is taken as it is, without squash.
        part_table: part name -> keypoint indices, in the order of `vectors`.
        num_keypoints: K.

    Returns:
        (N, K, H, W), the dtype of `vectors`.
    """
    scores = [v.squeeze(2) if v.shape[2] == 1 else squash_score(v) for v in vectors]
    by_keypoint: list[list[Tensor]] = [[] for _ in range(num_keypoints)]
    for part_scores, keypoints in zip(scores, part_table.values(), strict=True):
        for column, keypoint in enumerate(keypoints):
            by_keypoint[keypoint].append(part_scores[:, column])
    merged = [sum(maps[1:], maps[0]) for maps in by_keypoint]
    return torch.stack(merged, dim=1)


class VectorHead(nn.Module):
    """Per part: ReLU → 1×1 convolution with bias → channel = keypoint·D + component."""

    def __init__(self, in_channels: int, keypoint_counts: Sequence[int], vector_dim: int) -> None:
        super().__init__()
        self.vector_dim = vector_dim
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, k * vector_dim, 1) for k in keypoint_counts
        )
        for conv in self.convs:
            # Scores of about 0.1 at the start: a zero vector has no gradient, a long one little.
            nn.init.normal_(cast(nn.Conv2d, conv).weight, std=0.02)
            nn.init.zeros_(cast(Tensor, conv.bias))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Per-part features (N, C, H, W) → per-part vectors (N, k, D, H, W)."""
        return [
            conv(F.relu(x_NCHW)).unflatten(1, (-1, self.vector_dim))
            for conv, x_NCHW in zip(self.convs, features, strict=True)
        ]


def render_targets(
    joints: Tensor,
    size: tuple[int, int],
    *,
    sigma: float,
    stride: int = 4,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gaussian score maps with peak 1 at each joint's cell: exp(-r² / 2σ²).

    The cell is min(int(x / stride + ½), size - 1) on each axis, as in the published code; the
    formula itself is rendered (the published code blurs a delta, which is wrong near the border).

    Args:
        joints: (N, K, 2) x, y in network-input pixels.
        size: (H, W) of the score maps.
        sigma: σ in score-map pixels.
        stride: input pixels per score-map pixel.
        dtype: of the result; the joints' by default.

    Returns:
        (N, K, H, W).
    """
    height, width = size
    dtype = dtype or joints.dtype
    limit = torch.tensor([width - 1, height - 1], dtype=joints.dtype, device=joints.device)
    cells = torch.minimum((joints / stride + 0.5).trunc(), limit).to(dtype)
    xs = torch.arange(width, dtype=dtype, device=joints.device)
    ys = torch.arange(height, dtype=dtype, device=joints.device)
    dx2 = (xs - cells[..., 0:1]).square()
    dy2 = (ys - cells[..., 1:2]).square()
    scale = -0.5 / (sigma * sigma)
    return torch.exp(scale * dy2)[..., :, None] * torch.exp(scale * dx2)[..., None, :]


def heatmap_loss(scores: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over batch and all K joints of ½ · w · mean over pixels of (score - target)² (Eq. 6).

    Args:
        scores: (N, K, H, W) predicted.
        target: (N, K, H, W).
        weight: (N, K) 0 masks a joint; masked joints stay in the denominator.

    Returns:
        Scalar in float32 (float64 for float64 input).
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    per_joint = (scores - target).square().mean(dim=(2, 3))
    return 0.5 * (per_joint * weight).mean()


def pose_loss(
    model: nn.Module, images: Tensor, joints: Tensor, weights: Tensor, *, sigma: float
) -> Tensor:
    """The training loss of a batch (Eq. 6).

    Args:
        model: images (N, 3, 4H, 4W) → scores (N, K, H, W).
        images: normalised network input.
        joints: (N, K, 2) x, y in network-input pixels.
        weights: (N, K) joint weights, 0 or 1.
        sigma: of the Gaussian targets, in score-map pixels.
    """
    scores = model(images)
    target = render_targets(
        joints, (scores.shape[2], scores.shape[3]), sigma=sigma, dtype=torch.float32
    )
    return heatmap_loss(scores, target, weights)
