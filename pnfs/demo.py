"""The whole system in minutes: drawn people → training → AP on unseen people → pruning → pictures.

Everything is what `pnfs train`, `pnfs eval`, `pnfs prune` and `pnfs plot` use, with preset `tiny`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnfs.commands import prune_command
from pnfs.config import Config, load_config
from pnfs.data import PeopleDataset, load_people
from pnfs.errors import PnfsError
from pnfs.estimator import PoseEstimator
from pnfs.evaluation import evaluate
from pnfs.plotting import (
    plot_comparison,
    plot_curves,
    plot_model_architecture,
    plot_predictions,
    plot_search,
)
from pnfs.pruning import PruningReport
from pnfs.runlog import CONFIG, METRICS
from pnfs.runtime import keep_heap
from pnfs.statefile import write_json
from pnfs.train import TrainResult, train

# What the demo's short search leaves close to uniform is dropped, and the rest trains on for as
# long as a demo may take.
PRUNE_BELOW, EPOCHS_AFTER = 0.32, 2
RUN, PRUNED, RETRAINED = "run", "pruned", "retrained"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; also written as summary.json.

    Attributes:
        metrics: COCO AP and AR on the unseen people.
        pruned: the threshold, what was removed, its price in AP, and AP after training on.
        people: how many unseen people there were.
        seconds: by stage: data, training (with its evaluation), pruning, pictures; and `total`.
        pictures: what it shows -> where it is.
        run: the run folder.
    """

    metrics: dict[str, float]
    pruned: dict[str, Any]
    people: int
    seconds: dict[str, float]
    pictures: dict[str, str]
    run: str


def run_demo(
    out: str | Path, *, overwrite: bool = False, device: str = "auto", settings: Sequence[str] = ()
) -> DemoResult:
    """Run the demo and print its summary.

    Args:
        out: folder for data/, run/, pruned/, retrained/, pictures and summary.json.
        overwrite: discard an earlier demo's run; its data is used again if it fits.
        device: as for `train`.
        settings: dotted overrides of preset `tiny`.

    Raises:
        PnfsError: an earlier demo is in the way, the folder cannot be written, or training was
            stopped by a signal.
    """
    keep_heap()
    out = Path(out)
    run = out / RUN
    if run.exists() and not overwrite:
        raise PnfsError(f"{out}: holds an earlier demo; add --overwrite or choose another --out")
    config = load_config("tiny", settings)
    data = config.data.model_copy(update={"root": str((out / "data").resolve())})
    config = config.model_copy(update={"data": data})

    started = time.monotonic()
    print(f"1/4 drawing people into {data.root}", flush=True)
    skeleton = config.model.skeleton_table
    load_people(data, skeleton, "train")
    unseen = load_people(data, skeleton, "val")
    drawn = time.monotonic()

    print(f"2/4 training preset tiny, then scoring on {len(unseen)} unseen people", flush=True)
    result = _trained(config, run, overwrite, device)
    trained = time.monotonic()

    print(
        f"3/4 dropping mixing weights up to {PRUNE_BELOW}, removing what died of it, training on",
        flush=True,
    )
    report = prune_command(
        run, out=out / PRUNED, threshold=PRUNE_BELOW, data=None, overwrite=overwrite, device=device
    )
    estimator = PoseEstimator(out / PRUNED, device)
    at_once = evaluate(estimator.model, unseen, config, device=estimator.device, precision="fp32")
    epochs = min(EPOCHS_AFTER, config.train.epochs)
    changes = [f"train.weights={json.dumps(str((out / PRUNED).resolve()))}"]
    longer = load_config(out / PRUNED / CONFIG, [*changes, f"train.epochs={epochs}"])
    again = _trained(longer, out / RETRAINED, overwrite, device)
    pruned = _pruned(report, at_once.metrics["AP"], again.metrics["AP"])
    shrunk = time.monotonic()

    print("4/4 drawing architectures, curves, the search and some predictions", flush=True)
    pictures = _draw(out, unseen, device)
    ended = time.monotonic()
    stages = {
        "data": drawn - started,
        "training": trained - drawn,
        "pruning": shrunk - trained,
        "pictures": ended - shrunk,
    }
    seconds = {name: round(value, 1) for name, value in stages.items()}
    demo = DemoResult(
        metrics=result.metrics,
        pruned=pruned,
        people=len(unseen),
        seconds=seconds | {"total": round(ended - started, 1)},
        pictures=pictures,
        run=str(run),
    )
    summary = {
        "AP": demo.metrics["AP"],
        "AP50": demo.metrics["AP50"],
        "seconds": demo.seconds["total"],
        "seconds_by_stage": seconds,
        "people": demo.people,
        "metrics": demo.metrics,
        "pruned": demo.pruned,
        "pictures": demo.pictures,
        "run": demo.run,
    }
    write_json(out / "summary.json", summary)
    _print_summary(demo, out / "summary.json")
    return demo


def _trained(config: Config, run: Path, overwrite: bool, device: str) -> TrainResult:
    """`train`, or an error if a signal stopped it."""
    result = train(config, run, overwrite=overwrite and run.exists(), device=device)
    if result.stopped_by is not None:
        raise PnfsError(
            f"demo: stopped by {result.stopped_by}; go on with pnfs train --resume --out {run}, "
            "or start again with --overwrite"
        )
    return result


def _pruned(report: PruningReport, at_once: float, retrained: float) -> dict[str, Any]:
    costs = {
        name: [getattr(report.before, name), getattr(report.after, name)]
        for name in ("params", "conv_macs", "bytes")
    }
    return {
        "threshold": report.threshold,
        "removed": {k: len(report.of_kind(k)) for k in ("cell", "operation", "connection")},
        **costs,
        "milliseconds": [
            round(1e3 * report.seconds_before, 2),
            round(1e3 * report.seconds_after, 2),
        ],
        "masking_error": report.masking_error,
        "removal_error": report.removal_error,
        "AP_before_training_on": at_once,
        "AP": retrained,
    }


def _draw(out: Path, unseen: PeopleDataset, device: str) -> dict[str, str]:
    """All pictures: what they show -> where they are."""
    whole, small = (PoseEstimator(out / name, device) for name in (RUN, RETRAINED))
    pictures: dict[str, str] = {}
    for name, estimator, file in (
        ("architecture", whole, "architecture"),
        ("pruned architecture", small, "architecture-pruned"),
    ):
        for path in plot_model_architecture(estimator.model, out / file):
            pictures[f"{name} ({path.suffix[1:]})"] = str(path)
    [curves] = plot_curves(out / RUN / METRICS, out / "curves.png")
    [search] = plot_search(whole.model, out / RUN / METRICS, out / "search.png")
    both = {"whole": out / RUN, "pruned, trained on": out / RETRAINED}
    compared = plot_comparison(both, out / "pruning")
    [predictions] = plot_predictions(whole, unseen, out / "predictions.png")
    return {
        **pictures,
        "training curves": str(curves),
        "search of α and β": str(search),
        "pruned against whole, curves": str(compared[0]),
        "pruned against whole, AP": str(compared[-1]),
        "predictions beside the truth": str(predictions),
    }


def _print_summary(demo: DemoResult, path: Path) -> None:
    metrics, seconds = demo.metrics, demo.seconds
    parts = ", ".join(f"{name} {value:g}" for name, value in seconds.items() if name != "total")
    print(f"\nAP {metrics['AP']:.3f}   AP50 {metrics['AP50']:.3f}   on {demo.people} unseen people")
    small = demo.pruned
    share = 100 * (1 - small["conv_macs"][1] / max(1, small["conv_macs"][0]))
    print(
        f"AP {small['AP']:.3f}   pruned, with {share:.0f} % fewer multiply-adds "
        f"({small['AP_before_training_on']:.3f} before training on)"
    )
    print(f"{seconds['total']:.0f} seconds ({parts})")
    for name, picture in demo.pictures.items():
        print(f"{name}: {picture}")
    print(f"run folder: {demo.run}\nsummary: {path}", flush=True)
