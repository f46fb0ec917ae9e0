"""Fabrics as pictures: every part, live and dead cells, equal bytes for equal input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import OPERATIONS, has_colour, logits, one_line, read, subnetwork

from pnfs.config import list_presets, load_config, parse_config
from pnfs.errors import PnfsError
from pnfs.model import PoseNet, build_model
from pnfs.plotting import plot_architecture, plot_architecture_file, plot_model_architecture
from pnfs.plotting.panel import DEAD_FILL, live_cells
from pnfs.plotting.style import DPI, OPERATION_COLOURS, PART_COLOURS, TRANSFORM_COLOURS, rgb
from pnfs.pruning import prune
from pnfs.search import save_architecture
from pnfs.skeleton import COCO
from pnfs.topology import Topology, build_topology


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


def test_what_pruning_removed_is_grey(tmp_path: Path) -> None:
    model = build_model(load_config("tiny").model)
    assert isinstance(model, PoseNet)
    with torch.no_grad():  # every part takes its output from the 1/4 scale alone
        model.fabric.beta[:, :, 1:] = -5.0
        model.fabric.alpha[..., 1] = -5.0  # and hardly any skip
    small, report = prune(model, 0.1)
    assert report.removed_cells
    [whole] = plot_model_architecture(model, tmp_path / "whole.png")
    [pruned] = plot_model_architecture(small, tmp_path / "pruned.png")

    def pixels(path: Path, colour: str) -> int:
        return int((read(path)[..., ::-1] == rgb(colour)).all(-1).sum())

    assert pixels(pruned, DEAD_FILL) > 5 * pixels(whole, DEAD_FILL)
    down, skip = TRANSFORM_COLOURS["down"], OPERATION_COLOURS["skip"]
    assert pixels(pruned, down) < 0.6 * pixels(whole, down)
    assert pixels(pruned, skip) < pixels(whole, skip)


def test_a_file_is_drawn_as_its_model_is(tmp_path: Path) -> None:
    model = build_model(load_config("tiny").model)
    with torch.no_grad():
        for parameter in model.architecture_parameters():
            parameter.normal_()
    save_architecture(model, tmp_path / "a.json", {"run": "a"})
    [from_file] = plot_architecture_file(tmp_path / "a.json", tmp_path / "file.png", title="t")
    [from_model] = plot_model_architecture(model, tmp_path / "model.png", title="t")
    one, other = read(from_file), read(from_model)
    assert one.shape == other.shape
    assert (one != other).any(-1).mean() < 0.02, "all but the figures: a file has no keypoints"
    (tmp_path / "b.json").write_text('{"format": "pnfs-architecture-1", "source": {}}')
    with pytest.raises(PnfsError, match="b.json: a damaged architecture file"):
        plot_architecture_file(tmp_path / "b.json", tmp_path / "b.png")
