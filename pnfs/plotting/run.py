"""All pictures of one run."""

from __future__ import annotations

from pathlib import Path

from pnfs.checkpoint import find_weights, load_model
from pnfs.errors import PnfsError
from pnfs.plotting.architecture import plot_model_architecture
from pnfs.plotting.curves import plot_curves
from pnfs.runlog import METRICS


def plot_run(run: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draw a run: `architecture.svg`, `architecture.png` and `curves.png`.

    What there is nothing to draw from is left out: the curves of a lone `.safetensors` file or of a
    run without metrics, the architecture of a baseline, which has none.

    Args:
        run: a run folder, or a `.safetensors` file.
        out: folder for the pictures; default the run folder, or the file's.

    Returns:
        The files written.

    Raises:
        PnfsError: no such run, no model in it, a damaged file, nothing to draw, unwritable folder.
    """
    run = Path(run)
    weights = find_weights(run)
    folder = run if run.is_dir() else run.parent
    target = folder if out is None else Path(out)
    written: list[Path] = []
    model = load_model(weights)
    if hasattr(model, "fabric"):
        written += plot_model_architecture(model, target / "architecture")
    metrics = run / METRICS
    if metrics.is_file():
        written += plot_curves({run.resolve().name: metrics}, target / "curves.png")
    if not written:
        raise PnfsError(
            f"{run}: nothing to draw; the model has no fabric and there is no {METRICS}"
        )
    return written
