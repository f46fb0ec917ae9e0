"""Object keypoint similarity (OKS) between poses, and greedy suppression of duplicates by it.

Axes: n poses, K keypoints. Arithmetic is in float64 on every backend, so that a pose near the
threshold is decided alike everywhere. Source of OKS: COCO's keypoint evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pnfs.errors import PnfsError
from pnfs.kernels import checks, native
from pnfs.kernels.checks import Verdict
from pnfs.kernels.registry import register_op

EPS = 2.0**-52  # np.spacing(1): COCO adds it to the area


def oks_matrix(keypoints: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float]) -> Tensor:
    """OKS of every pair of poses.

    oks[i, j] = mean over k of exp(-d_k^2 / (2 sigma_k)^2 / (a + eps) / 2), d_k the distance of
    keypoint k in poses i and j, a = (areas[i] + areas[j]) / 2. All keypoints count; only x and y
    of them are read.

    Args:
        keypoints: (n, K, 2 or more) float32 or float64, (x, y, ...) in pixels of one image.
        areas: (n,) areas of the people in square pixels of that image, not negative.
        sigmas: (K,) the per-keypoint constants (`Skeleton.oks_sigmas`).

    Returns:
        (n, n) float64, symmetric, in [0, 1]; NaN where a coordinate or an area is NaN.

    Raises:
        PnfsError: a shape, dtype or device that does not fit.
    """
    points, areas, constants = _float64_arguments(keypoints, areas, sigmas)
    return _oks_matrix(points, areas, constants)


def oks_nms(
    keypoints: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor | Sequence[float],
    threshold: float,
    *,
    groups: Tensor | None = None,
    skip_after_removal: bool = False,
) -> Tensor:
    """Indices of the poses that survive greedy suppression, each group (image) for itself.

    Candidates are walked by descending score (equal scores: lower index first; a NaN score counts
    as -inf). Each one still in the list removes the later ones whose OKS with it is greater than
    `threshold`. A NaN similarity removes nothing.

    Args:
        keypoints: (n, K, 2 or more) float32 or float64, (x, y, ...) in image pixels.
        scores: (n,) floating point.
        areas: (n,) areas in square image pixels, not negative.
        sigmas: (K,) the per-keypoint constants (`Skeleton.oks_sigmas`).
        threshold: similarity above which two poses are the same person; 0.9 is customary.
        groups: (n,) int64, equal numbers for poses of one image; None: all are of one image.
        skip_after_removal: as the published PNFS code does: the candidate that follows a removed
            one in the list is not compared with the pose that removed it.

    Returns:
        (m,) int64 indices into the poses, by ascending group, then by descending score.

    Raises:
        PnfsError: a shape, dtype or device that does not fit.
    """
    points, areas, constants = _float64_arguments(keypoints, areas, sigmas)
    n = points.shape[0]
    checks.check_tensor("scores", scores, (n,))
    if not scores.is_floating_point():
        raise PnfsError(f"scores must be floating point, not {checks.short_name(scores.dtype)}")
    if groups is not None:
        checks.check_tensor("groups", groups, (n,), torch.int64)
    checks.check_same_device(keypoints=points, scores=scores, groups=groups)
    ranks = scores.detach().double().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    args = (points, ranks, areas, constants, float(threshold), groups, bool(skip_after_removal))
    return cast(Tensor, OP(*args))


def _float64_arguments(
    keypoints: Tensor, areas: Tensor, sigmas: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked, contiguous float64: points (n, K, 2), areas (n,), sigmas (K,)."""
    checks.check_tensor("keypoints", keypoints, (None,) * 3, torch.float32, torch.float64)
    n, k, depth = keypoints.shape
    if k == 0 or depth < 2:
        raise PnfsError(f"keypoints must be (n, K, 2 or more), not {tuple(keypoints.shape)}")
    checks.check_tensor("areas", areas, (n,))
    if not isinstance(sigmas, Tensor):
        sigmas = torch.tensor(tuple(sigmas), dtype=torch.float64, device=keypoints.device)
    checks.check_tensor("sigmas", sigmas, (k,))
    checks.check_same_device(keypoints=keypoints, areas=areas, sigmas=sigmas)
    points = keypoints.detach()[..., :2].double().contiguous()
    return points, areas.detach().double().contiguous(), sigmas.detach().double().contiguous()


def _oks_matrix(points: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    squared = (points[:, None] - points[None]).square().sum(3)  # (n, n, K)
    area = (areas[:, None] + areas[None]) / 2 + EPS
    exponent = squared / (2 * sigmas).square() / area[..., None] / 2
    return (-exponent).exp().mean(2)


def _walk_order(scores: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices by ascending group, then descending score; and the sizes of the groups."""
    order = scores.argsort(descending=True, stable=True)
    if groups is None:
        return order, torch.full((1,), scores.numel(), device=scores.device)
    order = order[groups[order].argsort(stable=True)]
    return order, groups[order].unique_consecutive(return_counts=True)[1]


def oks_nms_reference(
    points: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    threshold: float,
    groups: Tensor | None,
    skip_after_removal: bool,
) -> Tensor:
    """The definition; see `oks_nms`. All floating-point arguments are float64 and contiguous."""
    order, counts = _walk_order(scores, groups)
    kept = []
    for members in order.split(counts.tolist()):
        similar = _oks_matrix(points[members], areas[members], sigmas) > threshold
        alive = _survivors(similar.cpu(), skip_after_removal)
        kept.append(members[alive.to(members.device)])
    return torch.cat(kept) if kept else order


def _survivors(similar: Tensor, skip_after_removal: bool) -> Tensor:
    """(n,) bool: who is left; `similar` is (n, n) bool, candidates in walking order."""
    n = similar.shape[0]
    alive = torch.ones(n, dtype=torch.bool)
    for i in range(n):
        if not alive[i]:
            continue
        if not skip_after_removal:
            alive[i + 1 :] &= ~similar[i, i + 1 :]
            continue
        skip = False
        for j in range(i + 1, n):
            if not alive[j]:
                continue
            removed = bool(similar[i, j]) and not skip
            alive[j] = not removed
            skip = removed
    return alive


# The backends take the arguments of the reference.


def _fake(points: Tensor, *_: Any) -> Tensor:
    return points.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _cpp(
    points: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    threshold: float,
    groups: Tensor | None,
    skip_after_removal: bool,
) -> Tensor:
    n, k = points.shape[:2]
    inputs = [tensor.contiguous() for tensor in (points, scores, areas, sigmas)]
    groups = None if groups is None else groups.contiguous()
    keep = torch.empty(n, dtype=torch.int64)
    kept = native.call(
        "_cpu", "oks_nms",
        *(tensor.data_ptr() for tensor in inputs), 0 if groups is None else groups.data_ptr(),
        keep.data_ptr(), n, k, threshold, skip_after_removal,
        shapes=f"keypoints {tuple(points.shape)}",
    )  # fmt: skip
    return keep[:kept].clone()


def _cuda(
    points: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    threshold: float,
    groups: Tensor | None,
    skip_after_removal: bool,
) -> Tensor:
    n, k = points.shape[:2]
    with native.cuda_stream(points.device) as stream:
        order, counts = _walk_order(scores, groups)
        ends = counts.cumsum(0)
        # A row of bits per pose says which members of its group it would remove.
        words = (int(counts.max()) + 31) // 32 if n else 0
        inputs = [tensor.contiguous() for tensor in (points, areas, sigmas)]
        bits = torch.empty(n * words, dtype=torch.int32, device=points.device)
        keep = torch.empty(n, dtype=torch.bool, device=points.device)
        native.call(
            "_cuda", "oks_nms",
            *(tensor.data_ptr() for tensor in inputs), order.data_ptr(), ends.data_ptr(),
            ends.shape[0], n, k, words, threshold, skip_after_removal,
            bits.data_ptr(), keep.data_ptr(), stream,
            shapes=f"keypoints {tuple(points.shape)}",
        )  # fmt: skip
        return order[keep]


def _can_run(*_: Any) -> Verdict:
    return checks.RUNS


OP = register_op("oks_nms", oks_nms_reference)
OP.register_native("cpp", _cpp, _fake, _can_run)
OP.register_native("cuda", _cuda, _fake, _can_run)
