"""The loss from vectors and joints, with its gradient: against the reference and lean torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from pnfs.kernels import vector_heatmap_loss
from pnfs.skeleton import COCO

SIGMA, STRIDE = 2.0, 4


def lean_loss(
    vectors: Sequence[Tensor], places: Sequence[Tensor], joints: Tensor, weights: Tensor
) -> Tensor:
    """Vectorised torch with autograd, without the reference's care for NaN.

    A Gaussian is a product of one over rows and one over columns; the map of errors begins as its
    negative, in the vectors' layout, and is changed in place. Of the ways tried it is the fastest.

    Args:
        vectors: per part (N, k, 8, h, w). places: per part (k,), its keypoints.
    """
    sides = []
    cells = (joints / STRIDE + 0.5).trunc()
    for axis, size in ((1, vectors[0].shape[3]), (0, vectors[0].shape[4])):
        centre = cells[:, None, :, axis].clamp(max=size - 1)
        distance = torch.arange(size, device=joints.device)[:, None] - centre
        sides.append(torch.exp(distance.square() * (-0.5 / SIGMA**2)))  # (N, size, K)
    rows, columns = sides
    errors = (rows[:, :, None] * columns[:, None]).neg_()  # (N, h, w, K)
    for part, place in zip(vectors, places, strict=True):
        squared = part.permute(0, 3, 4, 1, 2).square().sum(-1)
        errors.index_add_(3, place, squared / (1 + squared))
    return (weights * errors.square().mean(dim=(1, 2))).mean() * 0.5


@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize(("backend", "device"), harness.backends("vector_heatmap_loss"))
def bench_vector_heatmap_loss(measure: Any, backend: str, device: str, count: int) -> None:
    parts = list(COCO.resolve_parts(harness.PARTS).values())
    vectors = harness.keypoint_vectors(parts, count, device)
    joints = torch.rand(count, COCO.num_keypoints, 2, device=device) * 190
    weights = torch.ones(count, COCO.num_keypoints, device=device)

    def run(*tensors: Tensor) -> Tensor:
        return vector_heatmap_loss(tensors, parts, joints, weights, sigma=SIGMA, stride=STRIDE)

    places = [torch.tensor(part, device=device) for part in parts]

    def lean(*tensors: Tensor) -> Tensor:
        return lean_loss(tensors, places, joints, weights)

    measure(
        harness.gradient_case(
            "vector_heatmap_loss",
            f"{count} images",
            run,
            vectors,
            others={"lean eager": lean},
            backend=backend,
            device=device,
            tolerance=1e-5,
            tolerance_against=1e-4,
            bytes=2 * sum(v.nbytes for v in vectors),
        )
    )
