"""Draw the pictures of the documentation anew: `python docs/make_pictures.py [DEMO]`.

`images/architecture.png` shows five part fabrics of preset ours-3 with α and β drawn at random by a
fixed seed; the cells that the paper's Fig. 1 shows as removed are made dead.

`images/predictions.jpg` is a smaller predictions.png of DEMO, the folder of a `pnfs demo`; left as
it is without one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import pnfs
from pnfs.plotting import plot_architecture
from pnfs.topology import build_topology

IMAGES = Path(__file__).parent / "images"
SEED = 3


def architecture(path: Path) -> None:
    model = pnfs.load_config("ours-3").model
    fabric = model.fabric
    topology = build_topology(
        layers=fabric.layers,
        channels=fabric.channels,
        hidden=fabric.hidden,
        operations=fabric.operations,
        cut=fabric.cut,
    )
    parts = list(model.part_table)
    random = np.random.default_rng(SEED)
    alpha = random.normal(
        scale=0.5, size=(len(parts), len(topology.edges), len(topology.operations))
    )
    beta = random.normal(scale=1.3, size=(len(parts), len(topology.cells), 3))
    # A cell dies when no cell of the next layer gives it any weight.
    every = range(len(parts))
    some = [parts.index(name) for name in ("left_lower_arm", "thigh")]
    for layer, dying in ((4, every), (3, some)):
        for cell in topology.cells:
            for source in cell.inputs:
                if source.source == (layer, 0):
                    beta[list(dying), cell.beta_row, source.slot] = -np.inf
    alpha[parts.index("thigh"), :, topology.operations.index("atrous")] = -np.inf
    plot_architecture(
        topology,
        alpha,
        beta,
        model.part_table,
        path,
        title="Five part fabrics over a shared backbone",
        skeleton=model.skeleton_table,
    )
    # A palette of 256 is plenty for flat shapes and takes a third of the bytes.
    Image.open(path).convert("RGB").quantize(
        256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    ).save(path, optimize=True)


def predictions(demo: Path, path: Path) -> None:
    picture = Image.open(demo / "predictions.png").convert("RGB")
    width = 1400
    small = picture.resize((width, round(width * picture.height / picture.width)))
    small.save(path, quality=85, optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    architecture(IMAGES / "architecture.png")
    for demo in sys.argv[1:2]:
        predictions(Path(demo), IMAGES / "predictions.jpg")
