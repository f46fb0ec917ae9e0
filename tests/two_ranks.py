"""Run by torchrun as two ranks, once for everything that test_processes.py asks of them.

`two_ranks.py FOLDER`: each check that a rank passes is named in FOLDER/passed-RANK.json, the first
that fails in FOLDER/failed-RANK.txt.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import batches_seen, rows_of, small_config
from torch import Tensor, nn

from pnfs import distributed, statefile
from pnfs import train as training
from pnfs.checkpoint import list_checkpoints
from pnfs.cli import main as pnfs_main
from pnfs.commands import eval_command
from pnfs.config import Config, dump_config
from pnfs.data import load_people
from pnfs.data.samples import SampleMaker
from pnfs.errors import PnfsError
from pnfs.evaluation import runner
from pnfs.model import build_model
from pnfs.search import STRATEGIES, build_strategy
from pnfs.steps import Stepper
from pnfs.train import ANOTHER_RANK, TrainResult, train

STEPS = 2
SEARCHES = [name for name in STRATEGIES if name != "none"]  # which is random with other numbers
CPU = torch.device("cpu")


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None, None]
    dist.all_gather_object(values, value)
    return values


def assert_equal_on_ranks(model: nn.Module) -> None:
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(*gathered(own))


class Inputs:
    """A float64 batch that is on the device already."""

    def __init__(self, pixels: Tensor, joints: Tensor, weights: Tensor) -> None:
        self.pixels, self.joints, self.weights = pixels, joints, weights

    @classmethod
    def drawn(cls, count: int, size: tuple[int, int]) -> Inputs:
        pixels, joints = torch.randn(count, 3, *size), torch.rand(count, 17, 2) * 64
        return cls(pixels, joints, (torch.rand(count, 17) > 0.3).double())

    def share(self) -> Inputs:
        """This rank's half."""
        half = len(self) // 2
        own = slice(half * distributed.rank(), half * (distributed.rank() + 1))
        return Inputs(self.pixels[own], self.joints[own], self.weights[own])

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, _: torch.device) -> Inputs:
        return self

    def images(self, **_: object) -> Tensor:
        return self.pixels


def equals_one_rank(strategy: str) -> None:
    """Steps of two ranks are those of one with all the data, with synchronised normalisation.

    Float64, so that only the mathematics counts: in float32 the deep chain of batch normalisations
    magnifies rounding to 1e-3 in gradients that nearly cancel.
    """
    count = 2 if strategy == "sync" else 1
    settings = [f"train.accumulate={count}", "train.weight_decay=0.01", "train.grad_clip=0.1"]
    config = small_config(Path("unused"), f"search.strategy={strategy}", *settings)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = build_model(config.model).double()
        alone = copy.deepcopy(model)
        steppers = [Stepper(config, m, build_strategy(config), CPU) for m in (model, alone)]
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        steppers[0].connect()
        for step in range(STEPS):
            seen = [Inputs.drawn(4, config.model.input_size) for _ in range(count)]
            held = [Inputs.drawn(4, config.model.input_size) for _ in range(count)]
            results = []
            for stepper, share in zip(steppers, (Inputs.share, lambda whole: whole), strict=True):
                more = iter(list(map(share, held)))  # type: ignore[arg-type]
                results.append(
                    stepper.step(
                        map(share, seen),  # type: ignore[arg-type]
                        count,
                        index=step,
                        total=STEPS,
                        learning_rate=1e-3,
                        architecture_rate=3e-3,
                        held=lambda more=more: next(more),  # type: ignore[misc]
                    )
                )
            assert_equal_on_ranks(model)
            assert results[0].taken and results[1].taken
            assert abs(results[0].loss - results[1].loss) < 1e-10 * results[1].loss
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, alone)
    )
    assert (theirs - start).abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-7
    for (name, buffer), other in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.allclose(buffer, other, rtol=1e-6, atol=1e-9), name


@contextlib.contextmanager
def after_each_step(action: Callable[[Stepper, int], None]) -> Iterator[None]:
    """Inside, `action` is called with the number of steps that `train` has made."""
    real = Stepper.step

    def step(self: Stepper, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        action(self, kwargs["index"] + 1)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        yield


def trained_runs_stay_equal_on_both_ranks(folder: Path) -> None:
    """Float32, the kernels, real data."""
    cases = [(name, "true") for name in SEARCHES] + [("sync", "false")]
    for name, synchronised in cases:
        settings = [f"search.strategy={name}", f"train.sync_batch_norm={synchronised}"]
        with after_each_step(lambda stepper, _: assert_equal_on_ranks(stepper.model)):
            run = folder / f"equal-{name}-{synchronised}"
            config = small_config(folder / "people", *settings)
            assert train(config, run, quiet=True, stop_at=2).step == 2


def evaluation_counts_every_person_once(folder: Path) -> None:
    config = small_config(folder / "people", "eval.batch_size=2")
    everybody = load_people(config.data, config.model.skeleton_table, "train")
    model = build_model(config.model)
    seen: list[int] = []

    def predict_batch(_: nn.Module, batch: Any, **__: Any) -> tuple[Tensor, Tensor]:
        seen.extend(batch.indices.tolist())
        xy = batch.indices.float()[:, None, None].expand(-1, 17, 2)
        return xy, torch.ones(len(batch), 17)

    for count in (1, 2, 3, 7):
        people = replace(everybody, people=everybody.people[:count])
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "predict_batch", predict_batch)
            found = runner._predict(model, people, config, CPU, "fp32", None, None)
        assert sorted(i for share in gathered(seen) for i in share) == list(range(count))
        assert (found[:, :, 0] == torch.arange(count)[:, None].numpy()).all()
        first, second = gathered(runner.evaluate(model, people, config).predictions)
        assert first == second and len(first) <= count


def eval_command_says_and_writes_it_once(folder: Path) -> None:
    result = eval_command(
        folder / "whole",
        data=None,
        boxes=None,
        profile=None,
        flip=None,
        precision="fp32",
        settings=[],
        out=folder / "eval",
        device="cpu",
    )
    assert result.metrics and len({json.dumps(m) for m in gathered(result.metrics)}) == 1
    assert (folder / "eval" / "metrics.json").is_file()


def three_epochs(folder: Path, strategy: str = "first-order") -> Config:
    """The learning rate falls with the third."""
    schedule = ["train.lr_schedule=step", "train.lr_steps=[2]", "train.epochs=3"]
    return small_config(folder / "people", *schedule, f"search.strategy={strategy}")


def agreed(folder: Path, name: str, strategy: str = "first-order", **kwargs: Any) -> TrainResult:
    """Train; both ranks must make the same steps."""
    result = train(three_epochs(folder, strategy), folder / name, quiet=True, **kwargs)
    assert len(set(gathered(result.step))) == 1
    return result


def a_run_of_two_ranks(folder: Path) -> None:
    """For the comparisons in test_processes.py."""
    agreed(folder, "whole")
    config = small_config(folder / "people", "train.batch_size=8", "train.epochs=1")
    train(config, folder / "two", quiet=True)


def a_signal_to_one_rank_stops_both_after_the_same_step(folder: Path) -> None:
    own = distributed.rank()

    def interrupt(_: Stepper, step: int) -> None:
        if own == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with after_each_step(interrupt):
        result = agreed(folder, "signalled")
    assert result.step == 4 and result.stopped_by == ("SIGTERM" if own else ANOTHER_RANK)
    if not own:
        assert "step-00000004" in list_checkpoints(folder / "signalled")[-1].name
        shutil.copytree(folder / "signalled", folder / "two-then-one")


def a_signal_to_one_rank_ends_the_evaluation_of_both(folder: Path) -> None:
    """Of the run above, which goes on and then ends."""
    own, real = distributed.rank(), training.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if own == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", interrupted)
        result = agreed(folder, "signalled", resume=True)
    assert result.stopped_by == ("SIGTERM" if own else ANOTHER_RANK)
    assert not result.metrics
    assert agreed(folder, "signalled", resume=True).stopped_by is None


def one_rank_goes_on_as_two(folder: Path) -> None:
    """Resumes what test_processes.py began with one process, in the middle of an epoch."""
    with batches_seen() as seen:
        result = agreed(folder, "one-then-two", "sync", resume=True)
    assert result.stopped_by is None
    shares = gathered(seen)
    if not distributed.rank():
        (folder / "seen-by-two.json").write_text(json.dumps(shares))


def broken_samples_of_both_ranks_are_counted(folder: Path) -> None:
    real, broken = SampleMaker.make, 0

    def make(self: SampleMaker, index: int, epoch: int) -> Any:
        nonlocal broken
        if self.augment is not None and index < 6:
            broken += 1
            raise PnfsError(f"person {index} is broken")
        return real(self, index, epoch)

    config = small_config(
        folder / "people", "train.epochs=1", "train.max_skipped_fraction=1", "eval.flip=false"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleMaker, "make", make)
        train(config, folder / "broken", quiet=True)
    counts = gathered(broken)
    assert all(counts), counts  # each rank met some
    assert rows_of(folder / "broken", "train")[-1]["skipped_samples"] == sum(counts)


def a_full_disk_is_told_on_both_ranks(folder: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if not distributed.rank():
            patch.setattr(statefile, "save_file", full)
        with pytest.raises(PnfsError, match=r"cannot be written \(No space left on device\)"):
            agreed(folder, "full")
    assert not list_checkpoints(folder / "full")


def an_error_is_told_by_one_rank(folder: Path) -> None:
    """Of the command line, of what rank 0 looks at for all, of what each reads for itself."""
    own = distributed.rank()
    file, absent = folder / f"three-epochs-{own}.yaml", folder / "absent"
    file.write_text(dump_config(three_epochs(folder)))
    for arguments, message in (
        (["train", "--resume", "--overwrite"], "exclude each other"),
        (["train", "--device", "cuda:7"], "CUDA devices are visible"),
        (["train", "--preset", "tinny"], "did you mean 'tiny'"),
        (["train", "--config", file, "--out", folder / "whole"], "not empty"),
        (["train", "--data", f"coco={absent}", "--out", folder / "no-data"], "no such folder"),
        (
            ["train", "--config", file, "--architecture", absent, "--out", folder / "new"],
            "cannot be read",
        ),
        (["eval", folder / "nothing"], "no such run folder or file"),
    ):
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as end:
            pnfs_main(list(map(str, arguments)))
        assert end.value.code == 2
        lines = shown.getvalue().splitlines()
        assert len(lines) == (own == 0), lines
        assert all(message in line for line in lines), lines

    def make() -> int:
        if own == 1:
            raise PnfsError("not on this disk")
        return own

    with pytest.raises(PnfsError, match="not on this disk") as error:
        distributed.together(make)
    assert error.value.rank == 1
    assert distributed.together(distributed.rank) == own


def a_rank_that_fails_takes_the_other_along(folder: Path) -> None:
    """The last check: it breaks the group."""
    own = distributed.rank()

    def fail(_: Stepper, step: int) -> None:
        if own == 1 and step == 2:
            raise PnfsError("rank 1 read a broken file")

    with after_each_step(fail):
        expected = "broken file" if own else "rank 0: another process of this run is gone"
        with pytest.raises(PnfsError, match=expected) as error:
            train(three_epochs(folder), folder / "failed", quiet=True)
    assert error.value.rank == own  # each tells its own line


CHECKS: dict[str, Callable[[Path], None]] = {
    **{
        f"equals_one_rank_{name}": lambda _, name=name: equals_one_rank(name)  # type: ignore[misc]
        for name in SEARCHES
    },
    **{
        check.__name__: check
        for check in (
            trained_runs_stay_equal_on_both_ranks,
            evaluation_counts_every_person_once,
            a_run_of_two_ranks,
            eval_command_says_and_writes_it_once,
            a_signal_to_one_rank_stops_both_after_the_same_step,
            a_signal_to_one_rank_ends_the_evaluation_of_both,
            one_rank_goes_on_as_two,
            broken_samples_of_both_ranks_are_counted,
            a_full_disk_is_told_on_both_ranks,
            an_error_is_told_by_one_rank,
            a_rank_that_fails_takes_the_other_along,
        )
    },
}


def main(folder: Path) -> None:
    passed: list[str] = []
    with distributed.group(CPU):
        own = distributed.rank()
        try:
            for name, check in CHECKS.items():
                started = time.monotonic()
                check(folder)
                passed.append(name)
                print(f"rank {own}: {name}: {time.monotonic() - started:.1f} s", flush=True)
        except BaseException:
            (folder / f"failed-{own}.txt").write_text(f"{name}\n{traceback.format_exc()}")
            raise
        finally:
            (folder / f"passed-{own}.json").write_text(json.dumps(passed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
