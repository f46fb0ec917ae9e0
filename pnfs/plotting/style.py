"""Colours shared by all pictures, and saving figures so that equal input gives equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pnfs.errors import PnfsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct for all common forms of colour blindness, plus one dark red so
# that Table I's eight parts differ. A part has the same colour in every picture.
PART_COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#882255",
)  # fmt: skip
# No colour of an operation returns among the transforms: the two are read side by side.
OPERATION_COLOURS = {
    "zero": "#C2C2C2",
    "skip": "#F0E442",
    "separable": "#0072B2",
    "atrous": "#56B4E9",
    "avg_pool": "#009E73",
    "max_pool": "#E69F00",
}
OTHER_OPERATIONS = ("#CC79A7", "#882255", "#999933")
TRANSFORM_COLOURS = {"same": "#222222", "down": "#6A3D9A", "up": "#D7301F"}  # as in Fig. 2
INK, SOFT, FAINT, PAPER = "#222222", "#6B6B6B", "#CFCFCF", "#FFFFFF"

FORMATS = (".svg", ".png")
DPI = 150


def part_colours(names: Sequence[str]) -> dict[str, str]:
    """Part name -> `#RRGGBB`, by position; repeats after eight parts."""
    return {name: PART_COLOURS[i % len(PART_COLOURS)] for i, name in enumerate(names)}


def operation_colours(names: Sequence[str]) -> dict[str, str]:
    """Operation name -> `#RRGGBB`; operations not listed above get spare colours in turn."""
    unknown = [name for name in names if name not in OPERATION_COLOURS]
    spare = {name: OTHER_OPERATIONS[i % len(OTHER_OPERATIONS)] for i, name in enumerate(unknown)}
    return {name: OPERATION_COLOURS.get(name) or spare[name] for name in names}


def rgb(colour: str) -> tuple[int, int, int]:
    """`#RRGGBB` as three levels 0..255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def readable_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (luma, ITU-R BT.601)."""
    red, green, blue = rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def spaced(name: str) -> str:
    """`left_lower_arm` as people write it: `left lower arm`."""
    return name.replace("_", " ")


@contextmanager
def drawing() -> Iterator[None]:
    """The settings under which every figure is built and saved: independent of the user's
    matplotlibrc, and with a fixed salt for the SVG's ids, so that equal input gives equal files."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"font.family": "DejaVu Sans", "svg.hashsalt": "pnfs", "svg.fonttype": "path"}
        )
        yield


def output_paths(path: str | Path) -> list[Path]:
    """The files that `path` stands for: itself with suffix .svg or .png, both without a suffix.

    Raises:
        PnfsError: another suffix.
    """
    path = Path(path)
    if not path.suffix:
        return [path.with_name(path.name + suffix) for suffix in FORMATS]
    if path.suffix.lower() not in FORMATS:
        raise PnfsError(
            f"picture {path}: suffix '{path.suffix}' is unknown; use .svg, .png or none for both"
        )
    return [path]


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Write `figure` to `output_paths(path)`, making the folder if needed; call inside `drawing()`.

    Raises:
        PnfsError: unknown suffix, or the file cannot be written.
    """
    paths = output_paths(path)
    for file in paths:
        # Metadata that would differ between two runs or two versions of matplotlib is left out.
        kind = file.suffix.lower()
        metadata = {"Date": None, "Creator": None} if kind == ".svg" else {"Software": None}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=DPI, format=kind[1:], metadata=metadata, facecolor=PAPER)
        except OSError as error:
            raise PnfsError(
                f"picture {file}: cannot be written ({error.strerror or error}); "
                "choose a writable folder"
            ) from None
    return paths
