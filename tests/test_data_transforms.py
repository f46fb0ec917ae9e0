"""Crops: the published affines to float precision, boxes of both profiles, augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pnfs.config import AugmentConfig
from pnfs.data.records import Person
from pnfs.data.transforms import (
    apply_affine,
    box_to_center_scale,
    compose,
    crop_matrix,
    half_body,
    invert_affine,
    joint_weights,
    mirror_matrix,
    person_center_scale,
    sample_augmentation,
)
from pnfs.skeleton import COCO

SIZE = (256, 192)
ASPECT = 0.75


def person(box: list[float], joints: list[list[float]] | None = None, size=(400, 600)) -> Person:
    keypoints = np.zeros((17, 3), np.float32)
    for index, joint in enumerate(joints or []):
        keypoints[index] = joint
    return Person(Path("a.jpg"), 1, keypoints, np.array(box, float), 1.0, 1.0, 7, size)


@pytest.fixture
def pipeline(shared_dir: Path):
    return np.load(shared_dir / "reference" / "pipeline.npz")


def test_affines_are_the_published_ones(pipeline):
    for box, factor, rotation, expected in zip(
        *(pipeline[f"post_{name}"] for name in ("bbox", "aug_scale", "aug_rot", "affine")),
        strict=True,
    ):
        center, scale = box_to_center_scale(box, ASPECT, "standard")
        # The published factor enlarges the person, that is, shrinks the crop.
        found = crop_matrix(center, scale / factor, rotation, SIZE)
        np.testing.assert_allclose(found, expected[:2], rtol=1e-12, atol=1e-11)


def test_joints_and_weights_are_the_published_ones(pipeline):
    keypoints, matrix = pipeline["tgt_a_kp"], pipeline["tgt_a_affine"][:2]
    weights = joint_weights(keypoints[:, :2], keypoints[:, 2], SIZE)
    assert weights.tolist() == pipeline["tgt_a_vis"].tolist()
    expected = pipeline["tgt_a_kp_affine"]
    moved = apply_affine(matrix, keypoints[:, :2])
    inside = joint_weights(moved, keypoints[:, 2], SIZE) > 0
    np.testing.assert_allclose(moved[inside], expected[inside, :2], rtol=1e-12)
    assert (expected[~inside & (keypoints[:, 2] > 0)] == 0).all()


def test_the_crop_matrix_is_hrnets_three_point_affine():
    cv2 = pytest.importorskip("cv2")
    center, scale, rotation = np.array([210.0, 130.0]), np.array([0.9, 1.2]), 25.0
    angle = np.deg2rad(rotation)
    up = np.array([0.0, -scale[0] * 100])
    up = np.array(
        [
            up[0] * np.cos(angle) - up[1] * np.sin(angle),
            up[0] * np.sin(angle) + up[1] * np.cos(angle),
        ]
    )
    middle, target_up = np.array([96.0, 128.0]), np.array([0.0, -96.0])

    def three(point: np.ndarray, direction: np.ndarray) -> np.ndarray:
        return np.array(
            [point, point + direction, point + direction + [-direction[1], direction[0]]],
            np.float32,
        )

    expected = cv2.getAffineTransform(three(center, up), three(middle, target_up))
    np.testing.assert_allclose(crop_matrix(center, scale, rotation, SIZE), expected, atol=1e-3)


def test_a_box_fills_four_fifths_of_the_crop_and_keeps_its_shape():
    center, scale = box_to_center_scale(np.array([50.0, 60, 120, 200]), ASPECT, "standard")
    assert center.tolist() == [110, 160]
    np.testing.assert_allclose(scale * 200, [1.25 * 150, 1.25 * 200])
    corners = apply_affine(crop_matrix(center, scale, 0, SIZE), np.array([[50, 60], [170, 260]]))
    np.testing.assert_allclose(corners[:, 1], [128 - 0.8 * 128, 128 + 0.8 * 128])


def test_the_posenfs_profile_rounds_detected_boxes():
    found = box_to_center_scale(np.array([10.9, 20.2, 30.5, 40.0]), ASPECT, "posenfs")
    expected = box_to_center_scale(np.array([10.0, 20, 31, 41]), ASPECT, "standard")
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected))


def test_annotated_boxes_standard_clips_as_hrnet_does():
    center, scale = person_center_scale(person([-20, 10, 100, 200]), ASPECT, "standard")
    np.testing.assert_allclose(center, [(0 + 99) / 2, 10 + 199 / 2])
    np.testing.assert_allclose(scale[1] * 200 / 1.25, 199)
    at_edge, _ = person_center_scale(person([550, 10, 100, 200]), ASPECT, "standard")
    np.testing.assert_allclose(at_edge[0], (550 + 599) / 2)


def test_annotated_boxes_posenfs_holds_the_labelled_joints_and_five_pixels():
    joints = [[90, 50, 2], [300, 350, 1], [599, 399, 0]]
    center, scale = person_center_scale(person([100.6, 60, 50, 100], joints), ASPECT, "posenfs")
    np.testing.assert_allclose(center, [(85 + 305) / 2, (45 + 355) / 2])
    np.testing.assert_allclose(scale[1] * 200 / 1.25, 310)
    edge = person([2, 3, 590, 390], [[1, 1, 2]])
    center, _ = person_center_scale(edge, ASPECT, "posenfs")
    np.testing.assert_allclose(center, [597 / 2, 398 / 2])  # stays in the image


def test_annotated_boxes_without_image_size_are_taken_as_they_are():
    whole = person([-20, 10, 100, 200], [[500, 5, 2]], size=None)
    for profile in ("standard", "posenfs"):
        assert person_center_scale(whole, 1.0, profile)[0].tolist() == [30, 110]


def test_a_sliver_of_a_box_still_makes_a_crop():
    for profile in ("standard", "posenfs"):
        _, scale = person_center_scale(person([599.5, 10, 0.5, 0.5], [[0, 0, 0]]), ASPECT, profile)
        assert (scale > 0).all()


@given(
    st.floats(-500, 500),
    st.floats(-500, 500),
    st.floats(0.05, 5),
    st.floats(-180, 180),
    st.integers(0, 9),
)
def test_inverse_and_composition_undo_the_crop(x, y, scale, rotation, seed):
    matrix = crop_matrix(np.array([x, y]), np.array([scale, scale / ASPECT]), rotation, SIZE)
    points = np.random.default_rng(seed).uniform(0, 200, (5, 2))
    back = apply_affine(invert_affine(matrix), apply_affine(matrix, points))
    np.testing.assert_allclose(back, points, atol=1e-6)
    mirror = mirror_matrix(SIZE[1])
    chained = apply_affine(compose(mirror, matrix), points)
    np.testing.assert_allclose(chained[:, 0], 191 - apply_affine(matrix, points)[:, 0], atol=1e-6)


def test_inverses_of_a_stack():
    stack = np.stack(
        [crop_matrix(np.array([5.0, 6]), np.array([1.0, 1]), r, SIZE) for r in (0, 30)]
    )
    np.testing.assert_allclose(invert_affine(stack)[1], invert_affine(stack[1]))


def test_augmentation_has_the_published_ranges():
    config = AugmentConfig()
    drawn = [sample_augmentation(np.random.default_rng(s), config, "standard") for s in range(2000)]
    factors, rotations = np.array([d.factor for d in drawn]), np.array([d.rotation for d in drawn])
    assert factors.min() == 0.7 and factors.max() == 1.3
    assert np.abs(rotations).max() == 90 and 0.55 < (rotations != 0).mean() < 0.65
    assert 0.46 < np.mean([d.flip for d in drawn]) < 0.54
    assert {d.half_body for d in drawn} == {None}
    inverse = [
        sample_augmentation(np.random.default_rng(s), config, "posenfs").factor for s in range(50)
    ]
    np.testing.assert_allclose(1 / np.array(inverse), factors[:50])


def test_settings_do_not_shift_the_random_stream():
    plain = AugmentConfig(half_body_probability=0, flip_probability=0, rotation_probability=0)
    rich = AugmentConfig(half_body_probability=1)
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    sample_augmentation(first, plain, "standard")
    sample_augmentation(second, rich, "standard")
    assert first.random() == second.random()


def test_half_body_surrounds_one_half():
    keypoints = np.zeros((17, 3), np.float32)
    keypoints[:, 0], keypoints[:, 1], keypoints[:, 2] = 100, np.arange(17) * 10, 2
    upper = half_body(keypoints, COCO, ASPECT, "upper", 8)
    lower = half_body(keypoints, COCO, ASPECT, "lower", 8)
    assert upper is not None and lower is not None
    assert upper[0].tolist() == [100, 50] and lower[0].tolist() == [100, 135]
    np.testing.assert_allclose(upper[1] * 200, [1.5 * 75, 1.5 * 100])


def test_half_body_falls_back_to_the_other_half_or_to_none():
    keypoints = np.zeros((17, 3), np.float32)
    keypoints[:8] = [[10 * k, 5, 1] for k in range(8)]
    keypoints[12] = (7, 90, 2)
    found = half_body(keypoints, COCO, ASPECT, "lower", 8)
    assert found is not None and found[0].tolist() == [35, 5]
    assert half_body(keypoints, COCO, ASPECT, "upper", 10) is None
