"""What a dataset is to the rest of the package: people, each with an image, a box and keypoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pnfs.errors import PnfsError
from pnfs.skeleton import Skeleton


@dataclass(frozen=True, eq=False)
class Person:
    """One annotated or detected person. Pixels are those of the stored image, 0-based.

    Attributes:
        image_path: the image file.
        image_id: the dataset's number of the image.
        keypoints: float32 (K, 3): x, y, v in skeleton order; v = 0 not labelled, 1 labelled but
            hidden, 2 visible. All zero for a detection.
        box: float64 (4,): x, y, width, height as the file gives them.
        score: of the detection; 1 for an annotation.
        area: px², of the segment (COCO) or of the box.
        annotation_id: the annotation's number; -1 for a detection.
        image_size: (height, width) as the annotation file states it, None where it does not.
        head_size: px, the length that PCKh divides by; None where the dataset has none.
    """

    image_path: Path
    image_id: int
    keypoints: np.ndarray
    box: np.ndarray
    score: float
    area: float
    annotation_id: int
    image_size: tuple[int, int] | None = None
    head_size: float | None = None


@dataclass(frozen=True, eq=False)
class PeopleDataset:
    """The people of one split, in an order that does not depend on the order of the file.

    Attributes:
        people: at least one.
        skeleton: order and meaning of the keypoints.
        source: what was read, in words, for logs and beside every score.
        annotation_file: the file with the images and, where the split has them, the keypoints.
        image_ids: every image of the split, also those without people.
        detected: whether the boxes are detections.
        broken: one line for each annotation that was left out because it is wrong.
    """

    people: tuple[Person, ...]
    skeleton: Skeleton
    source: str
    annotation_file: Path
    image_ids: tuple[int, ...]
    detected: bool = False
    broken: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.people:
            cause = (
                f"; {len(self.broken)} were left out, the first: {self.broken[0]}"
                if self.broken
                else ""
            )
            raise PnfsError(
                f"{self.annotation_file}: no usable person in {self.source}{cause}; "
                "check the file, the split and the score threshold"
            )

    def __len__(self) -> int:
        return len(self.people)


class BrokenAnnotation(Exception):
    """One entry of a file is unusable; the message names file, entry, field and remedy."""


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; `what` says in errors what the file should be."""
    try:
        with path.open("rb") as file:
            return json.load(file)
    except FileNotFoundError:
        raise PnfsError(f"{path}: {what} is missing; check data.root and the split") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PnfsError(f"{path}: {what} cannot be read ({error}); check the file") from None
    except json.JSONDecodeError as error:
        raise PnfsError(
            f"{path}: {what} is not valid JSON ({error.msg}, line {error.lineno} column "
            f"{error.colno}); fetch or write it again"
        ) from None


def section(tree: Any, path: Path, name: str) -> list[Any]:
    """The list called `name` in the mapping at the top of a JSON file."""
    value = tree.get(name) if isinstance(tree, Mapping) else None
    if not isinstance(value, list):
        raise PnfsError(f"{path}: has no list '{name}' at the top level; this is not a COCO file")
    return value


def require(entry: Any, name: str, where: str) -> Any:
    """Field `name` of one entry."""
    if not isinstance(entry, Mapping):
        raise BrokenAnnotation(f"{where}: is not a mapping; correct or remove it")
    if name not in entry:
        raise BrokenAnnotation(f"{where}: field '{name}' is missing; add it or remove the entry")
    return entry[name]


def numbers(entry: Any, name: str, where: str, count: int | None = None) -> np.ndarray:
    """Field `name` as finite float64 numbers, flattened; `count` of them unless it is None."""
    value = require(entry, name, where)
    try:
        array = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise BrokenAnnotation(
            f"{where}: {name} {value!r:.60} is not made of numbers; correct it"
        ) from None
    if count is not None and array.size != count:
        raise BrokenAnnotation(
            f"{where}: {name} has {array.size} numbers, needs {count}; correct it"
        )
    if not np.isfinite(array).all():
        raise BrokenAnnotation(
            f"{where}: {name} holds NaN or infinity; correct or remove the entry"
        )
    return array


def integer(entry: Any, name: str, where: str) -> int:
    """Field `name` as an integer."""
    value = require(entry, name, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BrokenAnnotation(f"{where}: {name} {value!r:.60} is not an integer; correct it")
    return value


def box_in_image(entry: Any, name: str, where: str, size: tuple[int, int] | None) -> np.ndarray:
    """Field `name` as a box x, y, width, height that has an area and touches the image."""
    box = numbers(entry, name, where, 4)
    x, y, width, height = box.tolist()
    shown = [round(side, 2) for side in box.tolist()]
    if width <= 0 or height <= 0:
        raise BrokenAnnotation(f"{where}: {name} {shown} has no area; correct or remove the entry")
    if size is not None and (x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0):
        raise BrokenAnnotation(
            f"{where}: {name} {shown} lies outside the {size[1]}x{size[0]} image; "
            "correct or remove the entry"
        )
    return box
