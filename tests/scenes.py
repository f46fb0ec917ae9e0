"""Pictures of squares and models that find them: poses that are right without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pnfs.config import Config, ModelConfig, load_config
from pnfs.data.transforms import MEAN, STD
from pnfs.skeleton import COCO, Skeleton


class Pointer(nn.Module):
    """Stands in for a trained model: it sees markers of K brightnesses and scores them highly.

    Score map k is high where the network's input has grey level 8 · (k + 1) all around, so
    whatever evaluation does to the image (crop, mirror, colours) it must undo to score well.
    """

    def __init__(self, keypoints: int, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("levels", 8.0 * torch.arange(1, keypoints + 1))
        self.modes: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        grey = 255 * (images[:, 1:2] * STD[1] + MEAN[1])
        near = torch.exp(-((grey - self.levels.view(1, -1, 1, 1)) ** 2) / 4)
        smooth = F.avg_pool2d(near, 9, stride=1, padding=4)  # a peak in the middle of a square
        return F.avg_pool2d(smooth, 12, stride=4, padding=4)


class UnflipPointer(Pointer):
    """Sees left joints where a mirrored image shows right ones, as a trained model does: it is told
    by the column order of the squares' levels whether the image is mirrored."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = super().forward(images)
        columns = torch.arange(scores.shape[3], dtype=scores.dtype)
        centre = (scores.sum(2) * columns).sum(2) / scores.sum((2, 3)).clamp(min=1e-6)
        mirrored = centre[:, 0] > centre[:, 3]  # joints 0 and 3: first and last of the top row
        swapped = scores[:, list(COCO.flip_permutation)]
        return torch.where(mirrored.view(-1, 1, 1, 1), swapped, scores)


def draw_scene(skeleton: Skeleton, number: int, people: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A picture (240, 500, 3) of people as grids of marked squares, and joints (people, K, 2)."""
    picture = np.zeros((240, 500, 3), np.uint8)
    joints = np.zeros((people, skeleton.num_keypoints, 2), int)
    for column in range(people):
        for k in range(skeleton.num_keypoints):
            x, y = 40 + 250 * column + 42 * (k % 4), 40 + 5 * number + 36 * (k // 4)
            picture[y - 8 : y + 9, x - 8 : x + 9] = 8 * (k + 1)
            joints[column, k] = x, y
    return picture, joints


def person_box(joints: np.ndarray) -> list[int]:
    """x, y, width, height around the squares of one person."""
    (x, y), (right, bottom) = (joints.min(0) - 20).tolist(), (joints.max(0) + 24).tolist()
    return [x, y, right - x, bottom - y]


def write_scene(root: Path, skeleton: Skeleton, images: int = 3) -> list[dict[str, Any]]:
    """A dataset of such pictures in COCO's layout, two people in each; returns the annotations."""
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    annotations: list[dict[str, Any]] = []
    entries = []
    for number in range(1, images + 1):
        picture, people = draw_scene(skeleton, number)
        for joints in people:
            box = person_box(joints)
            keypoints = np.column_stack([joints, np.full(len(joints), 2)])
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                "num_keypoints": len(joints), "keypoints": keypoints.ravel().tolist(),
                "bbox": box, "area": box[2] * box[3] * 0.6,
            })  # fmt: skip
        cv2.imwrite(str(root / "val2017" / f"{number}.png"), picture)
        entries.append({"id": number, "file_name": f"{number}.png", "height": 240, "width": 500})
    tree = {
        "images": entries, "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "keypoints": list(skeleton.keypoints)}],
    }  # fmt: skip
    (root / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(tree))
    return annotations


def scene_config(root: Path, *overrides: str) -> Config:
    return load_config(
        "tiny",
        ["data.dataset=coco", f"data.root={root}", "data.workers=0", "model.input_size=[256,192]",
         "eval.batch_size=4", *overrides],
    )  # fmt: skip
