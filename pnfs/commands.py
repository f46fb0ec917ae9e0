"""What the commands of the command line do with their arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pnfs.checkpoint import find_weights, load_model, read_metadata
from pnfs.config import EvalProfile, Precision, load_config, override_config
from pnfs.data import load_people
from pnfs.errors import PnfsError, did_you_mean
from pnfs.estimator import PoseEstimator
from pnfs.evaluation import EvalResult, evaluate
from pnfs.predict import PredictReport, predict
from pnfs.runlog import run_config
from pnfs.runtime import keep_heap, select_device
from pnfs.statefile import make_folder
from pnfs.train import train

DATASETS = ("coco", "mpii", "synthetic")
DEFAULT_PRESET = "tiny"


def data_overrides(spec: str) -> list[str]:
    """`coco=DIR`, `mpii=DIR`, `synthetic` or `synthetic=DIR` as dotted overrides.

    The folder becomes absolute, so that the run can be resumed from anywhere.

    Raises:
        PnfsError: an unknown dataset, or a missing folder.
    """
    name, _, folder = spec.partition("=")
    if name not in DATASETS:
        raise PnfsError(
            f"--data '{spec}': write coco=DIR, mpii=DIR or synthetic[=DIR]"
            + did_you_mean(name, DATASETS)
        )
    if not folder and name != "synthetic":
        raise PnfsError(f"--data '{spec}': give the dataset's folder, {name}=DIR")
    overrides = [f"data.dataset={name}"]
    if folder:
        overrides.append(f"data.root={json.dumps(str(Path(folder).expanduser().resolve()))}")
    return overrides


def train_command(
    *,
    preset: str | None,
    config_file: Path | None,
    data: str | None,
    strategy: str | None,
    settings: Sequence[str],
    out: Path | None,
    resume: bool,
    overwrite: bool,
    device: str,
) -> str | None:
    """`pnfs train`. Returns the name of the signal that stopped the run, if one did.

    Raises:
        PnfsError: options that exclude each other, and everything `train` raises.
    """
    keep_heap()
    if preset is not None and config_file is not None:
        raise PnfsError("--preset and --config exclude each other; give one")
    if resume and overwrite:
        raise PnfsError("--resume and --overwrite exclude each other; give one")
    source = str(config_file) if config_file is not None else preset or DEFAULT_PRESET
    folder = out or Path("runs") / Path(source).stem
    overrides = list(data_overrides(data)) if data else []
    if data:  # the dataset decides the keypoints
        overrides.append(f"model.skeleton={'mpii' if data.startswith('mpii') else 'coco'}")
    if strategy is not None:
        overrides.append(f"search.strategy={strategy}")
    overrides += settings
    if resume:
        if out is not None and (preset or config_file):
            raise PnfsError(
                "--resume continues a run with its own configuration; drop --preset and --config, "
                "and change settings with --set"
            )
        config = run_config(folder, overrides)
    else:
        config = load_config(source, overrides)
    return train(config, folder, resume=resume, overwrite=overwrite, device=device).stopped_by


def eval_command(
    run: Path,
    *,
    data: str | None,
    boxes: Path | None,
    profile: EvalProfile | None,
    flip: bool | None,
    precision: Precision,
    settings: Sequence[str],
    out: Path | None,
    device: str,
) -> EvalResult:
    """`pnfs eval`: load, score, print, and write if asked.

    Raises:
        PnfsError: no such run, model and data that do not fit, broken data.
    """
    keep_heap()
    overrides = list(data_overrides(data)) if data else []
    if boxes is not None:
        overrides.append(f"data.boxes={json.dumps(str(boxes.resolve()))}")
    if profile is not None:
        overrides += [f"eval.profile={profile}", f"data.profile={profile}"]
    if flip is not None:
        overrides.append(f"eval.flip={str(flip).lower()}")
    config = override_config(read_metadata(find_weights(run))[0], [*overrides, *settings])
    chosen = select_device(device)
    people = load_people(config.data, config.model.skeleton_table, "val")
    if out is not None:
        make_folder(out)  # before the work whose results go there
    result = evaluate(load_model(run, chosen), people, config, device=chosen, precision=precision)
    print(result.text())
    if out is not None:
        result.write(out)
    return result


def predict_command(
    run: Path,
    source: Path,
    *,
    out: Path,
    boxes: Path | None,
    box_threshold: float,
    profile: EvalProfile | None,
    flip: bool | None,
    precision: Precision,
    device: str,
) -> PredictReport:
    """`pnfs predict`: estimate, draw, write, and say what was done.

    Raises:
        PnfsError: no such run, nothing to read, unreadable boxes, an unwritable folder.
    """
    keep_heap()
    estimator = PoseEstimator(run, device, precision=precision, flip=flip, profile=profile)
    report = predict(estimator, source, out, boxes=boxes, box_threshold=box_threshold)
    print(report.summary())
    return report
