"""Pictures of poses, architectures and training runs.

`draw_poses`, `part_legend` and `tile` work on photographs with OpenCV; the others draw figures with
matplotlib, as SVG and PNG, equal bytes for equal input.
"""

from pnfs.plotting.architecture import (
    plot_architecture,
    plot_architecture_file,
    plot_model_architecture,
)
from pnfs.plotting.curves import plot_curves
from pnfs.plotting.poses import draw_poses, part_legend, tile
from pnfs.plotting.predictions import plot_predictions
from pnfs.plotting.run import plot_comparison, plot_run
from pnfs.plotting.search import plot_search
from pnfs.plotting.tradeoff import TradeOff, pareto_front, plot_tradeoff, read_tradeoff

__all__ = [
    "TradeOff",
    "draw_poses",
    "pareto_front",
    "part_legend",
    "plot_architecture",
    "plot_architecture_file",
    "plot_comparison",
    "plot_curves",
    "plot_model_architecture",
    "plot_predictions",
    "plot_run",
    "plot_search",
    "plot_tradeoff",
    "read_tradeoff",
    "tile",
]
