"""Making one sample: decode the image, draw the augmentation, cut out the region it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pnfs.config import AugmentConfig, EvalProfile
from pnfs.data.batch import Sample
from pnfs.data.cropcache import CropCache
from pnfs.data.images import ImageFile
from pnfs.data.records import PeopleDataset
from pnfs.data.transforms import (
    REDUCTIONS,
    Augmentation,
    Region,
    apply_affine,
    compose,
    crop_limits,
    crop_matrix,
    half_body,
    invert_affine,
    joint_weights,
    mirror_matrix,
    person_center_scale,
    reduced_affine,
    sample_augmentation,
)
from pnfs.errors import PnfsError
from pnfs.skeleton import Skeleton


@dataclass(frozen=True, eq=False)
class SampleMaker:
    """What workers need to make samples, as arrays: cheap to send to another process.

    Attributes:
        paths: N image files. keypoints: float32 (N, K, 3). centers, scales: float64 (N, 2).
        size: (H, W) of the network's input.
        augment: None for evaluation.
        seed: of the augmentation; sample `index` of `epoch` looks the same whoever makes it.
        cache: of decoded pixels; samples are the same with and without.
        reduced: whether JPEGs are decoded at a fraction of their size where that leaves a pixel or
            more for each pixel of the input under every augmentation.
    """

    paths: tuple[str, ...]
    keypoints: np.ndarray
    centers: np.ndarray
    scales: np.ndarray
    skeleton: Skeleton
    size: tuple[int, int]
    profile: EvalProfile
    augment: AugmentConfig | None
    seed: int
    cache: CropCache | None = None
    reduced: bool = False

    @classmethod
    def of(
        cls,
        dataset: PeopleDataset,
        size: tuple[int, int],
        profile: EvalProfile,
        augment: AugmentConfig | None,
        seed: int,
        *,
        cache: CropCache | None = None,
        reduced: bool = False,
    ) -> SampleMaker:
        aspect = size[1] / size[0]
        crops = [person_center_scale(person, aspect, profile) for person in dataset.people]
        return cls(
            paths=tuple(str(person.image_path) for person in dataset.people),
            keypoints=np.stack([person.keypoints for person in dataset.people]),
            centers=np.stack([center for center, _ in crops]),
            scales=np.stack([scale for _, scale in crops]),
            skeleton=dataset.skeleton,
            size=size,
            profile=profile,
            augment=augment,
            seed=seed,
            cache=cache,
            reduced=reduced,
        )

    def __len__(self) -> int:
        return len(self.paths)

    def make(self, index: int, epoch: int) -> Sample:
        """Sample `index` as it looks in `epoch`.

        Raises:
            PnfsError: the image is missing or damaged, or the crop misses it.
        """
        keypoints = self.keypoints[index]
        matrix, flip = self._crop(index, epoch)
        inverse = invert_affine(matrix)
        cut = self._cut(index, inverse)
        if cut is None:
            height, width = ImageFile(self.paths[index]).size
            center = np.round(self.centers[index], 1).tolist()
            raise PnfsError(
                f"{self.paths[index]}: the box around {center} lies outside the "
                f"{width}x{height} image; correct the annotation"
            )
        crop, to_crop = cut
        joints = apply_affine(matrix, keypoints[:, :2])
        flags, to_image = keypoints[:, 2], inverse
        if flip:
            mirror = mirror_matrix(self.size[1])
            order = list(self.skeleton.flip_permutation)
            joints, flags = apply_affine(mirror, joints)[order], flags[order]
            to_image = compose(inverse, mirror)
        weights = joint_weights(joints, flags, self.size)
        return Sample(
            crop=crop,
            matrix=to_crop,
            flip=flip,
            joints=np.where(weights[:, None] > 0, joints, 0),
            weights=weights,
            to_image=to_image,
            index=index,
        )

    def _cut(self, index: int, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """`cut_out` of the person's image, which is decoded only if the cache lacks the person, and
        whole only to be stored there."""
        path, key, reduction = self.paths[index], None, 1
        if self.cache is not None or self.reduced:
            region, reduction = self._limits(index)
        if self.cache is not None and (key := self.cache.key(path, region, reduction)):
            entry = self.cache.find(key)
            if entry is not None:
                with entry:
                    place = entry.place
                    warp = reduced_affine(inverse, place.reduction)
                    image_size = place.image_height, place.image_width
                    touched = touched_region(warp, self.size, image_size)
                    if touched is None:
                        return None
                    crop = entry.read(touched)
                if crop is not None:
                    return crop, _shifted(warp, touched)
        file = ImageFile(path, reduction)
        if self.cache is not None and key:
            self.cache.store(key, file.whole(), region, file.reduction)
        warp = reduced_affine(inverse, file.reduction)
        touched = touched_region(warp, self.size, file.size)
        return None if touched is None else (file.region(touched), _shifted(warp, touched))

    def _limits(self, index: int) -> tuple[Region, int]:
        """Where all crops of a person lie, and by how much its image may be reduced."""
        crops = [(self.centers[index], self.scales[index])]
        if self.augment is not None and self.augment.half_body_probability > 0:
            crops += filter(None, (self._half_body(index, half) for half in ("upper", "lower")))
        limits = [
            crop_limits(center, scale, self.size, self.augment, self.profile)
            for center, scale in crops
        ]
        lefts, tops, rights, bottoms = zip(*(region for region, _ in limits), strict=True)
        step = min(step for _, step in limits)
        fitting = (r for r in REDUCTIONS if self.reduced and r <= step)
        return (min(lefts), min(tops), max(rights), max(bottoms)), next(fitting, 1)

    def _half_body(self, index: int, first: str) -> tuple[np.ndarray, np.ndarray] | None:
        assert self.augment is not None
        aspect, least = self.size[1] / self.size[0], self.augment.half_body_min_keypoints
        return half_body(self.keypoints[index], self.skeleton, aspect, first, least)

    def _crop(self, index: int, epoch: int) -> tuple[np.ndarray, bool]:
        """The affine image pixel -> network-input pixel without mirroring; whether to mirror."""
        center, scale, drawn = self.centers[index], self.scales[index], Augmentation()
        if self.augment is not None:
            generator = np.random.default_rng([self.seed, epoch, index])
            drawn = sample_augmentation(generator, self.augment, self.profile)
            if drawn.half_body is not None:
                half = self._half_body(index, drawn.half_body)
                center, scale = half if half is not None else (center, scale)
        return crop_matrix(center, scale * drawn.factor, drawn.rotation, self.size), drawn.flip


def cut_out(
    image: np.ndarray, inverse: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The region of an image that a warp reads, and the warp in that region's pixels.

    Args:
        image: uint8 (h, w, 3).
        inverse: (2, 3), network-input pixel -> image pixel.
        size: (H, W) of the input.

    Returns:
        A view of the image, and (2, 3) network-input pixel -> pixel of the view; None if the warp
        reads nothing of the image.
    """
    region = touched_region(inverse, size, image.shape[:2])
    if region is None:
        return None
    left, top, right, bottom = region
    return image[top:bottom, left:right], _shifted(inverse, region)


def _shifted(inverse: np.ndarray, region: Region) -> np.ndarray:
    """An affine to image pixels as one to the pixels of a region."""
    return inverse - np.array([[0, 0, region[0]], [0, 0, region[1]]])


def touched_region(
    inverse: np.ndarray, size: tuple[int, int], image_size: tuple[int, int]
) -> Region | None:
    """Left, top, right, bottom (exclusive) of the image region that a bilinear warp reads.

    Args:
        inverse: (2, 3), network-input pixel -> image pixel.
        size: (H, W) of the input; image_size: (height, width) of the image.

    Returns:
        None if the warp reads nothing of the image. One pixel more on each side allows for the
        rounding of the matrices to float32.
    """
    height, width = size
    lows, highs = [], []
    for (a, b, c), limit in zip(inverse.tolist(), image_size[::-1], strict=True):
        over, down = a * (width - 1), b * (height - 1)
        if not math.isfinite(c + abs(over) + abs(down)):
            return None
        low = math.floor(c + min(over, 0) + min(down, 0)) - 1
        high = math.floor(c + max(over, 0) + max(down, 0)) + 3  # second tap, extra pixel, exclusive
        lows.append(max(low, 0))
        highs.append(min(high, limit))
    (left, top), (right, bottom) = lows, highs
    return (left, top, right, bottom) if left < right and top < bottom else None
