"""COCO keypoint AP: rescoring, OKS-NMS, results format and pycocotools' scores.

Shapes: n candidates, K keypoints. Coordinates are image pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pnfs.config import EvalProfile
from pnfs.data.records import read_json, section
from pnfs.errors import PnfsError
from pnfs.kernels import oks_nms
from pnfs.skeleton import Skeleton
from pnfs.statefile import write_text

COCO_METRICS = (
    "AP", "AP50", "AP75", "AP(M)", "AP(L)", "AR", "AR50", "AR75", "AR(M)", "AR(L)",
)  # fmt: skip
MAX_DETECTIONS = 20  # per image, as the COCO keypoint challenge counts them


@dataclass(frozen=True)
class Candidates:
    """Predicted poses before rescoring and suppression; row i is one box.

    Attributes:
        image_ids: (n,) int64, which image.
        keypoints: (n, K, 3) float32 x, y in image pixels and the joint's score.
        box_scores: (n,) float32; 1 for ground-truth boxes.
        areas: (n,) float64 square pixels that normalise OKS between two candidates.
    """

    image_ids: np.ndarray
    keypoints: np.ndarray
    box_scores: np.ndarray
    areas: np.ndarray


def rescore(joint_scores: np.ndarray, box_scores: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """Pose score = box score × mean of the joint scores above `threshold` (0 when none is above).

    Args:
        joint_scores: (n, K) scores; box_scores: (n,) scores.

    Returns:
        (n,) float32. The sum runs over the joints in order in float32, as HRNet's evaluation does,
        so that ties between candidates break the same way.
    """
    scores = np.asarray(joint_scores, np.float32)
    if scores.shape[1] == 0:
        return np.zeros(len(scores), np.float32)
    counted = scores > np.float32(threshold)
    # cumsum adds one by one; sum() would add pairwise and round differently.
    total = np.cumsum(np.where(counted, scores, np.float32(0)), axis=1, dtype=np.float32)[:, -1]
    mean = total / np.maximum(counted.sum(axis=1), 1).astype(np.float32)
    return mean * np.asarray(box_scores, np.float32)


def coco_results(
    candidates: Candidates,
    skeleton: Skeleton,
    *,
    profile: EvalProfile = "standard",
    visible_threshold: float = 0.2,
    nms_threshold: float = 0.9,
) -> list[dict[str, Any]]:
    """Rescore, suppress near-duplicates (see `suppress`), COCO results format.

    Returns:
        One dict per kept pose: image_id, category_id 1, keypoints [x, y, score] × K, score. Ordered
        by image, then by descending score.
    """
    if len(candidates.image_ids) == 0:
        return []
    scores = rescore(candidates.keypoints[..., 2], candidates.box_scores, visible_threshold)
    rows = suppress(candidates, scores, skeleton, profile=profile, threshold=nms_threshold)
    return results_format(candidates, scores, rows)


def suppress(
    candidates: Candidates,
    scores: np.ndarray,
    skeleton: Skeleton,
    *,
    profile: EvalProfile,
    threshold: float,
) -> np.ndarray:
    """Rows that OKS-NMS at `threshold` keeps, by image and then by descending pose score (n,).

    The profiles differ in two habits of the programs they follow: among equal scores `standard`
    takes the later candidate first and `posenfs` the earlier; and `posenfs` spares the candidate
    after each removed one.
    """
    n = len(candidates.image_ids)
    # oks_nms takes the first of equal scores first; a reversed list makes that the last one.
    order = np.arange(n) if profile == "posenfs" else np.arange(n)[::-1]
    keep = oks_nms(
        torch.from_numpy(candidates.keypoints[order].astype(np.float32)),
        torch.from_numpy(scores[order]),
        torch.from_numpy(candidates.areas[order].astype(np.float64)),
        skeleton.oks_sigmas,
        threshold,
        groups=torch.from_numpy(candidates.image_ids[order].astype(np.int64)),
        skip_after_removal=profile == "posenfs",
    )
    return order[keep.numpy()]


def results_format(
    candidates: Candidates, scores: np.ndarray, rows: np.ndarray
) -> list[dict[str, Any]]:
    """COCO results of the candidates `rows`, in that order, with the pose scores `scores` (n,)."""
    return [
        {
            "image_id": int(candidates.image_ids[i]),
            "category_id": 1,
            "keypoints": candidates.keypoints[i].astype(np.float64).ravel().tolist(),
            "score": float(scores[i]),
        }
        for i in rows.tolist()
    ]


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write COCO results as JSON, one pose per line, atomically."""
    text = ",\n".join(json.dumps(result) for result in results)
    write_text(path, f"[{text}]\n")


def read_annotations(path: str | Path) -> dict[str, Any]:
    """The tree of a COCO annotation file; test splits have images and categories alone.

    Raises:
        PnfsError: the file cannot be read, is not JSON or is no COCO file.
    """
    tree = read_json(Path(path), "COCO annotation file")
    for name in ("images", "categories"):
        section(tree, Path(path), name)
    return cast(dict[str, Any], tree)


def has_truth(tree: Mapping[str, Any]) -> bool:
    """Whether predictions can be scored: test splits list images without annotations."""
    return "annotations" in tree


def _index(source: str | Path | Mapping[str, Any], values: int) -> Any:
    """pycocotools' index of the annotations, each with `values` numbers of keypoints."""
    from pycocotools.coco import COCO

    tree = source if isinstance(source, Mapping) else read_annotations(source)
    if not has_truth(tree):
        raise PnfsError(
            f"{source if not isinstance(source, Mapping) else 'annotations'}: no 'annotations', so "
            "nothing can be scored; submit the results file of a test split to COCO's server"
        )
    # pycocotools writes into the annotations that it indexes; the caller's stay as they are.
    annotations = [dict(annotation) for annotation in tree["annotations"]]
    for annotation in annotations:
        count = len(annotation.get("keypoints", ()))
        if count != values:
            raise PnfsError(
                f"annotation {annotation.get('id')}: keypoints has {count} values, the skeleton "
                f"needs {values}; use the annotations of the model's skeleton"
            )
    coco = COCO()
    coco.dataset = {**tree, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def coco_ap(
    predictions: Sequence[Mapping[str, Any]],
    annotations: str | Path | Mapping[str, Any],
    skeleton: Skeleton,
) -> dict[str, float]:
    """COCO keypoint AP and AR by pycocotools, with the skeleton's OKS sigmas, maxDets 20.

    All images of `annotations` count, whether or not they have predictions.

    Args:
        predictions: COCO results (see `coco_results`).
        annotations: annotation file or parsed dict.

    Returns:
        `COCO_METRICS` -> value in [0, 1], or -1 where no annotated person falls in that size range.

    Raises:
        PnfsError: unreadable annotations, a wrong number of keypoints, or a prediction for an image
            that the annotations lack.
    """
    from pycocotools.cocoeval import COCOeval

    values = 3 * skeleton.num_keypoints
    truth = _index(annotations, values)
    for index, prediction in enumerate(predictions):
        if prediction["image_id"] not in truth.imgs:
            raise PnfsError(
                f"prediction {index}: image_id {prediction['image_id']} is not in the annotations; "
                "predict and score the same split"
            )
        if len(prediction["keypoints"]) != values:
            raise PnfsError(
                f"prediction {index}: keypoints has {len(prediction['keypoints'])} values, "
                f"skeleton '{skeleton.name}' needs {values}"
            )
    if not predictions:  # loadRes cannot read an empty list
        return dict.fromkeys(COCO_METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(prediction) for prediction in predictions])
        scorer = COCOeval(truth, found, "keypoints")
        scorer.params.kpt_oks_sigmas = np.asarray(skeleton.oks_sigmas)
        scorer.params.maxDets = [MAX_DETECTIONS]
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: float(value) for name, value in zip(COCO_METRICS, scorer.stats, strict=True)}
