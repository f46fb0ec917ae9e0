"""PCKh: the share of joints within a fraction of the head's size, as MPII evaluation counts it."""

from __future__ import annotations

import numpy as np

from pnfs.errors import PnfsError
from pnfs.skeleton import Skeleton

HEAD_SCALE = 0.6  # head size = 0.6 × diagonal of the annotated head box
LEFT_OUT_OF_MEAN = ("pelvis", "thorax")
PCKH_50 = "PCKh@0.5"
PCKH_10 = "PCKh@0.1 (<=0.10)"
PCKH_10_CUSTOMARY = "PCKh@0.1 (index 11, <=0.11)"


def pckh(
    predictions: np.ndarray,
    truth: np.ndarray,
    visible: np.ndarray,
    head_sizes: np.ndarray,
    skeleton: Skeleton,
) -> dict[str, float]:
    """PCKh@0.5 by joint group and as a mean, and the mean at 0.1 in both readings.

    A joint counts as right where its distance is `<=` threshold × head size. A group is the plain
    mean of its joints. Means weigh every joint by how often it is annotated and leave out pelvis
    and thorax. The figure customarily published as the mean at 0.1 reads index 11 of the thresholds
    0, 0.01, ..., which is 0.11; it is given beside the one at 0.10.

    Args:
        predictions: (N, K, 2) x, y; a person without prediction is NaN and counts as wrong.
        truth: (N, K, 2) x, y in the same frame (both 0-based or both 1-based pixels).
        visible: (N, K) bool, which joints are annotated.
        head_sizes: (N,) pixels, 0.6 × head-box diagonal.
        skeleton: keypoint names and `pckh_groups`.

    Returns:
        Percentages: one per group, the mean as `PCKh@0.5`, and the two means at 0.1. A group
        without any annotated joint is NaN.

    Raises:
        PnfsError: the skeleton has no groups, a head size is missing, or nothing is annotated.
    """
    if not skeleton.pckh_groups:
        raise PnfsError(f"PCKh: skeleton '{skeleton.name}' has no PCKh groups; use COCO AP for it")
    sizes = np.asarray(head_sizes, np.float64)
    bad = np.flatnonzero(~(sizes > 0))
    if bad.size:
        raise PnfsError(
            f"PCKh: person {bad[0]} has no head size ({len(bad)} of {len(sizes)} have none); "
            "score the valid split, with MPII's gt_valid.mat in annot/"
        )
    visible = np.asarray(visible, bool)
    difference = np.asarray(predictions, np.float64) - np.asarray(truth, np.float64)
    distances = np.linalg.norm(difference, axis=-1) / sizes[:, None]
    counts = visible.sum(axis=0)

    def by_joint(threshold: float) -> np.ndarray:
        hits = ((distances <= threshold) & visible).sum(axis=0)
        return np.divide(100.0 * hits, counts, out=np.full(len(counts), np.nan), where=counts > 0)

    in_mean = np.array([name not in LEFT_OUT_OF_MEAN for name in skeleton.keypoints]) & (counts > 0)
    if not in_mean.any():
        raise PnfsError("PCKh: no joint is annotated; check the annotation file")

    def mean(threshold: float) -> float:
        return float(np.average(by_joint(threshold)[in_mean], weights=counts[in_mean]))

    half = by_joint(0.5)
    metrics = {}
    for group, joints in skeleton.pckh_groups.items():
        seen = [k for k in joints if counts[k] > 0]
        metrics[group] = float(half[seen].mean()) if seen else float("nan")
    metrics[PCKH_50] = mean(0.5)
    metrics[PCKH_10] = mean(0.10)
    metrics[PCKH_10_CUSTOMARY] = mean(0.11)
    return metrics
