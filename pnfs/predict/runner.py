"""From files to drawings and results: what `pnfs predict` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from pnfs.data.transforms import PIXEL_STD, box_to_center_scale
from pnfs.errors import PnfsError
from pnfs.estimator import Pose, PoseEstimator, check_boxes
from pnfs.evaluation.coco import Candidates, results_format, suppress, write_results
from pnfs.plotting import draw_poses
from pnfs.predict.boxes import BoxTable, read_boxes
from pnfs.predict.media import (
    Frame,
    VideoReader,
    VideoWriter,
    drawing_path,
    image_numbers,
    image_paths,
    is_video,
    read_images,
    write_image,
)
from pnfs.statefile import make_folder

RESULTS = "predictions.json"
_IMAGES_AT_ONCE = 16  # held in memory, however few boxes they have


@dataclass(frozen=True)
class PredictReport:
    """What `predict` did.

    Attributes:
        images: images or video frames whose poses were estimated.
        poses: poses written, after suppression of near-duplicates.
        results: the JSON file.
        drawings: one per image, or one video.
        problems: one line for each image or frame that was left out.
    """

    images: int
    poses: int
    results: Path
    drawings: tuple[Path, ...]
    problems: tuple[str, ...]

    def summary(self) -> str:
        """What was done, in one line; counts what was left out."""
        left = ""
        if self.problems:
            left = f"; {len(self.problems)} left out, the first: {self.problems[0]}"
        return (
            f"{_count(self.poses, 'pose')} in {_count(self.images, 'image')}; "
            f"{_count(len(self.drawings), 'drawing')} and {self.results.name} in "
            f"{self.results.parent}{left}"
        )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def predict(
    estimator: PoseEstimator,
    source: str | Path,
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    box_threshold: float = 0.0,
    nms_threshold: float = 0.9,
    quiet: bool = False,
) -> PredictReport:
    """Estimate, draw and write the poses of an image, of every image in a folder, or of a video.

    Drawings are called like their image with `_poses` added; a video gives an MP4 (whose codec
    wants even sides: an odd one loses its last pixel). Images are turned as their EXIF orientation
    says, except with boxes of a COCO file, which refer to the pixels as stored. Results also have
    the `file_name`.

    Args:
        estimator: the model.
        source: an image, a folder (its images, not those of folders below) or a video.
        out: folder for drawings and predictions.json; made if it is not there.
        boxes: file with boxes, see `read_boxes`; images that it does not name have nobody in them.
            None: the whole image is one box.
        box_threshold: boxes with a lower score are left out.
        nms_threshold: of two poses in an image with a higher OKS the better one stays.
        quiet: no progress and no warnings; `PredictReport.problems` has them.

    Raises:
        PnfsError: nothing to read, unreadable boxes, an unwritable folder, or no image that could
            be used (names the first problem). One bad image among several is reported, counted and
            left out.
    """
    source, out = Path(source), Path(out)
    table = None if boxes is None else read_boxes(boxes)
    reader = VideoReader(source) if is_video(source) else None
    frames, total = (
        _open_images(source, out, table) if reader is None else _open_video(reader, table)
    )
    make_folder(out)
    done = _Done([], [], [], 0)
    console = Console(stderr=True, quiet=quiet)
    with contextlib.ExitStack() as stack:
        writer = None
        if reader is not None:
            path = drawing_path(out, source.name)
            writer = stack.enter_context(VideoWriter(path, reader.rate))
        bar = stack.enter_context(Progress(console=console, disable=quiet))
        task = bar.add_task("poses", total=total)
        for chunk in _chunks(_with_boxes(frames, table, box_threshold), estimator.batch_size):
            for frame, poses in _estimate(estimator, chunk):
                bar.advance(task)
                if frame.problem is not None:
                    done.problems.append(frame.problem)
                    line = f"left out: {frame.problem}"
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                kept = _keep(poses, frame, estimator, nms_threshold, done.results)
                _draw(frame, kept, estimator, out, writer, done)
    if done.images == 0:
        first = done.problems[0] if done.problems else f"{source}: has no frames"
        others = f" (none of {total} could be used)" if len(done.problems) > 1 else ""
        raise PnfsError(first + others)
    if writer is not None:
        done.drawings.append(writer.path)
    write_results(out / RESULTS, done.results)
    return PredictReport(
        done.images, len(done.results), out / RESULTS, tuple(done.drawings), tuple(done.problems)
    )


@dataclass
class _Done:
    """What has been finished so far."""

    results: list[dict[str, Any]]
    drawings: list[Path]
    problems: list[str]
    images: int


@dataclass(frozen=True, eq=False)
class _Work:
    """A frame and its checked boxes (n, 5)."""

    frame: Frame
    boxes: np.ndarray


def _open_images(source: Path, out: Path, table: BoxTable | None) -> tuple[Iterator[Frame], int]:
    """The images of `source` one by one, and how many there are."""
    paths = image_paths(source)
    if source.is_dir() and source.resolve() == out.resolve():
        raise PnfsError(f"{out}: drawings would mix with the images; choose another --out")
    numbers = image_numbers(paths)
    if table is not None:
        numbers = [
            table.ids.get(path.name, number) for path, number in zip(paths, numbers, strict=True)
        ]
        table.check_matches([(p.name, n) for p, n in zip(paths, numbers, strict=True)])
    turned = table is None or not table.coco
    return read_images(paths, numbers, apply_exif=turned), len(paths)


def _open_video(reader: VideoReader, table: BoxTable | None) -> tuple[Iterator[Frame], int | None]:
    """The frames of a video one by one, and how many there are, if it says so."""
    if table is not None and reader.length is not None:
        table.check_matches([(reader.path.name, number) for number in range(reader.length)])
    return reader.frames(), reader.length


def _with_boxes(
    frames: Iterable[Frame], table: BoxTable | None, threshold: float
) -> Iterator[_Work]:
    """Every frame with its boxes; bad boxes become the frame's problem."""
    nobody = np.zeros((0, 5))
    for frame in frames:
        if frame.pixels is None:
            yield _Work(frame, nobody)
            continue
        height, width = frame.pixels.shape[:2]
        rows = None if table is None else table.rows(frame.name, frame.image_id, threshold)
        try:
            yield _Work(frame, check_boxes(rows, (height, width), frame.name))
        except PnfsError as error:
            yield _Work(replace(frame, problem=str(error)), nobody)


def _chunks(work: Iterable[_Work], boxes: int) -> Iterator[list[_Work]]:
    """Consecutive frames with about as many boxes together as a batch holds."""
    chunk: list[_Work] = []
    for item in work:
        chunk.append(item)
        if len(chunk) == _IMAGES_AT_ONCE or sum(len(w.boxes) for w in chunk) >= boxes:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _estimate(estimator: PoseEstimator, chunk: list[_Work]) -> Iterator[tuple[Frame, list[Pose]]]:
    """Every frame of the chunk with its poses; none where there is nobody or a problem."""
    crowded = [w for w in chunk if len(w.boxes)]
    poses = iter(
        estimator(
            [w.frame.pixels for w in crowded if w.frame.pixels is not None],
            [w.boxes for w in crowded],
            color="bgr",
        )
    )
    for item in chunk:
        yield item.frame, next(poses) if len(item.boxes) else []


def _keep(
    poses: list[Pose],
    frame: Frame,
    estimator: PoseEstimator,
    threshold: float,
    results: list[dict[str, Any]],
) -> list[Pose]:
    """The poses of one image that are no near-duplicates, best first; appends their results."""
    if not poses:
        return []
    candidates = Candidates(
        image_ids=np.full(len(poses), frame.image_id, np.int64),
        keypoints=np.stack([np.column_stack([pose.xy, pose.confidence]) for pose in poses]),
        box_scores=np.ones(len(poses), np.float32),
        areas=np.array([_area(pose.box, estimator) for pose in poses]),
    )
    scores = np.array([pose.score for pose in poses], np.float32)
    rows = suppress(
        candidates, scores, estimator.skeleton, profile=estimator.profile, threshold=threshold
    )
    for result in results_format(candidates, scores, rows):
        results.append({**result, "file_name": frame.name})
    return [poses[row] for row in rows.tolist()]


def _area(box: np.ndarray, estimator: PoseEstimator) -> float:
    """Square pixels that normalise OKS: the crop's (`standard`) or the box's, as in evaluation."""
    x0, y0, x1, y1 = box.astype(np.float64).tolist()
    if estimator.profile == "posenfs":
        return float((x1 - x0) * (y1 - y0))
    height, width = estimator.config.input_size
    xywh = np.array([x0, y0, x1 - x0, y1 - y0])
    return float(np.prod(box_to_center_scale(xywh, width / height, "standard")[1] * PIXEL_STD))


def _draw(
    frame: Frame,
    poses: list[Pose],
    estimator: PoseEstimator,
    out: Path,
    writer: VideoWriter | None,
    done: _Done,
) -> None:
    """Draw a frame; a video keeps the frames whose boxes are bad, so that it stays in time."""
    done.images += frame.problem is None
    if frame.pixels is None or (frame.problem is not None and writer is None):
        return
    drawing = draw_poses(frame.pixels, poses, estimator.skeleton, estimator.config.part_table)
    if writer is not None:
        writer.add(drawing)
        return
    path = drawing_path(out, frame.name)
    write_image(path, drawing)
    done.drawings.append(path)
