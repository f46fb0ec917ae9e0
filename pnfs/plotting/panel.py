"""One fabric drawn as a panel in the manner of Fig. 1, and the legend. Units: inches, y downwards.

Adjacency is read from the topology's rows, never derived.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pnfs.plotting.body import draw_body
from pnfs.plotting.canvas import Canvas, Point, text_width
from pnfs.plotting.style import (
    FAINT,
    INK,
    PAPER,
    SOFT,
    TRANSFORM_COLOURS,
    operation_colours,
    readable_on,
    spaced,
)
from pnfs.skeleton import Skeleton
from pnfs.topology import LEVELS, CellInput, CellRow, Topology

Floats = NDArray[np.float64]
Place = tuple[int, int]  # (layer, level); inputs have layer `topology.input_layer`

CELL_W, CELL_H = 0.42, 0.38
PITCH_X, PITCH_Y = 0.92, 0.60
PADDING = 0.14  # inside the panel's frame
LABEL_W = 0.50  # scale names, left of the grid
INPUT_W = 0.16
OUTPUT_W = 1.10  # what the fabric predicts, right of the grid
HEADER_H = 0.56  # name and column headings
BAR_H, BAR_GAP = 0.29, 0.05
PORT = 0.11  # distance between the three inputs on a cell's left side
PORT_OF_SLOT = (0.0, -PORT, PORT)  # parallel in the middle, above on top, below at the bottom
POINTS_PER_WEIGHT = 6.5  # arrow width in points at weight 1
THINNEST = 0.5  # points

FRAME, FEATURE, DEAD_FILL, DEAD_EDGE = "#DDDDDD", "#9FB3C8", "#EFEFEF", "#B5B5B5"
INPUT_NAMES = {True: "stem", False: "pyramid"}  # by Topology.from_stem


@dataclass(frozen=True)
class Panel:
    """One fabric to draw: `alpha` (edges, ops) and `beta` (cells, 3) are softmax values.

    `keypoints` are the skeleton's indices that it predicts; none for a backbone. `outputs` are the
    levels of the last layer whose output is used; None for all.
    """

    name: str
    topology: Topology
    alpha: Floats
    beta: Floats
    colour: str
    keypoints: tuple[int, ...] = ()
    outputs: tuple[int, ...] | None = None

    @property
    def layers(self) -> range:
        return range(self.topology.first_layer, self.topology.last_layer + 1)

    @property
    def width(self) -> float:
        return 2 * PADDING + LABEL_W + INPUT_W + len(self.layers) * PITCH_X + OUTPUT_W

    @property
    def height(self) -> float:
        bars = len(self.topology.edges) * (BAR_H + BAR_GAP)
        return 2 * PADDING + HEADER_H + LEVELS * PITCH_Y + 0.06 + bars


def live_cells(
    topology: Topology, beta: Floats, threshold: float, outputs: Collection[int] | None = None
) -> frozenset[Place]:
    """Cells, and inputs from outside, that lie on a path from an input to an output.

    Args:
        beta: (cells, 3) softmax values of one part.
        threshold: connections with a weight up to this count as absent.
        outputs: levels of the last layer whose output is used; all by default.
    """
    present = [
        ((cell.layer, cell.level), x.source)
        for cell in topology.cells
        for x in cell.inputs
        if beta[cell.beta_row, x.slot] > threshold
    ]
    fed = {source for _, source in present if source[0] == topology.input_layer}
    for place, source in present:  # layer by layer, so a source is settled before its readers
        if source in fed:
            fed.add(place)
    ends = [c for c in topology.output_cells if outputs is None or c.level in outputs]
    needed = {(cell.layer, cell.level) for cell in ends} & fed
    for place, source in reversed(present):
        if place in needed and source in fed:
            needed.add(source)
    return frozenset(needed)


def draw_panel(
    canvas: Canvas,
    panel: Panel,
    x: float,
    y: float,
    height: float,
    skeleton: Skeleton | None,
    threshold: float,
) -> None:
    """Draw `panel` in a frame of `height` inches with its upper left corner at (x, y)."""
    canvas.box(x, y, panel.width, height, edge=FRAME, line=1.0, radius=0.08, layer=1)
    grid = _Grid(panel, x + PADDING, y + PADDING)
    live = live_cells(panel.topology, panel.beta, threshold, panel.outputs)
    _draw_header(canvas, panel, grid)
    _draw_connections(canvas, panel, grid, live, threshold)
    sources = {s.source for cell in panel.topology.cells for s in cell.inputs}
    for place in sorted(sources):
        if place[0] == panel.topology.input_layer:
            draw_feature(canvas, grid.centre(place), feature_size(place[1]), live=place in live)
    for cell in panel.topology.cells:
        place = cell.layer, cell.level
        if place in live:
            draw_live_cell(canvas, panel, grid.centre(place))
        else:
            draw_dead_cell(canvas, grid.centre(place))
    _draw_outputs(canvas, panel, grid, live, skeleton)
    _draw_operations(canvas, panel, grid)


@dataclass(frozen=True)
class _Grid:
    """Where things stand inside a panel whose content begins at (left, top)."""

    panel: Panel
    left: float
    top: float

    @property
    def right(self) -> float:
        return self.left + self.panel.width - 2 * PADDING

    @property
    def bottom(self) -> float:
        """Below the last scale."""
        return self.top + HEADER_H + LEVELS * PITCH_Y

    def column(self, layer: int) -> float:
        """x of a layer's centres; the input's layer stands left of the first."""
        first = self.left + LABEL_W + INPUT_W / 2
        step = layer - self.panel.topology.input_layer
        return first + step * PITCH_X

    def row(self, level: int) -> float:
        return self.top + HEADER_H + (level + 0.5) * PITCH_Y

    def centre(self, place: Place) -> Point:
        return self.column(place[0]), self.row(place[1])

    def half_width(self, place: Place) -> float:
        return (INPUT_W if place[0] == self.panel.topology.input_layer else CELL_W) / 2


def _draw_header(canvas: Canvas, panel: Panel, grid: _Grid) -> None:
    """Name, column headings and scales."""
    canvas.box(grid.left, grid.top + 0.03, 0.15, 0.15, fill=panel.colour, edge=INK, line=0.6)
    canvas.text(grid.left + 0.24, grid.top + 0.105, spaced(panel.name), 10.5, bold=True)
    y = grid.top + HEADER_H - 0.12
    topology = panel.topology
    heading = INPUT_NAMES[topology.from_stem]
    canvas.text(grid.column(topology.input_layer), y, heading, 7.5, align="center", colour=SOFT)
    for layer in panel.layers:
        canvas.text(grid.column(layer), y, f"layer {layer}", 7.5, align="center", colour=SOFT)
    for level in range(LEVELS):
        y = grid.row(level)
        canvas.text(grid.left, y - 0.07, f"1/{4 << level}", 8.5, bold=True)
        canvas.text(grid.left, y + 0.08, f"{topology.channels_at(level)} ch", 6.5, colour=SOFT)


def _draw_connections(
    canvas: Canvas, panel: Panel, grid: _Grid, live: frozenset[Place], threshold: float
) -> None:
    """Every row of the table as an arrow."""
    leaving: dict[Place, list[tuple[CellRow, CellInput]]] = defaultdict(list)
    for cell in panel.topology.cells:
        for x in cell.inputs:
            leaving[x.source].append((cell, x))
    strokes = []
    for source, targets in leaving.items():
        centre_x, centre_y = grid.centre(source)
        targets.sort(key=lambda t: grid.row(t[0].level) + PORT_OF_SLOT[t[1].slot])
        for (cell, x), offset in zip(targets, _leave_at(source, targets), strict=True):
            start = centre_x + grid.half_width(source), centre_y + offset
            end = grid.column(cell.layer) - CELL_W / 2, grid.row(cell.level) + PORT_OF_SLOT[x.slot]
            weight = float(panel.beta[cell.beta_row, x.slot])
            used = weight > threshold and source in live and (cell.layer, cell.level) in live
            strokes.append((used, weight, start, end, x))
    # Grey first, then wide below narrow.
    for used, weight, start, end, x in sorted(strokes, key=lambda stroke: (stroke[0], -stroke[1])):
        colour = TRANSFORM_COLOURS[x.transform] if used else FAINT
        width = max(THINNEST, weight * POINTS_PER_WEIGHT) if used else THINNEST
        canvas.arrow(start, end, colour, width, dashed=x.border_copy, head=used)


def _leave_at(source: Place, targets: Sequence[tuple[CellRow, CellInput]]) -> list[float]:
    """Where on the source's right side each arrow starts, as an offset downwards from its centre:
    level with its end where two do not collide, else side by side in the order of the ends."""
    offsets = [
        PORT_OF_SLOT[x.slot]
        if cell.level == source[1]
        else PORT * (1 if cell.level > source[1] else -1)
        for cell, x in targets
    ]
    if len(set(offsets)) == len(offsets):
        return offsets
    spacing = min(PORT, 0.30 / (len(targets) - 1))
    return [(i - (len(targets) - 1) / 2) * spacing for i in range(len(targets))]


def feature_size(level: int) -> Point:
    """(width, height) of a feature map; smaller at smaller scales."""
    return INPUT_W, 0.40 - 0.04 * level


def draw_feature(canvas: Canvas, centre: Point, size: Point, *, live: bool) -> None:
    """A feature map from or to outside."""
    corner = centre[0] - size[0] / 2, centre[1] - size[1] / 2
    fill, edge = (FEATURE, INK) if live else (DEAD_FILL, DEAD_EDGE)
    canvas.box(*corner, *size, fill=fill, edge=edge, line=0.8, dashed=not live)


def draw_dead_cell(canvas: Canvas, centre: Point, size: Point = (CELL_W, CELL_H)) -> None:
    """A cell through which nothing passes."""
    corner = centre[0] - size[0] / 2, centre[1] - size[1] / 2
    radius = size[1] / 6
    canvas.box(*corner, *size, fill=DEAD_FILL, edge=DEAD_EDGE, line=0.9, radius=radius, dashed=True)


def draw_live_cell(
    canvas: Canvas, panel: Panel, centre: Point, size: Point = (CELL_W, CELL_H)
) -> None:
    """A cell with the operations' shares inside: one row per edge, in α's order."""
    (x, y), (width, height) = (centre[0] - size[0] / 2, centre[1] - size[1] / 2), size
    radius = height / 6
    ground = canvas.box(x, y, width, height, fill=PAPER, radius=radius)
    colours = operation_colours(panel.topology.operations)
    step = height / len(panel.alpha)
    for row, shares in enumerate(panel.alpha):
        left, top = x, y + row * step
        for name, share in zip(panel.topology.operations, shares, strict=True):
            part = float(share) * width
            canvas.box(left, top, part, step, fill=colours[name], within=ground)
            left += part
        if row:
            canvas.line([(x, top), (x + width, top)], PAPER, 0.8)
    canvas.box(x, y, width, height, edge=INK, line=1.1, radius=radius, layer=4)


def _draw_outputs(
    canvas: Canvas, panel: Panel, grid: _Grid, live: frozenset[Place], skeleton: Skeleton | None
) -> None:
    """What leaves the last layer: keypoints from a fabric that ends in one cell, else a pyramid."""
    outputs = panel.topology.output_cells
    x = grid.column(panel.topology.last_layer) + CELL_W / 2
    centre = grid.right - 0.46
    heading = "pyramid" if len(outputs) > 1 else "keypoints"
    canvas.text(centre, grid.top + HEADER_H - 0.12, heading, 7.5, align="center", colour=SOFT)
    show_body = len(outputs) == 1 and skeleton is not None and bool(panel.keypoints)
    for cell in outputs:
        y = grid.row(cell.level)
        alive = (cell.layer, cell.level) in live
        end = centre - (0.24 if show_body else INPUT_W / 2)
        canvas.arrow((x, y), (end, y), INK if alive else FAINT, 1.2)
        if not show_body:
            draw_feature(canvas, (centre, y), feature_size(cell.level), live=alive)
    if show_body:
        assert skeleton is not None
        height = LEVELS * PITCH_Y - 0.62
        draw_body(
            canvas, centre, grid.row(0) - 0.16, height, skeleton, panel.keypoints, panel.colour
        )
        count = f"{len(panel.keypoints)} of {skeleton.num_keypoints}"
        canvas.text(centre, grid.bottom - 0.14, count, 7.5, align="center", colour=SOFT)


def _draw_operations(canvas: Canvas, panel: Panel, grid: _Grid) -> None:
    """The shares of the operations, softmax(α), as one wide bar per edge."""
    colours = operation_colours(panel.topology.operations)
    left, width = grid.left + LABEL_W, grid.right - grid.left - LABEL_W
    y = grid.bottom + 0.08
    for edge in panel.topology.edges:
        label = f"h{edge.source}→h{edge.target}" if len(panel.topology.edges) > 1 else "α"
        canvas.text(grid.left, y + BAR_H / 2, label, 7.5, bold=True)
        x = left
        for name, share in zip(panel.topology.operations, panel.alpha[edge.alpha_row], strict=True):
            part = float(share) * width
            canvas.box(x, y, part, BAR_H, fill=colours[name])
            ink, middle = readable_on(colours[name]), x + part / 2
            label, percent = spaced(name), f"{100 * share:.0f} %"
            if text_width(label, 6.8) < part - 0.09:
                canvas.text(middle, y + 0.09, label, 6.8, align="center", colour=ink)
                canvas.text(middle, y + 0.20, percent, 6.8, align="center", colour=ink)
            elif text_width(percent, 6.8) < part - 0.06:
                canvas.text(middle, y + BAR_H / 2, percent, 6.8, align="center", colour=ink)
            x += part
        canvas.box(left, y, width, BAR_H, edge=INK, line=0.8, layer=4)
        y += BAR_H + BAR_GAP
