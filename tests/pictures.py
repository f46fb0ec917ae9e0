"""What tests of pictures share: fabrics to draw, metrics to plot, and looking at pixels."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from pnfs.plotting.style import rgb
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
