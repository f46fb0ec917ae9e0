"""What the colours, widths and outlines of an architecture picture mean."""

from __future__ import annotations

from collections.abc import Sequence

from pnfs.plotting.canvas import Canvas
from pnfs.plotting.panel import (
    POINTS_PER_WEIGHT,
    Panel,
    draw_dead_cell,
    draw_feature,
    draw_live_cell,
)
from pnfs.plotting.style import (
    INK,
    OPERATION_COLOURS,
    SOFT,
    TRANSFORM_COLOURS,
    operation_colours,
    spaced,
)

LINE_H, BLOCK_W, BLOCK_GAP = 0.197, 2.35, 0.30
SWATCH_W, LABEL_X = 0.42, 0.54
TRANSFORMS = {
    "same": "same scale",
    "down": "half size, double channels",
    "up": "double size, half channels",
}
CONNECTION_LINES, CELL_LINES = len(TRANSFORMS) + 2, 3


def _operations(panels: Sequence[Panel]) -> list[str]:
    used = dict.fromkeys(name for panel in panels for name in panel.topology.operations)
    return [
        *(name for name in OPERATION_COLOURS if name in used),
        *(name for name in used if name not in OPERATION_COLOURS),
    ]


def legend_size(panels: Sequence[Panel], *, stacked: bool) -> tuple[float, float]:
    """(width, height) in inches of `draw_legend`."""
    lines = [CONNECTION_LINES, len(_operations(panels)), CELL_LINES]
    heights = [(1.3 + count) * LINE_H for count in lines]
    if stacked:
        return BLOCK_W, sum(heights) + 2 * 0.8 * LINE_H
    return 3 * BLOCK_W + 2 * BLOCK_GAP, max(heights)


def draw_legend(
    canvas: Canvas, panels: Sequence[Panel], x: float, y: float, *, stacked: bool
) -> None:
    """Three blocks, one below the other or side by side, from the upper left corner (x, y)."""
    for draw in (_connections, _operation_names, _cells):
        lines = draw(canvas, panels, x, y)
        if stacked:
            y += (2.1 + lines) * LINE_H
        else:
            x += BLOCK_W + BLOCK_GAP


def _heading(canvas: Canvas, x: float, y: float, text: str) -> float:
    """Draws a block's heading; y of its first line."""
    canvas.text(x, y + LINE_H / 2, text, 8.5, bold=True)
    return y + 1.75 * LINE_H


def _connections(canvas: Canvas, panels: Sequence[Panel], x: float, y: float) -> int:
    y = _heading(canvas, x, y, "Connections: width is softmax β")
    for transform, name in TRANSFORMS.items():
        canvas.arrow((x, y), (x + SWATCH_W, y), TRANSFORM_COLOURS[transform], 2.2)
        canvas.text(x + LABEL_X, y, name, 8)
        y += LINE_H
    canvas.arrow((x, y), (x + SWATCH_W, y), INK, 2.2, dashed=True)
    canvas.text(x + LABEL_X, y, "copy for a missing neighbour", 8)
    y += LINE_H
    for i, weight in enumerate((0.1, 0.33, 0.67)):
        left = x + 0.03 + i * 0.66
        canvas.line([(left, y), (left + 0.24, y)], SOFT, weight * POINTS_PER_WEIGHT)
        canvas.text(left + 0.32, y, f"{weight:g}", 7.5, colour=SOFT)
    return CONNECTION_LINES


def _operation_names(canvas: Canvas, panels: Sequence[Panel], x: float, y: float) -> int:
    y = _heading(canvas, x, y, "Operations: share is softmax α")
    names = _operations(panels)
    for name, colour in operation_colours(names).items():
        canvas.box(x, y - 0.07, 0.34, 0.14, fill=colour, edge=INK, line=0.6)
        canvas.text(x + LABEL_X, y, spaced(name), 8)
        y += LINE_H
    return len(names)


def _cells(canvas: Canvas, panels: Sequence[Panel], x: float, y: float) -> int:
    y = _heading(canvas, x, y, "Cells")
    size, centre = (0.24, 0.145), x + 0.17
    draw_live_cell(canvas, panels[0], (centre, y), size)
    canvas.text(x + LABEL_X, y, "cell and its operations", 8)
    y += LINE_H
    draw_dead_cell(canvas, (centre, y), size)
    canvas.text(x + LABEL_X, y, "dead: on no path to the output", 8)
    y += LINE_H
    draw_feature(canvas, (centre, y), (0.08, 0.145), live=True)
    canvas.text(x + LABEL_X, y, "feature map", 8)
    return CELL_LINES
