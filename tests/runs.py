"""Small training runs for tests: a few drawn people, a model of some thousand parameters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pnfs.checkpoint import list_checkpoints
from pnfs.config import Config, load_config
from pnfs.data import Batch
from pnfs.model import build_model
from pnfs.search import ParameterGroups, build_strategy
from pnfs.steps import Stepper, StepResult

TIMES = {"images_per_second", "data_seconds", "compute_seconds", "seconds"}
SETTINGS = (
    "data.synthetic={train_images: 16, val_images: 4, max_people: 2, image_size: [96, 96]}",
    "data.workers=0",
    "model.backbone={layers: 6, reserve: 3, hidden: 1, channels: 1, operations: [skip, separable]}",
    "model.fabric={layers: 6, cut: 4, channels: 1, operations: [zero, skip, separable]}",
    "model.vector_dim=2",
    "model.input_size=[64, 64]",
    "train.batch_size=4",
    "train.epochs=2",
    "train.eval_every=1",
    "train.warmup_steps=2",
)
PARTIAL = ("model.fabric.channels=2", "model.fabric.partial=2")  # channels of the fabric


def small_config(root: Path, *settings: str) -> Config:
    """Settings of preset `tiny` that train in seconds; the people are drawn into `root`."""
    return load_config("tiny", [*SETTINGS, f"data.root={root}", *settings])


def config_for(strategy: str, *settings: str) -> Config:
    """Of a search by `strategy` that draws nobody."""
    return small_config(Path("unused"), f"search.strategy={strategy}", *settings)


def prepared(strategy: str, *settings: str) -> tuple[nn.Module, ParameterGroups]:
    """A model as `strategy` starts it, and what the optimiser trains."""
    config = config_for(strategy, *settings)
    torch.manual_seed(0)
    model = build_model(config.model)
    return model, build_strategy(config).prepare(model)


def state_of(run: Path) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a run's newest checkpoint, and its tree without the length of timed rows."""
    folder = list_checkpoints(run)[-1]
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"training {k}": v for k, v in load_file(folder / "training.safetensors").items()}
    tree = json.loads((folder / "state.json").read_text())["training"]
    return tensors, {k: v for k, v in tree.items() if k != "metrics_position"}


def rows_of(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the measured times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if event in (None, row["event"])]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in kept]


def assert_same_run(first: Path, second: Path) -> None:
    """Tensors, counters, random states, metrics and best model are equal, bit for bit."""
    (tensors, tree), (other_tensors, other_tree) = state_of(first), state_of(second)
    assert tensors.keys() == other_tensors.keys()
    assert [k for k in tensors if not torch.equal(tensors[k], other_tensors[k])] == []
    assert tree == other_tree
    assert rows_of(first) == rows_of(second)
    for name in ("model.safetensors", "architecture.json"):
        assert (first / name).is_file() == (second / name).is_file()
    if (first / "model.safetensors").is_file():
        best, other = (load_file(run / "model.safetensors") for run in (first, second))
        assert best.keys() == other.keys()
        assert all(torch.equal(best[key], other[key]) for key in best)
    if (first / "architecture.json").is_file():
        found, wanted = (
            json.loads((run / "architecture.json").read_text()) for run in (first, second)
        )
        assert found["fabrics"] == wanted["fabrics"]


@contextlib.contextmanager
def batches_seen() -> Iterator[list[list[int]]]:
    """Inside, the people of every batch whose loss trains the weights, in this process."""
    seen: list[list[int]] = []
    real = Stepper.step

    def step(self: Stepper, batches: Iterable[Batch], count: int, **kwargs: Any) -> StepResult:
        def noted() -> Iterator[Batch]:
            for batch in batches:
                seen.append(batch.indices.tolist())
                yield batch

        return real(self, noted(), count, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        yield seen
