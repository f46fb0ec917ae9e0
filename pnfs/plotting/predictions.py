"""Predictions beside the truth, as a contact sheet (Fig. 8 and 9)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pnfs.data import PeopleDataset, Person
from pnfs.data.images import read_image
from pnfs.errors import PnfsError
from pnfs.estimator import Pose, PoseEstimator
from pnfs.plotting.poses import draw_poses, part_legend, tile
from pnfs.statefile import write_atomically

SHOWN_IMAGES = 6
CELL = (360, 480)  # height and width of a picture in the sheet, pixels
SMALLEST = 480  # pixels; smaller images are enlarged, so that limbs are crisp


def plot_predictions(
    estimator: PoseEstimator,
    people: PeopleDataset,
    path: str | Path,
    *,
    images: int = SHOWN_IMAGES,
) -> list[Path]:
    """Predictions (left) beside the truth (right) in the first images that have people.

    Args:
        estimator: of the run.
        people: with annotated keypoints.
        path: a .png or .jpg file.
        images: how many to show.

    Returns:
        The file, in a list as the other pictures'.

    Raises:
        PnfsError: no people, an unreadable image, an unwritable file.
    """
    path = Path(path)
    by_image: dict[Path, list[Person]] = {}
    for person in people.people:
        by_image.setdefault(person.image_path, []).append(person)
    shown = list(by_image)[:images]
    if not shown:
        raise PnfsError(f"predictions: no people in {people.source}")
    pictures = [read_image(image, apply_exif=False) for image in shown]
    boxes = [np.stack([_corners(person) for person in by_image[image]]) for image in shown]
    predicted = estimator(pictures, boxes, color="bgr")
    skeleton, parts = estimator.skeleton, estimator.config.part_table
    cells: list[np.ndarray] = []
    captions: list[str] = []
    for picture, name, poses in zip(pictures, shown, predicted, strict=True):
        truth = [_truth(person) for person in by_image[name]]
        scale = 2 if picture.shape[1] < SMALLEST else 1
        for which, drawn in (("predicted", poses), ("truth", truth)):
            cells.append(draw_poses(picture, drawn, skeleton, parts, scale=scale))
            captions.append(f"{name.name}: {which}")
    sheet = tile(cells, 4, captions=captions, cell=CELL)
    sheet = np.concatenate([sheet, part_legend(parts, sheet.shape[1])])
    encoded = cv2.imencode(path.suffix, sheet)[1].tobytes()

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(encoded)

    write_atomically(path, write)
    return [path]


def _corners(person: Person) -> np.ndarray:
    x, y, width, height = person.box
    return np.array([x, y, x + width, y + height], np.float32)


def _truth(person: Person) -> Pose:
    labelled = (person.keypoints[:, 2] > 0).astype(np.float32)
    return Pose(person.keypoints[:, :2], labelled, 1.0, _corners(person))
