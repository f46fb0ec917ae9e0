"""Where a person's crop lies: boxes, the affine to the network's input, augmentation.

Three pixel grids, all with integer coordinates at pixel centres: the stored image, the network's
input (H, W), and its score map (a quarter of that). A crop is described by the centre of a region
of the image and its `scale`, the region's (width, height) in units of 200 px, as HRNet writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pnfs.config import AugmentConfig, EvalProfile
from pnfs.data.records import Person
from pnfs.skeleton import Skeleton

PIXEL_STD = 200.0
PADDING = 1.25
Region = tuple[int, int, int, int]  # left, top, right, bottom (exclusive) in pixels
REDUCTIONS = (8, 4, 2)  # of JPEG decoders, the coarsest first
_GROWTH = 5.0  # px around the labelled joints, profile `posenfs`
_HALF_BODY_PADDING = 1.5

# ImageNet's, in the order red, green, blue. Profile `posenfs` applies them in this order to
# blue-green-red images, as the published checkpoints were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def box_to_center_scale(
    box: np.ndarray, aspect: float, profile: EvalProfile
) -> tuple[np.ndarray, np.ndarray]:
    """Centre (2,) in image pixels and scale (2,) of the crop around a detected or user-given box.

    The box is enlarged to `aspect` (width / height of the network's input) and padded by 1.25.

    Args:
        box: (4,) x, y, width, height in image pixels, with an area.
        profile: `posenfs` first truncates x, y, width + 1 and height + 1 to whole pixels.
    """
    if profile == "posenfs":
        box = np.trunc(np.asarray(box, np.float64)) + (0, 0, 1, 1)
    return _center_scale(box, aspect)


def person_center_scale(
    person: Person, aspect: float, profile: EvalProfile
) -> tuple[np.ndarray, np.ndarray]:
    """`box_to_center_scale` with the profile's rule for annotated boxes.

    `standard` clips the box to the image as HRNet does (last pixel included); `posenfs` grows it to
    hold the labelled joints and 5 px more, within the image, in whole pixels. Neither applies where
    the annotation file does not state the image's size (MPII).
    """
    if person.annotation_id < 0:
        return box_to_center_scale(person.box, aspect, profile)
    if person.image_size is None:
        return _center_scale(person.box, aspect)
    limit = np.array(person.image_size[::-1], np.float64)
    low, high = person.box[:2], person.box[:2] + person.box[2:]
    joints = person.keypoints[person.keypoints[:, 2] > 0, :2].astype(np.float64)
    if profile == "standard":
        low, high = (
            np.maximum(low, 0),
            np.minimum(limit - 1, np.maximum(low, 0) + person.box[2:] - 1),
        )
    elif len(joints):
        low = np.maximum(np.trunc(np.minimum(low, joints.min(0)) - _GROWTH), 0)
        high = np.minimum(np.trunc(np.maximum(high, joints.max(0)) + _GROWTH), limit)
    if (high <= low).any():  # clipping emptied a sliver of a box; its crop must have an area
        return _center_scale(person.box, aspect)
    return _center_scale(np.concatenate([low, high - low]), aspect)


def _center_scale(box: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    x, y, width, height = np.asarray(box, np.float64).tolist()
    return np.array([x + width / 2, y + height / 2]), _enlarge(width, height, aspect) * PADDING


def _enlarge(width: float, height: float, aspect: float) -> np.ndarray:
    """The smallest region of this aspect around width × height pixels, as a scale."""
    return np.array([max(width, height * aspect), max(height, width / aspect)]) / PIXEL_STD


def crop_matrix(
    center: np.ndarray, scale: np.ndarray, rotation: float, size: tuple[int, int]
) -> np.ndarray:
    """The affine from image pixels to network-input pixels, float64 (2, 3).

    The centre goes to (W/2, H/2), scale[0] · 200 image pixels become W.

    Args:
        center: (2,) x, y in image pixels.
        scale: (2,) extent of the region / 200 px.
        rotation: degrees; positive turns the content counter-clockwise as seen.
        size: (H, W) of the network's input.
    """
    height, width = size
    zoom = width / (scale[0] * PIXEL_STD)
    angle = np.deg2rad(rotation)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    linear = np.array([[cos, sin], [-sin, cos]])
    shift = np.array([width / 2, height / 2]) - linear @ np.asarray(center, np.float64)
    return np.concatenate([linear, shift[:, None]], axis=1)


def crop_limits(
    center: np.ndarray,
    scale: np.ndarray,
    size: tuple[int, int],
    augment: AugmentConfig | None,
    profile: EvalProfile,
) -> tuple[Region, float]:
    """What the crops of one centre and scale can reach under every augmentation.

    Args:
        center, scale, size: as for `crop_matrix`.
        augment: None for none.

    Returns:
        The image pixels between which all corners of the crops lie, which may be beyond the image;
        and the image pixels from one network-input pixel to the next in the closest crop.
    """
    smallest, largest, rotation = 1.0, 1.0, 0.0
    if augment is not None:
        smallest, largest = 1 - augment.scale, 1 + augment.scale
        if profile == "posenfs":
            smallest, largest = 1 / largest, 1 / smallest
        if augment.rotation_probability > 0:
            rotation = np.deg2rad(min(2 * augment.rotation, 90.0))
    height, width = size
    step = float(scale[0]) * PIXEL_STD / width
    x, y = step * largest * width / 2, step * largest * height / 2
    # a cos + b sin grows until the angle whose tangent is b / a.
    reach = np.array([
        a * np.cos(angle) + b * np.sin(angle)
        for a, b in ((x, y), (y, x))
        for angle in (min(rotation, np.arctan2(b, a)),)
    ])  # fmt: skip
    left, top = np.floor(center - reach).astype(int).tolist()
    right, bottom = np.ceil(center + reach).astype(int).tolist()
    return (left, top, right, bottom), step * smallest


def reduced_affine(inverse: np.ndarray, reduction: int) -> np.ndarray:
    """Network-input pixel -> pixel of the reduced image, from (2, 3) -> pixel of the whole image.

    Pixel i of the reduced image is the mean of pixels r·i … r·i + r - 1, so its centre lies at
    r·i + (r - 1)/2.
    """
    shift = np.array([[0, 0, (reduction - 1) / 2]] * 2)
    return (inverse - shift) / reduction


def invert_affine(matrix: np.ndarray) -> np.ndarray:
    """The inverse of affines (..., 2, 3), float64 of the same shape."""
    linear = np.linalg.inv(matrix[..., :2].astype(np.float64))
    return np.concatenate([linear, -linear @ matrix[..., 2:]], axis=-1)


def apply_affine(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points (..., 2) moved by an affine (2, 3); float64."""
    return np.asarray(xy, np.float64) @ matrix[:, :2].T + matrix[:, 2]


def mirror_matrix(width: int) -> np.ndarray:
    """The affine x -> width - 1 - x, float64 (2, 3)."""
    return np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0]])


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The affine (2, 3) that applies `inner`, then `outer`."""
    return np.concatenate(
        [outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2:] + outer[:, 2:]], axis=1
    )


def joint_weights(joints: np.ndarray, visibility: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which joints the loss counts: labelled (hidden or not) and strictly inside the input.

    Args:
        joints: (K, 2) in network-input pixels; visibility: (K,) 0, 1 or 2; size: (H, W).

    Returns:
        float32 (K,), 0 or 1.
    """
    limit = np.array([size[1] - 1, size[0] - 1])
    inside = ((joints > 0) & (joints < limit)).all(axis=1)
    return (inside & (visibility > 0)).astype(np.float32)


@dataclass(frozen=True)
class Augmentation:
    """One draw. `factor` multiplies the crop's extent; `rotation` is in degrees."""

    factor: float = 1.0
    rotation: float = 0.0
    flip: bool = False
    half_body: str | None = None  # which half to try first: upper, lower, or neither


def sample_augmentation(
    generator: np.random.Generator, config: AugmentConfig, profile: EvalProfile
) -> Augmentation:
    """Draw an augmentation; the number of draws does not depend on the settings.

    The scale factor is clip(N(1, s), 1 - s, 1 + s): it multiplies the crop's extent in `standard`
    (HRNet) and the person's size in `posenfs`. Rotation is clip(N(0, r), ±2r) in some samples.
    """
    normal, uniform = generator.standard_normal(2), generator.random(4)
    scale = config.scale
    factor = min(max(1 + scale * float(normal[0]), 1 - scale), 1 + scale)
    limit = 2 * config.rotation
    rotation = min(max(config.rotation * float(normal[1]), -limit), limit)
    half = (
        ("upper" if uniform[3] < 0.5 else "lower")
        if uniform[2] < config.half_body_probability
        else None
    )
    return Augmentation(
        factor=factor if profile == "standard" else 1 / factor,
        rotation=rotation if uniform[0] < config.rotation_probability else 0.0,
        flip=bool(uniform[1] < config.flip_probability),
        half_body=half,
    )


def half_body(
    keypoints: np.ndarray, skeleton: Skeleton, aspect: float, first: str, min_keypoints: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Centre and scale of a crop around the upper or the lower body alone (HRNet's augmentation).

    Args:
        keypoints: (K, 3) in image pixels.
        first: the half to take if more than two of its joints are labelled, else the other one.
        min_keypoints: labelled joints that the whole person must have.

    Returns:
        None where there are too few joints: the whole body stays.
    """
    labelled = keypoints[:, 2] > 0
    if labelled.sum() < min_keypoints:
        return None
    upper = np.zeros(len(keypoints), bool)
    upper[list(skeleton.upper_body)] = True
    halves = {"upper": keypoints[labelled & upper, :2], "lower": keypoints[labelled & ~upper, :2]}
    joints = (
        halves[first]
        if len(halves[first]) > 2
        else halves[{"upper": "lower", "lower": "upper"}[first]]
    )
    if len(joints) < 2:
        return None
    joints = joints.astype(np.float64)
    width, height = (joints.max(0) - joints.min(0)).tolist()
    # Joints on one spot or line still span a pixel: the crop must have an area.
    scale = _enlarge(max(width, 1.0), max(height, 1.0), aspect) * _HALF_BODY_PADDING
    return joints.mean(0), scale
