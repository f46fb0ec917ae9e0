"""Reading image files: 8-bit BGR, whatever was stored; damage is an error, never grey fill."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np

from pnfs.errors import PnfsError

# In a JPEG scan every 0xFF is followed by 0x00 (stuffing), a restart number, or the next marker.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END_OF_IMAGE, _STANDS_ALONE = 0xD9, 0x01
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"


_COLOR = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def read_image(path: str | Path, *, apply_exif: bool) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3), blue-green-red.

    Grayscale, palette, 16-bit, CMYK and alpha images are converted (16 bits to the upper 8, alpha
    is dropped).

    Args:
        apply_exif: turn the image as its EXIF orientation says, as viewers do. Datasets need False:
            their annotations refer to the pixels in stored order.

    Raises:
        PnfsError: the file is missing, empty, truncated or not an image; one line with the reason.
    """
    return decode_image(_read_bytes(path), str(path), apply_exif=apply_exif)


def read_reduced(path: str | Path, reduction: int) -> tuple[np.ndarray, int]:
    """Read an image file in stored order, and a JPEG at 1/`reduction` of its size, rounded up.

    A JPEG decoder reduces each block of 8×8 pixels by itself, so that pixel i of the result lies
    where the pixels r·i … r·i + r - 1 were. Other formats are read whole: reducing saves nothing.

    Args:
        reduction: 1, 2, 4 or 8.

    Returns:
        uint8 (h, w, 3), blue-green-red, and the reduction that was made.

    Raises:
        PnfsError: as `read_image`.
    """
    data = _read_bytes(path)
    reduction = reduction if data.startswith(_JPEG) else 1
    image = decode_image(data, str(path), apply_exif=False, reduction=reduction)
    return image, reduction


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PnfsError(f"{path}: image is missing; check the path") from None
    except OSError as error:
        raise PnfsError(
            f"{path}: image cannot be read ({error.strerror}); check the path"
        ) from None


def decode_image(data: bytes, name: str, *, apply_exif: bool, reduction: int = 1) -> np.ndarray:
    """`read_image` for bytes in memory; `name` stands for the file in errors."""
    problem = _damage(data)
    if problem:
        raise PnfsError(f"{name}: image {problem}; fetch or write it again")
    flags = _COLOR[reduction] | (0 if apply_exif else cv2.IMREAD_IGNORE_ORIENTATION)
    log = cv2.utils.logging
    level = log.setLogLevel(
        log.LOG_LEVEL_SILENT
    )  # the errors below replace what OpenCV would print
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise PnfsError(
            f"{name}: image cannot be decoded ({error.err}); convert it to JPEG or PNG"
        ) from None
    finally:
        log.setLogLevel(level)
    if pixels is None:
        raise PnfsError(
            f"{name}: image cannot be decoded (damaged, or not an image); "
            "fetch it again, or convert it to JPEG or PNG"
        )
    return np.asarray(pixels)


def _damage(data: bytes) -> str | None:
    """What is wrong with the bytes, if that shows without decoding them.

    Decoders fill the missing rows of a truncated JPEG with grey and return it as if whole.
    """
    if not data:
        return "file is empty"
    if data.startswith(_JPEG) and not _jpeg_is_complete(data):
        return "is truncated (JPEG without its end marker)"
    if data.startswith(_PNG) and b"IEND" not in data:
        return "is truncated (PNG without its IEND chunk)"
    return None


def _jpeg_is_complete(data: bytes) -> bool:
    """Walk the markers to the end of the image; thumbnails and trailing bytes do not mislead it."""
    position = len(_JPEG)
    while True:
        match = _MARKER.search(data, position)
        if match is None:
            return False
        marker, position = data[match.end() - 1], match.end()
        if marker == _END_OF_IMAGE:
            return True
        if marker == _STANDS_ALONE:  # TEM; every other marker is followed by its length
            continue
        position += int.from_bytes(data[position : position + 2], "big")
