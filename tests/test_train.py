"""Training resumes bit for bit, survives bad batches and signals, and spans processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_run, rows_of, small_config, state_of
from safetensors.torch import load_file
from torch import Tensor, nn

from pnfs import steps
from pnfs.checkpoint import list_checkpoints, load_model, read_metadata, save_weights
from pnfs.config import TrainConfig
from pnfs.errors import PnfsError
from pnfs.evaluation.pckh import PCKH_10, PCKH_50
from pnfs.kernels.triton import tuning
from pnfs.runlog import run_config
from pnfs.schedule import learning_rate
from pnfs.train import train


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("people")


def test_a_run_leaves_a_complete_folder(people: Path, tmp_path: Path) -> None:
    config = small_config(people)
    result = train(config, tmp_path / "run", quiet=True)
    run = tmp_path / "run"
    assert result.step == rows_of(run, "train")[-1]["step"]
    assert run_config(run) == config
    start = json.loads((run / "run.json").read_text())["starts"][0]
    assert {"command", "git_commit", "versions", "preset", "device"} <= start.keys()
    assert start["preset"] == "tiny" and "torch" in start["versions"]
    assert [row["epoch"] for row in rows_of(run, "eval")] == [1, 2]
    assert {"AP", "AP50"} <= rows_of(run, "eval")[-1].keys()
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "lr", "images_per_second", "data_seconds", "compute_seconds"} <= first.keys()
    assert load_model(run).config == config.model
    assert result.metrics["AP"] == rows_of(run, "eval")[-1]["AP"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    people: Path, tmp_path: Path, workers: int
) -> None:
    settings = [f"data.workers={workers}", "train.accumulate=2", "train.checkpoint_every=2"]
    config = small_config(people, *settings, "train.epochs=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    total = train(config, whole, quiet=True).step
    assert total >= 7
    per_epoch = total // 3
    stops = (1, per_epoch, per_epoch + 1)  # within an epoch, at its end, after it
    for number, stop in enumerate(stops):
        result = train(config, parts, resume=number > 0, quiet=True, stop_at=stop)
        assert (result.step, result.stopped_by) == (stop, "stop_at")
        torch.rand(3)  # what else the process does is of no account
    assert train(config, parts, resume=True, quiet=True).step == total
    assert_same_run(whole, parts)


def test_a_damaged_newest_checkpoint_costs_nothing_but_time(people: Path, tmp_path: Path) -> None:
    config = small_config(people, "train.checkpoint_every=1")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    train(config, whole, quiet=True)
    train(config, damaged, quiet=True, stop_at=3)
    newest = list_checkpoints(damaged)[-1] / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    train(config, damaged, resume=True, quiet=True)
    assert_same_run(whole, damaged)


def test_resuming_before_the_first_checkpoint_starts_over(people: Path, tmp_path: Path) -> None:
    config = small_config(people)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, whole, quiet=True)
    train(config, killed, quiet=True, stop_at=1)
    shutil.rmtree(killed / "checkpoints")
    (killed / "metrics.jsonl").write_text('{"event": "train", "step": 1')
    train(config, killed, resume=True, quiet=True)
    assert_same_run(whole, killed)


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(
    people: Path, tmp_path: Path
) -> None:
    config = small_config(people)
    train(config, tmp_path / "run", quiet=True, stop_at=1)
    (list_checkpoints(tmp_path / "run")[-1] / "state.json").unlink()
    with pytest.raises(PnfsError, match=r"no checkpoint can be read.*state\.json"):
        train(config, tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_a_finished_run_trains_on_with_more_epochs(people: Path, tmp_path: Path) -> None:
    config = small_config(people, "train.lr_schedule=step")
    steps_of_two = train(config, tmp_path / "run", quiet=True).step
    assert train(config, tmp_path / "run", resume=True, quiet=True).step == steps_of_two
    longer = run_config(tmp_path / "run", ["train.epochs=3"])
    assert train(longer, tmp_path / "run", resume=True, quiet=True).step == steps_of_two * 3 // 2
    assert [row["epoch"] for row in rows_of(tmp_path / "run", "eval")] == [1, 2, 3]


def test_choices_of_tuned_kernels_go_with_the_checkpoints(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(people, "train.tune_kernels=true")
    first, second = tuning.Tuner(None), tuning.Tuner(None)
    tuners = iter((first, second))
    monkeypatch.setattr(tuning, "Tuner", lambda path: next(tuners))
    first.choices["a case"] = {"version": "0", "config": [8, 1.0], "us": [2.0, 1.0]}
    train(config, tmp_path / "run", quiet=True, stop_at=1)
    train(config, tmp_path / "run", resume=True, quiet=True, stop_at=2)
    assert second.choices == first.choices


def test_a_run_folder_is_not_overwritten_by_accident(people: Path, tmp_path: Path) -> None:
    config, run = small_config(people, "train.epochs=1"), tmp_path / "run"
    train(config, run, quiet=True)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(PnfsError, match="not empty; add --resume .* --overwrite"):
        train(config, run, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    train(config, run, overwrite=True, quiet=True)
    assert len(rows_of(run, "eval")) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(PnfsError, match="files that no run wrote"):
        train(config, tmp_path / "mine", overwrite=True, quiet=True)
    with pytest.raises(PnfsError, match="no run to resume"):
        train(config, tmp_path / "mine", resume=True, quiet=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_two_processes_do_not_share_a_run_folder(people: Path, tmp_path: Path) -> None:
    from pnfs.runlog import open_run

    with open_run(tmp_path / "run", resume=False, overwrite=False):
        script = (
            "from pnfs.runlog import open_run; from pathlib import Path; import sys\n"
            "open_run(Path(sys.argv[1]), resume=False, overwrite=False)"
        )
        other = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True
        )
    assert f"in use by another training process (pid {os.getpid()} on " in other.stderr


def test_an_unwritable_run_folder_is_one_line(people: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PnfsError, match="cannot be written") as error:
        train(small_config(people), tmp_path / "file" / "run", quiet=True)
    assert "\n" not in str(error.value)


def break_loss(
    monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]
) -> Callable[..., Tensor]:
    """Let the loss of the n-th batch (from 1) be NaN wherever `bad(n)`."""
    calls = 0
    real = steps.pose_loss

    def loss(model: nn.Module, images: Tensor, *rest: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        return real(model, images * (math.nan if bad(calls) else 1.0), *rest, sigma=sigma)

    monkeypatch.setattr(steps, "pose_loss", loss)
    return loss


def test_a_nonfinite_step_is_skipped_and_leaves_no_mark(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(people)
    train(config, tmp_path / "before", quiet=True, stop_at=2)
    break_loss(monkeypatch, lambda n: n == 3)
    train(config, tmp_path / "after", quiet=True, stop_at=3)
    before, after = (state_of(tmp_path / name)[0] for name in ("before", "after"))
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed == []
    progress = state_of(tmp_path / "after")[1]["progress"]
    assert (progress["step"], progress["skipped_steps"]) == (3, 1)
    result = train(config, tmp_path / "after", resume=True, quiet=True)
    assert all(row["skipped_steps"] == 1 for row in rows_of(result.run, "train"))
    assert all(t.isfinite().all() for t in load_file(result.run / "model.safetensors").values())


def test_a_loss_that_stays_nonfinite_stops_the_run(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_loss(monkeypatch, lambda n: n > 2)
    settings = ["train.epochs=20", "train.eval_every=0", "train.max_nonfinite_steps=5"]
    config, run = small_config(people, *settings), tmp_path / "run"
    with pytest.raises(PnfsError, match=r"not finite in 5 steps in a row, up to step 7"):
        train(config, run, quiet=True)
    assert state_of(run)[1]["progress"]["nonfinite_in_a_row"] < 5
    monkeypatch.undo()
    assert train(config, run, resume=True, quiet=True, stop_at=12).step == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = small_config(people)
    train(config, tmp_path / "whole", quiet=True)
    real, calls = steps.pose_loss, 0

    def loss(*arguments: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), number)
        return real(*arguments, sigma=sigma)

    monkeypatch.setattr(steps, "pose_loss", loss)
    handler = signal.getsignal(number)
    result = train(config, tmp_path / "stopped", quiet=True)
    assert (result.stopped_by, result.step) == (number.name, 3)
    assert signal.getsignal(number) == handler
    train(config, tmp_path / "stopped", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_during_evaluation_is_honoured_at_once(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnfs import train as module

    config, real = small_config(people), module.evaluate
    train(config, tmp_path / "whole", quiet=True)

    def interrupted(*args, **kwargs):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", interrupted)
    result = train(config, tmp_path / "stopped", quiet=True)
    assert result.stopped_by == "SIGTERM" and rows_of(result.run, "eval") == []
    monkeypatch.undo()
    train(config, tmp_path / "stopped", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(people: Path, tmp_path: Path, precision: str) -> None:
    config = small_config(people, f"train.precision={precision}", "train.epochs=1")
    result = train(config, tmp_path / "run", quiet=True)
    assert all(math.isfinite(row["loss"]) for row in rows_of(result.run, "train"))
    assert next(load_model(result.run).parameters()).dtype is torch.float32


def test_clipping_bounds_the_gradient(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    real = torch.optim.Adam.step

    def step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train(small_config(people, "train.grad_clip=1e-3"), tmp_path / "run", quiet=True, stop_at=2)
    assert len(norms) == 2 and max(norms) <= 1e-3 * 1.001


def test_backbone_weights_are_read_at_the_start_but_not_when_resuming(
    people: Path, tmp_path: Path
) -> None:
    config = small_config(people)
    train(config, tmp_path / "source", quiet=True, stop_at=1)
    source = load_model(tmp_path / "source")
    weights = tmp_path / "source.safetensors"
    save_weights(weights, source, config, {})
    started = small_config(people, f"model.backbone_weights={weights}", "train.lr=1e-12")
    train(started, tmp_path / "run", quiet=True, stop_at=1)
    key = "backbone.fabric.cells.cell_0_0.output.weight"
    want = source.state_dict()[key]
    assert torch.allclose(load_model(tmp_path / "run").state_dict()[key], want, atol=1e-9)
    weights.unlink()
    train(started, tmp_path / "run", resume=True, quiet=True, stop_at=2)
    with pytest.raises(PnfsError, match=r"source\.safetensors"):
        train(started, tmp_path / "fresh", quiet=True)


def test_tensorboard_files_are_written(people: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(small_config(people, "train.tensorboard=true"), tmp_path / "run", quiet=True, stop_at=2)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_plain_lines_show_loss_rate_and_data_time(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(people, "train.epochs=1"), tmp_path / "run")
    shown = capsys.readouterr().out
    for word in ("loss", "img/s", "data", "compute", "epoch 1: AP", "strategy sync"):
        assert word in shown


def test_the_best_model_of_mpii_is_the_one_of_the_highest_pckh(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pnfs import train as module

    scores = iter([(40.0, 9.0), (60.0, 5.0), (50.0, 8.0)])

    def evaluate(*args, **kwargs):  # type: ignore[no-untyped-def]
        pckh_50, pckh_10 = next(scores)
        return SimpleNamespace(metrics={PCKH_10: pckh_10, PCKH_50: pckh_50})

    monkeypatch.setattr(module, "evaluate", evaluate)
    result = train(small_config(people, "train.epochs=3"), tmp_path / "run", quiet=True)
    assert result.best == 60.0 and result.metrics[PCKH_50] == 50.0
    assert read_metadata(result.run / "model.safetensors")[1]["epoch"] == 2


def test_profiles_that_disagree_are_said(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "note: trained with data.profile=standard"
    train(small_config(people), tmp_path / "same", stop_at=1)
    assert note not in capsys.readouterr().out
    train(small_config(people, "eval.profile=posenfs"), tmp_path / "other", stop_at=1)
    assert note in capsys.readouterr().out


def test_learning_rates() -> None:
    step = TrainConfig(lr=1.0, lr_steps=(2, 3), lr_factor=0.25, epochs=4, warmup_steps=3)
    rates = [learning_rate(step, i, 10) for i in (0, 2, 3, 19, 20, 30, 39)]
    assert rates == pytest.approx([0.25, 0.75, 1, 1, 0.25, 0.0625, 0.0625])
    cosine = TrainConfig(lr=1.0, lr_schedule="cosine", epochs=4)
    rates = [learning_rate(cosine, i, 10) for i in (0, 10, 20, 30, 40)]
    assert rates == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
