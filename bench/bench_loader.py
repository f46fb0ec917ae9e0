"""Training samples from JPEG files to the network's input on one core, beside the customary loader.

The customary way is that of HRNet's code: read the whole image, turn its colours, mirror it, warp
it to the input's size, convert and normalise it, and draw a heatmap of each joint. Ours leaves
heatmaps to the loss, which never builds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from pnfs.config import Config, parse_config
from pnfs.data import Batch, PeopleDataset, load_people, make_loader
from pnfs.data.samples import SampleMaker
from pnfs.data.transforms import MEAN, STD, apply_affine, compose, mirror_matrix
from pnfs.skeleton import COCO

SIZE, SIGMA, BATCH = (256, 192), 2, 24
PHOTOS = {"640x480": (480, 640), "1280x960": (960, 1280)}
FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


def config(root: Path, photo: str, **data: Any) -> Config:
    drawn = {"train_images": 24, "val_images": 1, "image_size": PHOTOS[photo]}
    folder = str(root / photo)
    return parse_config({
        "model": {"input_size": SIZE},
        "data": {"root": folder, "workers": 0, "synthetic": drawn, "sigma": SIGMA, **data},
        "train": {"batch_size": BATCH},
    })  # fmt: skip


def heatmaps(joints: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A Gaussian of 13 × 13 score-map pixels around each counted joint, (K, H/4, W/4)."""
    height, width, reach = SIZE[0] // 4, SIZE[1] // 4, 3 * SIGMA
    target = np.zeros((len(joints), height, width), np.float32)
    for k in range(len(joints)):
        x, y = (int(joints[k, axis] / 4 + 0.5) for axis in (0, 1))
        left, top, right, bottom = x - reach, y - reach, x + reach + 1, y + reach + 1
        if weights[k] <= 0 or left >= width or top >= height or right < 0 or bottom < 0:
            continue
        place = np.arange(0, 2 * reach + 1, 1, np.float32)
        patch = np.exp(-((place - reach) ** 2 + (place[:, None] - reach) ** 2) / (2 * SIGMA**2))
        rows = slice(max(0, -top), min(bottom, height) - top)
        columns = slice(max(0, -left), min(right, width) - left)
        target[k, max(0, top) : min(bottom, height), max(0, left) : min(right, width)] = patch[
            rows, columns
        ]
    return target


class Customary:
    """The samples of one of our batches, with the same augmentation."""

    def __init__(self, people: PeopleDataset, settings: Config, indices: list[int]) -> None:
        self.people, self.indices = people, indices
        self.maker = SampleMaker.of(people, SIZE, "standard", settings.data.augment, 0)
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def sample(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        person = self.people.people[index]
        image = cv2.cvtColor(cv2.imread(str(person.image_path), FLAGS), cv2.COLOR_BGR2RGB)
        matrix, flip = self.maker._crop(index, 0)
        joints, flags = person.keypoints[:, :2].copy(), person.keypoints[:, 2]
        if flip:
            width = image.shape[1]
            image = image[:, ::-1, :]
            order = list(COCO.flip_permutation)
            joints[:, 0] = width - joints[:, 0] - 1
            joints, flags = joints[order], flags[order]
            matrix = compose(mirror_matrix(SIZE[1]), compose(matrix, mirror_matrix(width)))
        warped = cv2.warpAffine(image, matrix, SIZE[::-1], flags=cv2.INTER_LINEAR)
        pixels = torch.from_numpy(warped.transpose(2, 0, 1)).contiguous().float().div(255)
        pixels = pixels.sub_(self.mean).div_(self.std)
        for k in range(len(joints)):
            if flags[k] > 0:
                joints[k] = apply_affine(matrix, joints[k])
        weights = (flags > 0).astype(np.float32)
        return pixels, torch.from_numpy(heatmaps(joints, weights)), torch.from_numpy(weights)

    def __call__(self) -> Tensor:
        samples = [self.sample(index) for index in self.indices]
        images, _, _ = (torch.stack(list(column)) for column in zip(*samples, strict=True))
        return images


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("way", ["decoded", "decoded at reduced scale", "cached"])
def bench_loader(measure: Any, root: Path, way: str, photo: str) -> None:
    chosen = {
        "decoded": {},
        "decoded at reduced scale": {"reduced_decode": True},
        "cached": {"cache": str(root / f"cache-{photo}")},
    }[way]
    settings = config(root, photo, **chosen)
    people = load_people(settings.data, COCO, "train")
    loader = make_loader(people, settings, train=True)

    def batch() -> Batch:
        loader.seek(0)
        return next(iter(loader))

    first = batch()
    measure(
        harness.Case(
            op="training samples",
            name=f"{BATCH} people of {photo} JPEGs, one core, {way}",
            backend="auto",
            device="cpu",
            call=lambda: batch().images(size=SIZE),
            want=harness.on_backend(
                "torch", lambda: batch().images(size=SIZE, dtype=torch.float64)
            )(),
            tolerance=2e-6,
            bytes=first.pixels.nbytes + BATCH * 3 * SIZE[0] * SIZE[1] * 4,
            images=BATCH,
            against={"customary": Customary(people, settings, first.indices.tolist())},
            # cv2's weights are multiples of 1/32; one pixel in a hundred is then some levels off.
            tolerance_against=0.02,
            approximate=("customary",) if settings.data.reduced_decode else (),
        )
    )
