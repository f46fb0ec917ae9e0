"""A loss or gradient of α and β that is not finite leaves no mark, and stops a run in the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import small_config
from torch.utils._pytree import tree_leaves

from pnfs.data import Batch
from pnfs.data.training import TrainingData
from pnfs.errors import PnfsError
from pnfs.model import build_model
from pnfs.search import build_strategy
from pnfs.steps import Stepper, StepResult
from pnfs.train import train


def broken(batch: Batch) -> Batch:
    """With a loss that is NaN."""
    return replace(batch, joints=batch.joints + torch.nan)


def everything(stepper: Stepper) -> list[torch.Tensor]:
    """Copies of all that a step may change."""
    state = stepper.state_dict(), stepper.strategy.state_dict()
    leaves = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in (*leaves, *stepper.model.state_dict().values())]


@pytest.mark.parametrize("name", ["first-order", "second-order"])
@pytest.mark.parametrize("which", ["architecture", "weights"])
def test_a_nonfinite_loss_of_either_half_undoes_the_step_of_both(
    tmp_path: Path, name: str, which: str
) -> None:
    config = small_config(tmp_path, f"search.strategy={name}")
    data = TrainingData(config)
    torch.manual_seed(0)
    model = build_model(config.model)
    stepper = Stepper(config, model, build_strategy(config), torch.device("cpu"))
    batches = iter(data.loader)

    def step(index: int, bad: str) -> StepResult:
        seen, held = next(batches), data.held()
        seen, held = (
            broken(batch) if bad == half else batch
            for half, batch in (("weights", seen), ("architecture", held))
        )
        return stepper.step([seen], 1, index=index, total=9, learning_rate=1e-3, held=lambda: held)

    assert step(0, "neither").taken
    before = everything(stepper)
    result = step(1, which)
    assert not result.taken and not math.isfinite(result.loss) and result.images == 4
    after = everything(stepper)
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert step(2, "neither").taken
    assert not all(map(torch.equal, before, everything(stepper)))


def test_a_loss_of_the_architecture_that_stays_nonfinite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainingData.held
    monkeypatch.setattr(TrainingData, "held", lambda data: broken(real(data)))
    settings = ["search.strategy=first-order", "train.max_nonfinite_steps=3", "train.epochs=3"]
    with pytest.raises(PnfsError, match="not finite in 3 steps in a row, up to step 3"):
        train(small_config(tmp_path / "people", *settings), tmp_path / "run", quiet=True)


def test_an_overflow_in_fp16_gradients_of_the_architecture_lowers_the_scale(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path, "search.strategy=first-order", "train.precision=fp16")
    data = TrainingData(config)
    stepper = Stepper(
        config, build_model(config.model), build_strategy(config), torch.device("cpu")
    )
    scale = stepper.scaler.get_scale()
    result = stepper.step(
        iter(data.loader),
        1,
        index=0,
        total=9,
        learning_rate=1e-3,
        held=lambda: broken(data.held()),
    )
    assert not result.taken and stepper.scaler.get_scale() == scale / 2
