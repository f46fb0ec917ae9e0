"""Reading images: every kind of file becomes 8-bit BGR, every damaged one a line that says why."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pnfs.data.images import decode_image, read_image
from pnfs.errors import PnfsError

Image = pytest.importorskip("PIL.Image", reason="Pillow writes the odd formats")


@pytest.fixture
def picture() -> np.ndarray:
    """RGB: red above green, a white stripe on the left; 64 rows, 96 columns."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32], pixels[32:], pixels[:, :16] = (200, 40, 30), (10, 220, 90), 255
    return pixels


def near(found: np.ndarray, rgb: np.ndarray, tolerance: int = 4) -> bool:
    """Same size and, away from edges, the same colours in BGR."""
    return found.shape == rgb.shape and all(
        np.abs(found[y, x].astype(int) - rgb[y, x, ::-1]).max() <= tolerance
        for y, x in ((12, 5), (12, 60), (52, 60))
    )


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_colours_come_out_blue_green_red(tmp_path: Path, picture: np.ndarray, suffix: str):
    Image.fromarray(picture).save(tmp_path / f"a{suffix}", quality=95)
    assert near(read_image(tmp_path / f"a{suffix}", apply_exif=True), picture)


def test_cmyk_jpeg(tmp_path: Path, picture: np.ndarray):
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert near(read_image(tmp_path / "a.jpg", apply_exif=False), picture, 6)


def test_grayscale_becomes_three_equal_channels(tmp_path: Path, picture: np.ndarray):
    Image.fromarray(picture).convert("L").save(tmp_path / "a.jpg", quality=95)
    found = read_image(tmp_path / "a.jpg", apply_exif=False)
    assert found.shape == (64, 96, 3) and (found == found[..., :1]).all()


def test_sixteen_bit_png_keeps_the_upper_eight(tmp_path: Path, picture: np.ndarray):
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1].astype(np.uint16) * 257)
    assert near(read_image(tmp_path / "a.png", apply_exif=False), picture)
    cv2.imwrite(str(tmp_path / "gray.png"), picture[..., 0].astype(np.uint16) * 257)
    gray = read_image(tmp_path / "gray.png", apply_exif=False)
    assert gray.dtype == np.uint8 and gray[12, 60].tolist() == [200, 200, 200]


def test_alpha_is_dropped(tmp_path: Path, picture: np.ndarray):
    Image.fromarray(picture).convert("RGBA").save(tmp_path / "a.png")
    assert near(read_image(tmp_path / "a.png", apply_exif=False), picture)


def test_exif_turns_photos_but_not_datasets(tmp_path: Path, picture: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert near(read_image(tmp_path / "a.jpg", apply_exif=False), picture)
    turned = read_image(tmp_path / "a.jpg", apply_exif=True)
    assert turned.shape == (96, 64, 3)
    assert (turned[4, 32] > 240).all()  # the stripe is on top now


def test_trailing_bytes_and_thumbnails_do_not_look_like_damage(picture: np.ndarray):
    data = cv2.imencode(".jpg", picture)[1].tobytes()
    thumbnail = cv2.imencode(".jpg", picture[::4, ::4])[1].tobytes()
    segment = b"Exif\0\0" + thumbnail
    nested = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    for whole in (data + b"\0" * 100, data + thumbnail[:-2], nested):
        assert decode_image(whole, "a.jpg", apply_exif=False).shape == (64, 96, 3)
    with pytest.raises(PnfsError, match="truncated"):  # the thumbnail's end is not the image's
        decode_image(nested[:-40], "a.jpg", apply_exif=False)


def test_progressive_jpeg_is_whole_only_with_all_its_scans():
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    data = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert decode_image(data, "a.jpg", apply_exif=False).shape == (64, 96, 3)
    for part in (0.1, 0.5, 0.9):
        with pytest.raises(PnfsError, match="truncated"):
            decode_image(data[: int(part * len(data))], "a.jpg", apply_exif=False)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("missing.jpg", None, "missing"),
        ("empty.jpg", lambda data: b"", "empty"),
        ("half.jpg", lambda data: data[: len(data) // 2], "truncated"),
        ("head.jpg", lambda data: data[:20], "truncated"),
        ("text.jpg", lambda data: b"not an image at all", "cannot be decoded"),
        ("zeros.png", lambda data: bytes(1000), "cannot be decoded"),
    ],
)
def test_damaged_files_say_which_and_why_in_one_line(
    tmp_path: Path, picture: np.ndarray, name: str, make, reason: str, capfd: pytest.CaptureFixture
):
    if make is not None:
        (tmp_path / name).write_bytes(make(cv2.imencode(".jpg", picture)[1].tobytes()))
    with pytest.raises(PnfsError, match=reason) as error:
        read_image(tmp_path / name, apply_exif=False)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # nothing from the decoder's own log


def test_truncated_png(tmp_path: Path, picture: np.ndarray):
    data = cv2.imencode(".png", picture)[1].tobytes()
    (tmp_path / "a.png").write_bytes(data[:-14])
    with pytest.raises(PnfsError, match=r"a\.png: image is truncated"):
        read_image(tmp_path / "a.png", apply_exif=False)


def test_a_folder_is_not_an_image(tmp_path: Path):
    with pytest.raises(PnfsError, match="cannot be read"):
        read_image(tmp_path, apply_exif=False)
