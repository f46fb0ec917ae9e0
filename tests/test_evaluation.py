"""COCO AP against golden figures, PCKh against a hand count, and `evaluate` from model to files."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scenes import Pointer, UnflipPointer, scene_config, write_scene

from pnfs.config import load_config
from pnfs.data import PeopleDataset, Person, load_people
from pnfs.errors import PnfsError
from pnfs.evaluation import EvalResult, evaluate
from pnfs.evaluation.coco import Candidates, coco_ap, coco_results, rescore
from pnfs.evaluation.pckh import PCKH_10, PCKH_10_CUSTOMARY, PCKH_50, pckh
from pnfs.skeleton import COCO, MPII

GOLDEN = {
    "AP": 0.52875, "AP50": 0.90429, "AP75": 0.50099, "AP(M)": 0.42475, "AP(L)": 0.62196,
    "AR": 0.58333, "AR50": 0.91667, "AR75": 0.58333, "AR(M)": 0.44, "AR(L)": 0.68571,
}  # fmt: skip


def candidates_of(
    annotations: list[dict[str, Any]], factors: tuple[float, float, float]
) -> Candidates:
    keypoints = np.array([a["keypoints"] for a in annotations], np.float32).reshape(-1, 17, 3)
    boxes = np.array([a["bbox"] for a in annotations])
    return Candidates(
        image_ids=np.array([a["image_id"] for a in annotations]),
        keypoints=keypoints * np.array(factors, np.float32),
        box_scores=np.full(len(annotations), 0.98, np.float32),
        areas=1.25**2 * boxes[:, 2] * boxes[:, 3],
    )


def person(image_id: int, annotation_id: int, x: float, y: float, size: float) -> dict[str, Any]:
    """An annotation with 17 visible keypoints on a grid of `size` pixels at (x, y)."""
    steps = np.arange(17)
    keypoints = np.stack([x + steps % 4 * size / 4, y + steps // 4 * size / 4, np.full(17, 2)], 1)
    return {
        "id": annotation_id, "image_id": image_id, "category_id": 1, "iscrowd": 0,
        "num_keypoints": 17, "keypoints": keypoints.ravel().tolist(),
        "bbox": [x, y, size, size], "area": size * size * 0.6,
    }  # fmt: skip


def coco_tree(people: list[dict[str, Any]]) -> dict[str, Any]:
    images = [{"id": i} for i in sorted({p["image_id"] for p in people})]
    return {"images": images, "annotations": people, "categories": [{"id": 1, "name": "person"}]}


def test_golden_figures_of_real_annotations_to_five_decimals(shared_dir: Path) -> None:
    file = shared_dir / "data" / "coco" / "annotations" / "person_keypoints_val2017.json"
    annotations = sorted(json.loads(file.read_text())["annotations"], key=lambda a: a["id"])
    results = coco_results(candidates_of(annotations, (0.98, 1.02, 0.8)), COCO)
    scores = coco_ap(results, file, COCO)
    assert {name: round(value, 5) for name, value in scores.items()} == GOLDEN


def test_true_keypoints_score_one_and_nothing_scores_zero() -> None:
    people = [person(i, i, 10 * i, 20, 120) for i in range(1, 4)]
    perfect = coco_results(candidates_of(people, (1, 1, 0.4)), COCO)
    assert coco_ap(perfect, coco_tree(people), COCO)["AP"] == pytest.approx(1.0)
    assert coco_ap([], coco_tree(people), COCO)["AP"] == 0.0


def test_a_size_range_without_people_is_marked_minus_one() -> None:
    people = [person(1, 1, 10, 20, 200)]
    scores = coco_ap(
        coco_results(candidates_of(people, (1, 1, 0.4)), COCO), coco_tree(people), COCO
    )
    assert scores["AP(M)"] == -1 and scores["AP(L)"] == pytest.approx(1.0)


def test_near_duplicates_are_suppressed_within_an_image_only() -> None:
    people = [person(1, 1, 50, 50, 100), person(1, 2, 50.5, 50, 100), person(2, 3, 50, 50, 100)]
    kept = coco_results(candidates_of(people, (1, 1, 0.4)), COCO)
    assert [k["image_id"] for k in kept] == [1, 2]


def test_equal_scores_go_to_the_later_candidate_in_standard_and_the_earlier_in_posenfs() -> None:
    people = [person(1, 1, 50, 50, 100), person(1, 2, 50.5, 50, 100)]
    candidates = candidates_of(people, (1, 1, 0.4))
    assert coco_results(candidates, COCO)[0]["keypoints"][0] == 50.5
    assert coco_results(candidates, COCO, profile="posenfs")[0]["keypoints"][0] == 50


def test_posenfs_spares_the_candidate_after_a_removed_one() -> None:
    people = [person(1, i, 50 + 0.1 * i, 50, 100) for i in range(1, 4)]
    candidates = candidates_of(people, (1, 1, 0.4))
    assert len(coco_results(candidates, COCO)) == 1
    assert len(coco_results(candidates, COCO, profile="posenfs")) == 2


def test_pose_score_is_box_score_times_mean_of_joints_above_the_threshold() -> None:
    joints = np.array([[0.9, 0.5, 0.2, 0.1], [0.2, 0.1, 0.0, -1.0]], np.float32)
    np.testing.assert_allclose(rescore(joints, np.array([0.5, 1.0])), [0.35, 0.0], atol=1e-7)


def test_pose_scores_add_joint_by_joint_in_float32() -> None:
    joints = np.random.default_rng(0).random((50, 17)).astype(np.float32)
    for row, value in zip(joints, rescore(joints, np.full(50, 0.98)), strict=True):
        total, count = np.float32(0), 0
        for score in row:
            if score > 0.2:
                total, count = np.float32(total + score), count + 1
        assert value == np.float32(total / np.float32(count)) * np.float32(0.98)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "image_id 9 is not in the annotations"),
        ({"keypoints": [0.0] * 48}, "keypoints has 48 values, skeleton 'coco' needs 51"),
    ],
)
def test_predictions_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    people = [person(1, 1, 10, 20, 200)]
    result = coco_results(candidates_of(people, (1, 1, 0.4)), COCO)[0]
    with pytest.raises(PnfsError, match=message):
        coco_ap([{**result, **change}], coco_tree(people), COCO)


def test_annotations_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    with pytest.raises(PnfsError, match=r"gone\.json: COCO annotation file is missing"):
        coco_ap([], tmp_path / "gone.json", COCO)
    (tmp_path / "info.json").write_text('{"images": [], "categories": []}')
    with pytest.raises(PnfsError, match=r"info\.json: no 'annotations'.*server"):
        coco_ap([], tmp_path / "info.json", COCO)
    wrong = person(1, 7, 0, 0, 50)
    wrong["keypoints"] = [0.0] * 48
    with pytest.raises(PnfsError, match=r"annotation 7: keypoints has 48 values"):
        coco_ap([], coco_tree([wrong]), COCO)


def test_scoring_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    people = [person(1, 1, 10, 20, 200)]
    coco_ap(coco_results(candidates_of(people, (1, 1, 0.4)), COCO), coco_tree(people), COCO)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


# ---- PCKh ----


def mpii_people(n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    truth = generator.uniform(0, 300, (n, 16, 2))
    heads = generator.uniform(20, 60, n)
    visible = generator.random((n, 16)) < 0.8
    angle = generator.uniform(0, 2 * np.pi, (n, 16))
    distance = generator.uniform(0, 1, (n, 16)) * heads[:, None]
    shift = np.stack([np.cos(angle), np.sin(angle)], -1) * distance[..., None]
    return truth + shift, truth, visible, heads


def test_pckh_equals_a_count_by_hand() -> None:
    predictions, truth, visible, heads = mpii_people()
    scores = pckh(predictions, truth, visible, heads, MPII)

    def share(joint: int, threshold: float) -> tuple[float, int]:
        rows = np.flatnonzero(visible[:, joint])
        far = [np.hypot(*(predictions[i, joint] - truth[i, joint])) / heads[i] for i in rows]
        return 100 * float(np.mean(np.array(far) <= threshold)), len(rows)

    for group, joints in MPII.pckh_groups.items():
        assert scores[group] == pytest.approx(np.mean([share(k, 0.5)[0] for k in joints]))
    counted = [k for k, name in enumerate(MPII.keypoints) if name not in ("pelvis", "thorax")]
    for name, threshold in ((PCKH_50, 0.5), (PCKH_10, 0.10), (PCKH_10_CUSTOMARY, 0.11)):
        shares = [share(k, threshold) for k in counted]
        total = sum(count for _, count in shares)
        assert scores[name] == pytest.approx(sum(s * count for s, count in shares) / total)


def test_pckh_counts_a_distance_equal_to_the_threshold_as_right() -> None:
    truth = np.zeros((1, 16, 2))
    predictions = truth + [5.0, 0.0]
    scores = pckh(predictions, truth, np.ones((1, 16), bool), np.array([10.0]), MPII)
    assert scores[PCKH_50] == 100 and scores[PCKH_10_CUSTOMARY] == 0


def test_pckh_mean_ignores_pelvis_and_thorax_and_counts_missing_predictions_as_wrong() -> None:
    truth = np.zeros((2, 16, 2))
    predictions = truth.copy()
    predictions[:, [2, 15]] = 1e3
    args = np.ones((2, 16), bool), np.array([10.0, 10.0]), MPII
    assert pckh(predictions, truth, *args)[PCKH_50] == 100
    predictions[1] = np.nan
    assert pckh(predictions, truth, *args)[PCKH_50] == 50


def test_pckh_without_head_sizes_says_what_to_do() -> None:
    predictions, truth, visible, heads = mpii_people(3)
    heads[1] = np.nan
    with pytest.raises(PnfsError, match=r"person 1 has no head size \(1 of 3.*gt_valid\.mat"):
        pckh(predictions, truth, visible, heads, MPII)
    with pytest.raises(PnfsError, match="'coco' has no PCKh groups"):
        pckh(predictions, truth, visible, heads, COCO)


# ---- evaluate: from model to files ----


@pytest.mark.parametrize("profile", ["standard", "posenfs"])
@pytest.mark.parametrize("flip", [False, True])
def test_evaluate_scores_a_model_that_is_right(tmp_path: Path, profile: str, flip: bool) -> None:
    write_scene(tmp_path, COCO)
    config = scene_config(tmp_path, f"eval.profile={profile}", f"eval.flip={flip}")
    people = load_people(config.data, COCO, "val")
    model, steps = UnflipPointer(17).train(), []
    result = evaluate(model, people, config, progress=lambda *step: steps.append(step))
    assert result.metrics["AP"] > 0.95 and len(result.predictions) == 6
    assert steps == [(4, 6), (6, 6)]
    assert model.training and not any(model.modes)  # run in eval mode, left as it was
    text = result.text()
    assert "coco val2017, ground-truth boxes (6 people in 3 images)" in text
    assert f"profile: {profile}" in text and f"flip test: {'on' if flip else 'off'}" in text
    assert "mean of joint scores > 0.2; OKS-NMS > 0.9" in text and "maxDets 20" in text


def test_written_results_score_the_same_when_read_back(tmp_path: Path) -> None:
    write_scene(tmp_path, COCO)
    config = scene_config(tmp_path)
    people = load_people(config.data, COCO, "val")
    result = evaluate(UnflipPointer(17), people, config)
    result.write(tmp_path / "out")
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert coco_ap(predictions, people.annotation_file, COCO) == result.metrics
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored == {"metrics": result.metrics, "description": list(result.description)}
    assert (tmp_path / "out" / "evaluation.txt").read_text() == result.text() + "\n"


def test_detected_boxes_are_scored_and_named(tmp_path: Path) -> None:
    annotations = write_scene(tmp_path, COCO)
    detections = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.5}
        for a in annotations
    ]
    (tmp_path / "found.json").write_text(json.dumps(detections))
    config = scene_config(tmp_path, f"data.boxes={tmp_path / 'found.json'}")
    result = evaluate(UnflipPointer(17), load_people(config.data, COCO, "val"), config)
    assert result.metrics["AP"] > 0.95
    assert all(prediction["score"] <= 0.5 for prediction in result.predictions)
    assert "detected boxes of found.json" in result.text()


def test_a_split_without_annotations_gives_predictions_and_no_score(tmp_path: Path) -> None:
    annotations = write_scene(tmp_path, COCO)
    file = tmp_path / "annotations" / "person_keypoints_val2017.json"
    tree = json.loads(file.read_text())
    file.unlink()
    del tree["annotations"]
    (tmp_path / "annotations" / "image_info_val2017.json").write_text(json.dumps(tree))
    (tmp_path / "found.json").write_text(json.dumps([{**a, "score": 1.0} for a in annotations]))
    config = scene_config(tmp_path, f"data.boxes={tmp_path / 'found.json'}")
    result = evaluate(UnflipPointer(17), load_people(config.data, COCO, "val"), config)
    assert result.metrics == {} and len(result.predictions) == 6
    assert "not scored" in result.text()


def test_evaluating_on_another_skeleton_is_refused(tmp_path: Path) -> None:
    write_scene(tmp_path, COCO)
    config = scene_config(tmp_path)
    people = load_people(config.data, COCO, "val")
    other = load_config("tiny", ["model.skeleton=mpii", "model.parts=1"])
    with pytest.raises(
        PnfsError, match="has the keypoints of coco, the model predicts those of mpii"
    ):
        evaluate(Pointer(16), people, other)


def test_a_broken_image_stops_evaluation_and_is_named(tmp_path: Path) -> None:
    write_scene(tmp_path, COCO)
    (tmp_path / "val2017" / "2.png").write_bytes(b"")
    config = scene_config(tmp_path)
    with pytest.raises(PnfsError, match=r"2\.png.*empty"):
        evaluate(UnflipPointer(17), load_people(config.data, COCO, "val"), config)


def test_results_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PnfsError, match="file/out: cannot be made"):
        EvalResult({}, (), []).write(tmp_path / "file" / "out")


def mpii_dataset(root: Path, *, head_sizes: bool) -> PeopleDataset:
    annotations = write_scene(root, MPII)
    people = tuple(
        Person(
            image_path=root / "val2017" / f"{a['image_id']}.png",
            image_id=a["image_id"],
            keypoints=np.array(a["keypoints"], np.float32).reshape(-1, 3),
            box=np.array(a["bbox"], np.float64),
            score=1.0,
            area=a["area"],
            annotation_id=a["id"],
            head_size=40.0 if head_sizes else None,
        )
        for a in annotations
    )
    return PeopleDataset(people, MPII, "mpii valid, ground-truth centre and scale", root, (1, 2, 3))


def test_evaluate_gives_pckh_for_mpii(tmp_path: Path) -> None:
    config = scene_config(tmp_path, "model.skeleton=mpii", "model.parts=1", "eval.flip=false")
    result = evaluate(Pointer(16), mpii_dataset(tmp_path, head_sizes=True), config)
    assert result.metrics[PCKH_50] == 100 and result.metrics["wrist"] == 100
    assert PCKH_10 in result.text() and PCKH_10_CUSTOMARY in result.text()
    assert "head size = 0.6 × head-box diagonal" in result.text()
    assert len(result.predictions) == 6


def test_mpii_without_head_sizes_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    config = scene_config(tmp_path, "model.skeleton=mpii", "model.parts=1", "eval.flip=false")
    with pytest.raises(PnfsError, match=r"no head size.*gt_valid\.mat"):
        evaluate(Pointer(16), mpii_dataset(tmp_path, head_sizes=False), config)


def _evaluate_share(rank: int, root: str, port: int) -> None:
    """One of two processes: scores a whole dataset, then one whose first image is broken."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in ("whole", "broken"):
        config = scene_config(Path(root) / name)
        people = load_people(config.data, COCO, "val")
        try:
            evaluate(UnflipPointer(17), people, config).write(Path(root) / f"{name}{rank}")
        except PnfsError as error:
            (Path(root) / f"error{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_two_processes_score_as_one_and_fail_together(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        write_scene(tmp_path / name, COCO)
    # Its first person is rank 0's share alone: rank 1 must not wait for it for ever.
    (tmp_path / "broken" / "val2017" / "1.png").write_bytes(b"")
    config = scene_config(tmp_path / "whole")
    single = evaluate(UnflipPointer(17), load_people(config.data, COCO, "val"), config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_evaluate_share, (str(tmp_path), port), nprocs=2)
    for rank in (0, 1):
        stored = json.loads((tmp_path / f"whole{rank}" / "predictions.json").read_text())
        assert stored == single.predictions
        assert "1.png" in (tmp_path / f"error{rank}").read_text()
