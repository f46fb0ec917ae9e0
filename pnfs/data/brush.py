"""Anti-aliased, outlined shapes, painted into an image and into a label image of their owners."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

Color = tuple[int, int, int]  # blue, green, red
_SUBPIXEL = 4  # fractional bits of the coordinates that OpenCV draws at


def shade(color: Color, factor: float) -> Color:
    """Darker for factor < 1, towards white for factor > 1."""
    if factor <= 1:
        blue, green, red = (int(channel * factor) for channel in color)
    else:
        blue, green, red = (int(255 - (255 - channel) * (2 - factor)) for channel in color)
    return blue, green, red


class Brush:
    """Paints outlined shapes, given in height units, into an image and its label image."""

    def __init__(
        self, image: np.ndarray, labels: np.ndarray, height: float, origin: np.ndarray, code: int
    ) -> None:
        self.image, self.labels = image, labels
        self.height, self.origin, self.code = height, origin, code

    def _fixed(self, points: np.ndarray) -> np.ndarray:
        pixels = np.asarray(points) * self.height + self.origin
        return np.rint(pixels * (1 << _SUBPIXEL)).astype(np.int32)

    def polygon(self, part: int, points: np.ndarray, color: Color, *, outline: bool = True) -> None:
        fixed = self._fixed(points)
        cv2.fillConvexPoly(self.image, fixed, color, cv2.LINE_AA, _SUBPIXEL)
        cv2.fillConvexPoly(self.labels, fixed, self.code + part, cv2.LINE_8, _SUBPIXEL)
        if outline:
            cv2.polylines(self.image, [fixed], True, shade(color, 0.5), 1, cv2.LINE_AA, _SUBPIXEL)

    def ellipse(
        self,
        part: int,
        center: np.ndarray,
        across: float,
        along: float,
        up: np.ndarray,
        color: Color,
        *,
        outline: bool = True,
    ) -> None:
        """Radii `across` and `along` the direction `up`."""
        angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        side = np.array([-up[1], up[0]])
        ring = np.cos(angle)[:, None] * across * side + np.sin(angle)[:, None] * along * up
        self.polygon(part, center + ring, color, outline=outline)

    def disc(
        self, part: int, center: np.ndarray, radius: float, color: Color, *, outline: bool = False
    ) -> None:
        self.ellipse(part, center, radius, radius, np.array([0.0, -1.0]), color, outline=outline)

    def capsule(
        self,
        part: int,
        start: np.ndarray,
        end: np.ndarray,
        radii: tuple[float, float],
        color: Color,
    ) -> None:
        """A tapered limb with round ends."""
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points = np.concatenate([start + radii[0] * ring, end + radii[1] * ring]).astype(np.float32)
        self.polygon(part, cv2.convexHull(points)[:, 0], color)

    def bands(
        self,
        part: int,
        start: np.ndarray,
        end: np.ndarray,
        radius: float,
        color: Color,
        places: Sequence[float],
    ) -> None:
        """Stripes across a limb at fractions of its length."""
        along = end - start
        across = np.array([-along[1], along[0]]) / np.linalg.norm(along) * radius
        for place in places:
            low, high = start + (place - 0.09) * along, start + (place + 0.09) * along
            corners = np.array([low - across, low + across, high + across, high - across])
            self.polygon(part, corners, color, outline=False)
