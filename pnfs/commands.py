"""What the commands of the command line do with their arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pnfs import distributed
from pnfs.architecture import entropy, mixing_weights
from pnfs.checkpoint import MODEL, find_weights, is_run, load_model, read_metadata, save_weights
from pnfs.config import Config, EvalProfile, Precision, load_config, override_config
from pnfs.data import PeopleDataset, load_people, make_loader
from pnfs.errors import PnfsError, did_you_mean
from pnfs.estimator import PoseEstimator
from pnfs.evaluation import EvalResult, evaluate
from pnfs.export import ExportReport, export_onnx, export_program
from pnfs.plotting import plot_comparison, plot_run
from pnfs.predict import PredictReport, predict
from pnfs.pruning import PruningReport, prune
from pnfs.runlog import discard_run, open_run, run_config, write_record
from pnfs.runtime import keep_heap, select_device
from pnfs.search import ARCHITECTURE, find_fabrics, read_architecture, save_architecture
from pnfs.statefile import check_file, make_folder, write_json
from pnfs.topology import SLOTS
from pnfs.train import train

DATASETS = ("coco", "mpii", "synthetic")
DEFAULT_PRESET = "tiny"
PRUNING = "pruning.json"
CHECKED_IMAGES = 4  # real inputs that pruned and exported models are verified on


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
    architecture: Path | None,
    settings: Sequence[str],
    out: Path | None,
    resume: bool,
    overwrite: bool,
    device: str,
) -> str | None:
    """`pnfs train`. Returns the name of the signal that stopped the run, if one did.

    Processes that torchrun started again after one had died resume what they began.

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
    if architecture is not None:
        if strategy == "random":
            raise PnfsError("--architecture and --strategy random exclude each other; give one")
        if resume:
            raise PnfsError("--resume continues with the run's own α and β; drop --architecture")
        architecture = architecture_file(architecture).resolve()
        overrides += [
            f"search.architecture={json.dumps(str(architecture))}",
            "search.strategy=none",
        ]
    if strategy is not None:
        overrides.append(f"search.strategy={strategy}")
    overrides += settings
    if resume and out is not None and (preset or config_file):
        raise PnfsError(
            "--resume continues a run with its own configuration; drop --preset and --config, "
            "and change settings with --set"
        )

    def resolve() -> tuple[Config, bool]:
        if resume or (distributed.restarted() and is_run(folder)):
            return run_config(folder, overrides), True
        if architecture is not None:
            read_architecture(architecture)  # an error comes before people are read or drawn
        return load_config(source, overrides), False

    with distributed.group(select_device(device)):
        config, go_on = distributed.from_first(resolve)
        overwrite = overwrite and not go_on
        return train(config, folder, resume=go_on, overwrite=overwrite, device=device).stopped_by


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
    """`pnfs eval`: load, score, print, and write if asked; under torchrun, in shares.

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

    def prepare() -> PeopleDataset:  # on rank 0 first: synthetic people are rendered once
        if out is not None:
            make_folder(out)  # before the work whose results go there
        return load_people(config.data, config.model.skeleton_table, "val")

    def report() -> None:
        print(result.text())
        if out is not None:
            result.write(out)

    with distributed.group(select_device(device)) as own:
        people = distributed.from_first(prepare)
        model = distributed.together(lambda: load_model(run, own))
        result = evaluate(model, people, config, device=own, precision=precision)
        distributed.on_first(report)
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


def prune_command(
    run: Path,
    *,
    out: Path,
    threshold: float,
    data: str | None,
    overwrite: bool,
    device: str,
) -> PruningReport:
    """`pnfs prune`: load, prune, verify on the run's own images, write a run folder, and say it.

    The folder holds the model, its configuration and pruning.json. To train it on:
    `pnfs train --config RUN2/config.yaml --set train.weights=RUN2 --out RUN3`.

    Raises:
        PnfsError: no such run, a folder in the way, a failed verification (nothing is written).
    """
    keep_heap()
    config, facts = read_metadata(find_weights(run))
    if data:
        config = override_config(config, data_overrides(data))
    chosen = select_device(device)
    images = _some_images(config).to(chosen)
    small, report = prune(load_model(run, chosen), threshold, images)
    config = config.model_copy(update={"model": small.config})
    with open_run(out, resume=False, overwrite=overwrite):
        discard_run(out)
        write_record(out, config, device=str(chosen), world=1, step=0)
        write_json(out / PRUNING, {"source": str(run), **report.as_dict()})
        # the scores are those of the model before; `pnfs eval` gives the new ones
        kept = {name: value for name, value in facts.items() if name != "metrics"}
        facts = {**kept, "pruned_from": str(run), "threshold": threshold}
        save_weights(out / MODEL, small, config, facts)
        save_architecture(small, out / ARCHITECTURE, {"run": str(out), **facts})
    print(f"{report.text()}\nrun folder: {out}")
    return report


def plot_command(runs: Sequence[Path], *, out: Path | None, data: str | None) -> list[Path]:
    """`pnfs plot`: draw, and name the pictures.

    Raises:
        PnfsError: as `plot_run` and `plot_comparison`.
    """
    if len(runs) == 1:
        overrides = data_overrides(data) if data else []
        notes: list[str] = []
        pictures = plot_run(runs[0], out, overrides=overrides, note=notes.append)
        for line in notes:
            print(line, file=sys.stderr)
    else:
        pictures = plot_comparison(runs, out or Path("plots"))
    for picture in pictures:
        print(picture)
    return pictures


def architecture_file(source: Path) -> Path:
    """The file itself, or the one in a run folder."""
    return source / ARCHITECTURE if source.is_dir() else source


def export_architecture_command(run: Path, out: Path) -> None:
    """`pnfs architecture export`.

    Raises:
        PnfsError: no such run, a model without fabrics, an unwritable file.
    """
    weights = find_weights(run)
    model = load_model(weights)
    if not find_fabrics(model):
        raise PnfsError(f"{run}: {type(model).__name__} has no fabric; baselines have no α and β")
    make_folder(out.parent)
    save_architecture(model, out, {"run": str(run), **read_metadata(weights)[1]})
    print(out)


def show_architecture_command(source: Path) -> None:
    """`pnfs architecture show`.

    Raises:
        PnfsError: a file that cannot be read.
    """
    file = architecture_file(source)
    fabrics, origin = read_architecture(file)
    print(f"{file}: of {origin.get('run', 'unknown origin')}")
    for which, stored in fabrics.items():
        table = stored.topology
        print(
            f"\n{which}: layers {table.first_layer} to {table.last_layer} of {table.layers}, "
            f"C = {table.channels}, H = {table.hidden}"
        )
        for p, name in enumerate(stored.parts):
            alpha, beta = (mixing_weights(x[p].double()) for x in (stored.alpha, stored.beta))
            spread = [float(entropy(x).mean()) for x in (alpha, beta)]
            print(f"  {name}: entropy of α {spread[0]:.3f}, of β {spread[1]:.3f} nats")
            for edge in table.edges:
                print(
                    _mix(f"h{edge.source}→h{edge.target}", table.operations, alpha[edge.alpha_row])
                )
            for cell in table.cells:
                print(_mix(cell.name, SLOTS, beta[cell.beta_row]))


def _mix(label: str, names: Sequence[str], weights: Tensor) -> str:
    shares = zip(names, weights.tolist(), strict=True)
    return f"    {label:<10}" + "  ".join(f"{name} {share:.3f}" for name, share in shares)


def export_command(
    run: Path, *, onnx: Path | None, program: Path | None, data: str | None
) -> list[ExportReport]:
    """`pnfs export`: load, write, check on the run's own images, and say it.

    Raises:
        PnfsError: no such run, no file to write or one that cannot be (seen before the work), a
            missing package, a failed check.
    """
    files = [file for file in (onnx, program) if file is not None]
    if not files:
        raise PnfsError("nothing to export; give --onnx FILE or --program FILE")
    keep_heap()
    config, _ = read_metadata(find_weights(run))
    for file in files:
        check_file(file)
    images: Tensor | None = None
    try:
        images = _some_images(override_config(config, data_overrides(data) if data else []))
    except PnfsError as error:
        if data:
            raise
        print(f"note: checked on random images, not on the run's ({error})")
    model = load_model(run)
    reports = []
    if onnx is not None:
        profile = config.data.profile
        reports.append(export_onnx(model, onnx, images, profile=profile, source=str(run)))
    if program is not None:
        reports.append(export_program(model, program, images))
    for report in reports:
        print(report.text())
    return reports


def _some_images(config: Config) -> Tensor:
    """Network inputs of the first people of the run's val split, (N, 3, H, W)."""
    people = load_people(config.data, config.model.skeleton_table, "val")
    small = config.eval.model_copy(update={"batch_size": CHECKED_IMAGES})
    one_process = config.data.model_copy(update={"workers": 0})
    few = config.model_copy(update={"eval": small, "data": one_process})
    batch = next(iter(make_loader(people, few, train=False)))
    return batch.images(size=config.model.input_size, profile=config.eval.profile)
