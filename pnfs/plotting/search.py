"""How α and β moved during a search: stacked shares over the steps, where the fabric has its cells.

A mix sums to one, so its trajectory is a stack: at a glance, which share grew. Every cell of the
scale × layer grid shows softmax(β) of its three inputs; below it softmax(α) of each edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import nn

from pnfs.errors import PnfsError
from pnfs.plotting.architecture import DEAD_BELOW, GUTTER, MARGIN, TITLE_H, panel_rows, used_outputs
from pnfs.plotting.canvas import Canvas, text_width
from pnfs.plotting.charts import PLAIN, plain_log_ticks, say_empty, style_axes
from pnfs.plotting.legend import TRANSFORMS
from pnfs.plotting.metrics import Series, read_rows, series_of
from pnfs.plotting.panel import DEAD_EDGE, FRAME, Place, live_cells
from pnfs.plotting.style import (
    INK,
    PAPER,
    SOFT,
    TRANSFORM_COLOURS,
    drawing,
    operation_colours,
    part_colours,
    save_figure,
    spaced,
)
from pnfs.search import find_fabrics
from pnfs.topology import CellRow, Topology

Floats = NDArray[np.float64]

CELL_W, CELL_H, PITCH_X, PITCH_Y = 0.74, 0.44, 0.88, 0.58
PADDING, LABEL_W, SHARES_W = 0.14, 0.50, 1.08  # SHARES_W: names of operations, right of α
HEADER_H, ALPHA_H, AXIS_H = 0.56, 0.62, 0.18
CHART_W, CHART_H, CHART_GAP = 2.9, 1.35, 0.62
LEGEND_H = 0.58
COPY_OPACITY = 0.45  # of an input that stands in for a missing neighbour
DEAD_OPACITY = 0.18


@dataclass(frozen=True)
class Trajectory:
    """One part of one fabric: α (T, edges, ops) and β (T, cells, 3), softmax values at T steps."""

    name: str
    topology: Topology
    colour: str
    steps: Floats
    alpha: Floats
    beta: Floats
    outputs: tuple[int, ...]  # levels of the last layer whose output is used

    @property
    def layers(self) -> range:
        return range(self.topology.first_layer, self.topology.last_layer + 1)

    @property
    def width(self) -> float:
        return 2 * PADDING + LABEL_W + len(self.layers) * PITCH_X + SHARES_W

    @property
    def height(self) -> float:
        edges = len(self.topology.edges) * (ALPHA_H + 0.08)
        return 2 * PADDING + HEADER_H + self.levels * PITCH_Y + 0.10 + edges + AXIS_H

    @property
    def live(self) -> frozenset[Place]:
        """Cells on a path to an output at the end of the search."""
        return live_cells(self.topology, self.beta[-1], DEAD_BELOW, self.outputs)

    @property
    def levels(self) -> int:
        return 1 + max(cell.level for cell in self.topology.cells)


def read_trajectories(rows: Sequence[Mapping[str, Any]], model: nn.Module) -> list[Trajectory]:
    """Trajectories of a fabric backbone and of every part, from the `search` rows of a run.

    Raises:
        PnfsError: rows of another architecture than the model's.
    """
    found = [row for row in rows if row.get("event") == "search" and row.get("fabrics")]
    if not found:
        return []
    config: Any = model.config
    names = {"backbone": ["backbone"], "parts": list(config.part_table)}
    colours = {**part_colours(names["parts"]), "backbone": SOFT}
    result = []
    fabrics = find_fabrics(model)
    for which in [key for key in ("backbone", "parts") if key in fabrics]:
        table, parts = fabrics[which].topology, len(names[which])
        shapes = {
            "alpha": (len(found), parts, len(table.edges), len(table.operations)),
            "beta": (len(found), parts, len(table.cells), 3),
        }
        values = {}
        for key, shape in shapes.items():
            try:
                array = np.array([row["fabrics"][which][key] for row in found], np.float64)
            except (KeyError, TypeError, ValueError):
                array = np.empty(0)
            if array.shape != shape:
                raise PnfsError(
                    f"metrics: the search rows' {which} {key} is {array.shape[1:]}, the model's "
                    f"{shape[1:]}; they belong to another model"
                )
            values[key] = array
        steps = np.array([float(row["step"]) for row in found])
        for p, name in enumerate(names[which]):
            alpha, beta = values["alpha"][:, p], values["beta"][:, p]
            ends = used_outputs(fabrics[which], p)
            result.append(Trajectory(name, table, colours[name], steps, alpha, beta, ends))
    return result


def plot_search(
    model: nn.Module, metrics: str | Path, path: str | Path, *, title: str | None = None
) -> list[Path]:
    """Softmax(α) and softmax(β) over the search, entropies, shares of skip and zero, gradients.

    Args:
        model: of the run: it knows the topology and the names of the parts.
        metrics: its metrics.jsonl or run folder.
        path: a .svg or .png file; without a suffix both are written.
        title: one line above everything.

    Returns:
        The files written.

    Raises:
        PnfsError: no rows about a search, rows of another model, an unwritable file.
    """
    rows = read_rows(metrics)
    panels = read_trajectories(rows, model)
    if not panels:
        raise PnfsError(f"metrics {metrics}: no rows about a search; nothing to draw")
    searched = [row for row in rows if row.get("event") == "search"]
    lines = panel_rows(panels)
    widths = [sum(panel.width + GUTTER for panel in line) - GUTTER for line in lines]
    heights = [max(panel.height for panel in line) for line in lines]
    charts = _charts(panels, searched)
    inner = max(*widths, 3 * (CHART_W + CHART_GAP))
    top = MARGIN + (TITLE_H if title else 0.0)
    charts_h = 0.32 + CHART_H + 0.50
    body = sum(heights) + GUTTER * (len(heights) - 1)
    with drawing():
        canvas = Canvas(inner + 2 * MARGIN, top + charts_h + LEGEND_H + body + MARGIN)
        if title:
            canvas.text(MARGIN, MARGIN + 0.10, title, 12, bold=True)
        pitch = inner / len(charts)
        for i, draw in enumerate(charts):
            x = MARGIN + CHART_GAP + i * pitch
            draw(canvas.axes(x, top + 0.32, pitch - CHART_GAP - 0.12, CHART_H))
        _draw_legend(canvas, panels, MARGIN, top + charts_h)
        y = top + charts_h + LEGEND_H
        for line, height in zip(lines, heights, strict=True):
            x = MARGIN
            for panel in line:
                _draw_panel(canvas, panel, x, y, height)
                x += panel.width + GUTTER
            y += height + GUTTER
        return save_figure(canvas.figure, path)


# -- the charts above ------------------------------------------------------------------------------


def _charts(panels: Sequence[Trajectory], rows: list[dict[str, Any]]) -> list[Any]:
    """Functions that draw one chart each into axes."""
    gradients = {
        name: series_of(rows, f"{key}_gradient")
        for name, key in (("α", "alpha"), ("β", "beta"), ("α and β", "architecture"))
    }
    if gradients["α"][0] or gradients["β"][0]:
        del gradients["α and β"]
    shares = {name: series_of(rows, f"{name}_share") for name in ("skip", "zero")}
    heat = {"τ": series_of(rows, "temperature")}
    charts = [
        lambda axes: _draw_entropies(axes, panels),
        lambda axes: _draw_series(axes, "Mean share of operations", shares, "not in the fabric"),
        lambda axes: _draw_series(axes, "Gradient norm", gradients, "α and β are frozen", log=True),
    ]
    if heat["τ"][0]:
        charts.append(lambda axes: _draw_series(axes, "Temperature of samples", heat, ""))
    return charts


def entropies(weights: Floats) -> Floats:
    """(T, mixes, choices) → (T,): mean entropy, as a share of the largest possible."""
    logs = np.log(np.where(weights > 0, weights, 1.0))
    largest = np.log(weights.shape[-1]) if weights.shape[-1] > 1 else 1.0
    return np.asarray(-(weights * logs).sum(-1).mean(-1) / largest)


def _draw_entropies(axes: Axes, panels: Sequence[Trajectory]) -> None:
    for panel in panels:
        used = panel.live
        rows = [c.beta_row for c in panel.topology.cells if (c.layer, c.level) in used]
        mixes = ((panel.alpha, "solid"), (panel.beta[:, rows], (0, (3, 1.5))))
        for weights, style in mixes if rows else mixes[:1]:
            axes.plot(
                panel.steps, entropies(weights), color=panel.colour, linestyle=style, linewidth=1.6
            )
    style_axes(axes, "Relative entropy (α —, β - -)")
    low = axes.get_ylim()[0]
    axes.set_ylim(min(0.9, max(0.0, low)), 1.01)
    axes.set_xlabel("step", fontsize=8, color=SOFT)


def _draw_series(
    axes: Axes, title: str, series: Mapping[str, Series], empty: str, *, log: bool = False
) -> None:
    colours = {"skip": "#C9A400", "zero": "#8A8A8A", "α": INK, "β": "#D55E00"}
    for name, (steps, values) in series.items():
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0 or not log]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colours.get(name, INK),
                linewidth=1.6,
                label=f"{name}  {values[-1]:.3g}",
            )
    style_axes(axes, title)
    axes.set_xlabel("step", fontsize=8, color=SOFT)
    if not axes.lines:
        say_empty(axes, empty)
        return
    if log:
        axes.set_yscale("log")
        plain_log_ticks(axes)
    else:
        axes.set_ylim(0, 1.15 * max(axes.get_ylim()[1], 1e-6))
    axes.legend(fontsize=8, frameon=False, loc="best", title="last value", title_fontsize=7)


# -- the panels ------------------------------------------------------------------------------------


def _draw_legend(canvas: Canvas, panels: Sequence[Trajectory], x: float, y: float) -> None:
    """Two lines: what the colours in cells and below them mean."""
    used = list(dict.fromkeys(name for panel in panels for name in panel.topology.operations))
    inputs = [(name, TRANSFORM_COLOURS[key]) for key, name in TRANSFORMS.items()]
    operations = [(spaced(name), colour) for name, colour in operation_colours(used).items()]
    lines = (
        ("cells: softmax β of the inputs", inputs, "pale: copy for a missing neighbour"),
        ("below: softmax α", operations, ""),
    )
    for heading, entries, remark in lines:
        canvas.text(x, y + 0.06, heading, 8.5, bold=True)
        at = x + 2.35
        for label, colour in entries:
            canvas.box(at, y, 0.20, 0.12, fill=colour, edge=INK, line=0.5)
            canvas.text(at + 0.26, y + 0.06, label, 8)
            at += 0.26 + text_width(label, 8) + 0.20
        canvas.text(at, y + 0.06, remark, 8, colour=SOFT)
        y += 0.22


def _draw_panel(canvas: Canvas, panel: Trajectory, x: float, y: float, height: float) -> None:
    canvas.box(x, y, panel.width, height, edge=FRAME, line=1.0, radius=0.08, layer=1)
    left, top = x + PADDING, y + PADDING
    canvas.box(left, top + 0.03, 0.15, 0.15, fill=panel.colour, edge=INK, line=0.6)
    canvas.text(left + 0.24, top + 0.105, spaced(panel.name), 10.5, bold=True)
    first = left + LABEL_W
    for i, layer in enumerate(panel.layers):
        centre = first + (i + 0.5) * PITCH_X
        heading = f"layer {layer}"
        canvas.text(centre, top + HEADER_H - 0.12, heading, 7.5, align="center", colour=SOFT)
    grid = top + HEADER_H
    for level in range(panel.levels):
        canvas.text(left, grid + (level + 0.5) * PITCH_Y, f"1/{4 << level}", 8.5, bold=True)
    live = panel.live
    for cell in panel.topology.cells:
        column = cell.layer - panel.topology.first_layer
        corner = (
            first + column * PITCH_X + (PITCH_X - CELL_W) / 2,
            grid + cell.level * PITCH_Y + (PITCH_Y - CELL_H) / 2,
        )
        _draw_cell(canvas, panel, cell, corner, alive=(cell.layer, cell.level) in live)
    y = grid + panel.levels * PITCH_Y + 0.10
    width = len(panel.layers) * PITCH_X
    for edge in panel.topology.edges:
        label = f"h{edge.source}→h{edge.target}" if len(panel.topology.edges) > 1 else "α"
        canvas.text(left, y + ALPHA_H / 2, label, 7.5 if len(label) > 1 else 8.5, bold=True)
        last = edge is panel.topology.edges[-1]
        _draw_alpha(canvas, panel, edge.alpha_row, (first, y, width), last=last)
        y += ALPHA_H + 0.08


def _stack(axes: Axes, steps: Floats, shares: Floats, colours: Sequence[Any]) -> None:
    """`shares` (T, choices) as bands that fill the axes."""
    if len(steps) == 1:  # a band needs two ends
        steps, shares = np.array([steps[0], steps[0] + 1]), np.repeat(shares, 2, axis=0)
    axes.stackplot(steps, shares.T, colors=colours, linewidth=0)
    edges = np.cumsum(shares, axis=1)[:, :-1]
    axes.plot(steps, edges, color=PAPER, linewidth=0.8)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([])


def _draw_cell(
    canvas: Canvas, panel: Trajectory, cell: CellRow, corner: tuple[float, float], *, alive: bool
) -> None:
    """The inputs' shares, drawn from above as they stand: above, parallel, below."""
    axes = canvas.axes(*corner, CELL_W, CELL_H)
    above_first = sorted(cell.inputs, key=lambda source: (0, -1, 1)[source.slot])
    slots = [source.slot for source in reversed(above_first)]  # a stack begins at the bottom
    by_slot = {source.slot: source for source in cell.inputs}
    colours = []
    for slot in slots:
        source = by_slot[slot]
        opacity = COPY_OPACITY if source.border_copy else 0.9
        colours.append((TRANSFORM_COLOURS[source.transform], opacity if alive else DEAD_OPACITY))
    _stack(axes, panel.steps, panel.beta[:, cell.beta_row][:, slots], colours)
    for side in axes.spines.values():
        side.set_color(INK if alive else DEAD_EDGE)
        side.set_linewidth(0.9)
        side.set_linestyle("solid" if alive else (0, (3, 2)))


def _draw_alpha(
    canvas: Canvas, panel: Trajectory, row: int, place: tuple[float, float, float], *, last: bool
) -> None:
    """Shares of one edge's operations, with their last values on the right."""
    x, y, width = place
    axes = canvas.axes(x, y, width, ALPHA_H)
    names = panel.topology.operations[::-1]  # the first on top
    colours = operation_colours(panel.topology.operations)
    shares = panel.alpha[:, row, ::-1]
    _stack(axes, panel.steps, shares, [colours[name] for name in names])
    for side in axes.spines.values():
        side.set_color(INK)
        side.set_linewidth(0.8)
    if last:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.tick_params(labelsize=7, colors=SOFT, length=2.5)
        axes.spines["bottom"].set_color(INK)
        canvas.text(x + width + 0.30, y + ALPHA_H + 0.10, "step", 7, colour=SOFT)
    final = shares[-1][::-1]
    tops = np.concatenate([[0.0], np.cumsum(final)[:-1]])
    centres = list(ALPHA_H * (tops + final / 2))
    spacing = min(0.125, ALPHA_H / max(1, len(centres)))
    for i in range(1, len(centres)):
        centres[i] = max(centres[i], centres[i - 1] + spacing)
    overflow = max(0.0, centres[-1] - (ALPHA_H - spacing / 2))
    for i in range(len(centres) - 1, -1, -1):
        limit = centres[i + 1] - spacing if i + 1 < len(centres) else centres[i] - overflow
        centres[i] = min(centres[i], limit)
    size = min(7.0, 72 * spacing * 0.92)
    for name, share, centre in zip(panel.topology.operations, final, centres, strict=True):
        canvas.box(x + width + 0.08, y + centre - 0.035, 0.07, 0.07, fill=colours[name])
        text = f"{spaced(name)} {100 * share:.0f} %"
        canvas.text(x + width + 0.19, y + centre, text, size)
