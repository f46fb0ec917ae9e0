"""A photograph end to end: training from scratch until AP is 1.0 on it, then `pnfs predict`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pnfs.cli import main
from pnfs.config import load_config
from pnfs.skeleton import COCO
from pnfs.train import train

IMAGE_ID, NAME = 785, "000000000785.jpg"
SETTINGS = (
    "data={dataset: coco, workers: 0, augment: {scale: 0, rotation: 0, flip_probability: 0}}",
    "model.input_size=[256, 192]",
    "model.backbone={layers: 6, reserve: 3, hidden: 1, channels: 2, operations: [skip, separable]}",
    "model.fabric={layers: 6, cut: 3, channels: 2}",
    "train={batch_size: 1, epochs: 5, eval_every: 0, lr: 3e-3, lr_schedule: cosine}",
    "eval.flip=false",
)


def only_this_image(shared: Path, root: Path) -> Path:
    """A COCO folder with one image, its people repeated for training so that epochs are long."""
    source = shared / "data" / "coco"
    tree = json.loads((source / "annotations" / "person_keypoints_val2017.json").read_text())
    tree["images"] = [image for image in tree["images"] if image["id"] == IMAGE_ID]
    own = [a for a in tree["annotations"] if a["image_id"] == IMAGE_ID]
    (root / "annotations").mkdir(parents=True)
    for split, copies in (("train2017", 40), ("val2017", 1)):
        many = [copy.deepcopy(a) for a in own for _ in range(copies)]
        for number, annotation in enumerate(many):
            annotation["id"] = number + 1
        annotations = root / "annotations" / f"person_keypoints_{split}.json"
        annotations.write_text(json.dumps(tree | {"annotations": many}))
        (root / split).mkdir()
        (root / split / NAME).symlink_to(source / "val2017" / NAME)
    return root


def test_a_photograph_is_learnt_to_ap_one_and_predicted(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = only_this_image(shared_dir, tmp_path / "coco")
    run, out = tmp_path / "run", tmp_path / "out"
    result = train(load_config("tiny", [*SETTINGS, f"data.root={root}"]), run, quiet=True)
    assert result.metrics["AP"] == pytest.approx(1.0)

    boxes = root / "annotations" / "person_keypoints_val2017.json"
    with pytest.raises(SystemExit) as end:
        main(["predict", str(run), str(root / "val2017"), "--boxes", str(boxes), "--out", str(out)])
    assert end.value.code in (0, None)
    assert "1 pose in 1 image" in capsys.readouterr().out
    [pose] = json.loads((out / "predictions.json").read_text())
    assert pose["image_id"] == IMAGE_ID
    truth = json.loads(boxes.read_text())["annotations"][0]
    found = np.array(pose["keypoints"]).reshape(17, 3)
    want = np.array(truth["keypoints"], float).reshape(17, 3)
    squared = ((found - want)[:, :2] ** 2).sum(1)
    variance = (2 * np.array(COCO.oks_sigmas)) ** 2 * truth["area"]
    assert np.exp(-squared / (2 * variance)).mean() > 0.95
    [drawing] = out.glob("*_poses.*")
    photograph = cv2.imread(str(root / "val2017" / NAME))
    drawn = cv2.imread(str(drawing))
    assert drawn.shape == photograph.shape
    assert (np.abs(drawn.astype(int) - photograph).max(2) > 60).sum() > 500  # limbs are there
