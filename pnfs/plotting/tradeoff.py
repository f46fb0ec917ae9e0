"""Score against cost over several runs, with the Pareto front (Fig. 7)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pnfs.checkpoint import find_weights, read_metadata
from pnfs.costs import count_costs
from pnfs.errors import PnfsError
from pnfs.model import build_model
from pnfs.plotting.canvas import text_width
from pnfs.plotting.charts import PLAIN, style_axes
from pnfs.plotting.metrics import number, read_curves
from pnfs.plotting.style import FAINT, INK, PAPER, SOFT, drawing, save_figure
from pnfs.runlog import METRICS
from pnfs.train import MAIN_METRICS

EVALUATION = Path("eval") / "metrics.json"  # of `pnfs eval RUN --out RUN/eval`
FRONT, BEHIND = "#0072B2", "#9A9A9A"
LABEL, WIDTH, HEIGHT = 8.5, 7.2, 4.6  # points, inches, inches

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class TradeOff:
    """One model in the picture.

    Attributes:
        macs: multiply-adds of the convolutions for one image.
        score: its value of `metric`, AP or PCKh.
        vector_dim: d; 1 is a scalar heatmap.
    """

    label: str
    macs: int
    params: int
    metric: str
    score: float
    vector_dim: int


def read_tradeoff(run: str | Path, label: str | None = None) -> TradeOff:
    """Cost and score of a run.

    The score is that of RUN/eval/metrics.json (`pnfs eval RUN --out RUN/eval`) if there is one,
    else the one that training noted with the model, else the last in metrics.jsonl.

    Raises:
        PnfsError: no such run, no model, or no score.
    """
    run = Path(run)
    weights = find_weights(run)
    config, facts = read_metadata(weights)
    sources = [facts.get("metrics") or {}]
    if (run / EVALUATION).is_file():
        try:
            tree = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
            sources.insert(0, tree["metrics"])
        except (OSError, ValueError, KeyError, TypeError):
            raise PnfsError(f"{run / EVALUATION}: not what `pnfs eval` writes; remove it") from None
    if "pruned_from" not in facts and (run / METRICS).is_file():
        scores = read_curves(run).scores
        sources.append({name: values[-1] for name, (_, values) in scores.items()})
    for metric in MAIN_METRICS:
        for source in sources:
            score = number(source.get(metric))
            if score is not None:
                costs = count_costs(build_model(config.model).eval(), config.model.input_size)
                return TradeOff(
                    label or run.resolve().name,
                    costs.conv_macs,
                    costs.params,
                    metric,
                    score,
                    config.model.vector_dim,
                )
    raise PnfsError(f"{run}: no score yet; run pnfs eval {run} --out {run / EVALUATION.parent}")


def pareto_front(points: Sequence[TradeOff]) -> list[TradeOff]:
    """The points that no other one beats in both cost and score, cheapest first."""
    front: list[TradeOff] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def plot_tradeoff(
    points: Sequence[TradeOff], path: str | Path, *, title: str | None = None
) -> list[Path]:
    """Score over multiply-adds; the Pareto front is a line, what lies behind it is grey.

    Round marks have vectors (d > 1), squares scalar heatmaps.

    Args:
        points: at least one, of one metric.
        path: a .svg or .png file; without a suffix both are written.
        title: one line above everything.

    Raises:
        PnfsError: no point, points of different metrics, an unwritable file.
    """
    if not points:
        raise PnfsError("trade-off picture: no run given")
    for point in points:
        if point.metric != points[0].metric:
            raise PnfsError(
                f"trade-off picture: {points[0].metric} of {points[0].label} and {point.metric} of "
                f"{point.label} do not share an axis; give runs of one dataset"
            )
    front = pareto_front(points)
    with drawing():
        figure = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasAgg(figure)
        top = 0.84 if title else 0.91
        axes = figure.add_axes((0.10, 0.125, 0.87, top - 0.125))
        if title:
            figure.text(0.10, 0.945, title, fontsize=12, fontweight="bold", va="center")
        _draw_points(axes, points, front)
        style_axes(axes, f"{points[0].metric} against multiply-adds of one image")
        axes.set_xlabel("multiply-adds of convolutions, 10⁹", fontsize=8.5, color=SOFT)
        _draw_labels(axes, points, front)
        return save_figure(figure, path)


def _draw_points(axes: Axes, points: Sequence[TradeOff], front: Sequence[TradeOff]) -> None:
    costs, scores = [p.macs / 1e9 for p in points], [p.score for p in points]
    low, high = min(scores), max(scores)
    pad = max(0.12 * (high - low), 0.01 * max(1.0, high))
    axes.set_ylim(low - pad, high + pad)
    if max(costs) > 8 * min(costs):
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.5, max(costs) * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.25 * max(max(costs) - min(costs), 0.4 * max(costs))
        axes.set_xlim(max(0.0, min(costs) - margin), max(costs) + margin)
    axes.xaxis.set_major_formatter(PLAIN)
    x, y = _staircase(front, axes.get_xlim()[1])
    axes.plot(x, y, color=FRONT, linewidth=1.4, alpha=0.8)
    axes.fill_between(x, y, low - pad, color=FRONT, alpha=0.06, linewidth=0)
    for point in points:
        axes.plot(
            [point.macs / 1e9],
            [point.score],
            marker="o" if point.vector_dim > 1 else "s",
            markersize=7.5,
            color=FRONT if point in front else BEHIND,
            markeredgecolor=INK,
            markeredgewidth=0.7,
            linestyle="none",
            zorder=4,
        )
    kinds = [("o", "vector in pixel"), ("s", "scalar heatmap")]
    if len({point.vector_dim > 1 for point in points}) < 2:
        kinds = []
    handles = [
        axes.plot([], [], marker, color=PAPER, markeredgecolor=INK, markersize=6, label=label)[0]
        for marker, label in kinds
    ]
    handles.append(axes.plot([], [], color=FRONT, linewidth=1.4, label="Pareto front")[0])
    legend = axes.legend(handles=handles, fontsize=8, loc="lower right", edgecolor=FAINT)
    legend.get_frame().set_linewidth(0.6)


def _staircase(front: Sequence[TradeOff], end: float) -> tuple[list[float], list[float]]:
    """Corners of the front: up to the next point nothing better is known at that cost."""
    x, y = [front[0].macs / 1e9], [front[0].score]
    for point in front[1:]:
        x += [point.macs / 1e9] * 2
        y += [y[-1], point.score]
    return [*x, end], [*y, y[-1]]


def _draw_labels(axes: Axes, points: Sequence[TradeOff], front: Sequence[TradeOff]) -> None:
    """Names beside the points, each on the first side where it covers nothing."""
    figure = axes.figure
    figure.canvas.draw()
    scale = figure.dpi / 72
    centres = [axes.transData.transform((p.macs / 1e9, p.score)) for p in points]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    corners = axes.transData.transform(np.array(_staircase(front, axes.get_xlim()[1])).T)
    for (x0, y0), (x1, y1) in itertools.pairwise(corners.tolist()):
        taken.append((min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2))
    legend = axes.get_legend()
    if legend is not None:
        taken.append(tuple(legend.get_window_extent().extents))  # type: ignore[arg-type]
    frame: Box = tuple(axes.get_window_extent().extents)  # type: ignore[assignment]
    for point, (x, y) in zip(points, centres, strict=True):
        width = text_width(point.label, LABEL) * 72 * scale + 2
        height, gap = LABEL * scale * 1.15, 8 * scale
        places = [
            (x + gap, y - height / 2),
            (x - gap - width, y - height / 2),
            (x - width / 2, y + gap * 0.8),
            (x - width / 2, y - gap * 0.8 - height),
            (x + gap * 0.6, y + gap * 0.6),
            (x + gap * 0.6, y - gap * 0.6 - height),
            (x - gap * 0.6 - width, y + gap * 0.6),
            (x - gap * 0.6 - width, y - gap * 0.6 - height),
        ]
        boxes = [(left, low, left + width, low + height) for left, low in places]
        inside = [box for box in boxes if _covers(frame, box)]
        best = min(inside or boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(best)
        left, low = axes.transAxes.inverted().transform((best[0], best[1] + height / 2))
        colour = INK if point in front else SOFT
        axes.text(
            left, low, point.label, transform=axes.transAxes, fontsize=LABEL, color=colour,
            va="center", zorder=5,
        )  # fmt: skip


def _covers(outer: Box, inner: Box) -> bool:
    return (
        inner[0] >= outer[0]
        and inner[1] >= outer[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
