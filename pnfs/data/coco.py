"""COCO keypoint files: annotated people, or detected boxes, of one split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pnfs.data.records import (
    BrokenAnnotation,
    PeopleDataset,
    Person,
    box_in_image,
    integer,
    numbers,
    read_json,
    require,
    section,
)
from pnfs.errors import PnfsError
from pnfs.skeleton import Skeleton

PERSON_CATEGORY = 1


def annotation_path(root: Path, split: str) -> Path:
    """`annotations/person_keypoints_{split}.json`, or `image_info_{split}.json` for test splits."""
    folder = root / "annotations"
    keypoints, info = folder / f"person_keypoints_{split}.json", folder / f"image_info_{split}.json"
    if keypoints.is_file() or not info.is_file():
        return keypoints
    return info


def image_folder(root: Path, split: str) -> Path:
    """The folder with the images of a split: `{split}/` or `images/{split}/` under `root`.

    test-dev2017 lists images of test2017, so that folder serves too.
    """
    names = (split, split.replace("-dev", "")) if "-dev" in split else (split,)
    folders = [parent / name for name in names for parent in (root, root / "images")]
    for folder in folders:
        if folder.is_dir():
            return folder
    tried = ", ".join(map(str, folders))
    raise PnfsError(f"data.root {root}: no image folder; looked for {tried}")


def load_annotated(
    root: Path, split: str, skeleton: Skeleton, *, strict: bool, name: str = "coco"
) -> PeopleDataset:
    """People with annotated boxes and at least one labelled keypoint; crowds are left out.

    Args:
        strict: a broken annotation is an error (evaluation); else it is left out and listed in
            `PeopleDataset.broken` (training).
        name: of the dataset, for its description.

    Raises:
        PnfsError: missing or malformed file, no usable person, or broken annotation and `strict`.
    """
    path = annotation_path(root, split)
    tree = read_json(path, "COCO annotation file")
    if "annotations" not in tree and path.name.startswith("image_info"):
        raise PnfsError(
            f"{path}: split {split} has no annotations; give data.boxes, a file of detected boxes"
        )
    folder = image_folder(root, split)
    images = _images(tree, path)
    _check_keypoint_names(tree, path, skeleton)
    people: list[Person] = []
    broken: list[str] = []
    for number, entry in enumerate(section(tree, path, "annotations")):
        try:
            person = _annotated(entry, f"{path}: annotations[{number}]", images, folder, skeleton)
        except BrokenAnnotation as problem:
            if strict:
                raise PnfsError(str(problem)) from None
            broken.append(str(problem))
        else:
            if person is not None:
                people.append(person)
    people.sort(key=lambda person: person.annotation_id)
    return PeopleDataset(
        people=tuple(people),
        skeleton=skeleton,
        source=f"{name} {split}, ground-truth boxes",
        annotation_file=path,
        image_ids=tuple(sorted(images)),
        broken=tuple(broken),
    )


def load_detected(
    root: Path, split: str, skeleton: Skeleton, boxes: Path, *, threshold: float = 0.0
) -> PeopleDataset:
    """People found by a detector: `boxes` is a COCO detection result file.

    Entries of other categories, with a score below `threshold`, or of images that the split does
    not list are left out.

    Raises:
        PnfsError: missing or malformed file, a missing or bad field, or no entry left.
    """
    path = annotation_path(root, split)
    folder = image_folder(root, split)
    images = _images(read_json(path, "COCO annotation file"), path)
    tree = read_json(boxes, "detection file")
    if not isinstance(tree, list):
        raise PnfsError(
            f"{boxes}: must be a list of detections {{image_id, category_id, bbox, score}}"
        )
    try:
        people = list(_detections(tree, boxes, images, folder, skeleton, threshold))
    except BrokenAnnotation as problem:
        raise PnfsError(str(problem)) from None
    people.sort(key=lambda person: (person.image_id, -person.score, *person.box.tolist()))
    shown = f" with score >= {threshold:g}" if threshold > 0 else ""
    return PeopleDataset(
        people=tuple(people),
        skeleton=skeleton,
        source=f"coco {split}, detected boxes of {boxes.name}{shown}",
        annotation_file=path,
        image_ids=tuple(sorted(images)),
        detected=True,
    )


ImageTable = dict[int, tuple[str, tuple[int, int]]]  # id -> file name, (height, width)


def _images(tree: Any, path: Path) -> ImageTable:
    table: ImageTable = {}
    for number, entry in enumerate(section(tree, path, "images")):
        where = f"{path}: images[{number}]"
        try:
            name = require(entry, "file_name", where)
            size = integer(entry, "height", where), integer(entry, "width", where)
            table[integer(entry, "id", where)] = str(name), size
        except BrokenAnnotation as problem:
            raise PnfsError(str(problem)) from None
    if not table:
        raise PnfsError(f"{path}: lists no images; check the split")
    return table


def _check_keypoint_names(tree: Mapping[str, Any], path: Path, skeleton: Skeleton) -> None:
    """Where the file says how many keypoints a person has, it must agree with the skeleton."""
    categories = tree.get("categories")
    for category in categories if isinstance(categories, list) else []:
        if isinstance(category, Mapping) and category.get("id") == PERSON_CATEGORY:
            names = category.get("keypoints") or []
            if names and len(names) != skeleton.num_keypoints:
                raise PnfsError(
                    f"{path}: categories keypoints: {len(names)} names, but skeleton "
                    f"{skeleton.name} has {skeleton.num_keypoints}; "
                    "set model.skeleton to the one of this dataset"
                )


def _annotated(
    entry: Any, where: str, images: ImageTable, folder: Path, skeleton: Skeleton
) -> Person | None:
    """One annotation as a person; None for crowds, other categories, people without keypoints."""
    annotation_id = integer(entry, "id", where)
    where = f"{where} (id {annotation_id})"
    if entry.get("iscrowd") or entry.get("category_id", PERSON_CATEGORY) != PERSON_CATEGORY:
        return None
    flat = numbers(entry, "keypoints", where, 3 * skeleton.num_keypoints)
    keypoints = flat.reshape(-1, 3)[list(skeleton.file_order)].astype(np.float32)
    if not (keypoints[:, 2] > 0).any():
        return None
    image_id = integer(entry, "image_id", where)
    if image_id not in images:
        raise BrokenAnnotation(
            f"{where}: image_id {image_id} is not among the images; correct or remove it"
        )
    name, size = images[image_id]
    return Person(
        image_path=folder / name,
        image_id=image_id,
        keypoints=keypoints,
        box=box_in_image(entry, "bbox", where, size),
        score=1.0,
        area=float(numbers(entry, "area", where, 1)[0]),
        annotation_id=annotation_id,
        image_size=size,
    )


def _detections(
    entries: list[Any],
    path: Path,
    images: ImageTable,
    folder: Path,
    skeleton: Skeleton,
    threshold: float,
) -> Iterator[Person]:
    nothing = np.zeros((skeleton.num_keypoints, 3), np.float32)
    for number, entry in enumerate(entries):
        where = f"{path}: [{number}]"
        image_id = integer(entry, "image_id", where)
        score = float(numbers(entry, "score", where, 1)[0])
        if (
            integer(entry, "category_id", where) != PERSON_CATEGORY
            or score < threshold
            or image_id not in images
        ):
            continue
        name, size = images[image_id]
        box = box_in_image(entry, "bbox", where, size)
        yield Person(
            image_path=folder / name,
            image_id=image_id,
            keypoints=nothing,
            box=box,
            score=score,
            area=float(box[2] * box[3]),
            annotation_id=-1,
            image_size=size,
        )
