"""Decoded pixels of people on disk: what every crop of a person can read, stored at first use.

    folder/used              bytes of all entries; locked while an entry is added
    folder/3f/3f09….crop     header, rows of blue-green-red bytes, the key once more

A file is written under a temporary name in its folder and renamed, so any number of processes may
fill one cache and none reads half an entry. A file that is cut short, or another's, counts as
missing and is replaced. Nothing is evicted: once the cache is full, other people are decoded as
without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from pnfs.data.transforms import Region
from pnfs.errors import PnfsError
from pnfs.statefile import reason

_MAGIC = b"pnfscrp1"  # the layout, and how regions are chosen and decoded
_KEY_BYTES = 16
_HEADER = struct.Struct(f"<8s{_KEY_BYTES}s7q")
_SUFFIX, _PART = ".crop", ".part"
_STALE = 3600.0  # seconds after which another process's unfinished file is left over from a kill
# Around the rounded region, in stored pixels: what `samples.touched_region` adds.
_BEFORE, _AFTER = 2, 4


class Place(NamedTuple):
    """Where stored pixels lie in their decoded image, in pixels of that."""

    left: int
    top: int
    height: int
    width: int
    image_height: int
    image_width: int
    reduction: int  # by which the image was reduced when it was decoded


class Entry:
    """An open file of the cache; a context manager.

    Attributes:
        place: where its pixels belong.
    """

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self.place = file, place

    def __enter__(self) -> Entry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, region: Region) -> np.ndarray | None:
        """The pixels of a region of the decoded image, uint8 (h, w, 3); None if it holds others or
        cannot be read."""
        left, top, right, bottom = region
        place = self.place
        left, right, top, bottom = (
            left - place.left,
            right - place.left,
            top - place.top,
            bottom - place.top,
        )
        if left < 0 or top < 0 or right > place.width or bottom > place.height:
            return None
        rows = np.empty((bottom - top, place.width, 3), np.uint8)
        try:
            self._file.seek(_HEADER.size + top * place.width * 3)
            if self._file.readinto(rows) != rows.nbytes:  # type: ignore[attr-defined]
                return None
        except OSError:
            return None
        return rows[:, left:right]


class CropCache:
    """A folder of entries, at most `gigabytes` · 10⁹ bytes of them.

    Raises:
        PnfsError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        self.folder, self.limit = Path(folder), int(gigabytes * 1e9)
        self._stopped = False  # full: this process adds no more
        self._notice: str | None = None  # why, until it is told
        self._counted = False  # this process has looked at what is there
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise PnfsError(
                f"data.cache: {self.folder} cannot be written ({reason(error)}); "
                "choose another folder, or null for none"
            ) from None

    def key(self, path: str, region: Region, reduction: int) -> bytes | None:
        """Names the pixels of `region` of an image file as it is now; None if it is missing.

        Args:
            region: in pixels of the stored image; it may reach beyond it.
            reduction: by which the image may be reduced.
        """
        try:
            status = os.stat(path)
        except OSError:
            return None
        known = (
            _MAGIC,
            os.path.abspath(path),
            status.st_size,
            status.st_mtime_ns,
            region,
            reduction,
        )
        return hashlib.blake2b(repr(known).encode(), digest_size=_KEY_BYTES).digest()

    def find(self, key: bytes) -> Entry | None:
        """The entry of a key, if a whole one is there."""
        try:
            file = open(self._name(key), "rb", buffering=0)  # noqa: SIM115
        except OSError:
            return None
        place = _checked(file, key)
        if place is None:
            file.close()
            return None
        return Entry(file, place)

    def store(self, key: bytes, image: np.ndarray, region: Region, reduction: int) -> None:
        """Keep what `region` covers of a decoded image, if there is room.

        A disk that is full or fails is no reason to stop training: this process then adds no more.

        Args:
            image: uint8 (h, w, 3), decoded at 1 / `reduction` of its size.
            region: in pixels of the stored image, as for `key`.
        """
        height, width = image.shape[:2]
        left, top = (max(side // reduction - _BEFORE, 0) for side in region[:2])
        right = min(region[2] // reduction + _AFTER, width)
        bottom = min(region[3] // reduction + _AFTER, height)
        if self._stopped or left >= right or top >= bottom:
            return
        pixels = np.ascontiguousarray(image[top:bottom, left:right])
        place = Place(left, top, bottom - top, right - left, height, width, reduction)
        path, part = Path(self._name(key)), None
        try:
            if not self._has_room(_file_size(place)):
                self._stop_full()
                return
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_PART, delete=False) as file:
                part = Path(file.name)
                file.write(_HEADER.pack(_MAGIC, key, *place))
                file.write(pixels.tobytes())
                file.write(key)
            if not self._add(part, path):
                self._stop_full()
        except OSError as error:
            self._stop(f"takes no more ({reason(error)})", "make room there or choose another one")
        finally:
            if part is not None:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def take_notice(self) -> str | None:
        """Why this process adds no more, in one line and once; None if it does, or has told."""
        notice, self._notice = self._notice, None
        return notice

    def _stop_full(self) -> None:
        with self._locked() as ledger:
            used = _number(ledger) or 0
        size = f"{used / 1e9:.3g} of {self.limit / 1e9:.3g} GB"
        self._stop(f"is full ({size})", "raise data.cache_gb to keep them too")

    def _stop(self, state: str, advice: str) -> None:
        self._stopped = True
        self._notice = (
            f"data.cache: {self.folder} {state}; people who are not in it are decoded in each "
            f"epoch; {advice}"
        )

    def _name(self, key: bytes) -> str:
        name = key.hex()  # not with pathlib, which takes as long as opening the file
        return f"{self.folder}/{name[:2]}/{name}{_SUFFIX}"

    def _add(self, part: Path, path: Path) -> bool:
        """Give a finished file its name and count it; False if the cache is full by now."""
        with self._locked() as ledger:
            used, size = _number(ledger), part.stat().st_size
            with contextlib.suppress(FileNotFoundError):
                size -= path.stat().st_size  # another process was faster, or a damaged entry
            if used is None or used + size > self.limit:
                return False
            os.replace(part, path)
            _write_number(ledger, used + size)
            return True

    def _has_room(self, size: int) -> bool:
        """Entries are counted anew where their number of bytes is missing, and once by each process
        that finds the cache full: somebody may have deleted some."""
        with self._locked() as ledger:
            used = _number(ledger)
            if used is None or (used + size > self.limit and not self._counted):
                used, self._counted = self._count(), True
                _write_number(ledger, used)
            return used + size <= self.limit

    def _count(self) -> int:
        total, now = 0, time.time()
        for entry in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.suffix == _SUFFIX:
                    total += status.st_size
                elif entry.suffix == _PART and now - status.st_mtime > _STALE:
                    entry.unlink()
        return total

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file `used`, no other process's while it is open."""
        ledger = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(ledger)
            yield ledger
        finally:
            os.close(ledger)


def _lock(ledger: int) -> None:
    """Wait for the lock. Where a platform or file system has none, the count of bytes may be off;
    entries are whole all the same."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(ledger, fcntl.LOCK_EX)


def _file_size(place: Place) -> int:
    return _HEADER.size + place.height * place.width * 3 + _KEY_BYTES


def _checked(file: BinaryIO, key: bytes) -> Place | None:
    """The place that a file's header states, if the file is a whole entry of this key."""
    try:
        header = file.read(_HEADER.size)
        if len(header) != _HEADER.size:
            return None
        magic, found, *numbers = _HEADER.unpack(header)
        place = Place(*numbers)
        if (magic, found) != (_MAGIC, key) or min(place) < 0:
            return None
        if file.seek(-_KEY_BYTES, os.SEEK_END) + _KEY_BYTES != _file_size(place):
            return None
        return place if file.read(_KEY_BYTES) == key else None
    except OSError:
        return None


def _number(ledger: int) -> int | None:
    text = os.pread(ledger, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write_number(ledger: int, value: int) -> None:
    text = f"{value:020d}\n".encode()
    os.pwrite(ledger, text, 0)
    os.ftruncate(ledger, len(text))
