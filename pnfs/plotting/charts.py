"""What the charts of training runs share: colours of runs, axes, ticks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pnfs.plotting.style import FAINT, SOFT

# The parts' palette, darkest first and without yellow, which does not read as a line on white.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
LINE_STYLES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")  # 0.003, not 3 × 10⁻³


def style_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9.5, fontweight="bold", loc="left")
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=SOFT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def run_colour(i: int) -> str:
    return RUN_COLOURS[i % len(RUN_COLOURS)]


def marker(values: Sequence[float]) -> dict[str, Any]:
    """Few points are marked, so that a single one is seen."""
    return {"marker": "o", "markersize": 3.5} if len(values) <= 30 else {}


def say_empty(axes: Axes, text: str) -> None:
    """A panel without data says so."""
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=SOFT
    )
    axes.set_yticks([])


def plain_log_ticks(axes: Axes) -> None:
    """On less than three decades, label intermediate values too."""
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 3.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())
