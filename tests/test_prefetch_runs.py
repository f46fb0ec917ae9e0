"""Training and evaluation with batches made ahead: the same results, in the expected order."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from played import PlayedSide, Player
from runs import assert_same_run, batches_seen, rows_of, small_config
from torch import Tensor

from pnfs.data import Batch, load_people
from pnfs.data.training import TrainingData
from pnfs.decode import decode, predict_batch
from pnfs.errors import PnfsError
from pnfs.evaluation import evaluate
from pnfs.model import build_model
from pnfs.skeleton import COCO
from pnfs.steps import Stepper, StepResult
from pnfs.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


RUNS: dict[str, tuple[str, ...]] = {
    "sync": ("search.strategy=sync",),
    "two loaders": ("search.strategy=second-order",),
    "accumulated": ("search.strategy=first-order", "train.accumulate=3"),
}


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> PlayedSide:
    side = PlayedSide()
    for module in ("pnfs.train", "pnfs.evaluation.runner"):
        monkeypatch.setattr(f"{module}.side_for", lambda device: side)
    return side


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_with_batches_made_ahead_is_the_run_without(
    settings: tuple[str, ...], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(root, "train.epochs=4", "train.eval_every=3", *settings)
    train(config, tmp_path / "plain", device="cpu", quiet=True)
    side, player = PlayedSide(), Player()
    for module in ("pnfs.train", "pnfs.evaluation.runner"):
        monkeypatch.setattr(f"{module}.side_for", lambda device: side)
    monkeypatch.setattr("pnfs.steps.recorder_for", lambda device: player)
    train(config, tmp_path / "ahead", device="cpu", quiet=True)
    assert_same_run(tmp_path / "plain", tmp_path / "ahead")
    joined = [int(line.split()[1]) for line in side.log if line.startswith("join")]
    assert len(joined) > 8 and sorted(joined) == list(range(1, side.marks + 1))
    assert player.replays  # of recordings that read their own inputs


def test_the_next_batch_is_prepared_while_the_step_runs(
    side: PlayedSide, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, step = Stepper._compute, Stepper.step

    def launched(self: Stepper, *inputs: Tensor) -> tuple[Tensor]:
        side.log.append("launch")
        return compute(self, *inputs)

    def made(self: Stepper, *args: Any, **kwargs: Any) -> StepResult:
        result = step(self, *args, **kwargs)
        side.log.append("result")
        return result

    monkeypatch.setattr(Stepper, "_compute", launched)
    monkeypatch.setattr(Stepper, "step", made)
    config = small_config(root, "search.strategy=none", "train.epochs=1")
    train(config, tmp_path / "run", device="cpu", quiet=True, stop_at=3)
    found = [line for line in side.log if line != "hand over"]
    assert found == [
        "mark 1", "join 1", "launch", "mark 2", "result",
        "join 2", "launch", "mark 3", "result",
        "join 3", "launch", "mark 4", "result",
        "wait for 1", "wait for 2", "wait for 3", "wait for 4",
    ]  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_stopped_run_resumes_to_the_same_bits(
    side: PlayedSide, stop_at: int, root: Path, tmp_path: Path
) -> None:
    config = small_config(root, "search.strategy=first-order", "train.epochs=3")
    with batches_seen() as whole:
        train(config, tmp_path / "whole", device="cpu", quiet=True)
    run = tmp_path / "stopped"
    with batches_seen() as seen:
        train(config, run, device="cpu", quiet=True, stop_at=stop_at)
        train(config, run, device="cpu", quiet=True, resume=True)
    assert seen == whole
    assert_same_run(tmp_path / "whole", run)


def test_a_batch_that_cannot_be_prepared_ends_the_run_at_its_own_step(
    side: PlayedSide, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Batch.prepared, 0

    def prepared(*args: Any, **kwargs: Any) -> Batch:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise PnfsError("no memory for the third")
        return real(*args, **kwargs)

    monkeypatch.setattr(Batch, "prepared", prepared)
    monkeypatch.setattr("pnfs.train.LOG_EVERY", 1)
    config = small_config(root, "search.strategy=none")
    with pytest.raises(PnfsError, match="no memory for the third"):
        train(config, tmp_path / "run", device="cpu", quiet=True)
    assert [row["step"] for row in rows_of(tmp_path / "run", "train")] == [1, 2]


def test_training_lets_go_of_its_loaders(side: PlayedSide, root: Path) -> None:
    """Workers of a loader that something still knew would outlive the run."""
    config = small_config(root, "search.strategy=first-order")
    data = TrainingData(config)
    data.prefetch(partial(Batch.prepared, device="cpu", size=(64, 64)), side)
    batches = iter(data.loader)
    next(batches), data.held(), data.ahead()
    gone = [weakref.ref(loader) for loader in data._loaders()]
    gc.disable()
    try:
        del data, batches
        assert [loader() for loader in gone] == [None, None]
    finally:
        gc.enable()


# -- evaluation ------------------------------------------------------------------------------------


def test_evaluation_makes_batches_ahead_and_finds_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(root, "eval.batch_size=3", "eval.flip=true")
    people = load_people(config.data, COCO, "train")
    torch.manual_seed(0)
    model = build_model(config.model)
    plain = evaluate(model, people, config)
    side = PlayedSide()
    monkeypatch.setattr("pnfs.evaluation.runner.side_for", lambda device: side)

    def launched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        side.log.append("launch")
        return predict_batch(*args, **kwargs)

    def read(done: int, total: int) -> None:
        side.log.append("result")

    monkeypatch.setattr("pnfs.evaluation.runner.predict_batch", launched)
    found = evaluate(model, people, config, progress=read)
    assert found.predictions == plain.predictions
    lines = [line for line in side.log if line != "hand over"]
    assert lines[:8] == [
        "mark 1", "join 1", "launch", "mark 2", "result", "join 2", "launch", "mark 3",
    ]  # fmt: skip
    assert side.marks == -(-len(people) // 3) and side.passed == side.marks


def test_decoding_copies_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host would wait for the network, and the next batch would be made after."""

    def decoded() -> tuple[Tensor, Tensor]:
        with torch.device("meta"):  # stands for a GPU
            maps, matrices = torch.empty(2, 17, 16, 16), torch.empty(2, 2, 3)
        return decode(maps, matrices, flipped=maps, skeleton=COCO, profile="posenfs")

    def made_on_the_host(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("torch.tensor copies from the host")

    decoded()
    monkeypatch.setattr(torch, "tensor", made_on_the_host)
    assert [x.device.type for x in decoded()] == ["meta", "meta"]
