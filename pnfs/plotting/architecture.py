"""Architectures as pictures: the fabric of each part, its α and β, in the manner of Fig. 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pnfs.errors import PnfsError
from pnfs.plotting.canvas import Canvas
from pnfs.plotting.legend import draw_legend, legend_size
from pnfs.plotting.panel import Floats, Panel, draw_panel
from pnfs.plotting.style import SOFT, drawing, part_colours, save_figure
from pnfs.search import read_architecture
from pnfs.skeleton import Skeleton
from pnfs.topology import Topology

if TYPE_CHECKING:
    from torch import nn

MARGIN, GUTTER = 0.22, 0.18  # inches, around the picture and between panels
TITLE_H = 0.42
DEAD_BELOW = 1e-3  # softmax weights up to this are drawn as absent

AnyPanel = TypeVar("AnyPanel")
Names = Sequence[str] | Mapping[str, Sequence[int]]


def plot_architecture(
    topology: Topology,
    alpha: Any,
    beta: Any,
    part_names: Names,
    path: str | Path,
    *,
    title: str | None = None,
    skeleton: Skeleton | None = None,
    threshold: float = DEAD_BELOW,
) -> list[Path]:
    """Draw P fabrics of one topology: cells on the scale × layer grid, arrows wide as softmax(β).

    softmax(α) is shown inside each cell and once, large, below. What reaches no output is grey.

    Args:
        topology: the table that α and β belong to.
        alpha: (P, edges, ops) logits of Eq. 1; a tensor on any device or an array. −inf means 0.
        beta: (P, cells, 3) logits of Eq. 2, slots parallel, above, below.
        part_names: P names, or `ModelConfig.part_table` (name -> keypoint indices).
        path: a .svg or .png file; without a suffix both are written.
        title: one line above everything.
        skeleton: with a part table, draws at each fabric's end the keypoints that it predicts.
        threshold: connections with a softmax weight up to this count as absent.

    Returns:
        The files written.

    Raises:
        PnfsError: shapes that do not fit the topology or the names, NaN, an unknown suffix, or a
            file that cannot be written.
    """
    panels = _panels(topology, alpha, beta, part_names)
    return _draw([panels], path, title, skeleton, threshold)


def plot_model_architecture(
    model: nn.Module, path: str | Path, *, title: str | None = None
) -> list[Path]:
    """`plot_architecture` of a PoseNet: its part fabrics and, above them, a fabric backbone.

    Args:
        model: has `fabric` (with `topology`, `alpha`, `beta`) and `config`.
        path: a .svg or .png file; without a suffix both are written.
        title: one line above everything; default backbone, parts and size of the fabric.

    Raises:
        PnfsError: the model has no fabric (a baseline), or as `plot_architecture`.
    """
    fabric: Any = getattr(model, "fabric", None)
    config: Any = getattr(model, "config", None)
    if fabric is None or config is None:
        raise PnfsError(
            f"architecture picture: {type(model).__name__} has no fabric; baselines have no α and β"
        )
    groups = [_panels_of(fabric, config.part_table)]
    backbone: Any = getattr(getattr(model, "backbone", None), "fabric", None)
    if backbone is not None:
        [panel] = _panels_of(backbone, ["backbone"])
        groups.insert(0, [replace(panel, colour=SOFT)])  # the palette is the parts'
    if title is None:
        source = config.backbone if isinstance(config.backbone, str) else "fabric backbone"
        parts = len(config.part_table)
        title = f"{source}  →  {parts} part fabric{'s' * (parts > 1)}"
        title += f",  C = {fabric.topology.channels},  d = {config.vector_dim}"
    return _draw(groups, path, title, config.skeleton_table)


def plot_architecture_file(
    file: str | Path, path: str | Path, *, title: str | None = None
) -> list[Path]:
    """`plot_model_architecture` of an architecture.json, without its model.

    Args:
        file: what a search or `pnfs architecture export` wrote.
        path: a .svg or .png file; without a suffix both are written.
        title: one line above everything; default where the file comes from.

    Raises:
        PnfsError: a file that cannot be read, or a picture that cannot be written.
    """
    fabrics, source = read_architecture(file)
    groups = []
    for which in [key for key in ("backbone", "parts") if key in fabrics]:
        stored = fabrics[which]
        panels = _panels(stored.topology, stored.alpha, stored.beta, stored.parts)
        if which == "backbone":
            panels = [replace(panel, colour=SOFT) for panel in panels]
        groups.append(panels)
    return _draw(groups, path, title or str(source.get("run", Path(file).name)), None)


def used_outputs(fabric: Any, part: int) -> tuple[int, ...]:
    """Levels of a fabric's last layer whose output somebody reads in a part."""
    return tuple(level for level, parts in enumerate(fabric.plan.outputs) if part in parts)


def _panels_of(fabric: Any, part_names: Names) -> list[Panel]:
    """Panels of a model's fabric, with what pruning dropped at zero."""
    # The logarithm of a softmax is a logit of it.
    alpha, beta = (weights.detach().log() for weights in fabric.mixing_weights())
    panels = _panels(fabric.topology, alpha, beta, part_names)
    return [replace(panel, outputs=used_outputs(fabric, p)) for p, panel in enumerate(panels)]


def _panels(
    topology: Topology,
    alpha: Any,
    beta: Any,
    part_names: Names,
) -> list[Panel]:
    """One panel per part from logits; the checks of `plot_architecture` are made here."""
    names = list(part_names)
    table = part_names if isinstance(part_names, Mapping) else dict.fromkeys(names, ())
    if not names or len(set(names)) != len(names):
        raise PnfsError(f"architecture picture: part names {names} must be distinct, at least one")
    shapes = {
        "alpha": (len(names), len(topology.edges), len(topology.operations)),
        "beta": (len(names), len(topology.cells), 3),
    }
    weights = {}
    for key, logits in (("alpha", alpha), ("beta", beta)):
        values = logits.detach().float().cpu() if hasattr(logits, "detach") else logits
        array = np.asarray(values, dtype=np.float64)
        if array.shape != shapes[key]:
            axes = "(parts, edges, operations)" if key == "alpha" else "(parts, cells, 3)"
            raise PnfsError(
                f"architecture picture: {key} is {array.shape}; this topology and "
                f"{len(names)} part names need {axes} = {shapes[key]}"
            )
        if np.isnan(array).any() or (array == np.inf).any():
            raise PnfsError(f"architecture picture: {key} holds NaN or +inf; pass finite logits")
        weights[key] = _softmax(array)
    colours = part_colours(names)
    return [
        Panel(
            name,
            topology,
            weights["alpha"][p],
            weights["beta"][p],
            colours[name],
            tuple(table[name]),
        )
        for p, name in enumerate(names)
    ]


def _softmax(logits: Floats) -> Floats:
    """Softmax over the last axis; a row of −inf alone gives zeros: all of it was removed."""
    top = logits.max(-1, keepdims=True)
    exponent = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    return np.asarray(exponent / np.maximum(exponent.sum(-1, keepdims=True), 1e-300))


def _draw(
    groups: Sequence[Sequence[Panel]],
    path: str | Path,
    title: str | None,
    skeleton: Skeleton | None,
    threshold: float = DEAD_BELOW,
) -> list[Path]:
    """Lay out the groups, each from a new row on, draw panels and legend, and save."""
    rows = [row for group in groups for row in panel_rows(group)]
    panels = [panel for row in rows for panel in row]
    widths = [sum(panel.width + GUTTER for panel in row) - GUTTER for row in rows]
    heights = [max(panel.height for panel in row) for row in rows]
    # The legend stands where a row leaves room for it, side by side or stacked, else below all
    # panels; where the picture is too narrow for that, it widens.
    inner = max(widths)
    places = [
        (i, stacked)
        for i in range(len(rows))
        for stacked in (False, True)
        if _fits(legend_size(panels, stacked=stacked), inner - widths[i], heights[i])
    ]
    below = legend_size(panels, stacked=False)
    if not places and inner < below[0]:
        stack = legend_size(panels, stacked=True)
        places = [(len(rows) - 1, True)]
        inner = max(inner, widths[-1] + GUTTER + stack[0])
        heights[-1] = max(heights[-1], stack[1])
    row_y = [sum(heights[:i]) + GUTTER * i for i in range(len(rows) + 1)]
    top = MARGIN + (TITLE_H if title else 0.0)
    bottom = row_y[-1] - GUTTER if places else row_y[-1] + below[1]
    with drawing():
        canvas = Canvas(inner + 2 * MARGIN, top + bottom + MARGIN)
        if title:
            canvas.text(MARGIN, MARGIN + 0.10, title, 12, bold=True)
        for row, height, y in zip(rows, heights, row_y[:-1], strict=True):
            x = MARGIN
            for panel in row:
                draw_panel(canvas, panel, x, top + y, height, skeleton, threshold)
                x += panel.width + GUTTER
        if places:
            i, stacked = places[0]
            y = row_y[i] + (heights[i] - legend_size(panels, stacked=stacked)[1]) / 2
            draw_legend(canvas, panels, MARGIN + widths[i] + GUTTER, top + y, stacked=stacked)
        else:
            draw_legend(canvas, panels, MARGIN + 0.1, top + row_y[-1], stacked=False)
        return save_figure(canvas.figure, path)


def _fits(size: tuple[float, float], width: float, height: float) -> bool:
    """Whether a legend of `size` fits into free space, with a gutter on its left."""
    return size[0] + GUTTER <= width and size[1] <= height


def panel_rows(panels: Sequence[AnyPanel]) -> list[list[AnyPanel]]:
    """Up to three panels side by side, four as two by two, more than nine in fours."""
    count = len(panels)
    columns = 2 if count == 4 else min(count, 3) if count <= 9 else 4
    return [list(panels[i : i + columns]) for i in range(0, count, columns)]
