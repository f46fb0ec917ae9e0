"""Making one sample: decode the image, draw the augmentation, cut out the region it needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pnfs.config import AugmentConfig, EvalProfile
from pnfs.data.batch import Sample
from pnfs.data.images import read_image
from pnfs.data.records import PeopleDataset
from pnfs.data.transforms import (
    Augmentation,
    apply_affine,
    compose,
    crop_matrix,
    half_body,
    invert_affine,
    joint_weights,
    mirror_matrix,
    person_center_scale,
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

    @classmethod
    def of(
        cls,
        dataset: PeopleDataset,
        size: tuple[int, int],
        profile: EvalProfile,
        augment: AugmentConfig | None,
        seed: int,
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
        )

    def __len__(self) -> int:
        return len(self.paths)

    def make(self, index: int, epoch: int) -> Sample:
        """Sample `index` as it looks in `epoch`.

        Raises:
            PnfsError: the image is missing or damaged, or the crop misses it.
        """
        image = read_image(self.paths[index], apply_exif=False)
        keypoints = self.keypoints[index]
        matrix, flip = self._crop(index, epoch)
        inverse = invert_affine(matrix)
        cut = cut_out(image, inverse, self.size)
        if cut is None:
            center = np.round(self.centers[index], 1).tolist()
            raise PnfsError(
                f"{self.paths[index]}: the box around {center} lies outside the "
                f"{image.shape[1]}x{image.shape[0]} image; correct the annotation"
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

    def _crop(self, index: int, epoch: int) -> tuple[np.ndarray, bool]:
        """The affine image pixel -> network-input pixel without mirroring; whether to mirror."""
        center, scale, drawn = self.centers[index], self.scales[index], Augmentation()
        if self.augment is not None:
            generator = np.random.default_rng([self.seed, epoch, index])
            drawn = sample_augmentation(generator, self.augment, self.profile)
            if drawn.half_body is not None:
                half = half_body(
                    self.keypoints[index],
                    self.skeleton,
                    self.size[1] / self.size[0],
                    drawn.half_body,
                    self.augment.half_body_min_keypoints,
                )
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
    return image[top:bottom, left:right], inverse - np.array([[0, 0, left], [0, 0, top]])


def touched_region(
    inverse: np.ndarray, size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom (exclusive) of the image region that a bilinear warp reads.

    Args:
        inverse: (2, 3), network-input pixel -> image pixel.
        size: (H, W) of the input; image_size: (height, width) of the image.

    Returns:
        None if the warp reads nothing of the image. One pixel more on each side allows for the
        rounding of the matrices to float32.
    """
    height, width = size
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    reached = apply_affine(inverse, corners)
    low = np.floor(reached.min(0)) - 1
    high = np.floor(reached.max(0)) + 3  # the second tap, the extra pixel, and exclusive
    left, top = np.maximum(low, 0).astype(int).tolist()
    right, bottom = np.minimum(high, image_size[::-1]).astype(int).tolist()
    return (left, top, right, bottom) if left < right and top < bottom else None
