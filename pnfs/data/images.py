"""Reading image files: 8-bit BGR, whatever was stored; damage is an error, never grey fill."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np

from pnfs.data.transforms import Region
from pnfs.errors import PnfsError
from pnfs.kernels import native

# In a JPEG scan every 0xFF is followed by 0x00 (stuffing), a restart number, or the next marker.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_END_OF_IMAGE, _START_OF_SCAN, _STANDS_ALONE = 0xD9, 0xDA, 0x01
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


class ImageFile:
    """An image file in stored order, decoded when pixels are asked for.

    With `pnfs._jpeg` a region of a JPEG is decoded by itself: of what lies above and beside it only
    the compressed symbols are read, and mostly nothing of what lies below, damage there included.

    A JPEG may be decoded at 1/`reduction` of its size, rounded up: a decoder reduces each block of
    8×8 pixels by itself, so that pixel i of the result lies where the pixels r·i … r·i + r - 1 lay.
    Other formats are read whole: reducing saves nothing.

    Args:
        reduction: 1, 2, 4 or 8.

    Attributes:
        reduction: the one that is made; 1 for other formats than JPEG.

    Raises:
        PnfsError: as `read_image`; so do the methods.
    """

    def __init__(self, path: str | Path, reduction: int = 1) -> None:
        self._name, self._data = str(path), _read_bytes(path)
        _check(self._data, self._name)
        is_jpeg = self._data.startswith(_JPEG)
        self.reduction = reduction if is_jpeg else 1
        self._pixels: np.ndarray | None = None
        self._size: tuple[int, int] | None = None
        if is_jpeg and native.module_available("_jpeg")[0]:
            self._size = native.module("_jpeg").jpeg_size(*_place(self._data), self.reduction)
        # Else, as for the kinds that the module does not take, `whole` decodes it, or says why not.

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the decoded image."""
        if self._size is None:
            height, width = self.whole().shape[:2]
            self._size = height, width
        return self._size

    def whole(self) -> np.ndarray:
        """All pixels, uint8 (h, w, 3), blue-green-red."""
        if self._pixels is None:
            flags = _COLOR[self.reduction] | cv2.IMREAD_IGNORE_ORIENTATION
            self._pixels = _decoded(self._data, self._name, flags)
        return self._pixels

    def region(self, region: Region) -> np.ndarray:
        """The pixels of a region inside the image, those that `whole` has there."""
        left, top, right, bottom = region
        if self._size is None or self._pixels is not None:
            return self.whole()[top:bottom, left:right]
        pixels = np.empty((bottom - top, right - left, 3), np.uint8)
        decode = native.module("_jpeg").decode_jpeg_region
        if not decode(*_place(self._data), self.reduction, region, pixels.ctypes.data):
            return self.whole()[top:bottom, left:right]
        return pixels


def _place(data: bytes) -> tuple[int, int]:
    """Address and length."""
    return np.frombuffer(data, np.uint8).ctypes.data, len(data)


def _read_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except FileNotFoundError:
        raise PnfsError(f"{path}: image is missing; check the path") from None
    except OSError as error:
        raise PnfsError(
            f"{path}: image cannot be read ({error.strerror}); check the path"
        ) from None


def decode_image(data: bytes, name: str, *, apply_exif: bool) -> np.ndarray:
    """`read_image` for bytes in memory; `name` stands for the file in errors."""
    _check(data, name)
    return _decoded(data, name, _COLOR[1] | (0 if apply_exif else cv2.IMREAD_IGNORE_ORIENTATION))


def _decoded(data: bytes, name: str, flags: int) -> np.ndarray:
    """By OpenCV, of what `_check` has passed."""
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


def _check(data: bytes, name: str) -> None:
    problem = _damage(data)
    if problem:
        raise PnfsError(f"{name}: image {problem}; fetch or write it again")


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
        # Most files end with their image, and no scan holds the end marker.
        if marker == _START_OF_SCAN and data.endswith(bytes([0xFF, _END_OF_IMAGE])):
            return True
        if marker == _STANDS_ALONE:  # TEM; every other marker is followed by its length
            continue
        position += int.from_bytes(data[position : position + 2], "big")
