"""Regions of image files: the pixels of the whole image, however the file is made or damaged."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from pnfs.data.images import ImageFile, read_image
from pnfs.data.transforms import Region
from pnfs.errors import PnfsError
from pnfs.kernels import native

BUILT, REASON = native.module_available("_jpeg")
needs_module = pytest.mark.skipif(not BUILT, reason=REASON or "-")
NOISE = np.random.default_rng(0).integers(0, 256, (83, 131, 3), np.uint8)
# Of a baseline file: height, width, number of components, then those of the first one.
FRAME = re.compile(rb"\xff\xc0\0\x11\x08(....)\x03\x01(.)", re.DOTALL)


def jpeg(pixels: np.ndarray, **options: int) -> bytes:
    """`options` as cv2 names them, without IMWRITE_JPEG_."""
    pairs = [(getattr(cv2, f"IMWRITE_JPEG_{name}"), value) for name, value in options.items()]
    return cv2.imencode(".jpg", pixels, [number for pair in pairs for number in pair])[1].tobytes()


def native_region(data: bytes, reduction: int, region: Region) -> np.ndarray | None:
    """By `pnfs._jpeg` alone; None where it leaves the file to OpenCV."""
    source = np.frombuffer(data, np.uint8)
    pixels = np.empty((region[3] - region[1], region[2] - region[0], 3), np.uint8)
    place = source.ctypes.data, source.size, reduction, region, pixels.ctypes.data
    return pixels if native.module("_jpeg").decode_jpeg_region(*place) else None


def some_regions(size: tuple[int, int], count: int) -> list[Region]:
    """The whole image, two corners, and others."""
    height, width = size
    generator = np.random.default_rng(height)
    found = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, width, height)]
    for _ in range(count):
        left, right = sorted(generator.choice(width + 1, 2, replace=False).tolist())
        top, bottom = sorted(generator.choice(height + 1, 2, replace=False).tolist())
        found.append((left, top, right, bottom))
    return found


@needs_module
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("restart", [0, 3])
@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("sampling", ["420", "422", "444", "440", "411"])
def test_regions_of_a_jpeg_are_those_of_the_whole_image(
    tmp_path: Path, sampling: str, progressive: int, restart: int, reduction: int
) -> None:
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    options = {"SAMPLING_FACTOR": factor, "PROGRESSIVE": progressive, "RST_INTERVAL": restart}
    data = jpeg(NOISE, QUALITY=90, **options)
    (tmp_path / "a.jpg").write_bytes(data)
    whole = ImageFile(tmp_path / "a.jpg", reduction)
    pixels = whole.whole()
    assert pixels.shape[:2] == (-(-83 // reduction), -(-131 // reduction))
    for region in some_regions(whole.size, 20):
        left, top, right, bottom = region
        wanted = pixels[top:bottom, left:right]
        found = native_region(data, reduction, region)
        assert found is not None and np.array_equal(found, wanted), region
        assert np.array_equal(whole.region(region), wanted), region


@pytest.mark.parametrize("kind", ["gray.jpg", "cmyk.jpg", "rgb.png", "rgb.jpg"])
@pytest.mark.parametrize("built", [True, False])
def test_regions_of_other_images_and_without_the_module(
    tmp_path: Path, kind: str, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow writes the odd formats")
    if not built:
        monkeypatch.setattr(native, "module_available", lambda name: (False, "not built"))
    mode = {"gray.jpg": "L", "cmyk.jpg": "CMYK"}.get(kind, "RGB")
    image.fromarray(NOISE).convert(mode).save(tmp_path / kind)
    file = ImageFile(tmp_path / kind)
    assert file.size == (83, 131)
    expected = read_image(tmp_path / kind, apply_exif=False)[10:50, 3:90]
    assert np.array_equal(file.region((3, 10, 90, 50)), expected)


@needs_module
def test_a_region_is_decoded_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(NOISE))
    expected = read_image(tmp_path / "a.jpg", apply_exif=False)[5:20, 7:33]
    monkeypatch.setattr(ImageFile, "whole", None)
    assert np.array_equal(ImageFile(tmp_path / "a.jpg").region((7, 5, 33, 20)), expected)


@needs_module
@pytest.mark.parametrize("region", [(-1, 0, 5, 5), (0, 0, 132, 4), (0, 80, 4, 84), (5, 5, 5, 9)])
def test_a_region_that_is_not_inside_is_not_decoded(region: Region) -> None:
    assert native_region(jpeg(NOISE), 1, region) is None


@needs_module
@pytest.mark.parametrize("scans", range(1, 10))
def test_a_progressive_jpeg_without_all_scans_is_decoded_whole(tmp_path: Path, scans: int) -> None:
    """The library smooths what is not known of a block, from further away than a region reaches."""
    data = jpeg(cv2.GaussianBlur(NOISE, (0, 0), 2), PROGRESSIVE=1)
    starts = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    assert len(starts) == 10
    ended = data[: starts[scans]] + b"\xff\xd9"
    (tmp_path / "a.jpg").write_bytes(ended)
    assert native_region(data, 1, (20, 20, 60, 50)) is not None
    assert native_region(ended, 1, (20, 20, 60, 50)) is None
    expected = read_image(tmp_path / "a.jpg", apply_exif=False)[20:50, 20:60]
    assert np.array_equal(ImageFile(tmp_path / "a.jpg").region((20, 20, 60, 50)), expected)


@needs_module
@pytest.mark.parametrize("factors", [0x24, 0x42, 0x14, 0x31])
def test_unusual_sampling_is_left_to_opencv(factors: int) -> None:
    """With chroma of 1×1 and luma of 2×4, say, the library leaves pixels of a region unset."""
    data = jpeg(NOISE)
    place = FRAME.search(data).start(2)  # type: ignore[union-attr]
    assert native_region(data, 2, (5, 5, 20, 20)) is not None
    changed = data[:place] + bytes([factors]) + data[place + 1 :]
    assert native_region(changed, 2, (5, 5, 20, 20)) is None


@needs_module
def test_a_size_that_opencv_refuses_is_refused(tmp_path: Path) -> None:
    """A damaged header must not become grey pixels, nor gigabytes."""
    data = jpeg(NOISE)
    place = FRAME.search(data).start(1)  # type: ignore[union-attr]
    changed = data[:place] + (60000).to_bytes(2, "big") * 2 + data[place + 4 :]
    assert native_region(changed, 1, (0, 0, 5, 5)) is None
    (tmp_path / "a.jpg").write_bytes(changed)
    with pytest.raises(PnfsError, match=r"a\.jpg: image cannot be decoded"):
        ImageFile(tmp_path / "a.jpg").region((0, 0, 5, 5))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x07"), "decoded"),
    ],
)
def test_damage_is_told_of_regions_too(
    tmp_path: Path, damage, reason: str, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.jpg").write_bytes(damage(jpeg(NOISE)))
    with pytest.raises(PnfsError, match=rf"a\.jpg: image .*{reason}"):
        ImageFile(tmp_path / "a.jpg").region((0, 0, 5, 5))
    assert capfd.readouterr().err == ""


@needs_module
def test_damaged_files_give_the_pixels_of_the_whole_or_one_line(tmp_path: Path) -> None:
    """Nothing crashes or hangs, whatever the bytes are."""
    generator = np.random.default_rng(1)
    data, compared = jpeg(NOISE), 0
    for trial in range(300):
        broken = bytearray(data)
        for place in generator.integers(2, len(data) - 2, 4):
            broken[place] = generator.integers(0, 256)
        (tmp_path / "a.jpg").write_bytes(broken)
        reduction = (1, 2, 4, 8)[trial % 4]
        try:
            file = ImageFile(tmp_path / "a.jpg", reduction)
            height, width = file.size
            if height * width > 10_000_000:  # takes long
                continue
            left, top = width // 3, height // 3
            right, bottom = max(width // 2, left + 1), max(height // 2, top + 1)
            found = file.region((left, top, right, bottom))
            wanted = ImageFile(tmp_path / "a.jpg", reduction).whole()[top:bottom, left:right]
            assert np.array_equal(found, wanted)
            compared += 1
        except PnfsError as error:
            assert "\n" not in str(error)
    assert compared > 100
