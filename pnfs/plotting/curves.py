"""Training curves from metrics.jsonl: loss, scores and learning rate of one or more runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnfs.errors import PnfsError
from pnfs.evaluation.pckh import PCKH_10, PCKH_50
from pnfs.plotting.charts import (
    LINE_STYLES,
    PLAIN,
    marker,
    plain_log_ticks,
    run_colour,
    say_empty,
    style_axes,
)
from pnfs.plotting.metrics import Curves, read_curves
from pnfs.plotting.style import SOFT, drawing, save_figure
from pnfs.runlog import METRICS

SCORES = ("AP", "AP50", PCKH_50, PCKH_10)  # shown if there, of one run
SMOOTH_FROM = 60  # rows from which the moving average is drawn over the raw losses

Runs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def plot_curves(runs: Runs, path: str | Path, *, title: str | None = None) -> list[Path]:
    """Loss on a logarithmic scale, scores at evaluations and learning rate over training steps.

    Args:
        runs: a metrics.jsonl or run folder; several of them, labelled by folder name; or a mapping
            label -> file, as for Fig. 6 (with and without vector in pixel).
        path: a .svg or .png file; without a suffix both are written.
        title: one line above everything.

    Returns:
        The files written.

    Raises:
        PnfsError: unreadable or empty metrics, no run, an unknown suffix or an unwritable file.
    """
    curves = {label: read_curves(source) for label, source in _labelled(runs).items()}
    for label, run in curves.items():
        if not (run.loss[0] or run.scores):
            raise PnfsError(
                f"metrics of '{label}': no loss and no score in it yet; train for longer"
            )
    with drawing():
        figure = Figure(figsize=(10, 4.4))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1.25, 1), height_ratios=(1.6, 1), wspace=0.18, hspace=0.42,
            left=0.07, right=0.98, bottom=0.11, top=0.85 if title else 0.92,
        )  # fmt: skip
        if title:
            figure.text(0.07, 0.945, title, fontsize=12, fontweight="bold", va="center")
        loss = figure.add_subplot(grid[:, 0])
        scores = figure.add_subplot(grid[0, 1], sharex=loss)
        learning_rate = figure.add_subplot(grid[1, 1], sharex=loss)
        _plot_loss(loss, curves)
        _plot_scores(scores, curves)
        _plot_learning_rate(learning_rate, curves)
        loss.set_xlim(left=0)
        return save_figure(figure, path)


def _labelled(runs: Runs) -> dict[str, str | Path]:
    if isinstance(runs, Mapping):
        labelled = dict(runs)
    else:
        sources = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
        names = [run.parent.name if run.name == METRICS else run.stem for run in sources]
        if len(set(names)) < len(names):
            names = [str(run) for run in sources]
        labelled = dict(zip(names, sources, strict=True))
    if not labelled:
        raise PnfsError("curves: no run given; pass a run folder or its metrics.jsonl")
    return labelled


def _plot_loss(axes: Axes, curves: Mapping[str, Curves]) -> None:
    smoothed = 0
    for i, (label, run) in enumerate(curves.items()):
        points = [(s, v) for s, v in zip(*run.loss, strict=True) if v > 0]  # logarithmic scale
        if not points:
            continue
        steps, values = np.array(points).T
        style: dict[str, Any] = {"color": run_colour(i), "linewidth": 1.6, "label": label}
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, values, color=run_colour(i), linewidth=0.7, alpha=0.35)
            window = max(3, len(values) // 40) | 1
            smoothed = max(smoothed, window)
            axes.plot(steps, _moving_average(values, window), **style)
        else:
            axes.plot(steps, values, **style, **marker(values))
    style_axes(axes, "Training loss" + (f" (thick: mean of {smoothed} rows)" if smoothed else ""))
    axes.set_xlabel("step", fontsize=8.5, color=SOFT)
    if not axes.lines:
        say_empty(axes, "no loss recorded")
        return
    axes.set_yscale("log")
    plain_log_ticks(axes)
    if len(curves) > 1:
        axes.legend(fontsize=8.5, frameon=False, loc="upper right")


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean; at the ends, of as many values as there are."""
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    return np.asarray(np.convolve(values, kernel, mode="same") / counts)


def _plot_scores(axes: Axes, curves: Mapping[str, Curves]) -> None:
    present = list(dict.fromkeys(name for run in curves.values() for name in run.scores))
    chosen = [name for name in SCORES if name in present] or present[:2]
    if len(curves) > 1:
        chosen = chosen[:1]  # colour tells runs apart; a second score would double the lines
    several = len(curves) > 1
    for i, (label, run) in enumerate(curves.items()):
        for j, name in enumerate(chosen):
            steps, values = run.scores.get(name, ([], []))
            if steps:
                last = f"{values[-1]:.3f}" if abs(values[-1]) <= 1 else f"{values[-1]:.1f}"
                axes.plot(
                    steps,
                    values,
                    color=run_colour(i if several else j),
                    linestyle=LINE_STYLES[0 if several else j],
                    linewidth=1.6,
                    label=f"{label if several else name}  {last}",
                    **marker(values),
                )
    style_axes(axes, f"{chosen[0] if several and chosen else 'Score'} at evaluations")
    if not axes.lines:
        say_empty(axes, "no evaluation yet")
        return
    low, high = axes.get_ylim()
    values = [float(y) for line in axes.lines for y in np.asarray(line.get_ydata())]
    if all(len(np.asarray(line.get_ydata())) == 1 for line in axes.lines):
        low, high = 0.0, 1.1 * max(*values, 1.0)  # a lone point is read on the whole scale
    axes.set_ylim(max(low, 0.0), high)
    axes.legend(
        fontsize=8,
        frameon=False,
        loc="best",
        title="last value",
        title_fontsize=7.5,
        alignment="left",
    )


def _plot_learning_rate(axes: Axes, curves: Mapping[str, Curves]) -> None:
    for i, run in enumerate(curves.values()):
        steps, values = run.learning_rate
        if steps:
            # Equal schedules of several runs lie on each other: dashes let the lower ones through.
            axes.plot(
                steps,
                values,
                color=run_colour(i),
                linewidth=1.6,
                linestyle=LINE_STYLES[i % len(LINE_STYLES)],
            )
    style_axes(axes, "Learning rate")
    axes.set_xlabel("step", fontsize=8.5, color=SOFT)
    if not axes.lines:
        say_empty(axes, "no learning rate recorded")
        return
    highest = max(value for run in curves.values() for value in run.learning_rate[1])
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 5, 10]))
    axes.yaxis.set_major_formatter(PLAIN)
