"""Drawn people: the same bytes for the same seed, true annotations, and never half a dataset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pnfs.config import DataConfig, SyntheticConfig
from pnfs.data import load_people, synthetic
from pnfs.data.figure import CODES_PER_PERSON, draw_figure, sample_figure, visibility
from pnfs.data.synthetic import generate, render_scene
from pnfs.errors import PnfsError
from pnfs.skeleton import COCO

SMALL = SyntheticConfig(train_images=4, val_images=2)


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    for name in "ab":
        generate(tmp_path / name, SMALL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(digest(tmp_path / "a")) == 4 + 2 + 2
    generate(tmp_path / "c", SMALL.model_copy(update={"seed": 1}))
    other = digest(tmp_path / "c")
    assert not set(digest(tmp_path / "a").values()) & set(other.values())


def test_more_images_leave_the_earlier_ones_as_they_are(tmp_path: Path):
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", SMALL.model_copy(update={"train_images": 6}))
    few, many = digest(tmp_path / "a"), digest(tmp_path / "b")
    images = [name for name in few if name.endswith(".jpg")]
    assert all(few[name] == many[name] for name in images)


def test_a_complete_dataset_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generate(tmp_path, SMALL)
    monkeypatch.setattr(synthetic, "render_scene", None)
    generate(tmp_path, SMALL)


def test_an_interrupted_run_leaves_no_annotations_and_the_next_one_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render_scene(*arguments)

    monkeypatch.setattr(synthetic, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "a", SMALL)
    assert not list((tmp_path / "a" / "annotations").iterdir())
    monkeypatch.undo()
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", SMALL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_other_settings_or_another_dataset_are_not_overwritten(tmp_path: Path):
    generate(tmp_path, SMALL)
    before = digest(tmp_path)
    with pytest.raises(PnfsError, match="rendered with seed 0, now 5"):
        generate(tmp_path, SMALL.model_copy(update={"seed": 5}))
    (tmp_path / "annotations" / "person_keypoints_val.json").write_text('{"info": {}}')
    with pytest.raises(PnfsError, match="is not a synthetic dataset"):
        generate(tmp_path, SMALL)
    del before["annotations/person_keypoints_val.json"]
    assert before.items() <= digest(tmp_path).items()


def test_an_unwritable_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PnfsError, match=r"cannot be written .*choose another data\.root"):
        generate(tmp_path / "file", SMALL)


def test_too_many_people_for_the_labels():
    with pytest.raises(PnfsError, match="max_people"):
        generate(
            "unused", SyntheticConfig.model_construct(max_people=31, train_images=1, val_images=1)
        )


def test_annotations_are_coco_and_agree_with_the_images(tmp_path: Path):
    generate(tmp_path, SMALL)
    tree = json.loads((tmp_path / "annotations" / "person_keypoints_train.json").read_text())
    assert tree["categories"][0]["keypoints"] == list(COCO.keypoints)
    for entry in tree["annotations"]:
        keypoints = np.array(entry["keypoints"]).reshape(17, 3)
        assert entry["num_keypoints"] == (keypoints[:, 2] > 0).sum() >= 6
        assert (keypoints[keypoints[:, 2] == 0] == 0).all()
        x, y, width, height = entry["bbox"]
        assert x >= 0 and x + width <= 320 and y >= 0 and y + height <= 240
        assert 0 < entry["area"] <= width * height
        seen = keypoints[keypoints[:, 2] == 2, :2]
        assert ((seen >= [x - 1, y - 1]) & (seen <= [x + width, y + height])).all()
    image = cv2.imread(str(tmp_path / "images" / "train" / tree["images"][0]["file_name"]))
    assert image.shape == (240, 320, 3)


def test_pycocotools_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    coco = pytest.importorskip("pycocotools.coco")
    generate(tmp_path, SMALL)
    index = coco.COCO(str(tmp_path / "annotations" / "person_keypoints_val.json"))
    assert index.getAnnIds(catIds=[1], iscrowd=False)


def test_loading_renders_what_is_not_there(tmp_path: Path):
    config = DataConfig(dataset="synthetic", root=str(tmp_path / "new"), synthetic=SMALL)
    train, val = (load_people(config, COCO, split) for split in ("train", "val"))
    assert train.source == "synthetic train, ground-truth boxes" and len(val.image_ids) == 2
    assert all(person.image_path.is_file() for person in (*train.people, *val.people))


@pytest.fixture(scope="module")
def scenes() -> list[synthetic.Scene]:
    return [render_scene(np.random.default_rng([7, i]), (240, 320), 3) for i in range(60)]


def test_scenes_vary(scenes: list[synthetic.Scene]):
    people = [len(scene.boxes) for scene in scenes]
    assert set(people) >= {1, 2, 3} and 1.5 < np.mean(people) < 2.5
    heights = np.array([box[3] for scene in scenes for box in scene.boxes])
    assert heights.min() > 55 and heights.max() < 225 and heights.std() > 15
    flags = np.concatenate([k[:, 2] for scene in scenes for k in scene.keypoints])
    share = np.bincount(flags, minlength=3) / len(flags)
    assert 0.003 < share[1] < 0.1 and share[2] > 0.9
    means = np.array([scene.image.mean(axis=(0, 1)) for scene in scenes])
    assert means.std(axis=0).min() > 10


def test_joints_are_hidden_by_what_is_painted_over_them():
    generator = np.random.default_rng(2)
    figure = sample_figure(generator)
    image, labels = np.full((240, 320, 3), 128, np.uint8), np.zeros((240, 320), np.uint8)
    joints = draw_figure(image, labels, figure, 150, np.array([160, 130]), 0)
    before = visibility(labels, joints, 0)
    assert (before[:5] == 2).all()  # the face is never behind the body
    x, y = np.rint(joints[0]).astype(int)
    labels[y - 1 : y + 2, x - 1 : x + 2] = 255
    assert visibility(labels, joints, 0)[0] == 1
    assert visibility(labels, joints + [1000, 0], 0).tolist() == [0] * 17
    draw_figure(image, labels, figure, 150, np.array([160, 130]), 1)
    assert (visibility(labels, joints, 0) == 1).all()


def test_left_is_the_images_right_and_looks_different():
    figure = sample_figure(np.random.default_rng(0))
    joints = figure.joints
    assert (
        joints[5, 0] > joints[6, 0]
        and joints[11, 0] > joints[12, 0]
        and joints[1, 0] > joints[2, 0]
    )
    image, labels = np.full((240, 320, 3), 128, np.uint8), np.zeros((240, 320), np.uint8)
    draw_figure(image, labels, figure, 180, np.array([160, 130]), 0)
    left, right = (image[labels % CODES_PER_PERSON == code].mean() for code in (5, 6))
    assert labels.max() < CODES_PER_PERSON and left > right + 15


def test_tiny_images_still_hold_somebody():
    for seed in range(5):
        scene = render_scene(np.random.default_rng(seed), (64, 48), 2)
        assert scene.image.shape == (64, 48, 3)
