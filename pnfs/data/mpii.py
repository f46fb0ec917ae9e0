"""MPII Human Pose in the JSON form of SimpleBaseline and HRNet, with the head sizes of PCKh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pnfs.data.records import BrokenAnnotation, PeopleDataset, Person, numbers, read_json, require
from pnfs.data.transforms import PIXEL_STD
from pnfs.errors import PnfsError
from pnfs.skeleton import Skeleton

_HEAD_FRACTION = 0.6  # of the head box's diagonal


def load_annotated(root: Path, split: str, skeleton: Skeleton, *, strict: bool) -> PeopleDataset:
    """People of `annot/{split}.json` (train, valid, trainval, test), images in `images/`.

    Centre and scale become a box: the centre moves down by 15 · scale px, the side is
    200 · scale px. Files count pixels from 1, people from 0. v is 2 for a labelled joint. For
    `valid`, joints and head sizes come from `annot/gt_valid.mat`, as in the published figures.

    Args:
        strict: a broken annotation is an error (evaluation); else it is left out and listed.

    Raises:
        PnfsError: missing or malformed file, no usable person, or broken annotation and `strict`.
    """
    path, folder = root / "annot" / f"{split}.json", root / "images"
    entries = read_json(path, "MPII annotation file")
    if not isinstance(entries, list):
        raise PnfsError(f"{path}: must be a list of people; this is not the JSON form of MPII")
    if not folder.is_dir():
        raise PnfsError(f"data.root {root}: no image folder; looked for {folder}")
    truth = _read_truth(root / "annot" / "gt_valid.mat", len(entries)) if split == "valid" else None
    people: list[Person] = []
    broken: list[str] = []
    for number, entry in enumerate(entries):
        try:
            person = _person(
                entry, f"{path}: [{number}]", number, folder, skeleton, split == "test", truth
            )
        except BrokenAnnotation as problem:
            if strict:
                raise PnfsError(str(problem)) from None
            broken.append(str(problem))
        else:
            if strict or (person.keypoints[:, 2] > 0).any():
                people.append(person)
    people.sort(key=lambda person: person.annotation_id)
    return PeopleDataset(
        people=tuple(people),
        skeleton=skeleton,
        source=f"mpii {split}, ground-truth centre and scale",
        annotation_file=path,
        image_ids=tuple(sorted({person.image_id for person in people})),
        broken=tuple(broken),
    )


def _person(
    entry: Any,
    where: str,
    number: int,
    folder: Path,
    skeleton: Skeleton,
    unlabelled: bool,
    truth: tuple[np.ndarray, np.ndarray] | None,
) -> Person:
    name = str(require(entry, "image", where))
    center = numbers(entry, "center", where, 2)
    scale = float(numbers(entry, "scale", where, 1)[0])
    if scale <= 0 or center[0] < 0:
        raise BrokenAnnotation(
            f"{where}: center {center.tolist()} and scale {scale:g} must be positive; "
            "correct or remove the entry"
        )
    count = skeleton.num_keypoints
    keypoints = np.zeros((count, 3))
    if truth is not None:
        keypoints = truth[0][number]
    elif not unlabelled:
        keypoints[:, :2] = numbers(entry, "joints", where, 2 * count).reshape(-1, 2) - 1
        keypoints[:, 2] = 2 * (numbers(entry, "joints_vis", where, count) > 0)
    side = PIXEL_STD * scale
    middle = center + (0, 15 * scale) - 1
    stem = Path(name).stem
    return Person(
        image_path=folder / name,
        image_id=int(stem) if stem.isdecimal() else number,
        keypoints=keypoints[list(skeleton.file_order)].astype(np.float32),
        box=np.concatenate([middle - side / 2, [side, side]]),
        score=1.0,
        area=side * side,
        annotation_id=number,
        head_size=float(truth[1][number]) if truth is not None else None,
    )


def _read_truth(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Joints (N, 16, 3) in file order, 0-based, and head sizes (N,) of the official evaluation."""
    if not path.is_file():
        raise PnfsError(f"{path}: head sizes for PCKh are missing; put MPII's gt_valid.mat there")
    try:
        from scipy.io import loadmat  # the one use of scipy, and only MPII's evaluation needs it
    except ImportError:
        raise PnfsError(f"{path}: reading it needs scipy; run pip install 'pnfs[mpii]'") from None
    try:
        tree = loadmat(str(path))
        missing, joints, heads = (
            np.asarray(tree[name], np.float64)
            for name in ("jnt_missing", "pos_gt_src", "headboxes_src")
        )
    except KeyError as error:
        raise PnfsError(
            f"{path}: array {error} is missing; fetch MPII's gt_valid.mat again"
        ) from None
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise PnfsError(
            f"{path}: cannot be read ({error}); fetch MPII's gt_valid.mat again"
        ) from None
    if (
        missing.shape != (16, count)
        or joints.shape != (16, 2, count)
        or heads.shape != (2, 2, count)
    ):
        raise PnfsError(
            f"{path}: holds {missing.shape[-1]} people, valid.json {count}; "
            "use files of one release"
        )
    visible = 2 * (1 - missing.T[..., None])
    truth = np.concatenate([joints.transpose(2, 0, 1) - 1, visible], axis=2)
    return truth, _HEAD_FRACTION * np.linalg.norm(heads[1] - heads[0], axis=0)
