"""Pictures of poses, architectures and training runs.

`draw_poses`, `part_legend` and `tile` work on photographs with OpenCV; the others draw figures with
matplotlib, as SVG and PNG, equal bytes for equal input.
"""

from pnfs.plotting.architecture import plot_architecture, plot_model_architecture
from pnfs.plotting.curves import plot_curves
from pnfs.plotting.poses import draw_poses, part_legend, tile
from pnfs.plotting.run import plot_run

__all__ = [
    "draw_poses",
    "part_legend",
    "plot_architecture",
    "plot_curves",
    "plot_model_architecture",
    "plot_run",
    "tile",
]
