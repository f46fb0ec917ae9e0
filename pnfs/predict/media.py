"""Images and videos from disk, and drawings to disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from pnfs.data.images import read_image
from pnfs.errors import PnfsError
from pnfs.statefile import reason, write_atomically

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_DEFAULT_RATE = 25.0  # frames per second, where the container does not say


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, or a frame of a video.

    Attributes:
        name: file name.
        image_id: its number in results.
        pixels: uint8 (H, W, 3) BGR; None if it could not be read.
        problem: why it is left out, in one line; None if it is good.
    """

    name: str
    image_id: int
    pixels: np.ndarray | None
    problem: str | None = None


def is_video(path: Path) -> bool:
    """Whether the name is a video's."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def image_paths(source: Path) -> list[Path]:
    """The image itself, or the images of a folder, by name.

    Raises:
        PnfsError: it does not exist, or is a folder without images.
    """
    if not source.is_dir():
        if not source.exists():
            raise PnfsError(f"{source}: no such image, folder or video; check the path")
        return [source]
    paths = sorted(
        path
        for path in source.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise PnfsError(f"{source}: holds no images ({' '.join(IMAGE_SUFFIXES)}); check the folder")
    return paths


def image_numbers(paths: list[Path]) -> list[int]:
    """The numbers that the file names spell, as COCO's do; 1, 2, ... unless all do, differently."""
    spelled = [int(path.stem) for path in paths if path.stem.isdecimal() and len(path.stem) < 19]
    if len(set(spelled)) == len(paths):
        return spelled
    return list(range(1, len(paths) + 1))


def read_images(paths: list[Path], numbers: list[int], *, apply_exif: bool) -> Iterator[Frame]:
    """Every image in turn, read when it is asked for; a bad one as a frame with a problem."""
    for path, number in zip(paths, numbers, strict=True):
        try:
            yield Frame(path.name, number, read_image(path, apply_exif=apply_exif))
        except PnfsError as error:
            yield Frame(path.name, number, None, str(error))


class VideoReader:
    """The frames of a video, numbered from 0.

    Attributes:
        rate: frames per second.
        length: number of frames as the container states it; None if it does not.

    Raises:
        PnfsError: the file is missing or no video that OpenCV can decode.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise PnfsError(f"{path}: no such image, folder or video; check the path")
        self.path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise PnfsError(f"{path}: cannot be opened as a video; convert it to MP4")
        rate, length = (
            self._capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT)
        )
        self.rate = rate if 0 < rate < 1000 else _DEFAULT_RATE
        self.length = int(length) if 0 < length < 1e9 else None

    def frames(self) -> Iterator[Frame]:
        """All frames; a last one with a problem if the video breaks off early."""
        number = 0
        while True:
            good, pixels = self._capture.read()
            if not good:
                break
            yield Frame(self.path.name, number, pixels)
            number += 1
        self._capture.release()
        # Containers round their length; one frame of difference means nothing.
        if self.length is not None and number < self.length - 1:
            problem = (
                f"{self.path}: only {number} of {self.length} frames can be read; "
                "the file is damaged or truncated"
            )
            yield Frame(self.path.name, number, None, problem)


class VideoWriter:
    """Writes an MP4 file, which appears under its name when the last frame is in it."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self._rate = path, rate
        self._temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()
            if kind is None:
                self._finish()
        self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        try:
            self._temporary.replace(self.path)
        except OSError as error:
            raise PnfsError(
                f"{self.path}: cannot be written ({reason(error)}); choose another --out"
            ) from None

    def add(self, pixels: np.ndarray) -> None:
        """Append a frame, uint8 (H, W, 3) BGR; all frames have one size.

        Raises:
            PnfsError: the file cannot be written.
        """
        if self._writer is None:
            size = (pixels.shape[1], pixels.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._temporary), codec, self._rate, size)
            if not self._writer.isOpened():
                raise PnfsError(
                    f"{self.path}: video cannot be written; choose another --out or extract frames"
                )
        self._writer.write(pixels)


def drawing_path(folder: Path, name: str) -> Path:
    """Where the drawing of an image or video called `name` goes."""
    path = Path(name)
    if is_video(path):
        return folder / f"{path.stem}_poses.mp4"
    suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
    return folder / f"{path.stem}_poses{suffix}"


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W, 3) BGR in the format that the name says, atomically.

    Raises:
        PnfsError: the file cannot be written.
    """
    data = cv2.imencode(path.suffix, pixels)[1].tobytes()

    def fill(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, fill)
