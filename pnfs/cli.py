"""The command line: arguments in, one function call out. Everything heavy is imported inside.

A `PnfsError` is one red line on stderr and exit status 2; Ctrl-C is status 130.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from pnfs.errors import PnfsError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="pnfs",
    help="Pose Neural Fabrics: train, search, score and use part-specific pose networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Precision(str, Enum):
    """Arithmetic of the model."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Profile(str, Enum):
    """Decoding and colours."""

    standard = "standard"
    posenfs = "posenfs"


Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder of `pnfs train`, or a .safetensors file."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="coco=DIR, mpii=DIR, synthetic or synthetic=DIR. Default: what preset or run says.",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, for example train.lr=5e-4; may be given several times.",
    ),
]
Device = Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda or cuda:N.")]


def _plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors that the user can fix into one line and a status."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PnfsError as error:
            if _is_told_here(error):
                typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.secho("interrupted", fg="red", err=True)
            raise typer.Exit(130) from None

    return guarded


def _is_told_here(error: PnfsError) -> bool:
    """Whether this process prints an error that others of the same torchrun have as well."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    return local == 0 if error.rank is None else error.rank == rank


@app.command()
@_plain_errors
def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where data, run and pictures go.")
    ] = Path("runs/demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier demo in DIR.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Draw synthetic people, train on them, score on unseen ones, draw the results.

    Takes minutes on two cores and needs no download.

    Example: pnfs demo --out runs/demo
    """
    from pnfs.demo import run_demo

    run_demo(out, overwrite=overwrite, device=device)


@app.command()
@_plain_errors
def train(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A preset, see README. Default: tiny.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML configuration in place of a preset."),
    ] = None,
    data: Data = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How α and β are found: none, random, sync (default), first-order, second-order "
            "or gumbel; see docs/search.md.",
        ),
    ] = None,
    architecture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Start from the α and β of an architecture.json, or of a run that has one; frozen "
            "unless --strategy says otherwise.",
        ),
    ] = None,
    settings: Override = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder. Default: runs/ and the preset's name."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in DIR with its own configuration.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the run that is in DIR.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a model; without options, the demo's data and preset.

    Ctrl-C writes a checkpoint and leaves. Several processes: torchrun ... -m pnfs.train with the
    same options.

    Examples: pnfs train --preset ours-1 --data coco=/data/coco --out runs/a

    pnfs train --resume --out runs/a --set train.epochs=300

    pnfs train --preset ours-1 --architecture runs/a --out runs/b
    """
    from pnfs.commands import train_command

    stopped_by = train_command(
        preset=preset,
        config_file=config,
        data=data,
        strategy=strategy,
        architecture=architecture,
        settings=settings or [],
        out=out,
        resume=resume,
        overwrite=overwrite,
        device=device,
    )
    if stopped_by is not None:
        raise typer.Exit(130 if stopped_by == "SIGINT" else 143)


@app.command(name="eval")
@_plain_errors
def evaluate(
    run: Run,
    data: Data = None,
    boxes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="COCO detections to use. Default: the annotated boxes."),
    ] = None,
    profile: Annotated[
        Profile | None, typer.Option(help="Decoding and colours. Default: the run's.")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="Average with the mirrored image. Default: the run's."
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the model.")] = Precision.fp32,
    settings: Override = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write predictions, scores and text there."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a model: COCO AP, or PCKh for MPII, with the definitions behind the figures.

    Examples: pnfs eval runs/a --data coco=/data/coco --boxes detections.json

    pnfs eval runs/a --profile posenfs --no-flip --out runs/a/eval
    """
    from pnfs.commands import eval_command

    eval_command(
        run,
        data=data,
        boxes=boxes,
        profile=profile.value if profile else None,
        flip=flip,
        precision=precision.value,
        settings=settings or [],
        out=out,
        device=device,
    )


@app.command()
@_plain_errors
def predict(
    run: Run,
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="An image, a folder of images, or a video.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where drawings and predictions.json go.")
    ] = Path("predictions"),
    boxes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Person boxes as JSON. Default: each whole image."),
    ] = None,
    box_threshold: Annotated[
        float, typer.Option(metavar="SCORE", help="Leave out boxes with a lower score.")
    ] = 0.0,
    profile: Annotated[
        Profile | None, typer.Option(help="Decoding and colours. Default: the run's.")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="Average with the mirrored image. Default: the run's."
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the model.")] = Precision.fp32,
    device: Device = "auto",
) -> None:
    """Find poses in images or a video: drawings, and JSON in COCO's results format.

    Examples: pnfs predict runs/a photo.jpg --boxes boxes.json --out poses

    pnfs predict runs/a clip.mp4
    """
    from pnfs.commands import predict_command

    predict_command(
        run,
        source,
        out=out,
        boxes=boxes,
        box_threshold=box_threshold,
        profile=profile.value if profile else None,
        flip=flip,
        precision=precision.value,
        device=device,
    )


@app.command()
@_plain_errors
def prune(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="RUN2", help="Folder of the pruned model.")],
    threshold: Annotated[
        float, typer.Option(help="Mixing weights (softmax of α and β) up to this are dropped.")
    ] = 0.0,
    data: Data = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the run that is in RUN2.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Remove what unused mixing weights make useless; refuses if the scores would change.

    Example: pnfs prune runs/a --out runs/a-small --threshold 0.05
    """
    from pnfs.commands import prune_command

    prune_command(run, out=out, threshold=threshold, data=data, overwrite=overwrite, device=device)


@app.command()
@_plain_errors
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, .safetensors files, or an architecture.json."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for the pictures. Default: the run's; of several: plots."
        ),
    ] = None,
    data: Data = None,
) -> None:
    """Draw one run, or compare several.

    One: the architecture of every part (SVG, PNG), training curves, how α and β moved, predictions
    beside the truth. Several: their curves, and score against multiply-adds with the Pareto front.

    Examples: pnfs plot runs/a

    pnfs plot runs/d8 runs/d1 --out plots
    """
    from pnfs.commands import plot_command

    plot_command(runs, out=out, data=data)


@app.command()
@_plain_errors
def export(
    run: Run,
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write ONNX, as in model.onnx.")
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a program of torch.export, as in model.pt2."),
    ] = None,
    data: Data = None,
) -> None:
    """Write a model for other runtimes, folded, for any batch size; checked after writing.

    Example: pnfs export runs/a --onnx model.onnx
    """
    from pnfs.commands import export_command

    export_command(run, onnx=onnx, program=program, data=data)


architecture_app = typer.Typer(
    name="architecture",
    help="Architectures as files: what a search found, to read, keep and train from.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(architecture_app)


@architecture_app.command(name="export")
@_plain_errors
def export_architecture(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The JSON file.")],
) -> None:
    """Write topology, α, β, their softmax and entropies of every part as JSON.

    Training writes one into the run folder whenever the model gets better.

    Example: pnfs architecture export runs/a --out found.json
    """
    from pnfs.commands import export_architecture_command

    export_architecture_command(run, out)


@architecture_app.command(name="show")
@_plain_errors
def show_architecture(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="An architecture.json, or a run that has one.")
    ],
) -> None:
    """Print the mixes of every part and their entropies.

    Example: pnfs architecture show runs/a
    """
    from pnfs.commands import show_architecture_command

    show_architecture_command(source)


@app.command()
@_plain_errors
def info() -> None:
    """Show versions, what was compiled and why not the rest, backends per op, and devices."""
    from pnfs.info import print_info

    print_info()


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run the command line; `arguments` default to the process's own."""
    return app(args=None if arguments is None else list(arguments), prog_name="pnfs")


if __name__ == "__main__":
    main()
