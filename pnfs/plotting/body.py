"""A small standing figure that shows which keypoints a part predicts."""

from __future__ import annotations

from collections.abc import Collection

from pnfs.errors import PnfsError
from pnfs.plotting.canvas import POINT, Canvas, Point
from pnfs.plotting.style import INK
from pnfs.skeleton import Skeleton

SILHOUETTE = "#E4E4E4"

# Facing us, so the person's left is on the right; x from the body's axis, y down, height 1.
_MIDDLE: dict[str, Point] = {
    "head_top": (0.0, 0.0), "nose": (0.0, 0.105), "upper_neck": (0.0, 0.18), "thorax": (0.0, 0.235),
    "pelvis": (0.0, 0.52),
}  # fmt: skip
_SIDES: dict[str, Point] = {
    "eye": (0.032, 0.072), "ear": (0.072, 0.088), "shoulder": (0.135, 0.245),
    "elbow": (0.195, 0.395), "wrist": (0.235, 0.54), "hip": (0.085, 0.53),
    "knee": (0.10, 0.76), "ankle": (0.11, 0.99),
}  # fmt: skip


def body_points(skeleton: Skeleton) -> list[Point]:
    """(x, y) of every keypoint of a standing figure of height 1, head at the top."""
    points = []
    for name in skeleton.keypoints:
        side, _, joint = name.partition("_")
        if name in _MIDDLE:
            points.append(_MIDDLE[name])
        elif side in ("left", "right") and joint in _SIDES:
            x, y = _SIDES[joint]
            points.append((x if side == "left" else -x, y))
        else:
            raise PnfsError(f"skeleton '{skeleton.name}': no place in the figure for '{name}'")
    return points


def draw_body(
    canvas: Canvas,
    centre: float,
    top: float,
    height: float,
    skeleton: Skeleton,
    part: Collection[int],
    colour: str,
) -> None:
    """A silhouette of `height` inches below (centre, top); the keypoints of `part` in `colour`."""

    def place(x: float, y: float) -> Point:
        return centre + x * height, top + y * height

    thick = 0.062 * height / POINT
    canvas.disc(place(0.0, 0.085), 0.083 * height, SILHOUETTE, layer=2)
    for sign in (-1, 1):
        for limb in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")):
            joints = [place(sign * _SIDES[name][0], _SIDES[name][1]) for name in limb]
            canvas.line(joints, SILHOUETTE, thick, layer=2)
    canvas.line([place(0.0, 0.16), place(0.0, 0.26)], SILHOUETTE, thick, layer=2)
    torso = [
        (_SIDES[name], sign)
        for name, sign in (("shoulder", -1), ("shoulder", 1), ("hip", 1), ("hip", -1))
    ]
    canvas.line([place(s * x, y) for (x, y), s in torso], SILHOUETTE, thick, filled=True, layer=2)

    points = [place(x, y) for x, y in body_points(skeleton)]
    limbs = [[points[a], points[b]] for a, b in skeleton.limbs if a in part and b in part]
    for width, ink in ((3.4, INK), (2.2, colour)):
        for ends in limbs:
            canvas.line(ends, ink, width)
    for k in part:
        canvas.disc(points[k], 0.030, colour, INK, 0.6)
