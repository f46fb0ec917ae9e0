"""Images and boxes in, poses out: a trained model as one object.

Shapes: K keypoints, n boxes of one image. Coordinates are pixels of the image given, integer
coordinates at pixel centres.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from pnfs.checkpoint import find_weights, load_model, read_metadata
from pnfs.config import EvalConfig, EvalProfile, ModelConfig, Precision
from pnfs.data.batch import Sample, collate
from pnfs.data.images import read_image
from pnfs.data.samples import cut_out
from pnfs.data.transforms import box_to_center_scale, crop_matrix, invert_affine
from pnfs.decode import predict_batch
from pnfs.errors import PnfsError, did_you_mean
from pnfs.evaluation import rescore
from pnfs.folding import for_evaluation
from pnfs.runtime import select_device

ImageLike = str | Path | np.ndarray


@dataclass(frozen=True, eq=False)
class Pose:
    """One person.

    Attributes:
        xy: (K, 2) float32, x and y in image pixels, keypoints in the skeleton's order.
        confidence: (K,) float32, the peak of each score map.
        score: of the whole pose: the box's score × mean of the confidences above 0.2 (the run's
            `eval.visible_threshold`).
        box: (4,) float32 x0, y0, x1, y1 as given, in image pixels.
    """

    xy: np.ndarray
    confidence: np.ndarray
    score: float
    box: np.ndarray


class PoseEstimator:
    """Estimates the pose in every box of every image.

    Args:
        model: a run folder, a `.safetensors` file of this package, or a model with a `config`
            (then it is put into eval mode and stays where it is unless `device` says otherwise;
            poses are those of its weights as they are now).
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
        precision: of the model's arithmetic: `fp32`, `bf16` or `fp16`. On a CPU bf16 rounds the
            operands of products where the processor multiplies these faster, else it is fp32.
        flip: average with the mirrored image: twice the work, a little more accurate. Default: as
            the run was evaluated (`eval.flip`), on for a bare model.
        profile: `standard` or `posenfs` (colours, crop and decoding of published PNFS
            checkpoints). Default: the run's `eval.profile`, `standard` for a bare model.
        batch_size: crops per forward pass, across images.

    Raises:
        PnfsError: no such run, a damaged file, a GPU that is not there.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        device: str = "auto",
        *,
        precision: Precision = "fp32",
        flip: bool | None = None,
        profile: EvalProfile | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise PnfsError(f"batch_size: {batch_size} must be at least 1")
        _check_choice("precision", precision, get_args(Precision))
        if profile is not None:
            _check_choice("profile", profile, get_args(EvalProfile))
        settings = EvalConfig()
        if isinstance(model, nn.Module):
            first = next(model.parameters(), None)
            here = torch.device("cpu") if first is None else first.device
            self.device = here if device == "auto" else select_device(device)
            self.model = model.to(self.device).eval()
        else:
            self.device = select_device(device)
            settings = read_metadata(find_weights(model))[0].eval
            self.model = load_model(model, self.device)
        config = getattr(self.model, "config", None)
        if not isinstance(config, ModelConfig):
            raise PnfsError(
                f"model: {type(self.model).__name__} has no `config`; build it with "
                "pnfs.build_model or load it with pnfs.load_model"
            )
        self.config = config
        self.skeleton = config.skeleton_table
        self.precision = precision
        self._scores = for_evaluation(self.model, self.device, precision)
        self.flip = settings.flip if flip is None else flip
        self.profile: EvalProfile = settings.profile if profile is None else profile
        self.visible_threshold = settings.visible_threshold
        self.batch_size = batch_size

    def __call__(
        self,
        images: Sequence[ImageLike],
        boxes: Sequence[Any] | None = None,
        *,
        color: Literal["rgb", "bgr"] = "rgb",
    ) -> list[list[Pose]]:
        """Poses of all boxes of all images.

        Args:
            images: paths, or uint8 arrays (height, width, 3). Files are turned as their EXIF
                orientation says: coordinates are those of the picture that viewers show.
            boxes: per image (n, 4) x0, y0, x1, y1 in its pixels, or (n, 5) with a score, or None
                for one box around the whole image; None for that in every image.
            color: channel order of the arrays; `bgr` for what OpenCV reads.

        Returns:
            Per image a list with one pose per box, in the boxes' order; no boxes, no poses.

        Raises:
            PnfsError: an image that cannot be read or is no such array; a box that is NaN, has no
                area or lies outside its image (the message names image and box).
        """
        if isinstance(images, str | Path | np.ndarray):
            raise PnfsError(
                "images: give a list of images; for one image write estimator([image], [boxes])"
            )
        _check_choice("color", color, ("rgb", "bgr"))
        if boxes is not None and len(boxes) != len(images):
            raise PnfsError(
                f"boxes: {len(boxes)} entries for {len(images)} images; give one (n, 4) per image"
            )
        poses: list[list[Pose]] = [[] for _ in images]
        pending: list[tuple[int, np.ndarray, Sample]] = []
        for number, image in enumerate(images):
            wanted = None if boxes is None else boxes[number]
            for box, sample in self._samples(image, wanted, number, color):
                pending.append((number, box, sample))
                if len(pending) == self.batch_size:
                    self._run(pending, poses)
                    pending = []
        if pending:
            self._run(pending, poses)
        return poses

    def _samples(
        self, image: ImageLike, boxes: Any, number: int, color: str
    ) -> Iterator[tuple[np.ndarray, Sample]]:
        """One (box with score, crop) per box of an image."""
        if isinstance(image, np.ndarray):
            where = f"image {number}"
            _check_array(image, where)
            pixels = image if color == "bgr" else image[..., ::-1]
        else:
            where = f"image {number} ({image})"
            pixels = read_image(image, apply_exif=True)
        height, width = pixels.shape[:2]
        size = self.config.input_size
        nothing = np.zeros((self.skeleton.num_keypoints, 2))
        for index, box in enumerate(check_boxes(boxes, (height, width), where)):
            x0, y0, x1, y1 = box[:4].tolist()
            xywh = np.array([x0, y0, x1 - x0, y1 - y0])
            center, scale = box_to_center_scale(xywh, size[1] / size[0], self.profile)
            to_image = invert_affine(crop_matrix(center, scale, 0.0, size))
            cut = cut_out(pixels, to_image, size)
            if cut is None:  # the profile's rounding moved a box at the border out of the image
                raise _outside(where, index, box, (height, width))
            crop, matrix = cut
            yield (
                box,
                Sample(
                    crop=crop,
                    matrix=matrix,
                    flip=False,
                    joints=nothing,
                    weights=nothing[:, 0],
                    to_image=to_image,
                    index=number,
                ),
            )

    def _run(
        self, pending: Sequence[tuple[int, np.ndarray, Sample]], poses: list[list[Pose]]
    ) -> None:
        """Estimate one batch of crops and append the poses to those of their images."""
        batch = collate([sample for _, _, sample in pending], self.skeleton.num_keypoints)
        xy, confidence = predict_batch(
            self._scores,
            batch.to(self.device),
            size=self.config.input_size,
            skeleton=self.skeleton,
            profile=self.profile,
            flip=self.flip,
            precision=self.precision,
        )
        found_xy, found = xy.cpu().numpy(), confidence.cpu().numpy()
        scores = rescore(found, np.array([box[4] for _, box, _ in pending]), self.visible_threshold)
        for row, (number, box, _) in enumerate(pending):
            pose = Pose(found_xy[row], found[row], float(scores[row]), box[:4].astype(np.float32))
            poses[number].append(pose)


def check_boxes(boxes: Any, image_size: tuple[int, int], where: str) -> np.ndarray:
    """Boxes of one image as float64 (n, 5): x0, y0, x1, y1, score.

    Args:
        boxes: (n, 4), (n, 5) with a score, or None for the whole image.
        image_size: (height, width) in pixels.
        where: what errors call the image.

    Raises:
        PnfsError: another shape; a box that is not finite, has no area or misses the image.
    """
    height, width = image_size
    if boxes is None:
        return np.array([[0.0, 0.0, width, height, 1.0]])
    try:
        array = np.asarray(boxes, np.float64)
    except (TypeError, ValueError):
        raise PnfsError(f"{where}: boxes are not numbers; give (n, 4) x0, y0, x1, y1") from None
    if array.size == 0:
        return np.zeros((0, 5))
    if array.ndim != 2 or array.shape[1] not in (4, 5):
        raise PnfsError(
            f"{where}: boxes have shape {array.shape}; give (n, 4) x0, y0, x1, y1 in pixels"
        )
    if array.shape[1] == 4:
        array = np.column_stack([array, np.ones(len(array))])
    for index, box in enumerate(array):
        x0, y0, x1, y1, _ = box.tolist()
        if not np.isfinite(box).all():
            raise PnfsError(
                f"{where}, box {index}: {_numbers(box)} holds NaN or infinity; correct or remove it"
            )
        if x1 <= x0 or y1 <= y0:
            raise PnfsError(
                f"{where}, box {index}: {_numbers(box)} has no area; "
                "boxes are x0, y0, x1, y1 with x1 > x0 and y1 > y0"
            )
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            raise _outside(where, index, box, image_size)
    return array


def _outside(where: str, index: int, box: np.ndarray, image_size: tuple[int, int]) -> PnfsError:
    return PnfsError(
        f"{where}, box {index}: {_numbers(box)} lies outside the "
        f"{image_size[1]}x{image_size[0]} image; correct or remove it"
    )


def _numbers(box: np.ndarray) -> list[float]:
    return [round(side, 2) for side in box[:4].tolist()]


def _check_array(image: np.ndarray, where: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise PnfsError(
            f"{where}: {image.dtype} array of shape {image.shape}; "
            "give uint8 (height, width, 3), or the file's path"
        )


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise PnfsError(f"{name}: '{value}' is unknown; use {' or '.join(allowed)}{hint}")
