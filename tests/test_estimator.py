"""Poses from images and boxes: places, batching, colours, and every kind of wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scenes import Pointer, UnflipPointer, draw_scene, person_box
from torch import nn

from pnfs.checkpoint import save_weights
from pnfs.config import load_config
from pnfs.errors import PnfsError
from pnfs.estimator import PoseEstimator, check_boxes
from pnfs.model import build_model
from pnfs.skeleton import COCO

CONFIG = load_config("tiny", ["model.input_size=[256,192]"])


def corners(joints: np.ndarray) -> list[int]:
    x, y, width, height = person_box(joints)
    return [x, y, x + width, y + height]


def scene_estimator(**options: Any) -> PoseEstimator:
    return PoseEstimator(UnflipPointer(17, CONFIG.model), **options)


@pytest.mark.parametrize("profile", ["standard", "posenfs"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_poses_are_where_the_people_are(profile: Any, flip: bool, batch_size: int) -> None:
    pictures, joints = zip(*(draw_scene(COCO, number) for number in range(3)), strict=True)
    boxes = [[corners(j) for j in people] for people in joints]
    boxes[1] = boxes[1][1:]  # images with different numbers of people share batches
    estimator = scene_estimator(profile=profile, flip=flip, batch_size=batch_size)
    poses = estimator(list(pictures), boxes)
    assert [len(found) for found in poses] == [2, 1, 2]
    truth = [joints[0][0], joints[0][1], joints[1][1], joints[2][0], joints[2][1]]
    given = [box for image in boxes for box in image]
    for pose, expected, box in zip([p for f in poses for p in f], truth, given, strict=True):
        assert np.abs(pose.xy - expected).max() < 4  # about a score-map cell
        assert pose.xy.dtype == pose.confidence.dtype == np.float32
        assert pose.xy.shape == (17, 2) and pose.confidence.shape == (17,)
        assert pose.score == pytest.approx(float(pose.confidence.mean()), rel=1e-5)
        np.testing.assert_array_equal(pose.box, np.array(box, np.float32))


def test_files_and_arrays_give_the_same_poses(tmp_path: Path) -> None:
    picture, joints = draw_scene(COCO, 0)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    boxes = [[corners(j) for j in joints]] * 2
    from_file, from_array = scene_estimator()([tmp_path / "a.png", picture], boxes)
    for one, other in zip(from_file, from_array, strict=True):
        np.testing.assert_array_equal(one.xy, other.xy)


def test_arrays_are_rgb_unless_told_otherwise(tmp_path: Path) -> None:
    class Red(Pointer):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.seen = images[0].mean((1, 2))
            return super().forward(images)

    model = Red(17, CONFIG.model)
    rgb = np.zeros((64, 48, 3), np.uint8)
    rgb[..., 0] = 200
    cv2.imwrite(str(tmp_path / "red.png"), rgb[..., ::-1])
    estimator = PoseEstimator(model, flip=False)
    seen = []
    for image, color in ((rgb, "rgb"), (rgb[..., ::-1], "bgr"), (tmp_path / "red.png", "rgb")):
        estimator([image], color=color)
        seen.append(model.seen)
    assert seen[0][0] > seen[0][1]
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], seen[2])
    PoseEstimator(model, flip=False, profile="posenfs")([rgb])
    assert model.seen[2] > model.seen[0]  # blue first: red comes last


def test_without_boxes_the_whole_image_is_one_box() -> None:
    picture, joints = draw_scene(COCO, 0, people=1)
    picture = picture[:, :240]
    whole, none, some = scene_estimator()([picture] * 3, [None, [], [[0, 0, 240, 240]]])
    assert none == []
    np.testing.assert_array_equal(whole[0].box, [0, 0, 240, 240])
    np.testing.assert_array_equal(whole[0].xy, some[0].xy)
    assert np.abs(whole[0].xy - joints[0]).max() < 4
    assert len(scene_estimator()([picture])[0]) == 1
    assert scene_estimator()([]) == []


def test_a_box_with_a_score_scales_the_pose_score() -> None:
    picture, joints = draw_scene(COCO, 0, people=1)
    box = corners(joints[0])
    plain, scored = scene_estimator()([picture], [[box + [1.0], box + [0.5]]])[0]
    assert scored.score == pytest.approx(plain.score / 2)
    np.testing.assert_array_equal(scored.confidence, plain.confidence)


def test_files_are_turned_as_viewers_turn_them(tmp_path: Path) -> None:
    picture, joints = draw_scene(COCO, 0, people=1)
    stored = np.rot90(picture)  # orientation 6: a viewer turns it by 90 degrees clockwise
    jpeg = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    tag = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\0\0\0\0"
    segment = b"\xff\xe1" + (len(tag) + 2).to_bytes(2, "big") + tag
    (tmp_path / "turned.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    pose = scene_estimator()([tmp_path / "turned.jpg"], [[corners(joints[0])]])[0][0]
    assert np.abs(pose.xy - joints[0]).max() < 4


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([float("nan"), 0, 10, 10], r"image 1, box 2: \[nan, 0.0, 10.0, 10.0\] holds NaN"),
        ([0, 0, float("inf"), 10], "image 1, box 2: .* infinity"),
        ([5, 5, 5, 20], "image 1, box 2: .* has no area"),
        ([20, 5, 10, 20], "image 1, box 2: .* x1 > x0"),
        ([500, 0, 520, 20], "image 1, box 2: .* outside the 500x240 image"),
        ([-30, -30, -1, 20], "image 1, box 2: .* outside the 500x240 image"),
    ],
)
@pytest.mark.parametrize("profile", ["standard", "posenfs"])
def test_bad_boxes_are_named_in_one_line(box: list[float], message: str, profile: Any) -> None:
    picture, joints = draw_scene(COCO, 0)
    good = [corners(j) for j in joints]
    with pytest.raises(PnfsError, match=message) as caught:
        scene_estimator(profile=profile)([picture, picture], [good, [*good, box]])
    assert "\n" not in str(caught.value)


def test_boxes_that_reach_beyond_the_image_are_fine() -> None:
    picture, _ = draw_scene(COCO, 0)
    boxes = [[-50.0, -50.0, 20.0, 20.0], [499.5, 239.5, 900, 900], [-1e6, -1e6, 1e6, 1e6]]
    for profile in ("standard", "posenfs"):
        poses = scene_estimator(profile=profile)([picture], [boxes])[0]
        assert len(poses) == 3 and all(np.isfinite(pose.xy).all() for pose in poses)


@pytest.mark.parametrize(
    ("images", "boxes", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), None, "give a list of images"),
        ("a.jpg", None, "give a list of images"),
        ([np.zeros((8, 8), np.uint8)], None, r"image 0: uint8 array of shape \(8, 8\)"),
        ([np.zeros((8, 8, 3))], None, "image 0: float64 array"),
        ([np.zeros((0, 8, 3), np.uint8)], None, r"shape \(0, 8, 3\)"),
        ([np.zeros((8, 8, 3), np.uint8)], [], "0 entries for 1 images"),
        ([np.zeros((8, 8, 3), np.uint8)], [[0, 0, 8, 8]], "4 entries for 1 images"),
        ([np.zeros((8, 8, 3), np.uint8)], [[0, 0, 8, 8, 9]], "5 entries"),
        ([np.zeros((8, 8, 3), np.uint8)], [[[0, 0, 8]]], r"boxes have shape \(1, 3\)"),
        ([np.zeros((8, 8, 3), np.uint8)], [["none"]], "boxes are not numbers"),
        (["no/such.jpg"], None, "no/such.jpg: image is missing"),
    ],
)
def test_other_wrong_input_is_one_line(images: Any, boxes: Any, message: str) -> None:
    if boxes == [[0, 0, 8, 8]]:  # a user's slip: one image's box where a list per image belongs
        boxes = boxes[0]
    if boxes == [[0, 0, 8, 8, 9]]:
        boxes = boxes[0]
    with pytest.raises(PnfsError, match=message) as caught:
        scene_estimator()(images, boxes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"profile": "postnfs"}, "profile: 'postnfs' is unknown.*did you mean 'posenfs'"),
        ({"precision": "half"}, "precision: 'half' is unknown; use fp32 or bf16 or fp16"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PnfsError, match=message):
        scene_estimator(**options)


def test_a_module_without_config_is_refused() -> None:
    with pytest.raises(PnfsError, match=r"Linear has no `config`.*build_model"):
        PoseEstimator(nn.Linear(2, 2))


def test_a_run_brings_its_own_profile_and_flip(tmp_path: Path) -> None:
    config = load_config("tiny", ["eval.profile=posenfs", "eval.flip=false"])
    model = build_model(config.model)
    save_weights(tmp_path / "model.safetensors", model, config, {})
    image = np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)
    from_run = PoseEstimator(tmp_path)
    assert (from_run.profile, from_run.flip) == ("posenfs", False)
    assert PoseEstimator(tmp_path, profile="standard", flip=True).flip
    same = PoseEstimator(model, profile="posenfs", flip=False)
    assert not model.training
    one, other = from_run([image])[0][0], same([image])[0][0]
    np.testing.assert_array_equal(one.xy, other.xy)
    np.testing.assert_array_equal(one.confidence, other.confidence)
    file = PoseEstimator(tmp_path / "model.safetensors")([image])[0][0]
    np.testing.assert_array_equal(one.xy, file.xy)


def test_half_precision_stays_close() -> None:
    picture, joints = draw_scene(COCO, 0)
    boxes = [[corners(j) for j in joints]]
    for pose, expected in zip(
        scene_estimator(precision="bf16")([picture], boxes)[0], joints, strict=True
    ):
        assert np.abs(pose.xy - expected).max() < 6


def test_check_boxes_adds_the_score_and_keeps_the_order() -> None:
    boxes = check_boxes([[1, 2, 3, 4], [0, 0, 9, 9]], (10, 10), "image")
    np.testing.assert_array_equal(boxes, [[1, 2, 3, 4, 1], [0, 0, 9, 9, 1]])
    assert check_boxes(np.zeros((0, 4)), (10, 10), "image").shape == (0, 5)
