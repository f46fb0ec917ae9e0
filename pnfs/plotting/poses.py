"""Poses drawn on photographs, with OpenCV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from pnfs.errors import PnfsError
from pnfs.plotting.style import part_colours, rgb, spaced
from pnfs.skeleton import Skeleton

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

_SHIFT = 4  # OpenCV draws at 1/16 pixel
_DARK: Colour = (24, 24, 24)
_NEUTRAL: Colour = (200, 200, 200)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


class DrawablePose(Protocol):
    """What `draw_poses` reads of a pose.

    Attributes:
        xy: (K, 2) x, y in pixels of the image drawn on; NaN where unknown.
        confidence: (K,) in [0, 1].
        score: of the whole pose, or None.
        box: (4,) x1, y1, x2, y2 in pixels of the image, or None.
    """

    @property
    def xy(self) -> Any: ...
    @property
    def confidence(self) -> Any: ...
    @property
    def score(self) -> Any: ...
    @property
    def box(self) -> Any: ...


def draw_poses(
    image: Image,
    poses: Sequence[DrawablePose],
    skeleton: Skeleton,
    part_table: Mapping[str, Sequence[int]],
    *,
    min_confidence: float = 0.2,
    scale: int = 1,
) -> Image:
    """Draw `poses` on a copy of `image`: limbs in their part's colour, keypoints, a thin box.

    A limb has the colour of the first part that predicts both of its ends; between two parts, each
    half has the colour of its end's part. Confidence is opacity, and the size of the person's box
    sets the line width.

    Args:
        image: uint8 (H, W, 3), BGR.
        poses: one per person, coordinates in this image's pixels.
        skeleton: names and limbs of the K keypoints.
        part_table: part name -> keypoint indices, as `ModelConfig.part_table` gives it.
        min_confidence: keypoints below it, and limbs that need them, are left out.
        scale: enlarge the picture this many times first; small images then get crisp lines.

    Returns:
        uint8 (scale·H, scale·W, 3), BGR; `image` is unchanged.

    Raises:
        PnfsError: the image is not uint8 (H, W, 3), or a pose has another number of keypoints.
    """
    _check_image(image)
    canvas: Image = image.copy()
    if scale > 1:
        size = (image.shape[1] * scale, image.shape[0] * scale)
        canvas = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    names = list(part_table)
    colours = {name: _bgr(colour) for name, colour in part_colours(names).items()}
    home = {k: name for name in reversed(names) for k in part_table[name]}  # first part wins
    # Unsure people first, so that a sure one is not hidden.
    for pose in sorted(poses, key=lambda pose: float(pose.score or 0)):
        xy = np.asarray(pose.xy, dtype=np.float64)
        confidence = np.asarray(pose.confidence, dtype=np.float64)
        count = skeleton.num_keypoints
        if xy.shape != (count, 2) or confidence.shape != (count,):
            raise PnfsError(
                f"pose: xy {xy.shape} and confidence {confidence.shape} do not fit skeleton "
                f"'{skeleton.name}'; need ({count}, 2) and ({count},)"
            )
        xy = (xy + 0.5) * scale - 0.5  # integer coordinates are pixel centres, as in cv2.resize
        box = None if pose.box is None else (np.asarray(pose.box, np.float64) + 0.5) * scale - 0.5
        reach = max(canvas.shape)  # farther outside than this, nothing reaches the picture
        near = np.isfinite(xy).all(1) & (np.abs(np.nan_to_num(xy)) < 2 * reach).all(1)
        shown = near & (confidence >= min_confidence)
        width = _line_width(box, xy[shown])
        if box is not None:
            _draw_box(canvas, box, max(1, round(width / 5)))
        for a, b in skeleton.limbs:
            if shown[a] and shown[b]:
                both = [name for name in names if a in part_table[name] and b in part_table[name]]
                ends = (both[0], both[0]) if both else (home.get(a), home.get(b))
                start, end = (colours.get(name or "", _NEUTRAL) for name in ends)
                opacity = _opacity(min(confidence[a], confidence[b]))
                _draw_limb(canvas, xy[a], xy[b], start, end, width, opacity)
        for k in np.flatnonzero(shown):
            colour = colours.get(home.get(int(k), ""), _NEUTRAL)
            _draw_dot(canvas, xy[k], colour, width, _opacity(confidence[k]))
    return canvas


def part_legend(part_table: Mapping[str, Sequence[int]], width: int) -> Image:
    """A strip with each part's colour and name, to stand below pictures.

    Args:
        part_table: part name -> keypoint indices.
        width: pixels; the names wrap to as many rows as they need.

    Returns:
        uint8 (rows, width, 3), BGR, dark on white.
    """
    scale, line, pad, swatch = 0.45, 24, 10, 14
    places: list[tuple[str, int, int]] = []
    x, y = pad, 0
    for name in part_table:
        needed = swatch + 6 + cv2.getTextSize(spaced(name), _FONT, scale, 1)[0][0] + 18
        if x > pad and x + needed > width - pad:
            x, y = pad, y + line
        places.append((name, x, y))
        x += needed
    strip: Image = np.full((y + line + pad, width, 3), 255, np.uint8)
    for name, x, y in places:
        top, colour = y + pad, _bgr(part_colours(list(part_table))[name])
        cv2.rectangle(strip, (x, top), (x + swatch, top + swatch), colour, cv2.FILLED)
        cv2.rectangle(strip, (x, top), (x + swatch, top + swatch), _DARK, 1)
        origin = (x + swatch + 6, top + swatch - 2)
        cv2.putText(strip, spaced(name), origin, _FONT, scale, _DARK, 1, cv2.LINE_AA)
    return strip


def tile(
    images: Sequence[Image],
    columns: int,
    *,
    captions: Sequence[str] | None = None,
    cell: tuple[int, int] | None = None,
    gap: int = 8,
) -> Image:
    """A contact sheet on white: row by row, every image scaled to fit its cell and centred in it.

    Prediction beside ground truth: pass the two kinds in turn, with an even number of columns.

    Args:
        images: uint8 (H, W, 3) BGR, of any sizes; at least one.
        columns: images per row.
        captions: one line per image, drawn below it.
        cell: (height, width) in pixels; default the largest height and width among the images.
        gap: pixels between cells and around the sheet.

    Returns:
        uint8 (rows, columns, 3), BGR.

    Raises:
        PnfsError: no image, a bad image, columns < 1, or another number of captions than images.
    """
    if not images or columns < 1:
        raise PnfsError(f"contact sheet: {len(images)} images in {columns} columns; need 1 of each")
    if captions is not None and len(captions) != len(images):
        raise PnfsError(
            f"contact sheet: {len(captions)} captions for {len(images)} images; give one each"
        )
    for image in images:
        _check_image(image)
    height = cell[0] if cell else max(image.shape[0] for image in images)
    width = cell[1] if cell else max(image.shape[1] for image in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    caption = 22 if captions is not None else 0
    pitch_y, pitch_x = height + caption + gap, width + gap
    sheet: Image = np.full((rows * pitch_y + gap, columns * pitch_x + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        shown = _fit(image, height, width)
        top, left = gap + i // columns * pitch_y, gap + i % columns * pitch_x
        y, x = top + (height - shown.shape[0]) // 2, left + (width - shown.shape[1]) // 2
        sheet[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
        if captions is not None:
            origin = (left, top + height + caption - 6)
            cv2.putText(sheet, captions[i], origin, _FONT, 0.45, _DARK, 1, cv2.LINE_AA)
    return sheet


def _check_image(image: Image) -> None:
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if dtype != np.uint8 or shape is None or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise PnfsError(
            f"image to draw on: {dtype} {shape} cannot be used; need uint8 (height, width, 3) BGR"
        )


def _fit(image: Image, height: int, width: int) -> Image:
    """`image` scaled, aspect kept, to the largest size that fits; never enlarged."""
    factor = min(1.0, height / image.shape[0], width / image.shape[1])
    if factor == 1.0:
        return image
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _bgr(colour: str) -> Colour:
    red, green, blue = rgb(colour)
    return blue, green, red


def _opacity(confidence: float) -> float:
    """0.35 for no confidence, so that what is drawn is seen, up to 1."""
    return 0.35 + 0.65 * float(np.clip(confidence, 0, 1))


def _line_width(box: NDArray[np.float64] | None, points: NDArray[np.float64]) -> float:
    """Limb width in pixels, from the side of the person's box (or of the keypoints' extent)."""
    width, height = 0.0, 0.0
    if box is not None:
        x1, y1, x2, y2 = (float(value) for value in box)
        width, height = x2 - x1, y2 - y1
    if not (width > 0 and height > 0) and len(points):
        width, height = np.ptp(points, axis=0)
    side = float(np.hypot(width, height))
    return float(np.clip(0.011 * side, 1.5, 24)) if np.isfinite(side) else 1.5


def _fixed(point: NDArray[np.float64]) -> tuple[int, int]:
    """A point in OpenCV's fixed-point coordinates."""
    x, y = np.round(np.asarray(point) * (1 << _SHIFT)).astype(int)
    return int(x), int(y)


def _blend(
    canvas: Image,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    colour: Colour,
    opacity: float,
    draw: Callable[[Image, NDArray[np.float64]], None],
) -> None:
    """Composite `colour` through an anti-aliased mask that `draw(mask, origin)` fills.

    `low` and `high` bound the shape, in canvas pixels: work is done in that rectangle alone.
    """
    limit = np.array([canvas.shape[1], canvas.shape[0]])
    x1, y1 = np.clip(np.floor(low), 0, limit).astype(int)
    x2, y2 = np.clip(np.ceil(high) + 1, 0, limit).astype(int)
    if x1 >= x2 or y1 >= y2:
        return
    mask: Image = np.zeros((y2 - y1, x2 - x1), np.uint8)
    draw(mask, np.array([x1, y1], dtype=np.float64))
    weight = mask[..., None].astype(np.float32) * (opacity / 255)
    region = canvas[y1:y2, x1:x2]
    mixed = region + weight * (np.array(colour, np.float32) - region)
    region[:] = np.round(mixed).astype(np.uint8)


def _draw_limb(
    canvas: Image,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    start: Colour,
    end: Colour,
    width: float,
    opacity: float,
) -> None:
    """A line from a to b with dark rims; its halves take the colours of their ends."""

    def stroke(p: NDArray[np.float64], q: NDArray[np.float64], colour: Colour, rim: bool) -> None:
        outer = max(1, round(width)) + 2 * _rim(width)

        def line(mask: Image, origin: NDArray[np.float64]) -> None:
            points = _fixed(p - origin), _fixed(q - origin)
            cv2.line(mask, *points, 255, max(1, round(width)), cv2.LINE_AA, _SHIFT)
            if rim:  # what the wider line covers and the coloured one does not
                inner = mask.copy()
                cv2.line(mask, *points, 255, outer, cv2.LINE_AA, _SHIFT)
                np.subtract(mask, inner, out=mask)

        reach = outer / 2 + 2
        _blend(canvas, np.minimum(p, q) - reach, np.maximum(p, q) + reach, colour, opacity, line)

    middle = (a + b) / 2
    stroke(a, b, _DARK, True)
    if start == end:
        stroke(a, b, start, False)
    else:
        stroke(a, middle, start, False)
        stroke(middle, b, end, False)


def _draw_dot(
    canvas: Image, point: NDArray[np.float64], colour: Colour, width: float, opacity: float
) -> None:
    """A keypoint: a disc with a dark outline."""
    radius = 0.7 * width + 0.5
    for size, fill in ((radius + _rim(width), _DARK), (radius, colour)):

        def disc(mask: Image, origin: NDArray[np.float64], size: float = size) -> None:
            centre, fixed = _fixed(point - origin), round(size * (1 << _SHIFT))
            cv2.circle(mask, centre, fixed, 255, cv2.FILLED, cv2.LINE_AA, _SHIFT)

        _blend(canvas, point - size - 2, point + size + 2, fill, opacity, disc)


def _rim(width: float) -> int:
    """Width in pixels of the dark rim around a limb or dot of `width`."""
    return max(1, round(width / 6))


def _draw_box(canvas: Image, box: NDArray[np.float64], width: int) -> None:
    """The person's box, thin, white on a dark rim; what lies outside the image is cut off."""
    if box.shape != (4,) or not np.isfinite(box).all():
        return
    reach = max(canvas.shape)
    x1, y1, x2, y2 = np.clip(box, -reach, 2 * reach)
    corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    low, high = corners.min(0) - width - 2, corners.max(0) + width + 2
    for size, colour, opacity in ((width + 2, _DARK, 0.35), (width, (255, 255, 255), 0.9)):

        def outline(mask: Image, origin: NDArray[np.float64], size: int = size) -> None:
            points = np.array([_fixed(corner - origin) for corner in corners], np.int32)
            cv2.polylines(mask, [points], True, 255, size, cv2.LINE_AA, _SHIFT)

        _blend(canvas, low, high, colour, opacity, outline)
