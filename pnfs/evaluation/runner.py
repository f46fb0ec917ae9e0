"""A model over a dataset: poses from every box and all processes, scored and described."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pnfs import distributed
from pnfs.config import Config, EvalConfig, Precision
from pnfs.data import Batch, PeopleDataset, make_loader
from pnfs.data.prefetch import side_for
from pnfs.data.transforms import PADDING, PIXEL_STD, person_center_scale
from pnfs.decode import predict_batch
from pnfs.errors import PnfsError
from pnfs.evaluation.coco import (
    COCO_METRICS,
    MAX_DETECTIONS,
    Candidates,
    coco_ap,
    coco_results,
    has_truth,
    read_annotations,
    rescore,
    results_format,
    write_results,
)
from pnfs.evaluation.pckh import HEAD_SCALE, LEFT_OUT_OF_MEAN, pckh
from pnfs.folding import for_evaluation
from pnfs.runtime import StoppedBySignal
from pnfs.statefile import reason, write_json, write_text

Progress = Callable[[int, int], None]  # people done, people in all (of this process)


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Scores of one model on one split, and what they mean.

    Attributes:
        metrics: name -> value: COCO AP and AR in [0, 1] (-1 where nobody is annotated in that size
            range), PCKh in percent (NaN for a group that is never annotated). Empty for a split
            without annotations.
        description: how they were measured, one line each: boxes, profile, flip test, pose score,
            thresholds.
        predictions: COCO results, keypoints in the skeleton's order.
    """

    metrics: dict[str, float]
    description: tuple[str, ...]
    predictions: list[dict[str, Any]]

    def text(self) -> str:
        """The scores as a table for people, with the description below."""
        width = max(map(len, self.metrics), default=0)
        rows = [f"{name:<{width}}  {_shown(name, value)}" for name, value in self.metrics.items()]
        return "\n".join([*rows, *([""] if rows else []), *self.description])

    def write(self, folder: str | Path) -> None:
        """Write predictions.json (COCO results), metrics.json and evaluation.txt into `folder`.

        Raises:
            PnfsError: the folder cannot be made or written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PnfsError(
                f"{folder}: cannot be made ({reason(error)}); choose another --out"
            ) from None
        metrics = {n: None if math.isnan(value) else value for n, value in self.metrics.items()}
        write_results(folder / "predictions.json", self.predictions)
        write_json(
            folder / "metrics.json", {"metrics": metrics, "description": list(self.description)}
        )
        write_text(folder / "evaluation.txt", self.text() + "\n")


def evaluate(
    model: nn.Module,
    dataset: PeopleDataset,
    cfg: Config,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> EvalResult:
    """Score `model` on every person of `dataset`: PCKh for MPII, COCO AP for COCO and synthetic.

    Under torch.distributed each process takes a share of the people, every person once; all
    processes return the same result. The model is run in eval mode and left in the mode it had.

    Args:
        model: images (N, 3, H, W) -> scores (N, K, H/4, W/4), on `device`.
        cfg: `model.input_size`, `data.workers` and `eval` are used.
        progress: called after each batch.
        stop: asked before each batch; if it says yes on any process, all of them give up.

    Raises:
        StoppedBySignal: `stop` said yes.
        PnfsError: model and dataset differ in their keypoints, a broken image, or missing truth
            (for MPII head sizes).
    """
    skeleton = cfg.model.skeleton_table
    if skeleton.name != dataset.skeleton.name:
        raise PnfsError(
            f"{dataset.source}: has the keypoints of {dataset.skeleton.name}, the model predicts "
            f"those of {skeleton.name}; choose a dataset of the model's skeleton"
        )
    training = model.training
    model.eval()
    try:
        place = torch.device(device)
        scores = for_evaluation(model, place, precision)
        keypoints = _predict(scores, dataset, cfg, place, precision, progress, stop)
    finally:
        model.train(training)
    boxes = f"boxes: {dataset.source} ({len(dataset)} people in {len(dataset.image_ids)} images)"
    description = (boxes, *_describe(cfg.eval, precision))
    if skeleton.pckh_groups:
        return _score_pckh(keypoints, dataset, cfg, description)
    return _score_coco(keypoints, dataset, cfg, description)


def _predict(
    model: nn.Module,
    dataset: PeopleDataset,
    cfg: Config,
    device: torch.device,
    precision: Precision,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> np.ndarray:
    """(n, K, 3) float32: x, y in image pixels and score of every person, from all processes."""
    rank, world = distributed.rank(), distributed.world()
    indices: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    problem: str | None = None
    stopped = False
    try:
        loader = make_loader(dataset, cfg, train=False, rank=rank, world=world)
        size, profile, flip = cfg.model.input_size, cfg.eval.profile, cfg.eval.flip
        prepare = partial(Batch.prepared, device=device, size=size, profile=profile, flip=flip)
        loader.prefetch(prepare, side_for(device))
        done, total = 0, len(range(rank, len(dataset), world))
        for batch in loader:
            stopped = stop is not None and stop()
            if stopped:
                break
            xy, score = predict_batch(
                model,
                batch.to(device),
                size=size,
                skeleton=dataset.skeleton,
                profile=profile,
                flip=flip,
                precision=precision,
            )
            loader.ahead()
            indices.append(batch.indices.cpu().numpy())
            rows.append(torch.cat([xy, score[..., None]], dim=2).cpu().numpy())
            done += len(batch)
            if progress is not None:
                progress(done, total)
    except PnfsError as error:
        # The other processes wait for this one's share: they must hear of it before it leaves.
        problem = str(error)
    shares: list[Any] = [(indices, rows, problem, stopped)]
    if world > 1:
        own, shares = shares[0], [None] * world
        dist.all_gather_object(shares, own)
    for _, _, failed, _ in shares:
        if failed is not None:
            raise PnfsError(failed)
    if any(share[3] for share in shares):
        raise StoppedBySignal
    keypoints = np.full((len(dataset), dataset.skeleton.num_keypoints, 3), np.nan, np.float32)
    for share_indices, share_rows, *_ in shares:
        for index, row in zip(share_indices, share_rows, strict=True):
            keypoints[index] = row
    return keypoints


def _score_coco(
    keypoints: np.ndarray, dataset: PeopleDataset, cfg: Config, description: tuple[str, ...]
) -> EvalResult:
    settings = cfg.eval
    predictions = coco_results(
        _candidates(keypoints, dataset, cfg),
        dataset.skeleton,
        profile=settings.profile,
        visible_threshold=settings.visible_threshold,
        nms_threshold=settings.oks_nms_threshold,
    )
    description += (
        f"pose score: box score × mean of joint scores > {settings.visible_threshold:g}; "
        f"OKS-NMS > {settings.oks_nms_threshold:g}",
    )
    tree = read_annotations(dataset.annotation_file)
    if not has_truth(tree):
        description += ("not scored: the split has no annotations",)
        return EvalResult({}, description, predictions)
    metrics = coco_ap(predictions, tree, dataset.skeleton)
    description += (
        f"AP, AR: OKS 0.50:0.05:0.95 with the sigmas of {dataset.skeleton.name}, "
        f"maxDets {MAX_DETECTIONS}, pycocotools",
    )
    return EvalResult(metrics, description, predictions)


def _score_pckh(
    keypoints: np.ndarray, dataset: PeopleDataset, cfg: Config, description: tuple[str, ...]
) -> EvalResult:
    people = dataset.people
    truth = np.stack([person.keypoints for person in people]).astype(np.float64)
    # People and predictions both count pixels from 0 here: the same as predictions + 1 against the
    # official annotations, which count from 1.
    metrics = pckh(
        keypoints[..., :2],
        truth[..., :2],
        truth[..., 2] > 0,
        np.array([np.nan if p.head_size is None else p.head_size for p in people]),
        dataset.skeleton,
    )
    description += (
        f"PCKh@t: distance <= t × head size, head size = {HEAD_SCALE:g} × head-box diagonal; "
        f"groups at t = 0.5; means weighted by joint counts, "
        f"without {' and '.join(LEFT_OUT_OF_MEAN)}",
    )
    candidates = _candidates(keypoints, dataset, cfg)
    scores = rescore(keypoints[..., 2], candidates.box_scores, cfg.eval.visible_threshold)
    predictions = results_format(candidates, scores, np.arange(len(people)))
    return EvalResult(metrics, description, predictions)


def _candidates(keypoints: np.ndarray, dataset: PeopleDataset, cfg: Config) -> Candidates:
    return Candidates(
        image_ids=np.array([person.image_id for person in dataset.people], np.int64),
        keypoints=keypoints,
        box_scores=np.array([person.score for person in dataset.people], np.float32),
        areas=_areas(dataset, cfg),
    )


def _areas(dataset: PeopleDataset, cfg: Config) -> np.ndarray:
    """(n,) px² for OKS between candidates: the crop's (`standard`) or the box's (`posenfs`)."""
    if cfg.eval.profile == "posenfs":
        return np.array([person.box[2] * person.box[3] for person in dataset.people], np.float64)
    height, width = cfg.model.input_size
    scales = [person_center_scale(p, width / height, "standard")[1] for p in dataset.people]
    return np.prod(np.stack(scales) * PIXEL_STD, axis=1)


def _describe(settings: EvalConfig, precision: Precision) -> tuple[str, ...]:
    standard = settings.profile == "standard"
    profile = (
        f"profile: standard (RGB input, box padding {PADDING:g}, cell c at input pixel 4c)"
        if standard
        else "profile: posenfs (BGR input, RGB mean and deviation, cell c at input pixel 4c + 0.5)"
    )
    flip = "off"
    if settings.flip:
        flip = (
            "on, mirrored map shifted by one cell" if standard else "on, mirrored map not shifted"
        )
    return profile, f"flip test: {flip}; precision: {precision}"


def _shown(name: str, value: float) -> str:
    if math.isnan(value) or value == -1:
        return "n/a"
    return f"{value:.5f}" if name in COCO_METRICS else f"{value:.3f}"
