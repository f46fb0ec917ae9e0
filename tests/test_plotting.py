"""Pictures: what is drawn where, equal bytes for equal input, one line for what cannot be drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from pnfs.checkpoint import save_weights
from pnfs.config import list_presets, load_config, parse_config
from pnfs.errors import PnfsError
from pnfs.model import build_model
from pnfs.plotting import (
    draw_poses,
    part_legend,
    plot_architecture,
    plot_curves,
    plot_model_architecture,
    plot_run,
    tile,
)
from pnfs.plotting.body import body_points
from pnfs.plotting.curves import read_curves
from pnfs.plotting.panel import live_cells
from pnfs.plotting.style import DPI, OPERATION_COLOURS, PART_COLOURS, TRANSFORM_COLOURS, rgb
from pnfs.skeleton import COCO, MPII, SKELETONS
from pnfs.topology import Topology, build_topology

OPERATIONS = ("zero", "skip", "separable", "atrous")


def subnetwork(hidden: int = 1) -> Topology:
    return build_topology(layers=6, channels=10, hidden=hidden, operations=OPERATIONS, cut=3)


def logits(topology: Topology, parts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    alpha = random.normal(size=(parts, len(topology.edges), len(topology.operations)))
    return alpha, random.normal(size=(parts, len(topology.cells), 3))


def read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None
    return image


def has_colour(image: np.ndarray, colour: str, at_least: int = 20) -> bool:
    """Whether at least so many pixels have exactly this colour."""
    return int((image[..., ::-1] == rgb(colour)).all(-1).sum()) >= at_least


def one_line(message: str) -> bool:
    return bool(message) and "\n" not in message


# -- poses ---------------------------------------------------------------------------------------


def standing_pose(confidence: float = 1.0, **changes: object) -> SimpleNamespace:
    """A person 160 pixels high in a 200 × 200 image."""
    points = np.array(body_points(COCO)) * 160 + [100, 20]
    pose = {
        "xy": points.astype(np.float32),
        "confidence": np.full(17, confidence, np.float32),
        "score": 0.9,
        "box": np.array([50.0, 15, 150, 185]),
    }
    return SimpleNamespace(**{**pose, **changes})


def grey(height: int = 200, width: int = 200) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
def test_limbs_take_the_colour_of_their_part(parts: int) -> None:
    image = grey()
    table = COCO.part_table[parts]
    drawn = draw_poses(image, [standing_pose()], COCO, table)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (image == 128).all(), "the input is left as it was"
    for name, colour in zip(table, PART_COLOURS, strict=False):
        assert has_colour(drawn, colour, at_least=5), name
    for unused in PART_COLOURS[len(table) :]:
        assert not has_colour(drawn, unused, at_least=1)


def test_limb_between_two_parts_is_half_and_half() -> None:
    table = {"left": (5,), "rest": tuple(k for k in range(17) if k != 5)}
    pose = standing_pose()
    drawn = draw_poses(grey(), [pose], COCO, table)
    shoulder, elbow = pose.xy[5], pose.xy[7]
    for share, colour in ((0.35, PART_COLOURS[0]), (0.65, PART_COLOURS[1])):
        x, y = np.round(shoulder + share * (elbow - shoulder)).astype(int)
        assert tuple(drawn[y, x, ::-1]) == rgb(colour)


def test_confidence_is_opacity_and_low_ones_are_left_out() -> None:
    def change(confidence: float) -> float:
        pose = standing_pose(confidence, box=None)
        drawn = draw_poses(grey(), [pose], COCO, COCO.part_table[3], min_confidence=0.2)
        return float(np.abs(drawn.astype(int) - 128).sum())

    assert change(0.1) == 0 < change(0.3) < change(0.6) < change(1.0)


def test_line_width_follows_the_box() -> None:
    def touched(box: list[float]) -> int:
        pose = standing_pose(box=np.array(box))
        image = draw_poses(grey(), [pose], COCO, COCO.part_table[1])
        return int(sum(has for has in (image[..., ::-1] == rgb(PART_COLOURS[0])).all(-1).ravel()))

    assert touched([0, 0, 600, 600]) > 1.5 * touched([50, 15, 150, 185])


@pytest.mark.parametrize(
    "changes",
    [
        {"xy": np.full((17, 2), np.nan, np.float32)},
        {"xy": np.full((17, 2), 1e9, np.float32)},
        {"xy": np.full((17, 2), -50.0, np.float32), "box": np.array([-90.0, -90, -10, -10])},
        {"box": np.array([np.nan] * 4)},
        {"box": np.array([-1e12, -1e12, 1e12, 1e12])},
        {"box": np.array([50.0, 50, 50, 50])},
        {"box": None, "score": None},
    ],
)
def test_odd_poses_are_drawn_as_far_as_they_can_be(changes: dict[str, object]) -> None:
    drawn = draw_poses(grey(), [standing_pose(**changes)], COCO, COCO.part_table[3])
    assert drawn.shape == (200, 200, 3)


def test_no_pose_changes_nothing_and_scale_enlarges() -> None:
    assert np.array_equal(draw_poses(grey(), [], COCO, COCO.part_table[3]), grey())
    drawn = draw_poses(grey(), [standing_pose()], COCO, COCO.part_table[3], scale=3)
    assert drawn.shape == (600, 600, 3)
    x, y = np.round((standing_pose().xy[9] + 0.5) * 3 - 0.5).astype(int)
    assert tuple(drawn[y, x, ::-1]) == rgb(PART_COLOURS[1]), "the wrist is where it was, times 3"


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)],
)
def test_images_that_cannot_be_drawn_on_give_one_line(image: np.ndarray) -> None:
    with pytest.raises(PnfsError, match=r"need uint8 \(height, width, 3\)") as caught:
        draw_poses(image, [], COCO, COCO.part_table[3])
    assert one_line(str(caught.value))


def test_pose_of_another_skeleton_gives_one_line() -> None:
    with pytest.raises(PnfsError, match=r"skeleton 'mpii'.*\(16, 2\)"):
        draw_poses(grey(), [standing_pose()], MPII, MPII.part_table[3])


def test_contact_sheet_places_every_image() -> None:
    colours = [(0, 0, 255), (0, 255, 0), (255, 0, 0)]
    images = [np.full((20, 30, 3), colour, np.uint8) for colour in colours]
    sheet = tile(images, 2, gap=4)
    assert sheet.shape == (2 * 24 + 4, 2 * 34 + 4, 3)
    for (y, x), colour in zip(((14, 19), (14, 53), (38, 19)), colours, strict=True):
        assert tuple(sheet[y, x]) == colour
    assert tuple(sheet[38, 53]) == (255, 255, 255)
    big = np.zeros((400, 100, 3), np.uint8)
    assert tile([big], 5, cell=(100, 100), captions=["one"]).shape == (100 + 22 + 16, 116, 3)


@pytest.mark.parametrize(
    ("count", "columns", "captions"), [(0, 2, None), (1, 0, None), (2, 2, ["a"])]
)
def test_bad_contact_sheets_give_one_line(
    count: int, columns: int, captions: list[str] | None
) -> None:
    with pytest.raises(PnfsError, match="contact sheet"):
        tile([grey(8, 8)] * count, columns, captions=captions)


def test_legend_wraps_and_shows_every_part() -> None:
    wide, narrow = part_legend(COCO.part_table[8], 1200), part_legend(COCO.part_table[8], 200)
    assert wide.shape[1] == 1200 and narrow.shape[0] > 3 * wide.shape[0] / 2
    for colour in PART_COLOURS:
        assert has_colour(wide, colour) and has_colour(narrow, colour)


@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
def test_figure_has_a_place_for_every_keypoint(skeleton) -> None:
    points = np.array(body_points(skeleton))
    assert points.shape == (skeleton.num_keypoints, 2)
    assert len({tuple(point) for point in points}) == len(points)
    mirrored = points[list(skeleton.flip_permutation)] * [-1, 1]
    assert np.array_equal(mirrored, points)


# -- architectures -------------------------------------------------------------------------------


def test_without_suffix_writes_svg_and_png(tmp_path: Path) -> None:
    topology = subnetwork()
    paths = plot_architecture(
        topology,
        *logits(topology, 3),
        COCO.part_table[3],
        tmp_path / "new" / "v1_net",
        title="t",
        skeleton=COCO,
    )
    assert [path.name for path in paths] == ["v1_net.svg", "v1_net.png"]
    assert paths[0].read_text().startswith("<?xml")
    image = read(paths[1])
    for name in OPERATIONS:
        assert has_colour(image, OPERATION_COLOURS[name], 500), name
    for name, colour in TRANSFORM_COLOURS.items():
        assert has_colour(image, colour, 100), name
    for colour in PART_COLOURS[:3]:
        assert has_colour(image, colour, 100)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_equal_input_gives_equal_bytes(tmp_path: Path, suffix: str) -> None:
    topology = subnetwork(hidden=2)
    alpha, beta = logits(topology, 3)
    files = []
    for name in "ab":
        path = tmp_path / (name + suffix)
        assert plot_architecture(topology, alpha, beta, COCO.part_table[3], path) == [path]
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert b"<dc:date>" not in files[0]


def preset_topologies() -> dict[str, tuple[Topology, int | str]]:
    """Every different fabric among the presets, by the first preset that has it."""
    found: dict[tuple, tuple[str, Topology, int | str]] = {}
    for name in list_presets():
        model = load_config(name).model
        if model.family != "pnfs":
            continue
        f, b = model.fabric, model.fabric_backbone
        own = build_topology(
            layers=f.layers,
            channels=f.channels,
            hidden=f.hidden,
            operations=f.operations,
            cut=f.cut,
        )
        parts = len(model.part_table)
        found.setdefault((len(own.cells), f.hidden, f.operations, parts), (name, own, parts))
        if b is not None:
            stem = build_topology(
                layers=b.layers,
                channels=b.channels,
                hidden=b.hidden,
                operations=b.operations,
                reserve=b.reserve,
            )
            found.setdefault(
                (len(stem.cells), b.hidden, b.operations, 0), (f"{name}:backbone", stem, 1)
            )
    return {name: (topology, parts) for name, topology, parts in found.values()}


@pytest.mark.parametrize(("name", "case"), preset_topologies().items())
def test_every_preset_can_be_drawn(tmp_path: Path, name: str, case: tuple[Topology, int]) -> None:
    topology, parts = case
    names = [f"part {p}" for p in range(parts)]
    [path] = plot_architecture(topology, *logits(topology, parts), names, tmp_path / "a.png")
    image = read(path)
    assert image.shape[0] > 2 * DPI and image.shape[1] > 4 * DPI
    assert (image != 255).any(-1).mean() > 0.05
    assert (image[:, [0, -1]] == 255).all() and (image[[0, -1]] == 255).all(), (
        "a margin on all sides"
    )


def test_live_cells_follow_the_table() -> None:
    topology = subnetwork()  # layers 3, 4, 5 with cells at 1/4..1/16, 1/4..1/8, 1/4
    everything = {(cell.layer, cell.level) for cell in topology.cells}
    inputs = {(2, level) for level in range(4)}
    beta = np.full((len(topology.cells), 3), 1 / 3)
    assert live_cells(topology, beta, 1e-3) == everything | inputs
    # The output takes only what comes up from 1/8: the 1/4 cell of layer 4 is dead.
    beta[topology.cell_at[5, 0].beta_row] = [0, 0, 1]
    assert live_cells(topology, beta, 1e-3) == everything - {(4, 0)} | inputs
    # A border copy keeps its source alive.
    beta[topology.cell_at[5, 0].beta_row] = [0, 1, 0]
    assert live_cells(topology, beta, 1e-3) == everything - {(4, 1), (3, 2)} | inputs - {(2, 3)}
    # A cell that receives nothing is dead even though the output would read it.
    beta[topology.cell_at[4, 0].beta_row] = 0
    assert live_cells(topology, beta, 1e-3) == frozenset()


def test_dead_cells_are_grey(tmp_path: Path) -> None:
    topology = subnetwork()
    alpha, beta = np.zeros((1, 1, 4)), np.zeros((1, len(topology.cells), 3))
    alpha[0, 0] = [-np.inf, -np.inf, 0, -np.inf]  # separable alone
    beta[0, topology.cell_at[5, 0].beta_row] = [-np.inf, -np.inf, 0]

    def separable_pixels(beta: np.ndarray) -> int:
        [path] = plot_architecture(topology, alpha, beta, ["all"], tmp_path / "a.png")
        image = read(path)
        assert not has_colour(image, OPERATION_COLOURS["skip"], 1400), "only the legend's"
        return int((image[..., ::-1] == rgb(OPERATION_COLOURS["separable"])).all(-1).sum())

    cell = separable_pixels(np.zeros_like(beta)) - separable_pixels(beta)
    assert 0.8 < cell / (0.42 * 0.38 * DPI**2) < 1.0, "one cell's face fewer"


def test_tensors_on_the_graph_and_low_precision_are_taken(tmp_path: Path) -> None:
    topology = subnetwork()
    alpha = torch.nn.Parameter(torch.zeros(1, 1, 4))
    beta = torch.zeros(1, len(topology.cells), 3, dtype=torch.bfloat16)
    assert plot_architecture(topology, alpha, beta, ["all"], tmp_path / "a.svg")[0].stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": np.zeros((2, 1, 4))}, r"alpha is \(2, 1, 4\).*\(3, 1, 4\)"),
        ({"alpha": np.zeros((3, 4))}, r"alpha is \(3, 4\)"),
        ({"beta": np.zeros((3, 5, 3))}, r"beta is \(3, 5, 3\).*\(3, 6, 3\)"),
        ({"beta": np.full((3, 6, 3), np.nan)}, "beta holds NaN"),
        ({"part_names": ["a", "b"]}, r"alpha is \(3, 1, 4\).*2 part names"),
        ({"part_names": ["a", "a", "b"]}, "must be distinct"),
        ({"part_names": []}, "at least one"),
        ({"path": "picture.gif"}, "suffix '.gif' is unknown"),
    ],
)
def test_what_does_not_fit_gives_one_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    topology = subnetwork()
    alpha, beta = logits(topology, 3)
    given = {"alpha": alpha, "beta": beta, "part_names": ["a", "b", "c"], "path": "a.png", **change}
    given["path"] = tmp_path / str(given["path"])
    with pytest.raises(PnfsError, match=message) as caught:
        plot_architecture(topology, **given)
    assert one_line(str(caught.value))
    assert not list(tmp_path.iterdir())


def test_unwritable_picture_gives_one_line(tmp_path: Path) -> None:
    topology = subnetwork()
    (tmp_path / "file").write_text("")
    with pytest.raises(PnfsError, match="cannot be written"):
        plot_architecture(topology, *logits(topology, 1), ["all"], tmp_path / "file" / "a.png")


def test_model_with_a_fabric_backbone_draws_both(tmp_path: Path) -> None:
    small = {"channels": 2, "hidden": 1}
    tree = {"backbone": {"layers": 6, "reserve": 3, **small}, "fabric": small, "parts": 3}
    model = build_model(parse_config({"model": tree}).model)
    [both] = plot_model_architecture(model, tmp_path / "both.png")
    fabric = model.fabric
    [parts] = plot_architecture(
        fabric.topology, fabric.alpha, fabric.beta, COCO.part_table[3], tmp_path / "parts.png"
    )
    assert read(both).shape[0] > 1.4 * read(parts).shape[0]
    assert has_colour(read(both), OPERATION_COLOURS["max_pool"]), "the backbone's own operations"


def test_baseline_has_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(PnfsError, match="has no fabric"):
        plot_model_architecture(torch.nn.Linear(1, 1), tmp_path / "a.png")


# -- curves and runs -----------------------------------------------------------------------------


def write_metrics(path: Path, rows: int = 100, scale: float = 1.0, tail: str = "") -> Path:
    lines = []
    for i in range(1, rows + 1):
        row = {"event": "train", "step": 20 * i, "epoch": i // 10, "loss": scale / i, "lr": 1e-3}
        lines.append({**row, "images_per_second": 50.0, "data_seconds": 0.1})
        if i % 25 == 0:
            scores = {"AP": 0.8 * i / rows, "AP50": i / rows, "seconds": 2.0}
            lines.append({"event": "eval", "step": 20 * i, "epoch": i // 10, **scores})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_curves_are_read_whatever_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"step": 10, "epoch": 0, "loss": 0.5, "lr": 0.001}',
        '{"step": 20, "loss": NaN, "lr": null}',
        '{"event": "note", "step": 20, "text": "resumed"}',
        "",
        '{"step": 30, "loss": 0.25}',
        '{"event": "eval", "step": 30, "AP": 0.5, "AP(M)": NaN, "AP(L)": -1, "boxes": "truth"}',
        '{"event": "eval", "step": 40, "epoch": 2, "AP": 0.75, "seconds": 3}',
        '{"event": "train", "st',
    ]
    path.write_text("\n".join(rows))
    curves = read_curves(path)
    assert curves.loss == ([10, 30], [0.5, 0.25])
    assert curves.learning_rate == ([10], [0.001])
    assert curves.scores == {"AP": ([30, 40], [0.5, 0.75])}
    assert read_curves(tmp_path) == curves


def test_curves_of_one_run_and_of_several(tmp_path: Path) -> None:
    one = write_metrics(tmp_path / "a" / "metrics.jsonl", tail='{"event": "tra')
    two = write_metrics(tmp_path / "b" / "metrics.jsonl", scale=2.0)
    [alone] = plot_curves(one, tmp_path / "one.png")
    [both] = plot_curves({"with vector": one, "without": two}, tmp_path / "both.png")
    plot_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "folders")
    assert (tmp_path / "folders.svg").is_file() and (tmp_path / "folders.png").is_file()
    blue, red = "#0072B2", "#D55E00"
    left = slice(None), slice(0, 800)
    assert has_colour(read(alone)[left], blue, 200) and not has_colour(read(alone)[left], red, 1)
    assert has_colour(read(both)[left], blue, 200) and has_colour(read(both)[left], red, 200)
    again = plot_curves(one, tmp_path / "again.png")[0]
    assert again.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    "line", ['{"step": 1, "loss": 0.5}', '{"event": "eval", "step": 1, "AP": 0}']
)
def test_a_single_row_is_enough(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert plot_curves(tmp_path, tmp_path / "a.png")[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "no loss and no score"),
        ('{"note": 1}\n', "no loss and no score"),
        ('not JSON\n{"step": 1, "loss": 1}\n', "line 1 is not a JSON object"),
    ],
)
def test_bad_metrics_give_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PnfsError, match=message) as caught:
        plot_curves(path, tmp_path / "a.png")
    assert one_line(str(caught.value))
    with pytest.raises(PnfsError, match="no run given"):
        plot_curves([], tmp_path / "a.png")


def test_a_run_is_drawn_from_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_metrics(run / "metrics.jsonl")
    config = load_config("tiny")
    save_weights(run / "model.safetensors", build_model(config.model), config, {"step": 1})
    assert [path.name for path in plot_run(run)] == [
        "architecture.svg",
        "architecture.png",
        "curves.png",
    ]
    elsewhere = plot_run(run / "model.safetensors", tmp_path / "out")
    assert [path.name for path in elsewhere] == ["architecture.svg", "architecture.png"]
    assert all(path.parent == tmp_path / "out" for path in elsewhere)
    with pytest.raises(PnfsError, match="no such run folder"):
        plot_run(tmp_path / "rum")


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", rows=3)
    code = (
        "import matplotlib, sys\n"
        "matplotlib.rcParams['font.size'] = 31\n"
        "from pnfs.plotting import plot_curves\n"
        f"plot_curves({str(tmp_path)!r}, {str(tmp_path / 'a.svg')!r})\n"
        "assert matplotlib.rcParams['font.size'] == 31\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
