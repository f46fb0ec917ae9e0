"""COCO files: layouts, which people are taken, detections, and a clear line for every defect."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnfs.config import DataConfig
from pnfs.data import load_people
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO, MPII


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    keypoints = [float(v) for k in range(17) for v in (20 + k, 30 + 2 * k, 2 - k % 2)]
    entry = {
        "id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 900.0,
        "bbox": [10.0, 20.0, 50.0, 60.0], "keypoints": keypoints, "num_keypoints": 17,
    }  # fmt: skip
    return {**entry, **changes}


def tree(*annotations: dict[str, Any]) -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 120} for i in (1, 2)]
    categories = [{"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}]
    return {"images": images, "annotations": list(annotations), "categories": categories}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("annotations", "train2017", "val2017"):
        (tmp_path / folder).mkdir()
    return tmp_path


def write(
    root: Path, content: Any, split: str = "val2017", prefix: str = "person_keypoints"
) -> Path:
    path = root / "annotations" / f"{prefix}_{split}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(root: Path, split: str = "val", skeleton=COCO, boxes=None, **settings: Any):
    return load_people(
        DataConfig(dataset="coco", root=str(root), **settings), skeleton, split, boxes=boxes
    )


def test_a_person_is_what_the_file_says(root: Path):
    write(root, tree(annotation(5)))
    (found,) = load(root).people
    assert found.image_path == root / "val2017" / "1.jpg"
    assert (found.image_id, found.annotation_id, found.score, found.area) == (1, 5, 1.0, 900.0)
    assert found.box.tolist() == [10, 20, 50, 60] and found.image_size == (100, 120)
    assert found.keypoints.dtype == np.float32 and found.keypoints[3].tolist() == [23, 36, 1]


def test_crowds_other_categories_and_unlabelled_people_are_left_out(root: Path):
    nobody = [0] * 51
    write(root, tree(
        annotation(1), annotation(2, iscrowd=1), annotation(3, category_id=18),
        annotation(4, keypoints=nobody, bbox=[0, 0, 0, 0]),
    ))  # fmt: skip
    dataset = load(root)
    assert [person.annotation_id for person in dataset.people] == [1]
    assert dataset.image_ids == (1, 2) and not dataset.broken


def test_the_order_of_the_file_does_not_matter(root: Path):
    entries = [annotation(i, image_id=1 + i % 2) for i in range(9)]
    shuffled = entries[:]
    random.Random(1).shuffle(shuffled)
    write(root, tree(*entries))
    first = [person.annotation_id for person in load(root).people]
    write(root, tree(*shuffled))
    assert [person.annotation_id for person in load(root).people] == first == list(range(9))


def test_images_may_lie_under_images(root: Path):
    (root / "val2017").rmdir()
    (root / "images" / "val2017").mkdir(parents=True)
    write(root, tree(annotation(1)))
    assert load(root).people[0].image_path == root / "images" / "val2017" / "1.jpg"


def test_test_dev_lists_images_of_test2017_and_needs_boxes(root: Path):
    (root / "test2017").mkdir()
    listed = tree()
    del listed["annotations"]
    write(root, listed, "test-dev2017", "image_info")
    with pytest.raises(PnfsError, match=r"data\.boxes"):
        load(root, val_split="test-dev2017")
    detections = [{"image_id": 2, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}]
    (root / "boxes.json").write_text(json.dumps(detections))
    (found,) = load(root, val_split="test-dev2017", boxes=root / "boxes.json").people
    assert found.image_path == root / "test2017" / "2.jpg"


def test_detections_are_filtered_sorted_and_unlabelled(root: Path):
    write(root, tree(annotation(1)))
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}
    changes = [
        {"score": 0.3}, {"score": 0.9}, {"category_id": 3},
        {"image_id": 77}, {"image_id": 2}, {"score": 0.05},
    ]  # fmt: skip
    path = root / "boxes.json"
    path.write_text(json.dumps([{**entry, **change} for change in changes]))
    dataset = load(root, boxes=path, box_score_threshold=0.1)
    assert [(p.image_id, p.score) for p in dataset.people] == [(1, 0.9), (1, 0.3), (2, 0.5)]
    assert dataset.detected and not any(p.keypoints.any() for p in dataset.people)
    assert {p.annotation_id for p in dataset.people} == {-1}
    assert "boxes.json" in dataset.source and "0.1" in dataset.source


def test_boxes_of_the_configuration_serve_evaluation_alone(root: Path):
    write(root, tree(annotation(1)))
    write(root, tree(annotation(1)), "train2017")
    detections = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}]
    (root / "boxes.json").write_text(json.dumps(detections))
    assert load(root, boxes=None, **{"val_split": None}).detected is False
    config = DataConfig(dataset="coco", root=str(root), boxes=str(root / "boxes.json"))
    assert load_people(config, COCO, "val").detected
    assert not load_people(config, COCO, "train").detected


DEFECTS = [
    ({"keypoints": [1.0] * 48}, r"annotations\[1\] \(id 9\): keypoints has 48 numbers, needs 51"),
    ({"keypoints": [float("nan")] * 51}, "keypoints holds NaN"),
    ({"keypoints": "none"}, "keypoints 'none' is not made of numbers"),
    ({"bbox": [10, 20, 0, 60]}, r"bbox \[10.0, 20.0, 0.0, 60.0\] has no area"),
    ({"bbox": [10, 20, -5, 60]}, "bbox .* has no area"),
    ({"bbox": [200, 20, 50, 60]}, "bbox .* lies outside the 120x100 image"),
    ({"bbox": [float("nan"), 20, 50, 60]}, "bbox holds NaN"),
    ({"bbox": [1, 2, 3]}, "bbox has 3 numbers, needs 4"),
    ({"area": None}, "area"),
    ({"image_id": 99}, "image_id 99 is not among the images"),
    ({"image_id": "1"}, "image_id '1' is not an integer"),
    ({"bbox": ...}, "field 'bbox' is missing"),
    ({"keypoints": ...}, "field 'keypoints' is missing"),
]


@pytest.mark.parametrize(("changes", "message"), DEFECTS)
def test_a_broken_annotation_stops_evaluation_and_is_left_out_of_training(
    root: Path, changes: dict[str, Any], message: str
):
    broken = {key: value for key, value in annotation(9, **changes).items() if value is not ...}
    path = write(root, tree(annotation(1), broken))
    with pytest.raises(PnfsError, match=message) as error:
        load(root)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    write(root, tree(annotation(1), broken), "train2017")
    dataset = load(root, "train")
    assert len(dataset) == 1 and len(dataset.broken) == 1


def test_an_annotation_that_is_no_mapping(root: Path):
    write(root, {**tree(), "annotations": [3]})
    with pytest.raises(PnfsError, match=r"annotations\[0\]: is not a mapping"):
        load(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not valid JSON .*line 1 column 2"),
        ("[1, 2]", "no list 'images'"),
        ('{"images": []}', "lists no images"),
        ('{"images": [{"id": 1}]}', r"images\[0\]: field 'file_name' is missing"),
        (json.dumps({"images": tree()["images"]}), "no list 'annotations'"),
        (json.dumps(tree()), "no usable person"),
        (json.dumps(tree(annotation(1, keypoints=[0] * 51))), "no usable person"),
    ],
)
def test_a_malformed_or_empty_file(root: Path, content: str, message: str):
    path = write(root, content)
    with pytest.raises(PnfsError, match=message) as error:
        load(root)
    assert str(path) in str(error.value)


def test_training_without_a_single_good_annotation_names_the_first_broken_one(root: Path):
    write(root, tree(annotation(4, keypoints=[1])), "train2017")
    with pytest.raises(
        PnfsError, match=r"no usable person .*1 were left out, the first: .*keypoints has 1"
    ):
        load(root, "train")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bbox": [1, 2, 0, 5]}, r"boxes.json: \[1\]: bbox .* has no area"),
        ({"bbox": [float("nan"), 2, 3, 5]}, "bbox holds NaN"),
        ({"bbox": [500, 2, 3, 5]}, "lies outside the 120x100 image"),
        ({"score": float("nan")}, "score holds NaN"),
        ({"score": ...}, "field 'score' is missing"),
    ],
)
def test_a_broken_detection(root: Path, entry: dict[str, Any], message: str):
    write(root, tree(annotation(1)))
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.5}
    bad = {key: value for key, value in {**good, **entry}.items() if value is not ...}
    (root / "boxes.json").write_text(json.dumps([good, bad]))
    with pytest.raises(PnfsError, match=message):
        load(root, boxes=root / "boxes.json")


def test_detection_files_that_are_missing_empty_or_of_another_kind(root: Path):
    write(root, tree(annotation(1)))
    with pytest.raises(PnfsError, match=r"no.json: detection file is missing"):
        load(root, boxes=root / "no.json")
    (root / "boxes.json").write_text("{}")
    with pytest.raises(PnfsError, match="must be a list of detections"):
        load(root, boxes=root / "boxes.json")
    (root / "boxes.json").write_text("[]")
    with pytest.raises(PnfsError, match="no usable person"):
        load(root, boxes=root / "boxes.json")


def test_folders_and_files_that_are_not_there(root: Path, tmp_path: Path):
    with pytest.raises(PnfsError, match=r"person_keypoints_val2017.json: .* is missing"):
        load(root)
    with pytest.raises(PnfsError, match=r"data\.root .*nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(PnfsError, match=r"data\.root: set it"):
        load_people(DataConfig(dataset="coco"), COCO, "val")
    write(root, tree(annotation(1)))
    (root / "val2017").rmdir()
    with pytest.raises(PnfsError, match=r"no image folder; looked for .*val2017"):
        load(root)


def test_the_skeleton_must_be_the_datasets(root: Path):
    write(root, tree(annotation(1)))
    with pytest.raises(PnfsError, match="set model.skeleton=coco"):
        load(root, skeleton=MPII)
    other = copy.deepcopy(tree(annotation(1)))
    other["categories"][0]["keypoints"] = ["head", "foot"]
    write(root, other)
    with pytest.raises(PnfsError, match="2 names, but skeleton coco has 17"):
        load(root)


def test_real_annotations_and_detections(shared_dir: Path):
    root = shared_dir / "data" / "coco"
    dataset = load(root)
    assert len(dataset) == 12 and len(dataset.image_ids) == 4
    first = next(p for p in dataset.people if p.annotation_id == 442619)
    assert first.image_path.is_file() and first.keypoints[0].tolist() == [367, 81, 2]
    (boxes,) = (root / "person_detection_results").glob("*.json")
    detected = load(root, boxes=boxes)
    assert len(detected) == 118 and load(root, boxes=boxes, box_score_threshold=0.9).people
    assert len(load(root, boxes=boxes, box_score_threshold=0.9)) < 118
