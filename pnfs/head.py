"""Vector in pixel: heads, score maps and the training loss.

Shape suffixes: N batch, K keypoints of the skeleton, k keypoints of one part, D vector components,
C channels, H W score-map height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from pnfs.kernels import vector_heatmap, vector_heatmap_loss
from pnfs.kernels.vector_heatmap import squash_score
from pnfs.kernels.vector_heatmap_loss import heatmap_loss, render_targets

__all__ = [
    "VectorHead",
    "heatmap_loss",
    "merge_parts",
    "pose_loss",
    "render_targets",
    "squash_score",
]


def merge_parts(
    vectors: Sequence[Tensor], part_table: Mapping[str, Sequence[int]], num_keypoints: int
) -> Tensor:
    """Score maps of all keypoints, summed over the parts that predict each (inner sum of Eq. 6).

    Args:
        vectors: per part (N, k, D, H, W), before the squash. D = 1 is a plain score map ("vector in
            pixel" off): it is taken as it is, without squash.
        part_table: part name -> keypoint indices, in the order of `vectors`.
        num_keypoints: K.

    Returns:
        (N, K, H, W), the dtype of `vectors`.
    """
    return vector_heatmap(vectors, tuple(part_table.values()), num_keypoints)


class VectorHead(nn.Module):
    """Per part: ReLU → 1×1 convolution with bias → k·D channels, keypoint·D + component."""

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

    def forward(self, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Per-part features (N, C, H, W), stacked or not → per-part vectors (N, k, D, H, W)."""
        if isinstance(features, Tensor):
            rectified: Sequence[Tensor] = F.relu(features).unbind(0)
        else:
            rectified = [F.relu(x_NCHW) for x_NCHW in features]
        return [
            conv(x_NCHW).unflatten(1, (-1, self.vector_dim))
            for conv, x_NCHW in zip(self.convs, rectified, strict=True)
        ]


def pose_loss(
    model: nn.Module, images: Tensor, joints: Tensor, weights: Tensor, *, sigma: float
) -> Tensor:
    """The training loss of a batch (Eq. 6), without score maps or targets in memory.

    Args:
        model: what `build_model` gives: `config`, and `vectors(images (N, 3, 4H, 4W))`. A model in
            DistributedDataParallel is not one: wrap a module that calls this function instead.
        images: normalised network input.
        joints: (N, K, 2) x, y in network-input pixels.
        weights: (N, K) joint weights, 0 masks a joint.
        sigma: of the Gaussian targets, in score-map pixels.

    Returns:
        Scalar, float32 (float64 for a float64 model).
    """
    posed = cast(Any, model)
    vectors: list[Tensor] = posed.vectors(images)
    parts = tuple(posed.config.part_table.values())
    return vector_heatmap_loss(vectors, parts, joints, weights, sigma=sigma)
