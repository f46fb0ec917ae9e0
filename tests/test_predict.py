"""`pnfs predict`: images, folders, videos, every form of boxes, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scenes import UnflipPointer, draw_scene, person_box, write_scene

from pnfs.config import load_config
from pnfs.errors import PnfsError
from pnfs.estimator import PoseEstimator
from pnfs.evaluation import coco_ap
from pnfs.model import build_model
from pnfs.predict import PredictReport, predict
from pnfs.skeleton import COCO

CONFIG = load_config("tiny", ["model.input_size=[256,192]"])


@pytest.fixture
def estimator() -> PoseEstimator:
    return PoseEstimator(UnflipPointer(17, CONFIG.model), batch_size=4)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """COCO's layout: val2017/{1,2,3}.png with two people each, and their annotations."""
    write_scene(tmp_path / "scene", COCO)
    return tmp_path / "scene"


def results_of(report: PredictReport) -> list[dict[str, Any]]:
    return json.loads(report.results.read_text())


def annotation_file(scene: Path) -> Path:
    return scene / "annotations" / "person_keypoints_val2017.json"


def by_name(scene: Path) -> dict[str, list[list[float]]]:
    boxes: dict[str, list[list[float]]] = {}
    for entry in json.loads(annotation_file(scene).read_text())["annotations"]:
        x, y, width, height = entry["bbox"]
        boxes.setdefault(f"{entry['image_id']}.png", []).append([x, y, x + width, y + height])
    return boxes


def write(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree))
    return path


def detections(scene: Path) -> list[dict[str, Any]]:
    entries = json.loads(annotation_file(scene).read_text())["annotations"]
    return [
        {"image_id": e["image_id"], "category_id": 1, "bbox": e["bbox"], "score": 0.75}
        for e in entries
    ]


@pytest.mark.parametrize("form", ["annotations", "detections", "names"])
def test_a_folder_with_boxes_of_any_form_scores_as_it_should(
    estimator: PoseEstimator, scene: Path, tmp_path: Path, form: str
) -> None:
    boxes = annotation_file(scene)
    if form == "detections":
        other = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 1.0}
        boxes = write(tmp_path / "found.json", [*detections(scene), other])
    elif form == "names":
        boxes = write(tmp_path / "names.json", by_name(scene))
    report = predict(estimator, scene / "val2017", tmp_path / "out", boxes=boxes, quiet=True)
    assert (report.images, report.poses, report.problems) == (3, 6, ())
    assert coco_ap(results_of(report), annotation_file(scene), COCO)["AP"] > 0.95
    assert {r["file_name"] for r in results_of(report)} == {"1.png", "2.png", "3.png"}
    assert [path.name for path in report.drawings] == [f"{n}_poses.png" for n in (1, 2, 3)]
    for drawing in report.drawings:
        before = cv2.imread(str(scene / "val2017" / drawing.name.replace("_poses", "")))
        after = cv2.imread(str(drawing))
        assert after.shape == before.shape and (after != before).any()
    assert "6 poses in 3 images; 3 drawings and predictions.json" in report.summary()


def test_one_image_without_boxes_is_one_person(estimator: PoseEstimator, tmp_path: Path) -> None:
    picture, joints = draw_scene(COCO, 0, people=1)
    cv2.imwrite(str(tmp_path / "000000000785.jpg"), picture[:, :240])
    report = predict(estimator, tmp_path / "000000000785.jpg", tmp_path / "out", quiet=True)
    (result,) = results_of(report)
    assert result["image_id"] == 785 and result["category_id"] == 1
    xy = np.array(result["keypoints"]).reshape(17, 3)[:, :2]
    assert np.abs(xy - joints[0]).max() < 5
    assert [path.name for path in report.drawings] == ["000000000785_poses.jpg"]


def test_near_duplicate_boxes_give_one_pose(estimator: PoseEstimator, tmp_path: Path) -> None:
    picture, joints = draw_scene(COCO, 0, people=1)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    x, y, width, height = person_box(joints[0])
    box = [x, y, x + width, y + height]
    boxes = {"a.png": [[*box, 0.6], [*[side + 1 for side in box], 0.9], [*box, 0.1]]}
    file = write(tmp_path / "boxes.json", boxes)
    report = predict(estimator, tmp_path / "a.png", tmp_path / "out", boxes=file, quiet=True)
    (result,) = results_of(report)
    assert 0.6 * result["score"] / 0.9 < result["score"]
    everyone = predict(
        estimator, tmp_path / "a.png", tmp_path / "out", boxes=file, nms_threshold=1.0,
        box_threshold=0.5, quiet=True,
    )  # fmt: skip
    assert everyone.poses == 2
    assert results_of(everyone)[0]["score"] == result["score"]  # best first


def test_an_image_without_boxes_in_the_file_has_nobody(
    estimator: PoseEstimator, scene: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "boxes.json", {"2.png": by_name(scene)["2.png"]})
    report = predict(estimator, scene / "val2017", tmp_path / "out", boxes=file, quiet=True)
    assert (report.images, report.poses, len(report.drawings)) == (3, 2, 3)
    assert {result["image_id"] for result in results_of(report)} == {2}


def test_no_people_at_all_is_an_empty_result(
    estimator: PoseEstimator, scene: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "boxes.json", [])
    report = predict(estimator, scene / "val2017", tmp_path / "out", boxes=file, quiet=True)
    assert report.poses == 0 and results_of(report) == []


def test_bad_files_are_reported_counted_and_left_out(
    estimator: PoseEstimator, scene: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = scene / "val2017"
    whole = cv2.imencode(".jpg", draw_scene(COCO, 0)[0])[1].tobytes()
    (folder / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "9.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image")
    boxes = by_name(scene)
    boxes["2.png"].append([600, 0, 700, 50])
    file = write(tmp_path / "boxes.json", boxes)
    report = predict(estimator, folder, tmp_path / "out", boxes=file)
    assert (report.images, report.poses) == (2, 4)
    assert len(report.problems) == 3
    assert "0.jpg: image is truncated" in report.problems[0]
    assert "2.png, box 2: [600.0, 0.0, 700.0, 50.0] lies outside" in report.problems[1]
    assert "9.png: image" in report.problems[2]
    assert "3 left out, the first: " in report.summary()
    assert capfd.readouterr().err.count("left out: ") == 3
    assert not (tmp_path / "out" / "2_poses.png").exists()


def test_nothing_usable_is_an_error_that_names_the_first(
    estimator: PoseEstimator, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / name).write_bytes(b"")
    with pytest.raises(PnfsError, match=r"a\.jpg: .*empty.*none of 2 could be used"):
        predict(estimator, tmp_path / "in", tmp_path / "out", quiet=True)
    with pytest.raises(PnfsError, match=r"a\.jpg: .*empty"):
        predict(estimator, tmp_path / "in" / "a.jpg", tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jpg", "no such image, folder or video"),
        ("gone.mp4", "no such image, folder or video"),
        ("empty", "holds no images"),
        ("text.mp4", "cannot be opened as a video"),
        ("text.txt", "text.txt: image"),
    ],
)
def test_sources_that_cannot_be_read_are_one_line(
    estimator: PoseEstimator, tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(PnfsError, match=message) as caught:
        predict(estimator, tmp_path / source, tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (7, "must be a COCO file or"),
        ([{"bbox": [0, 0, 5, 5]}], r"\[0\]: field 'image_id' is missing"),
        ([{"image_id": 1}], r"\[0\]: field 'bbox' is missing"),
        ([{"image_id": "1", "bbox": [0, 0, 5, 5]}], "image_id '1' is not an integer"),
        ([{"image_id": 1, "bbox": [0, 0, 5]}], r"\[0\]: bbox: .* must be 4 numbers"),
        ([{"image_id": 1, "bbox": [0, 0, 5, 5], "score": "a"}], "score: .* must be 1 numbers"),
        ({"1.png": [0, 0, 5, 5]}, "'1.png': must be a list of boxes"),
        ({"1.png": [[0, 0, 5]]}, r"'1.png'\[0\]: .* must be 4 or 5 numbers"),
        ({"one.png": [[0, 0, 5, 5]]}, r"has boxes for one.png but none for 1.png, 2.png, 3.png"),
        ([{"image_id": 77, "bbox": [0, 0, 5, 5]}], "has boxes for 77 but none for 1.png"),
    ],
)
def test_wrong_box_files_are_named_with_the_entry(
    estimator: PoseEstimator, scene: Path, tmp_path: Path, tree: Any, message: str
) -> None:
    file = write(tmp_path / "boxes.json", tree)
    with pytest.raises(PnfsError, match=message) as caught:
        predict(estimator, scene / "val2017", tmp_path / "out", boxes=file, quiet=True)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_missing_and_malformed_box_files_are_named(
    estimator: PoseEstimator, scene: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("[{")
    for name, message in (("gone.json", "missing"), ("broken.json", "not valid JSON")):
        with pytest.raises(PnfsError, match=rf"{name}: boxes file .*{message}"):
            predict(estimator, scene / "val2017", tmp_path / "out", boxes=tmp_path / name)


def test_nan_boxes_are_the_problem_of_their_image(
    estimator: PoseEstimator, scene: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "boxes.json", {**by_name(scene), "2.png": [[0, 0, float("nan"), 9]]})
    report = predict(estimator, scene / "val2017", tmp_path / "out", boxes=file, quiet=True)
    assert report.images == 2 and capfd.readouterr() == ("", "")
    assert "2.png, box 0" in report.problems[0] and "NaN" in report.problems[0]


def test_output_that_cannot_be_written_is_refused_before_any_work(
    estimator: PoseEstimator, scene: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PnfsError, match="file/out: cannot be written"):
        predict(estimator, scene / "val2017", tmp_path / "file" / "out", quiet=True)
    with pytest.raises(PnfsError, match="would mix with the images"):
        predict(estimator, scene / "val2017", scene / "val2017", quiet=True)


def test_names_without_numbers_are_counted_from_one(
    estimator: PoseEstimator, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.png", "7.png", "a.png"):
        cv2.imwrite(str(tmp_path / "in" / name), draw_scene(COCO, 0)[0])
    report = predict(estimator, tmp_path / "in", tmp_path / "out", quiet=True)
    numbers = {r["file_name"]: r["image_id"] for r in results_of(report)}
    assert numbers == {"7.png": 1, "a.png": 2, "b.png": 3}


# ---- video ----


def write_video(path: Path, frames: int) -> np.ndarray:
    """A video of one person; returns the joints (frames, K, 2)."""
    codec = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), codec, 10.0, (240, 240))
    joints = []
    for number in range(frames):
        picture, people = draw_scene(COCO, number, people=1)
        writer.write(np.ascontiguousarray(picture[:, :240]))
        joints.append(people[0])
    writer.release()
    return np.stack(joints)


def test_a_video_gives_a_video_and_numbered_results(
    estimator: PoseEstimator, tmp_path: Path
) -> None:
    joints = write_video(tmp_path / "walk.avi", 5)
    report = predict(estimator, tmp_path / "walk.avi", tmp_path / "out", quiet=True)
    assert (report.images, report.poses, report.problems) == (5, 5, ())
    results = results_of(report)
    assert [result["image_id"] for result in results] == list(range(5))
    for result, expected in zip(results, joints, strict=True):
        xy = np.array(result["keypoints"]).reshape(17, 3)[:, :2]
        assert np.median(np.abs(xy - expected)) < 4
    assert report.drawings == (tmp_path / "out" / "walk_poses.mp4",)
    drawn = cv2.VideoCapture(str(report.drawings[0]))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and drawn.get(cv2.CAP_PROP_FPS) == 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "walk_poses.mp4",
        "predictions.json",
    }


def test_boxes_of_a_video_go_by_frame_or_for_all_frames(
    estimator: PoseEstimator, tmp_path: Path
) -> None:
    write_video(tmp_path / "walk.avi", 4)
    box, out = [0, 0, 240, 240], tmp_path / "out"
    for tree, frames in (
        ({"1": [box], "3": [box, [900, 0, 950, 50]]}, [1]),
        ([{"image_id": 2, "bbox": box}], [2]),
        ({"walk.avi": [box]}, [0, 1, 2, 3]),
    ):
        file = write(tmp_path / "boxes.json", tree)
        report = predict(estimator, tmp_path / "walk.avi", out, boxes=file, quiet=True)
        assert [result["image_id"] for result in results_of(report)] == frames
        drawn = cv2.VideoCapture(str(report.drawings[0]))  # bad boxes do not cost a frame
        assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    file = write(tmp_path / "boxes.json", {"9": [box]})
    with pytest.raises(PnfsError, match=r"has boxes for 9.* but none for walk\.avi"):
        predict(estimator, tmp_path / "walk.avi", out, boxes=file, quiet=True)


def test_a_video_that_breaks_off_is_reported(estimator: PoseEstimator, tmp_path: Path) -> None:
    write_video(tmp_path / "whole.avi", 12)
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    report = predict(estimator, tmp_path / "cut.avi", tmp_path / "out", quiet=True)
    assert 0 < report.images < 12 and len(report.drawings) == 1
    assert f"only {report.images} of 12 frames" in report.problems[0]


# ---- real input ----


def test_a_real_photograph_with_detected_boxes(shared_dir: Path, tmp_path: Path) -> None:
    coco = shared_dir / "data" / "coco"
    model = build_model(load_config("tiny").model)
    found = coco / "person_detection_results" / "COCO_val2017_detections_AP_H_56_person.json"
    report = predict(
        PoseEstimator(model), coco / "val2017", tmp_path, boxes=found, box_threshold=0.5, quiet=True
    )
    assert report.images == 1 and report.problems == ()
    for result in results_of(report):
        assert result["image_id"] == 785 and len(result["keypoints"]) == 51
    scores = coco_ap(results_of(report), coco / "annotations/person_keypoints_val2017.json", COCO)
    assert 0 <= scores["AP"] <= 1
