"""A sheet whose unit is the inch, y downwards: text measured in points fits as planned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, Patch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from pnfs.plotting.style import INK

POINT = 1 / 72  # inches
HEAD_LENGTH, HEAD_WIDTH = 4.5, 5.0  # of a thin arrow's head, in points
Point = tuple[float, float]


@lru_cache(maxsize=1024)
def text_width(text: str, size: float) -> float:
    """Width in inches of `text` set in `size` points."""
    extents = TextPath(
        (0, 0), text, size=size, prop=FontProperties(family="DejaVu Sans")
    ).get_extents()
    return float(extents.width) * POINT


class Canvas:
    """A figure of `width` × `height` inches with drawing functions in those units."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)
        self._axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)
        self._axes.set_axis_off()

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes for a chart, with the upper left corner at (x, y)."""
        below = self.height - y - height
        place = (x / self.width, below / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        align: Literal["left", "center", "right"] = "left",
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """One line, centred on y."""
        self._axes.text(
            x, y, text, fontsize=size, ha=align, va="center_baseline", color=colour,
            fontweight="bold" if bold else "normal", zorder=6,
        )  # fmt: skip

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "none",
        edge: str = "none",
        line: float = 0.8,
        radius: float = 0.0,
        dashed: bool = False,
        within: Patch | None = None,
        layer: float = 3,
    ) -> Patch:
        """A rectangle with its upper left corner at (x, y); `within` cuts it to another patch."""
        style: dict[str, Any] = {
            "facecolor": fill, "edgecolor": edge, "linewidth": line, "zorder": layer,
            "linestyle": (0, (3, 2)) if dashed else "solid",
        }  # fmt: skip
        patch: Patch
        if radius:
            shape = f"round,pad=0,rounding_size={radius}"
            patch = FancyBboxPatch((x, y), width, height, boxstyle=shape, **style)
        else:
            patch = Rectangle((x, y), width, height, **style)
        self._axes.add_patch(patch)
        if within is not None:
            patch.set_clip_path(within)
        return patch

    def disc(
        self,
        centre: Point,
        radius: float,
        fill: str,
        edge: str = "none",
        line: float = 0.5,
        layer: float = 4,
    ) -> None:
        """A filled circle."""
        self._axes.add_patch(
            Circle(centre, radius, facecolor=fill, edgecolor=edge, linewidth=line, zorder=layer)
        )

    def line(
        self,
        points: Sequence[Point],
        colour: str,
        width: float,
        *,
        filled: bool = False,
        layer: float = 3,
    ) -> None:
        """Straight segments with round ends, `width` in points; `filled` closes and fills them."""
        path = Path([*points, points[0]] if filled else list(points), closed=filled)
        self._axes.add_patch(
            PathPatch(
                path,
                facecolor=colour if filled else "none",
                edgecolor=colour,
                linewidth=width,
                capstyle="round",
                joinstyle="round",
                zorder=layer,
            )
        )

    def arrow(
        self,
        start: Point,
        end: Point,
        colour: str,
        width: float,
        *,
        dashed: bool = False,
        head: bool = True,
        layer: float = 2,
    ) -> None:
        """An arrow that leaves and arrives horizontally; `width` in points."""
        (x0, y0), (x1, y1) = start, end
        length = (HEAD_LENGTH + 0.6 * width) * POINT if head else 0.0
        tip, x1 = x1, x1 - length
        bend = 0.5 * (x1 - x0)
        codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        curve = Path([(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)], codes)
        pattern = (0, (4 / width, 2 / width)) if dashed else "solid"  # matplotlib scales by width
        self._axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                edgecolor=colour,
                linewidth=width,
                linestyle=pattern,
                capstyle="butt",
                zorder=layer,
            )
        )
        if head:
            half = (HEAD_WIDTH + 1.2 * width) / 2 * POINT
            # The head begins a hair early so that no gap shows between it and the line.
            corners = [(x1 - 0.3 * POINT, y1 - half), (tip, y1), (x1 - 0.3 * POINT, y1 + half)]
            self._axes.add_patch(
                Polygon(corners, closed=True, facecolor=colour, edgecolor="none", zorder=layer)
            )
