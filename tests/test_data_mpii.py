"""MPII: centre and scale conventions, keypoint order, head sizes, and defects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnfs.config import DataConfig
from pnfs.data import load_people
from pnfs.data.transforms import person_center_scale
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO, MPII


def entry(**changes: Any) -> dict[str, Any]:
    joints = [[10.0 * k + 1, 5.0 * k + 1] for k in range(16)]
    base = {
        "image": "015601864.jpg", "center": [301.0, 201.0], "scale": 2.0,
        "joints": joints, "joints_vis": [1] * 15 + [0],
    }  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annot").mkdir()
    (tmp_path / "images").mkdir()
    return tmp_path


def write(root: Path, entries: Any, split: str = "train") -> None:
    (root / "annot" / f"{split}.json").write_text(json.dumps(entries))


def load(root: Path, split: str = "train", **settings: Any):
    return load_people(DataConfig(dataset="mpii", root=str(root), **settings), MPII, split)


def write_truth(root: Path, count: int, **changes: Any) -> None:
    savemat = pytest.importorskip("scipy.io", reason="MPII's .mat files need scipy").savemat
    heads = np.zeros((2, 2, count))
    heads[1] = np.array([[30.0], [40.0]])
    arrays = {
        "jnt_missing": np.eye(16, count),
        "pos_gt_src": np.arange(32.0 * count).reshape(16, 2, count),
        "headboxes_src": heads,
    }  # fmt: skip
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not ...}
    savemat(str(root / "annot" / "gt_valid.mat"), arrays)


def test_centre_scale_and_joints_follow_hrnets_conventions(root: Path):
    write(root, [entry()])
    (found,) = load(root).people
    center, scale = person_center_scale(found, 1.0, "standard")
    assert center.tolist() == [300, 230]  # down by 15 · scale, 1-based -> 0-based
    np.testing.assert_allclose(scale, 2.5)  # times 1.25
    assert found.image_id == 15601864 and found.image_path == root / "images" / "015601864.jpg"
    # Head top is 9th in the file and first in the skeleton; the file counts pixels from 1.
    assert found.keypoints[MPII.keypoints.index("head_top")].tolist() == [90, 45, 2]
    assert found.keypoints[MPII.keypoints.index("right_ankle")].tolist() == [0, 0, 2]
    assert found.keypoints[MPII.keypoints.index("left_wrist"), 2] == 0


def test_validation_takes_joints_and_head_sizes_from_the_official_file(root: Path):
    write(root, [entry(), entry()], "valid")
    write_truth(root, 2)
    people = load(root, "val").people
    assert [p.head_size for p in people] == [pytest.approx(30.0)] * 2  # 0.6 · diagonal of 30 × 40
    ankle = MPII.keypoints.index("right_ankle")
    assert people[0].keypoints[ankle].tolist() == [-1, 1, 0]
    assert people[1].keypoints[ankle].tolist() == [0, 2, 2]


def test_the_test_split_has_no_joints(root: Path):
    write(root, [entry(joints=..., joints_vis=...)], "test")
    (found,) = load(root, "val", val_split="test").people
    assert not found.keypoints.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joints": [[1, 2]] * 15}, r"\[1\]: joints has 30 numbers, needs 32"),
        ({"joints_vis": [1] * 3}, "joints_vis has 3 numbers, needs 16"),
        ({"center": [float("nan"), 2]}, "center holds NaN"),
        ({"scale": 0}, "must be positive"),
        ({"center": [-1, -1]}, "must be positive"),
        ({"image": ...}, "field 'image' is missing"),
        ({"joints": ...}, "field 'joints' is missing"),
    ],
)
def test_a_broken_annotation(root: Path, changes: dict[str, Any], message: str):
    write(root, [entry(), entry(**changes)])
    dataset = load(root)
    assert len(dataset) == 1
    with pytest.raises(PnfsError, match=message) as error:
        load(root, "val", val_split="train")
    assert str(error.value) == dataset.broken[0] and "train.json" in dataset.broken[0]


def test_files_that_are_missing_or_do_not_belong_together(root: Path):
    with pytest.raises(PnfsError, match=r"train.json: MPII annotation file is missing"):
        load(root)
    write(root, {})
    with pytest.raises(PnfsError, match="must be a list of people"):
        load(root)
    write(root, [])
    with pytest.raises(PnfsError, match="no usable person"):
        load(root)
    write(root, [entry()], "valid")
    with pytest.raises(PnfsError, match=r"gt_valid.mat: head sizes for PCKh are missing"):
        load(root, "val")
    write_truth(root, 3)
    with pytest.raises(PnfsError, match="holds 3 people, valid.json 1"):
        load(root, "val")
    write_truth(root, 1, headboxes_src=...)
    with pytest.raises(PnfsError, match="array 'headboxes_src' is missing"):
        load(root, "val")
    (root / "annot" / "gt_valid.mat").write_bytes(b"nonsense" * 40)
    with pytest.raises(PnfsError, match=r"gt_valid.mat: cannot be read"):
        load(root, "val")
    (root / "images").rmdir()
    with pytest.raises(PnfsError, match="no image folder"):
        load(root, "val")


def test_settings_that_mpii_does_not_have(root: Path):
    write(root, [entry()])
    config = DataConfig(dataset="mpii", root=str(root))
    with pytest.raises(PnfsError, match="set model.skeleton=mpii"):
        load_people(config, COCO, "train")
    with pytest.raises(PnfsError, match=r"data\.boxes: MPII"):
        load(root, "val", boxes="boxes.json", val_split="train")
