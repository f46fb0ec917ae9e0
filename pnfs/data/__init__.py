"""Datasets of people, their crops and the batches that models train on and are scored with."""

from __future__ import annotations

from pathlib import Path

from pnfs.config import DataConfig
from pnfs.data import coco, mpii, synthetic
from pnfs.data.batch import Batch
from pnfs.data.loader import Loader, make_loader, split_half
from pnfs.data.records import PeopleDataset, Person
from pnfs.errors import PnfsError
from pnfs.skeleton import Skeleton

__all__ = [
    "Batch",
    "Loader",
    "PeopleDataset",
    "Person",
    "default_split",
    "load_people",
    "make_loader",
    "split_half",
    "synthetic_root",
]

_SPLITS = {
    "coco": {"train": "train2017", "val": "val2017"},
    "mpii": {"train": "train", "val": "valid"},
    "synthetic": {"train": "train", "val": "val"},
}


def default_split(config: DataConfig, split: str) -> str:
    """The dataset's own name of `train` or `val`, unless the configuration gives another."""
    chosen = config.train_split if split == "train" else config.val_split
    return chosen or _SPLITS[config.dataset][split]


def synthetic_root(config: DataConfig) -> Path:
    """Where the rendered dataset lies: `data.root`, or runs/synthetic in the working folder."""
    return Path(config.root) if config.root else Path("runs") / "synthetic"


def load_people(
    config: DataConfig, skeleton: Skeleton, split: str, *, boxes: str | Path | None = None
) -> PeopleDataset:
    """Read one split of the configured dataset; `synthetic` is rendered first if it is not there.

    Args:
        split: `train` or `val`. In `train`, broken annotations are left out and listed; in `val`
            they are an error.
        boxes: COCO detection result file to use in place of annotated boxes; default
            `config.boxes` for `val`.

    Raises:
        PnfsError: what is wrong with which file and field.
    """
    name, strict = default_split(config, split), split != "train"
    expected = "mpii" if config.dataset == "mpii" else "coco"
    if skeleton.name != expected:
        raise PnfsError(
            f"data.dataset {config.dataset} has the keypoints of {expected}, "
            f"model.skeleton is {skeleton.name}; set model.skeleton={expected}"
        )
    if config.dataset == "synthetic":
        root = synthetic_root(config)
        synthetic.generate(root, config.synthetic)
    elif config.root is None:
        raise PnfsError(f"data.root: set it to the folder of {config.dataset}")
    else:
        root = Path(config.root)
        if not root.is_dir():
            raise PnfsError(
                f"data.root {root}: no such folder; set it to the folder of {config.dataset}"
            )
    detections = boxes if boxes is not None else (config.boxes if strict else None)
    if config.dataset == "mpii":
        if detections is not None:
            raise PnfsError(
                "data.boxes: MPII is scored with its own centres and scales; leave it unset"
            )
        return mpii.load_annotated(root, name, skeleton, strict=strict)
    if detections is not None:
        threshold = config.box_score_threshold
        return coco.load_detected(root, name, skeleton, Path(detections), threshold=threshold)
    return coco.load_annotated(root, name, skeleton, strict=strict, name=config.dataset)
