"""The whole system in minutes: drawn people → training → AP on unseen people → pictures → summary.

Everything is what `pnfs train`, `pnfs eval` and `pnfs plot` use, with preset `tiny`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pnfs.config import load_config
from pnfs.data import PeopleDataset, Person, load_people
from pnfs.data.images import read_image
from pnfs.errors import PnfsError
from pnfs.estimator import Pose, PoseEstimator
from pnfs.plotting import draw_poses, part_legend, plot_curves, plot_model_architecture, tile
from pnfs.runlog import METRICS
from pnfs.runtime import keep_heap
from pnfs.statefile import write_atomically, write_json
from pnfs.train import train

SHOWN_IMAGES = 6
ENLARGE = 2  # of the small drawn images, so that the limbs are crisp


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; also written as summary.json.

    Attributes:
        metrics: COCO AP and AR on the unseen people.
        people: how many unseen people there were.
        seconds: by stage: data, training (with its evaluation), pictures; and `total`.
        pictures: what it shows -> where it is.
        run: the run folder.
    """

    metrics: dict[str, float]
    people: int
    seconds: dict[str, float]
    pictures: dict[str, str]
    run: str


def run_demo(
    out: str | Path, *, overwrite: bool = False, device: str = "auto", settings: Sequence[str] = ()
) -> DemoResult:
    """Run the demo and print its summary.

    Args:
        out: folder for data/, run/, pictures and summary.json.
        overwrite: discard an earlier demo's run; its data is used again if it fits.
        device: as for `train`.
        settings: dotted overrides of preset `tiny`.

    Raises:
        PnfsError: an earlier demo is in the way, the folder cannot be written, or training was
            stopped by a signal.
    """
    keep_heap()
    out = Path(out)
    run = out / "run"
    if run.exists() and not overwrite:
        raise PnfsError(f"{out}: holds an earlier demo; add --overwrite or choose another --out")
    config = load_config("tiny", settings)
    data = config.data.model_copy(update={"root": str((out / "data").resolve())})
    config = config.model_copy(update={"data": data})

    started = time.monotonic()
    print(f"1/3 drawing people into {data.root}", flush=True)
    skeleton = config.model.skeleton_table
    load_people(data, skeleton, "train")
    unseen = load_people(data, skeleton, "val")
    drawn = time.monotonic()

    print(f"2/3 training preset tiny, then scoring on {len(unseen)} unseen people", flush=True)
    result = train(config, run, overwrite=overwrite, device=device)
    if result.stopped_by is not None:
        raise PnfsError(
            f"demo: stopped by {result.stopped_by}; go on with pnfs train --resume --out {run}, "
            "or start again with --overwrite"
        )
    trained = time.monotonic()

    print("3/3 drawing the architecture, the curves and some predictions", flush=True)
    estimator = PoseEstimator(run, device)
    architecture = plot_model_architecture(estimator.model, out / "architecture")
    pictures = {f"architecture ({path.suffix[1:]})": str(path) for path in architecture}
    pictures["training curves"] = str(plot_curves(run / METRICS, out / "curves.png")[0])
    pictures["predictions beside the truth"] = str(
        _draw_predictions(estimator, unseen, out / "predictions.png")
    )
    ended = time.monotonic()
    stages = {"data": drawn - started, "training": trained - drawn, "pictures": ended - trained}
    seconds = {name: round(value, 1) for name, value in stages.items()}
    demo = DemoResult(
        metrics=result.metrics,
        people=len(unseen),
        seconds=seconds | {"total": round(ended - started, 1)},
        pictures=pictures,
        run=str(run),
    )
    summary = {
        "AP": demo.metrics["AP"],
        "AP50": demo.metrics["AP50"],
        "seconds": demo.seconds["total"],
        "seconds_by_stage": seconds,
        "people": demo.people,
        "metrics": demo.metrics,
        "pictures": demo.pictures,
        "run": demo.run,
    }
    write_json(out / "summary.json", summary)
    _print_summary(demo, out / "summary.json")
    return demo


def _print_summary(demo: DemoResult, path: Path) -> None:
    metrics, seconds = demo.metrics, demo.seconds
    parts = ", ".join(f"{name} {value:g}" for name, value in seconds.items() if name != "total")
    print(f"\nAP {metrics['AP']:.3f}   AP50 {metrics['AP50']:.3f}   on {demo.people} unseen people")
    print(f"{seconds['total']:.0f} seconds ({parts})")
    for name, picture in demo.pictures.items():
        print(f"{name}: {picture}")
    print(f"run folder: {demo.run}\nsummary: {path}", flush=True)


def _draw_predictions(estimator: PoseEstimator, people: PeopleDataset, path: Path) -> Path:
    """Predictions (left) beside the truth (right) in the first images that have people."""
    by_image: dict[Path, list[Person]] = {}
    for person in people.people:
        by_image.setdefault(person.image_path, []).append(person)
    shown = list(by_image)[:SHOWN_IMAGES]
    images = [read_image(image, apply_exif=False) for image in shown]
    boxes = [np.stack([_corners(person) for person in by_image[image]]) for image in shown]
    predicted = estimator(images, boxes, color="bgr")
    skeleton, parts = estimator.skeleton, estimator.config.part_table
    cells: list[np.ndarray] = []
    captions: list[str] = []
    for image, name, poses in zip(images, shown, predicted, strict=True):
        truth = [_truth(person) for person in by_image[name]]
        for which, drawn in (("predicted", poses), ("truth", truth)):
            cells.append(draw_poses(image, drawn, skeleton, parts, scale=ENLARGE))
            captions.append(f"{name.name}: {which}")
    sheet = tile(cells, 4, captions=captions)
    sheet = np.concatenate([sheet, part_legend(parts, sheet.shape[1])])
    encoded = cv2.imencode(".png", sheet)[1].tobytes()

    def write(temporary: Path) -> None:
        temporary.write_bytes(encoded)

    write_atomically(path, write)
    return path


def _corners(person: Person) -> np.ndarray:
    x, y, width, height = person.box
    return np.array([x, y, x + width, y + height], np.float32)


def _truth(person: Person) -> Pose:
    labelled = (person.keypoints[:, 2] > 0).astype(np.float32)
    return Pose(person.keypoints[:, :2], labelled, 1.0, _corners(person))
