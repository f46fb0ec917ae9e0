"""All pictures of one run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pnfs.checkpoint import find_weights, load_model, read_metadata
from pnfs.config import Config, override_config
from pnfs.data import load_people, synthetic_root
from pnfs.errors import PnfsError
from pnfs.estimator import PoseEstimator
from pnfs.plotting.architecture import plot_architecture_file, plot_model_architecture
from pnfs.plotting.curves import plot_curves
from pnfs.plotting.metrics import read_rows
from pnfs.plotting.predictions import plot_predictions
from pnfs.plotting.search import plot_search
from pnfs.plotting.tradeoff import plot_tradeoff, read_tradeoff
from pnfs.runlog import METRICS

Note = Callable[[str], None]


def plot_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    note: Note = lambda line: None,
) -> list[Path]:
    """Draw a run: architecture (SVG, PNG), curves, trajectories of the search, predictions.

    What there is nothing to draw from is left out: curves and trajectories of a run without
    metrics, the architecture of a baseline, predictions where the run's data are not there.

    Args:
        run: a run folder, a `.safetensors` file, or an architecture as JSON.
        out: folder for the pictures; default the run folder, or the file's.
        overrides: dotted settings, for example of where the data are.
        note: called with a line about what is left out.

    Returns:
        The files written.

    Raises:
        PnfsError: no such run, no model in it, a damaged file, nothing to draw, unwritable folder.
    """
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    target = folder if out is None else Path(out)
    if run.suffix == ".json" and run.is_file():
        return plot_architecture_file(run, target / run.stem)
    weights = find_weights(run)
    written: list[Path] = []
    model = load_model(weights)
    if hasattr(model, "fabric"):
        written += plot_model_architecture(model, target / "architecture")
    metrics = run / METRICS
    if metrics.is_file():
        rows = read_rows(metrics)
        if any(row.get("event") != "search" for row in rows):
            written += plot_curves({run.resolve().name: metrics}, target / "curves.png")
        if any(row.get("event") == "search" for row in rows):
            written += plot_search(model, metrics, target / "search.png")
    config = override_config(read_metadata(weights)[0], overrides)
    missing = _missing_data(config)
    if missing is None:
        people = load_people(config.data, config.model.skeleton_table, "val")
        written += plot_predictions(PoseEstimator(weights), people, target / "predictions.png")
    else:
        note(f"no predictions: {missing}; say where it is with --data")
    if not written:
        raise PnfsError(
            f"{run}: nothing to draw; the model has no fabric and there is no {METRICS}"
        )
    return written


def _missing_data(config: Config) -> str | None:
    """The dataset's folder where it is not there, else None: a picture downloads and draws none."""
    if config.data.dataset == "synthetic":
        root: Path | None = synthetic_root(config.data)
    else:
        root = Path(config.data.root) if config.data.root else None
    if root is not None and root.is_dir():
        return None
    return f"data.root {root} is no folder" if root is not None else "data.root is not set"


def plot_comparison(
    runs: Sequence[str | Path] | Mapping[str, str | Path], out: str | Path
) -> list[Path]:
    """Several runs in one picture each: curves (Fig. 6), score against multiply-adds (Fig. 7).

    Runs are labelled by their folders' names, and with d where it differs.

    Args:
        runs: two or more run folders, or what to call them -> run folder.
        out: folder for curves.png and tradeoff.png.

    Raises:
        PnfsError: as `plot_curves` and `plot_tradeoff`; no metrics at all.
    """
    if isinstance(runs, Mapping):
        labels = {label: Path(run) for label, run in runs.items()}
    else:
        labels = _labels([Path(run) for run in runs])
    written: list[Path] = []
    logs = {label: run / METRICS for label, run in labels.items() if (run / METRICS).is_file()}
    if len(logs) > 1:
        written += plot_curves(logs, Path(out) / "curves.png")
    points = [read_tradeoff(run, label) for label, run in labels.items()]
    return written + plot_tradeoff(points, Path(out) / "tradeoff.png")


def _labels(runs: Sequence[Path]) -> dict[str, Path]:
    """What each run is called in a picture, in the order given."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    if len(set(names)) < len(names):
        raise PnfsError(f"plot: {', '.join(names)}: the same run twice; give each once")
    depths = [read_metadata(find_weights(run))[0].model.vector_dim for run in runs]
    if len(set(depths)) > 1:
        names = [f"{name}, d = {depth}" for name, depth in zip(names, depths, strict=True)]
    return dict(zip(names, runs, strict=True))
