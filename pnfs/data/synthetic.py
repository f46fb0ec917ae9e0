"""A dataset of drawn people: JPEG files and COCO keypoint annotations, the same for the same seed.

Every image is drawn from its own random stream (seed, split, number of the image), so more images
leave the earlier ones as they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pnfs.config import SyntheticConfig
from pnfs.data.figure import CODES_PER_PERSON, Figure, draw_figure, sample_figure, visibility
from pnfs.data.records import read_json
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO
from pnfs.statefile import reason, write_atomically

_VERSION = 1  # of the drawing; part of the annotations, so that old datasets are not taken for new
_SPLITS = ("train", "val")
_JPEG_QUALITY = 92
_OCCLUDER = 255
_HEIGHTS = {1: (0.5, 0.8), 2: (0.42, 0.72)}  # of the image's height, by people in it
_CROWDED = (0.36, 0.6)
_MAX_OVERLAP = 0.12  # of the smaller person's box
_MIN_JOINTS = 6


@dataclass(frozen=True, eq=False)
class Scene:
    """One drawn image: uint8 (H, W, 3), blue-green-red, and its people."""

    image: np.ndarray
    keypoints: list[np.ndarray]  # int64 (17, 3) each
    boxes: list[list[int]]  # x, y, width, height of the painted pixels
    areas: list[int]  # painted pixels


def generate(root: str | Path, config: SyntheticConfig) -> None:
    """Render `images/{train,val}/*.jpg` and `annotations/person_keypoints_{train,val}.json`.

    The annotations are written last, by renaming a finished file, so an interrupted run is not
    taken for a dataset. A split that is already there is left alone. Several processes may do this
    at once: they write the same bytes.

    Raises:
        PnfsError: the folder holds a dataset of other settings, or cannot be written.
    """
    root = Path(root)
    if config.max_people * CODES_PER_PERSON + CODES_PER_PERSON > _OCCLUDER:
        raise PnfsError(f"data.synthetic.max_people: {config.max_people} is too many for one image")
    for split, count in zip(_SPLITS, (config.train_images, config.val_images), strict=True):
        path = root / "annotations" / f"person_keypoints_{split}.json"
        if not _is_complete(path, config, count):
            try:
                _generate_split(root, path, split, count, config)
            except OSError as error:
                raise PnfsError(
                    f"{error.filename or root}: cannot be written ({reason(error)}); "
                    "choose another data.root or free some space"
                ) from None


def _settings(config: SyntheticConfig, count: int) -> dict[str, Any]:
    size = list(config.image_size)
    return {
        "version": _VERSION,
        "images": count,
        "size": size,
        "max_people": config.max_people,
        "seed": config.seed,
    }


def _is_complete(path: Path, config: SyntheticConfig, count: int) -> bool:
    if not path.exists():
        return False
    tree = read_json(path, "synthetic annotation file")
    info = tree.get("info") if isinstance(tree, dict) else None
    found = info.get("pnfs_synthetic") if isinstance(info, dict) else None
    wanted = _settings(config, count)
    if found == wanted:
        return True
    if not isinstance(found, dict):
        raise PnfsError(
            f"{path}: is not a synthetic dataset; choose another data.root or data.dataset=coco"
        )
    key = next((key for key in wanted if found.get(key) != wanted[key]), "settings")
    raise PnfsError(
        f"{path}: was rendered with {key} {found.get(key)}, now {wanted.get(key)} is asked for; "
        "delete the folder or choose another data.root"
    )


def _generate_split(
    root: Path, path: Path, split: str, count: int, config: SyntheticConfig
) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = config.image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        generator = np.random.default_rng([config.seed, _SPLITS.index(split), number])
        scene = render_scene(generator, config.image_size, config.max_people)
        name, image_id = f"{number:06d}.jpg", number + 1
        encoded = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        part = folder / f".{name}.{os.getpid()}"  # another process may be reading the finished file
        part.write_bytes(encoded.tobytes())
        part.replace(folder / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for keypoints, box, area in zip(scene.keypoints, scene.boxes, scene.areas, strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0,
                "bbox": box, "area": area, "keypoints": keypoints.reshape(-1).tolist(),
                "num_keypoints": int((keypoints[:, 2] > 0).sum()),
            })  # fmt: skip
    limbs = [[first + 1, second + 1] for first, second in COCO.limbs]
    category = {"id": 1, "name": "person", "keypoints": list(COCO.keypoints), "skeleton": limbs}
    tree = {
        "info": {"description": "people drawn by pnfs", "pnfs_synthetic": _settings(config, count)},
        "categories": [{"supercategory": "person", **category}],
        "images": images,
        "annotations": annotations,
    }

    def write(part: Path) -> None:
        part.write_text(json.dumps(tree), encoding="utf-8")

    write_atomically(path, write)


def render_scene(generator: np.random.Generator, size: tuple[int, int], max_people: int) -> Scene:
    """Draw a background, 1 to `max_people` people from far to near, and sometimes things in front.

    Args:
        size: (height, width) in pixels.
    """
    image, labels = _background(generator, size), np.zeros(size, np.uint8)
    wanted = int(generator.integers(1, max_people + 1))
    placed = _place(generator, size, wanted)
    drawn = [
        draw_figure(image, labels, figure, height, origin, person)
        for person, (figure, height, origin) in enumerate(placed)
    ]
    if generator.random() < 0.25:
        _draw_occluder(generator, image, labels, drawn[int(generator.integers(len(drawn)))])
    image = _finish(generator, image)
    scene = Scene(image, [], [], [])
    for person, joints in enumerate(drawn):
        flags = visibility(labels, joints, person)
        painted = labels // CODES_PER_PERSON == person
        painted &= labels > 0  # the background has code 0, as person 0 would without a part
        painted &= labels != _OCCLUDER
        area = int(painted.sum())
        if (flags > 0).sum() < _MIN_JOINTS or not area:
            continue
        keypoints = np.concatenate([np.rint(joints), flags[:, None]], axis=1).astype(np.int64)
        keypoints[flags == 0] = 0
        scene.keypoints.append(keypoints)
        scene.boxes.append(list(cv2.boundingRect(painted.astype(np.uint8))))
        scene.areas.append(area)
    return scene


def _place(
    generator: np.random.Generator, size: tuple[int, int], wanted: int
) -> list[tuple[Figure, float, np.ndarray]]:
    """Figures with height and pelvis pixel, small (far) ones first; boxes hardly overlap."""
    placed: list[tuple[Figure, float, np.ndarray]] = []
    boxes: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(12 * wanted):
        figure = sample_figure(generator)
        height = generator.uniform(*_HEIGHTS.get(wanted, _CROWDED)) * size[0]
        low, high = (corner * height for corner in figure.extent())
        # A little of some people lies outside the image, all of the others inside.
        slack = 0.12 * height if generator.random() < 0.12 else 0.0
        first = -low - slack
        last = np.array([size[1], size[0]]) - high + slack
        if (first > last).any():
            continue
        origin = generator.uniform(first, last)
        box = (low + origin, high + origin)
        if all(_overlap(box, other) <= _MAX_OVERLAP for other in boxes):
            placed.append((figure, height, origin))
            boxes.append(box)
        if len(placed) == wanted:
            break
    if not placed:  # an image too small or flat for this pose: take what fits its middle
        height = 0.4 * min(size)
        placed.append((sample_figure(generator), height, np.array([size[1], size[0]]) / 2))
    return sorted(placed, key=lambda item: item[1])


def _overlap(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Shared area as a fraction of the smaller box."""
    shared = np.clip(
        np.minimum(first[1], second[1]) - np.maximum(first[0], second[0]), 0, None
    ).prod()
    return float(shared / min((first[1] - first[0]).prod(), (second[1] - second[0]).prod()))


def _color(generator: np.random.Generator) -> tuple[int, int, int]:
    blue, green, red = generator.integers(20, 236, 3).tolist()
    return blue, green, red


def _background(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A colour gradient under smooth noise, stripes, tiles or nothing, and some clutter."""
    height, width = size
    corners = generator.integers(30, 226, (2, 2, 3)).astype(np.float32)
    corners = (corners + corners.mean(axis=2, keepdims=True)) / 2  # duller than clothes
    canvas = cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)
    kind = int(generator.integers(4))
    if kind == 0:
        coarse = generator.normal(0, 20, (height // 24 + 2, width // 24 + 2, 3)).astype(np.float32)
        canvas = canvas + cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    elif kind == 1:
        angle, period = generator.uniform(0, np.pi), generator.uniform(14, 50)
        ys, xs = np.mgrid[:height, :width]
        wave = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * (2 * np.pi / period))
        canvas = canvas + generator.normal(0, 22, 3) * np.clip(4 * wave, -1, 1)[..., None]
    elif kind == 2:
        tile = int(generator.integers(20, 56))
        ys, xs = np.mgrid[:height, :width]
        canvas = canvas + generator.normal(0, 18, 3) * ((xs // tile + ys // tile) % 2)[..., None]
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    for _ in range(int(generator.integers(0, 9))):
        _draw_shape(generator, image, generator.uniform((0, 0), (width, height)), 0.16 * height)
    return image


def _draw_shape(
    generator: np.random.Generator, image: np.ndarray, center: np.ndarray, radius: float
) -> None:
    """A box, ball, polygon or pole of random colour."""
    color, kind = _color(generator), int(generator.integers(4))
    size = radius * generator.uniform(0.35, 1.0)
    middle = np.rint(center).astype(int).tolist()
    if kind == 0:
        cv2.circle(image, middle, round(size), color, -1, cv2.LINE_AA)
    elif kind == 1:
        box = cv2.boxPoints((center.tolist(), (2 * size, 1.4 * size), generator.uniform(0, 90)))
        cv2.fillConvexPoly(image, np.rint(box).astype(np.int32), color, cv2.LINE_AA)
    elif kind == 2:
        ring = np.sort(generator.uniform(0, 2 * np.pi, 6))
        points = center + size * np.stack([np.cos(ring), np.sin(ring)], axis=1)
        cv2.fillPoly(image, [np.rint(points).astype(np.int32)], color, cv2.LINE_AA)
    else:
        end = np.rint(center + generator.uniform(-4, 4, 2) * size).astype(int).tolist()
        cv2.line(image, middle, end, color, max(2, round(size / 4)), cv2.LINE_AA)


def _draw_occluder(
    generator: np.random.Generator, image: np.ndarray, labels: np.ndarray, joints: np.ndarray
) -> None:
    """A thing in front of one person's limbs; it hides a joint or two."""
    extent = joints.max(0) - joints.min(0)
    center = joints[int(generator.integers(5, 17))] + generator.normal(0, 0.04, 2) * extent
    radius = generator.uniform(0.07, 0.13) * extent.max()
    color = _color(generator)
    box = cv2.boxPoints((center.tolist(), (2 * radius, 1.3 * radius), generator.uniform(0, 90)))
    corners = np.rint(box).astype(np.int32)
    cv2.fillConvexPoly(image, corners, color, cv2.LINE_AA)
    cv2.polylines(image, [corners], True, tuple(channel // 2 for channel in color), 1, cv2.LINE_AA)
    cv2.fillConvexPoly(labels, corners, _OCCLUDER)


def _finish(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light falling off to one side, slight blur, and sensor noise."""
    height, width = image.shape[:2]
    slope = generator.uniform(-0.15, 0.15, 2)
    ys, xs = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    light = (generator.uniform(0.88, 1.08) + slope[0] * xs + slope[1] * ys).astype(np.float32)
    noise = generator.standard_normal((height, width, 3), dtype=np.float32) * generator.uniform(
        1, 5
    )
    blurred = cv2.GaussianBlur(image, (3, 3), generator.uniform(0.3, 0.7))
    return np.clip(blurred * light[..., None] + noise, 0, 255).astype(np.uint8)
